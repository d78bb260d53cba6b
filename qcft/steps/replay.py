"""Replay rows: answered by the model that a phase starts from, or chosen from data."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from qcft.models.load import free_bytes
from qcft.replay.generation import Generation
from qcft.replay.rows import make_replay
from qcft.steps.base import StepWork
from qcft.steps.needs import answered_at_once
from qcft.steps.step import Step


class ReplayWork(StepWork):
    """Does the `replay` steps, and what they need of the pools'."""

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
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
                source = self.steps[part["pool"]]
                place = held.enter_context(self.store.claim(source.id, source.inputs(), self.watch))
                load = partial(self.load, source)
                batch = answered_at_once(self.prepared, phase, free_bytes())[0]
                made = Generation(place, pool.rows, phase.replay, self.recipe.seed, encoder, load, self.watch, batch)
                answerer = " + ".join(filter(None, (source.weights, *source.under, source.adapter)))
                generations.append((made, answerer or self.prepared.model.digest, source.id))
            new = self.prepared.encoded(phase)
            return make_replay(phase, pools, new, encoder, generations, folder, self.watch)
