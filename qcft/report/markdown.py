"""report.md: the table, what it says, sample answers, and what is needed to repeat the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qcft.files import read_json, write_text
from qcft.recipe import Recipe
from qcft.report.cells import change_rows, conclusion, header, stage_rows
from qcft.report.drift import NOTE, drift_rows, drift_says
from qcft.report.similarity import similarity_rows

SAMPLES = 4


def write_report(folder: Path, recipe: Recipe, table: Mapping[str, Any], steps: Mapping[str, Path]) -> Path:
    """Write `folder/report.md` from a run's table and the folders of its done steps; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        f"# {recipe.name}\n",
        *(f"- {sentence}" for sentence in conclusion(table)),
        "\n## Stages and languages\n",
        markdown_table(header(table), stage_rows(table) + change_rows(table)),
        "\nHeld-out rows: mean NLL in nats per answer token (lower is better) and the share of answer tokens "
        "predicted right. `*` marks English; `!` marks an English loss whose 95% interval (paired bootstrap over "
        "rows) excludes zero. Compare stages of one precision only.\n",
        *_similarity(folder),
        *_drift(steps),
        *_mix(steps),
        *_samples(table, steps),
        "\n## Cost\n",
        _cost(steps),
        "\n## To repeat it\n",
        _versions(steps),
        f"\n```yaml\n{yaml.safe_dump(recipe.model_dump(mode='json'), sort_keys=False, allow_unicode=True)}```\n",
    ]
    path = folder / "report.md"
    write_text(path, "\n".join(parts))
    return path


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(_cell, titles)) + " |", "|" + "---|" * len(titles)]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows])


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")


def _similarity(folder: Path) -> list[str]:
    """What `qcft similarity` left beside the report."""
    found = read_json(folder / "similarity.json")
    if not found:
        return []
    return [
        "\n## How alike the phases' instructions are\n",
        markdown_table(*similarity_rows(found)),
        "",
        *found["says"],
    ]


def _drift(steps: Mapping[str, Path]) -> list[str]:
    parts = []
    for stage, place in steps.items():
        found = read_json(place / "drift.json")
        if found:
            parts += [
                f"\n## Drift from {found['from']} to {found['to']}\n",
                *(f"- {sentence}" for sentence in drift_says(found)),
                f"\n![drift]({stage.replace('/', '-')}.svg)\n",
                markdown_table(*drift_rows(found)),
                f"\n{NOTE}.",
            ]
    return parts


def _mix(steps: Mapping[str, Path]) -> list[str]:
    parts = []
    for stage, folder in steps.items():
        metrics = read_json(folder / "done.json")["metrics"]
        mix = metrics.get("mix")
        if not mix:
            continue
        fed = {entry["source"]: entry for entry in metrics["exposure"]}
        total = {key: sum(share[key] for share in mix) for key in ("rows", "tokens")}
        rows = [
            [
                share["source"],
                f"{share['rows']} ({share['rows'] / total['rows']:.1%})",
                f"{share['tokens']:,} ({share['tokens'] / total['tokens']:.1%})",
                f"{share['answer_tokens']:,}",
                f"{fed[share['source']]['rows']:,} rows, {fed[share['source']]['answer_tokens']:,} answer tokens"
                if share["source"] in fed
                else "nothing",
                ", ".join(f"{n} {reason}" for reason, n in share["left_out"].items()) or "none",
            ]
            for share in mix
        ]
        parts += [
            f"\n## What {stage} trained on\n",
            markdown_table(["source", "rows", "tokens", "answer tokens", "trained, all epochs", "left out"], rows),
        ]
    return parts


def _samples(table: Mapping[str, Any], steps: Mapping[str, Path]) -> list[str]:
    answers = {s["stage"]: read_json(steps[s["stage"]] / "answers.json") for s in table["stages"]}
    first = next(iter(answers.values()), None)
    if not first:
        return []
    parts = ["\n## Greedy answers to held-out English prompts\n"]
    names = {s["stage"]: f"{s['name']}, {s['precision']}" for s in table["stages"]}
    for i, sample in enumerate(first[:SAMPLES]):
        parts.append(f"**{_line(sample['prompt'])}**\n")
        for stage, given in answers.items():
            cut = "" if given[i]["finished"] else " ..."
            parts.append(f"- {names[stage]}: {_line(given[i]['text'])}{cut}")
        parts.append("")
    return parts


def _line(text: str) -> str:
    """Text from a model as one line of Markdown that can't break the page."""
    flat = " ".join(text.split())
    return "".join("\\" + c if c in "\\`*_[]<>#|" else c for c in flat)


def _cost(steps: Mapping[str, Path]) -> str:
    rows = []
    for stage, folder in steps.items():
        record = read_json(folder / "done.json")
        peak = next((v for k, v in record["metrics"].items() if k.startswith("peak_")), 0)
        rows.append([stage, folder.name, f"{record['seconds']:.0f}", f"{peak / 2**30:.2f}"])
    return markdown_table(["stage", "step", "seconds", "peak memory of the process or GPU, GiB"], rows)


def _versions(steps: Mapping[str, Path]) -> str:
    found: dict[str, Any] = {}
    for folder in steps.values():
        found = (read_json(folder / "step.json") or {}).get("versions") or found
    return ", ".join(f"{name} {version}" for name, version in found.items())
