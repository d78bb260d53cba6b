"""Making replay rows: generated in chunks that a killed run goes on from, or chosen from a data set."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.data.encode import Encoder
from qcft.data.mix import shuffled, stable_seed
from qcft.data.rows import Message, Row
from qcft.errors import QcftError
from qcft.events import Watch
from qcft.files import write_text
from qcft.models.generate import Sampling, answer_prompts
from qcft.pipeline.prepare import Pool
from qcft.recipe import Replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "replay.jsonl"


def choose_rows(pool: Pool, needed: int, encoder: Encoder, seed: int, folder: Path) -> dict[str, Any]:
    """English replay: `needed` rows drawn from the pool as they are."""
    chosen: list[Row] = []
    left_out: Counter[str] = Counter(pool.left_out)
    for row in shuffled(pool.rows, f"{seed}:replay"):
        if len(chosen) == needed:
            break
        encoded = encoder.encode(row)
        if isinstance(encoded, str):
            left_out[encoded] += 1
        else:
            chosen.append(row)
    _check(len(chosen), needed, pool, left_out)
    _write(folder / FILE, [row.as_dict() for row in chosen])
    return {"rows": len(chosen), "pool": len(pool.rows), "reason": pool.reason, "left_out": dict(left_out)}


def generate_rows(
    model: PreTrainedModel,
    pool: Pool,
    needed: int,
    encoder: Encoder,
    replay: Replay,
    seed: int,
    folder: Path,
    watch: Watch,
) -> dict[str, Any]:
    """Generative replay: the model answers prompts of the pool, in a seeded order, until `needed` are usable.

    Prompts are taken in chunks of `replay.batch`, each with a seed of its own, and each finished chunk is
    kept, so that a killed run goes on at the next and comes to the same rows. Answers that are empty,
    were cut off or are too long to train are left out, and counted.
    """
    order = shuffled(pool.rows, f"{seed}:replay")
    accepted: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter(pool.left_out)
    chunks = folder / "chunks"
    chunks.mkdir(exist_ok=True)
    watch.progress("generating replay", 0, needed, "answers")
    for number, start in enumerate(range(0, len(order), replay.batch)):
        if len(accepted) >= needed:
            break
        rows = []
        for row in order[start : start + replay.batch]:
            prompt = encoder.prompt(row)
            if isinstance(prompt, str):
                left_out[prompt] += 1
            else:
                rows.append(row)
        answers = _chunk(model, rows, number, encoder, replay, seed, chunks, watch)
        for row, answer in zip(rows, answers, strict=True):
            reason, made = _judge(row, answer, encoder)
            if made is None:
                left_out[reason] += 1
            else:
                accepted.append(made.as_dict() | {"tokens": answer["tokens"]})
        out = sum(left_out.values()) - sum(pool.left_out.values())
        watch.progress("generating replay", min(len(accepted), needed), needed, "answers", out=f"{out} left out")
    _check(len(accepted), needed, pool, left_out)
    _write(folder / FILE, accepted[:needed])
    for file in chunks.iterdir():
        file.unlink()
    chunks.rmdir()
    return {
        "rows": needed,
        "pool": len(pool.rows),
        "reason": pool.reason,
        "left_out": dict(left_out),
        "mean_tokens": sum(row["tokens"] for row in accepted[:needed]) / max(1, needed),
    }


def read_rows(file: Path) -> list[Row]:
    """The rows of a replay file."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt, completion = (
            tuple(Message(m["role"], m["content"]) for m in record[part]) for part in ("prompt", "completion")
        )
        rows.append(Row(prompt, completion, record.get("id")))
    return rows


def _chunk(
    model: PreTrainedModel,
    rows: list[Row],
    number: int,
    encoder: Encoder,
    replay: Replay,
    seed: int,
    chunks: Path,
    watch: Watch,
) -> list[dict[str, Any]]:
    """The answers to one chunk of prompts, read back where they were made before."""
    file = chunks / f"{number:06d}.json"
    if file.is_file():
        return list(json.loads(file.read_text(encoding="utf-8")))
    sampling = Sampling(replay.max_new_tokens, replay.temperature, replay.top_p, stable_seed(f"{seed}:chunk:{number}"))
    prompts = [encoder.prompt_ids(row) for row in rows]
    made = answer_prompts(model, encoder.tokenizer, prompts, encoder.end_ids, sampling, replay.batch, watch)
    answers = [{"text": a.text, "tokens": a.tokens, "finished": a.finished} for a in made]
    write_text(file, json.dumps(answers, ensure_ascii=False))
    return answers


def _judge(row: Row, answer: dict[str, Any], encoder: Encoder) -> tuple[str, Row | None]:
    """The replay row an answer makes, or the reason why it makes none."""
    if not answer["text"]:
        return "empty answer", None
    if not answer["finished"]:
        return "unfinished answer", None
    made = Row(row.prompt, (Message("assistant", answer["text"]),), row.id)
    encoded = encoder.encode(made)
    return (encoded, None) if isinstance(encoded, str) else ("", made)


def _check(have: int, needed: int, pool: Pool, left_out: Counter[str]) -> None:
    if have < needed:
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common())
        raise QcftError(
            f"replay: {needed - have} of {needed} rows are missing: {len(pool.rows)} prompts gave {have} ({reasons})",
            "lower replay.ratio, raise replay.max_new_tokens, or name more prompts in replay.data",
        )


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
