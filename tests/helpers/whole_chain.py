"""One family of models through the whole chain: loaded, scored, asked, trained in two phases, merged and exported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

CHECKS = ("loads", "scores", "generates", "packs", "pads", "two phases", "merge", "export", "prefix")


def one_family(name: str, place: Path) -> dict[str, Any]:
    """What comes of one family."""
    import torch

    import qcft
    from qcft.events import Note, StepBegun, Watch
    from qcft.models.load import load_model, load_tokenizer, quiet_libraries
    from qcft.recipe import Model, recipe_from
    from qcft.training.agreement import compare
    from tests.helpers.families import make_family
    from tests.helpers.tiny import make_color_data, make_recipe

    torch.set_num_threads(1)
    os.environ["QCFT_CACHE"] = str(place / "cache")
    folder = make_family(name, place / "model")
    quiet_libraries()
    found: dict[str, Any] = {}
    recipe = make_recipe(folder, make_color_data(place / "data"))
    recipe["phases"][1]["freeze"] = "first:2"
    recipe["phases"][0]["train"]["epochs"] = 1
    recipe["merge"] = {"refuse_below": None}
    events: list[Any] = []
    try:
        run = qcft.run(recipe_from(recipe), runs=place / "runs", listener=events.append)
    except qcft.QcftError as error:
        begun = any(isinstance(event, StepBegun) for event in events)
        kind = "error" if begun or not isinstance(error, qcft.InputError) else "refused"
        return {kind: f"{error.message} ({error.hint})"[:300]}
    found["two phases"] = "yes"
    notes = [event.text for event in events if isinstance(event, Note) and ": rows are" in event.text]
    found["prefix"] = "stored" if run.stages["phase2"].metrics["prefix_cache"] else "plain"
    named = Model(name=str(folder))
    tokenizer, model = load_tokenizer(folder, named), load_model(folder, named)
    found["loads"] = "yes"
    found["scores"] = _scores(model, tokenizer)
    found["generates"] = _generates(model, tokenizer)
    agreed = compare(model, tokenizer)
    found["packs"], found["pads"] = ("yes" if agreed.packed else "no"), ("yes" if agreed.padded else "no")
    if not agreed.packed:
        found["note"] = notes[0][:200] if notes else f"UNSAID {agreed.why}"
    del model
    adapter, merged = run.stages["phase1"].folder / "adapter", run.stages["merged"].folder / "model"
    found["merge"] = _merge(folder, adapter, merged)
    found["export"] = _export(run, place, Watch())
    return found


def _ids(tokenizer: Any) -> list[int]:
    return list(tokenizer("The baker asks the miller how much flour is left at the old mill.")["input_ids"])[:30]


def _scores(model: Any, tokenizer: Any) -> str:
    """NLLs of two rows in one batch, beside each alone by plain arithmetic."""
    import torch

    from qcft.data.encode import IGNORED, EncodedRow
    from qcft.events import Watch
    from qcft.measure.score import score_rows

    ids = _ids(tokenizer)
    rows = [EncodedRow(one, [IGNORED] * 5 + one[5:]) for one in (ids, ids[::-1][:20])]
    scores = score_rows(model, rows, Watch(), "scores")
    off = 0.0
    with torch.no_grad():
        for row, score in zip(rows, scores, strict=True):
            logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, 4:-1].float()
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(row.input_ids[5:]), reduction="sum")
            off = max(off, abs(float(nll) - score.nll) / score.tokens)
    return "yes" if off < 0.02 else f"off {off:.3f}"


def _generates(model: Any, tokenizer: Any) -> str:
    """Greedy answers to two prompts together, beside the library's own to each alone; a tie may fall either way."""
    import torch

    from qcft.events import Watch
    from qcft.models.generate import Sampling, answer_prompts
    from qcft.models.load import evaluating

    ids, ends = _ids(tokenizer), [2]
    prompts = [ids[:12], ids[5:25]]
    answers = answer_prompts(model, tokenizer, prompts, ends, Sampling(8), 2, Watch())
    for prompt, answer in zip(prompts, answers, strict=True):
        with evaluating(model):
            begin = torch.tensor([prompt])
            own = model.generate(
                input_ids=begin, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        made = own.sequences[0, len(prompt) :].tolist()
        text = tokenizer.decode([t for t in made if t not in ends], skip_special_tokens=True).strip()
        nearest = min(float(one[0].float().topk(2).values.diff().abs()) for one in own.logits)
        if answer.text != text and nearest > 0.05:
            return f"{answer.text!r}"
    return "yes"


def _logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits.float()


def _merge(base: Path, adapter: Path, merged: Path) -> str:
    """The merged folder, in fp32, beside PEFT's own merge in fp32; what is not of the language model, byte by byte."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from qcft.models.meta import auto_class, read_config
    from qcft.models.tensors import stored_weights
    from qcft.recipe import Model

    def load(folder: Path) -> Any:
        config = read_config(folder, Model(name=str(folder)))
        return auto_class(config).from_pretrained(folder, config=config, dtype=torch.float32)

    if set(stored_weights(base)) != set(stored_weights(merged)):
        return "names differ"
    ids = _ids(AutoTokenizer.from_pretrained(base))
    theirs = PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload()
    ours, plain = load(merged), load(base)
    wanted, got, before = (_logits(model, ids) for model in (theirs, ours, plain))
    moved, off = (wanted - before).abs().mean(), (wanted - got).abs().mean()
    return "yes" if off < 0.05 * moved else f"off {float(off / moved):.2f}"


def _export(run: Any, place: Path, watch: Any) -> str:
    """The exported folder as transformers alone loads it, beside the step's own model."""
    import torch
    from transformers import AutoTokenizer

    from qcft import deliveries
    from qcft.models.meta import auto_class, read_config
    from qcft.recipe import Model

    made = deliveries.merge(run.name, place / "out", place / "runs", watch)
    folder = place / "runs" / run.name / made["stage"] / "model"

    def load(one: Path) -> Any:
        config = read_config(one, Model(name=str(one)))
        return auto_class(config).from_pretrained(one, config=config, dtype=torch.bfloat16)

    ids = _ids(AutoTokenizer.from_pretrained(place / "out"))
    return "yes" if torch.equal(_logits(load(place / "out"), ids), _logits(load(folder), ids)) else "differs"
