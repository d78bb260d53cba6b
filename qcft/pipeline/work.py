"""What each kind of step does, from its parents' files to its own. Returns the step's metrics."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qcft.data.encode import Encoder
from qcft.events import Watch
from qcft.files import read_json, read_sealed, write_json, write_sealed
from qcft.measure.distance import compare, predictions
from qcft.measure.score import RowScore, score_rows
from qcft.measure.stats import accuracy, kept, mean_nll
from qcft.models.adapters import combine_live, load_stack, set_scale
from qcft.models.deltas import CONFIG, WEIGHTS
from qcft.models.generate import Sampling, answer_prompts
from qcft.models.load import free_memory, load_model
from qcft.models.merge import Target, merge_adapters
from qcft.pipeline.abilities import Abilities
from qcft.pipeline.generation import Generation
from qcft.pipeline.layers import change_since, snr_of, summed_changes
from qcft.pipeline.phase import PhaseTraining
from qcft.pipeline.places import StepWork
from qcft.pipeline.pools import ENGLISH
from qcft.pipeline.prepare import Prepared
from qcft.pipeline.replay import make_replay
from qcft.plan import Step
from qcft.store import Store

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Worker(StepWork):
    """Does the steps of one prepared recipe."""

    def __init__(self, prepared: Prepared, store: Store, watch: Watch) -> None:
        super().__init__(prepared, store, watch)
        self.abilities = Abilities(prepared, self.weights, self.adapter, watch)

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Do one step in its folder, going on with what a killed process left there."""
        bodies = {
            "probe": self.probe,
            "train": PhaseTraining(self.prepared, self.store, self.watch).train,
            "adapter": self.take_in,
            "merge": self.merge,
            "replay": self.replay,
            "kept": self.kept,
            "layers": self.layers,
            "dial": self.dial,
            "suite": self.abilities.work,
        }
        if step.kind != "suite":
            self.abilities.drop()
        try:
            return bodies[step.kind](step, folder)
        finally:
            free_memory()

    def probe(self, step: Step, folder: Path) -> dict[str, Any]:
        """Score every held-out group and answer the English prompts."""
        return self._measure(self.load(step, quantize=step.settings["quantize"]), step, step.title, folder)

    def dial(self, step: Step, folder: Path) -> dict[str, Any]:
        """Measure the phase's delta at each scale, in one load; what a killed process measured is kept."""
        model = cast("PeftModel", self.load(step, quantize=step.settings["quantize"]))
        settings, points = step.settings, []
        for scale in settings["scales"]:
            place = folder / f"{scale:g}"
            point = read_sealed(place / "point.json")
            if point is None:
                place.mkdir(exist_ok=True)
                if settings.get("method"):
                    combine_live(
                        model, scale, settings["method"], settings["density"], settings["seed"], len(step.under) + 1
                    )
                else:
                    set_scale(model, scale)
                measured = self._measure(cast("PreTrainedModel", model), step, f"{step.title} at {scale:g}", place)
                point = {"scale": scale, **measured}
                write_sealed(place / "point.json", point)
            points.append(point)
        return {"points": points}

    def _measure(self, model: PreTrainedModel, step: Step, label: str, folder: Path) -> dict[str, Any]:
        scores: dict[str, list[dict[str, Any]]] = {}
        groups: dict[str, Any] = {}
        for group in self.prepared.groups:
            encoded = self.prepared.held_out(group)
            rows = score_rows(model, encoded.encoded, self.watch, f"{label}: {group.name}")
            scores[group.name] = [{"key": r.key, **asdict(s)} for r, s in zip(encoded.rows, rows, strict=True)]
            groups[group.name] = {
                "phase": group.phase,
                "lang": group.lang,
                "nll": mean_nll(rows),
                "accuracy": accuracy(rows),
                "rows": len(rows),
                "answer_tokens": sum(s.tokens for s in rows),
                "left_out": encoded.left_out,
            }
        answers = self._answers(model, step)
        write_json(folder / "scores.json", scores)
        write_json(folder / "answers.json", answers)
        return {"groups": groups, "answers": _summary(answers)}

    def take_in(self, step: Step, folder: Path) -> dict[str, Any]:
        """Copy an adapter made elsewhere into the step."""
        phase = self.phase(step)
        assert phase.adapter is not None
        (folder / "adapter").mkdir(exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(Path(os.path.expanduser(phase.adapter)) / name, folder / "adapter" / name)
        return {"adapter": phase.adapter}

    def merge(self, step: Step, folder: Path) -> dict[str, Any]:
        """Merge an adapter onto the 16-bit weights it was trained on."""
        assert step.adapter is not None
        work, done = folder / "model.partial", folder / "model"
        for place in (work, done):
            shutil.rmtree(place, ignore_errors=True)
        work.mkdir()
        settings = step.settings
        target = Target(
            settings.get("dtype"), settings.get("base") == "dequantised", self.recipe.model.trust_remote_code
        )
        stack: list[Path | tuple[Path, float]] = [*map(self.adapter, step.under)]
        stack.append((self.adapter(step.adapter), settings.get("scale", 1.0)))
        if settings.get("method"):
            stack = [self._combined(step, folder)]
        changed = merge_adapters(self.weights(step), stack, work, self.watch, target)
        self.prepared.tokenizer.save_pretrained(work)  # with the chat template that was trained
        work.rename(done)
        return {"merged_weights": changed}

    def replay(self, step: Step, folder: Path) -> dict[str, Any]:
        """Make the replay rows: answered by the model the phase starts from, or chosen from data."""
        phase = self.phase(step)
        assert phase.replay is not None
        pools, encoder = self.prepared.pools[phase.name], self.prepared.replay_encoder(phase)
        with ExitStack() as held:
            generations: list[tuple[Generation, str, str] | None] = []
            for pool, part in zip(pools, step.settings["parts"], strict=True):
                self.watch.note(f"replay ({part['kind']}): {pool.reason}")
                if part["pool"] is None:
                    generations.append(None)
                    continue
                source = self.prepared.plan.pools[part["pool"]]
                place = held.enter_context(self.store.claim(source.id, source.inputs(), self.watch))
                load = partial(self.load, source)
                made = Generation(place, pool.rows, phase.replay, self.recipe.seed, encoder, load, self.watch)
                answerer = " + ".join(filter(None, (source.weights, *source.under, source.adapter)))
                generations.append((made, answerer or self.prepared.model.digest, source.id))
            new = self.prepared.encoded(phase)
            return make_replay(phase, pools, new, encoder, generations, folder, self.watch)

    def kept(self, step: Step, folder: Path) -> dict[str, Any]:
        """Compare base, live adapters and merged model on the held-out rows of the phases they hold."""
        base, live, merged = (read_json(self.store.folder(parent) / "scores.json") for parent in step.parents)
        groups = self.prepared.groups
        # An adapter made elsewhere has no rows of its own here: English stands for them.
        phases = step.settings["phases"]
        own = [g for g in groups if g.phase in phases] or [g for g in groups if g.lang == ENGLISH]
        a, b, c = ([_score(s) for g in own for s in scores[g.name]] for scores in (base, live, merged))
        rows = [row for group in own for row in self.prepared.held_out(group).encoded]
        steps = {one.id: one for one in self.prepared.plan.steps}
        live_step, merged_step = (steps[parent] for parent in step.parents[1:])
        seen = predictions(self.load(live_step), rows, self.watch, f"{step.title}: live")
        free_memory()
        model = self.load(merged_step, quantize=merged_step.settings["quantize"])
        distance = compare(model, rows, seen, self.watch, f"{step.title}: merged")
        return {"groups": [g.name for g in own], **asdict(kept(a, b, c)), **asdict(distance)}

    def layers(self, step: Step, folder: Path) -> dict[str, Any]:
        """Measure what a freeze spec goes by, module by module."""
        prepared = self.prepared
        measure = step.settings["measure"]
        if measure == "snr":
            values = snr_of(self.weights(step), self.weights_digest(step), prepared.meta_model, self.watch)
        elif step.parents:
            values = summed_changes(self.store.folder(parent) / "adapter" for parent in step.parents)
        else:
            values = change_since(prepared.base_folder, prepared.folder, prepared.meta_model, self.watch)
        write_json(folder / "layers.json", {"measure": measure, "modules": values})
        return {"measure": measure, "modules": len(values)}

    def _combined(self, step: Step, folder: Path) -> Path:
        """The stack's adapters combined by one of PEFT's methods, saved in the step."""
        settings = step.settings
        model = load_stack(
            load_model(self.weights(step), self.recipe.model),
            [self.adapter(one) for one in (*step.under, step.adapter or "")],
        )
        name = combine_live(
            model, settings["scale"], settings["method"], settings["density"], self.recipe.seed, len(step.under) + 1
        )
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        return folder / name

    def _answers(self, model: PreTrainedModel, step: Step) -> list[dict[str, Any]]:
        prompts = self.prepared.english_prompts()
        if not prompts:
            return []
        group = prompts[0][0]
        encoder = Encoder(self.prepared.tokenizer, group.system, group.max_length, group.long_rows)
        answers = answer_prompts(
            model,
            self.prepared.tokenizer,
            [encoder.prompt_ids(row) for _, row in prompts],
            encoder.end_ids,
            Sampling(self.recipe.answers.max_new_tokens),
            batch=16,
            watch=self.watch,
            label=f"{step.title}: English answers",
        )
        return [
            {"key": row.key, "prompt": row.prompt[-1].content, **asdict(answer)}
            for (_, row), answer in zip(prompts, answers, strict=True)
        ]


def _summary(answers: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not answers:
        return None
    return {
        "rows": len(answers),
        "mean_tokens": sum(a["tokens"] for a in answers) / len(answers),
        "finished": sum(a["finished"] for a in answers) / len(answers),
    }


def _score(entry: dict[str, Any]) -> RowScore:
    return RowScore(entry["nll"], entry["tokens"], entry["correct"])
