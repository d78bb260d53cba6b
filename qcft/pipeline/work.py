"""What each kind of step does, from its parents' files to its own. Returns the step's metrics."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qcft.data.encode import EncodedSet, Encoder
from qcft.data.mix import mixed_order
from qcft.data.rows import Row
from qcft.errors import QcftError
from qcft.events import Mixed, SourceShare, Watch
from qcft.files import file_digest, read_json, read_sealed, write_json, write_sealed
from qcft.measure.distance import compare, predictions
from qcft.measure.score import RowScore, score_rows
from qcft.measure.stats import accuracy, kept, mean_nll
from qcft.models.adapters import add_lora_over, combine_live, load_stack, set_scale
from qcft.models.deltas import CONFIG, WEIGHTS
from qcft.models.generate import Sampling, answer_prompts
from qcft.models.load import free_memory, load_model
from qcft.models.merge import Target, merge_adapters
from qcft.pipeline.generation import Generation
from qcft.pipeline.layers import change_since, model_digest, snr_of, summed_changes
from qcft.pipeline.pools import ENGLISH
from qcft.pipeline.prefix import open_prefix
from qcft.pipeline.prepare import Prepared
from qcft.pipeline.probing import english_rows
from qcft.pipeline.replay import make_replay, read_replay
from qcft.plan import Step
from qcft.recipe import Phase
from qcft.store import Store

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qcft.training.batches import Batches
    from qcft.training.passes import Fit


class Worker:
    """Does the steps of one prepared recipe."""

    def __init__(self, prepared: Prepared, store: Store, watch: Watch) -> None:
        self.prepared = prepared
        self.recipe = prepared.recipe
        self.store = store
        self.watch = watch

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Do one step in its folder, going on with what a killed process left there."""
        bodies = {
            "probe": self.probe,
            "train": self.train,
            "adapter": self.take_in,
            "merge": self.merge,
            "replay": self.replay,
            "kept": self.kept,
            "layers": self.layers,
            "dial": self.dial,
        }
        try:
            return bodies[step.kind](step, folder)
        finally:
            free_memory()

    def probe(self, step: Step, folder: Path) -> dict[str, Any]:
        """Score every held-out group and answer the English prompts."""
        return self._measure(self._load(step, quantize=step.settings["quantize"]), step, step.title, folder)

    def dial(self, step: Step, folder: Path) -> dict[str, Any]:
        """Measure the phase's delta at each scale, in one load; what a killed process measured is kept."""
        model = cast("PeftModel", self._load(step, quantize=step.settings["quantize"]))
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

    def train(self, step: Step, folder: Path) -> dict[str, Any]:
        """Train a phase's adapter on its rows and its replay."""
        from qcft.layers import adapted_modules, decoder_layers, frozen_in_words, frozen_whole, lowest_adapted
        from qcft.training.attention import attend_by_rows
        from qcft.training.batches import make_batches
        from qcft.training.probe import lay_out
        from qcft.training.sft import Shortcuts, train_adapter

        phase = self._phase(step)
        replay = self._replay_sets(phase, step)
        shares = self._shares(phase, replay)
        rows = [
            replace(tokens, source=share.source, name=row.name)
            for share, encoded in shares
            for row, tokens in zip(encoded.rows, encoded.encoded, strict=True)
        ]
        extra = sum(len(encoded.rows) for encoded in replay.values())
        seed = self.recipe.seed
        batches = make_batches(
            rows, lambda epoch: mixed_order(len(rows) - extra, extra, f"{seed}:{epoch}"), phase.train
        )
        targets = self.recipe.lora.targets
        modules = adapted_modules(self.prepared.meta_model, targets, phase.freeze, seed, self._measured(step))
        frozen = frozen_in_words(self.prepared.meta_model, targets, modules)
        mixed = Mixed(
            phase.name,
            tuple(share for share, _ in shares),
            batches.steps,
            batches.rows / batches.steps,
            phase.freeze if phase.freeze == "none" else f"{phase.freeze} ({frozen})",
        )
        self.watch.tell(mixed)
        model = self._load(step)
        free_memory()  # what loading left behind
        _seed_everything(seed)
        under = [self._adapter(one) for one in step.under]
        if step.adapter is not None:  # start: continue
            adapted = load_stack(model, [*under, self._adapter(step.adapter)], modules)
        else:
            adapted = add_lora_over(model, under, modules, self.recipe.lora)
        below = lowest_adapted(model, modules)
        probing = None
        if self.recipe.forgetting is not None and (english := english_rows(self.prepared, phase)):
            probing = lay_out(self.recipe.forgetting, english, batches, below / decoder_layers(model)[1])
            if probing is None:
                self.watch.note("no live probe: even a small one would cost over 5% of so short a training")
        by_rows = attend_by_rows(model, max(len(row.input_ids) for row in rows))
        weights: dict[str, Any] = {"weights": self._weights_digest(step), "quantize": self.recipe.model.quantize}
        if under:
            weights["under"] = [file_digest(folder / WEIGHTS) for folder in under]
        prefix = None
        if step.adapter is None:
            seen = [*rows, *(probing.rows if probing else ())]
            prefix = open_prefix(model, below, seen, batches.rows, weights, phase.train, self.store, self.watch)
        elif phase.train.prefix_cache is True:
            self.watch.note("no prefix cache: an adapter that goes on has a part in the frozen layers too")
        trained = train_adapter(
            adapted,
            self.prepared.tokenizer,
            batches,
            phase.train,
            seed,
            folder,
            self.watch,
            f"training {phase.name}",
            Shortcuts(below, by_rows, prefix),
            probing,
            self._fit(phase, modules, batches, by_rows, prefix is not None),
        )
        return {
            **asdict(trained),
            "mix": [asdict(share) for share in mixed.shares],
            "adapted_modules": len(modules),
            "frozen_layers": frozen_whole(model, modules),
            "prefix_cache": prefix is not None,
            "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        }

    def _fit(self, phase: Phase, modules: list[str], batches: Batches, by_rows: bool, cut: bool) -> Fit | None:
        """How passes are made to fit, where that is left to qcft: tried out on shapes, with the weights loaded."""
        from qcft.models.load import device, free_bytes
        from qcft.training.footprint import Shape
        from qcft.training.memory import plan_training

        train = phase.train
        if train.micro_batch != "auto" and (train.gradient_checkpointing != "auto" or device() == "cpu"):
            return None
        shape = Shape(tuple(modules), self.recipe.lora, self.recipe.model.quantize, False, cut, device())
        meta = self.prepared.meta_model
        planned = plan_training(meta, shape, batches, train, by_rows, free_bytes(), loaded=True)
        if planned.fit.limit:
            self.watch.note(f"{phase.name}: passes of at most {planned.fit.limit} tokens, to fit into memory")
        return planned.fit

    def take_in(self, step: Step, folder: Path) -> dict[str, Any]:
        """Copy an adapter made elsewhere into the step."""
        phase = self._phase(step)
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
        stack: list[Path | tuple[Path, float]] = [*map(self._adapter, step.under)]
        stack.append((self._adapter(step.adapter), settings.get("scale", 1.0)))
        if settings.get("method"):
            stack = [self._combined(step, folder)]
        changed = merge_adapters(self._weights(step), stack, work, self.watch, target)
        self.prepared.tokenizer.save_pretrained(work)  # with the chat template that was trained
        work.rename(done)
        return {"merged_weights": changed}

    def replay(self, step: Step, folder: Path) -> dict[str, Any]:
        """Make the replay rows: answered by the model the phase starts from, or chosen from data."""
        phase = self._phase(step)
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
                load = partial(self._load, source)
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
        seen = predictions(self._load(live_step), rows, self.watch, f"{step.title}: live")
        free_memory()
        model = self._load(merged_step, quantize=merged_step.settings["quantize"])
        distance = compare(model, rows, seen, self.watch, f"{step.title}: merged")
        return {"groups": [g.name for g in own], **asdict(kept(a, b, c)), **asdict(distance)}

    def layers(self, step: Step, folder: Path) -> dict[str, Any]:
        """Measure what a freeze spec goes by, module by module."""
        prepared = self.prepared
        measure = step.settings["measure"]
        if measure == "snr":
            values = snr_of(self._weights(step), self._weights_digest(step), prepared.meta_model, self.watch)
        elif step.parents:
            values = summed_changes(self.store.folder(parent) / "adapter" for parent in step.parents)
        else:
            values = change_since(prepared.base_folder, prepared.folder, prepared.meta_model, self.watch)
        write_json(folder / "layers.json", {"measure": measure, "modules": values})
        return {"measure": measure, "modules": len(values)}

    def _measured(self, step: Step) -> dict[str, float] | None:
        for parent in step.parents:
            found = read_json(self.store.folder(parent) / "layers.json")
            if found is not None:
                return dict(found["modules"])
        return None

    def _weights_digest(self, step: Step) -> str:
        return self.prepared.model.digest if step.weights is None else model_digest(self.store, step.weights)

    def _load(self, step: Step, quantize: str | None = None) -> PreTrainedModel:
        model = load_model(self._weights(step), self.recipe.model, quantize)
        if step.adapter is not None and step.kind != "train":
            return load_stack(model, [self._adapter(one) for one in (*step.under, step.adapter)])
        return model

    def _combined(self, step: Step, folder: Path) -> Path:
        """The stack's adapters combined by one of PEFT's methods, saved in the step."""
        settings = step.settings
        model = load_stack(
            load_model(self._weights(step), self.recipe.model),
            [self._adapter(one) for one in (*step.under, step.adapter or "")],
        )
        name = combine_live(
            model, settings["scale"], settings["method"], settings["density"], self.recipe.seed, len(step.under) + 1
        )
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        return folder / name

    def _adapter(self, step: str) -> Path:
        return self.store.folder(step) / "adapter"

    def _weights(self, step: Step) -> Path:
        return self.prepared.folder if step.weights is None else self.store.folder(step.weights) / "model"

    def _phase(self, step: Step) -> Phase:
        assert step.phase is not None
        return self.recipe.phase(step.phase)

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

    def _replay_sets(self, phase: Phase, step: Step) -> dict[str, EncodedSet]:
        """The replay rows as tokens, kind by kind."""
        made = [parent for parent in step.parents if parent.startswith("replay-")]
        if not made:
            return {}
        encoder = self.prepared.replay_encoder(phase)
        by_kind: dict[str, list[Row]] = {}
        for row, kind in read_replay(self.store.folder(made[0]) / "replay.jsonl"):
            by_kind.setdefault(f"replay ({kind})", []).append(row)
        sets = {name: encoder.encode_all(rows) for name, rows in by_kind.items()}
        for name, encoded in sets.items():
            if encoded.left_out:
                raise QcftError(f"{name}: {encoded.left_out} cannot train", "please report this")
        return sets

    def _shares(self, phase: Phase, replay: dict[str, EncodedSet]) -> list[tuple[SourceShare, EncodedSet]]:
        """What the phase trains on, source by source."""
        shares = []
        for source, encoded in zip(self.prepared.sources[phase.name], self.prepared.encoded(phase), strict=True):
            name = f"{source.name} ({source.lang})" if source.lang != "?" else source.name
            left_out = {**source.left_out}
            for reason, n in encoded.left_out.items():
                left_out[reason] = left_out.get(reason, 0) + n
            shares.append((_share(name, encoded, left_out), encoded))
        return shares + [(_share(name, encoded, {}), encoded) for name, encoded in replay.items()]


def _share(name: str, encoded: EncodedSet, left_out: dict[str, int]) -> SourceShare:
    return SourceShare(name, len(encoded.rows), encoded.tokens, encoded.answer_tokens, left_out)


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


def _seed_everything(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)
