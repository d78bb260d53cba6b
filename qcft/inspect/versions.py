"""The models that a run holds, each identified by the steps that made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qcft.errors import InputError, nearest
from qcft.models.deltas import read_adapter
from qcft.store import NamedRun, Store
from qcft.store.opened import run_again


@dataclass(frozen=True)
class Version:
    """A model of a run: the merge whose weights it has (None: the unmodified model), the adapters live on them."""

    name: str
    weights: str | None
    stack: tuple[str, ...]
    trained: str | None = None  # the step that trained its last adapter

    @property
    def steps(self) -> tuple[str, ...]:
        """All steps that made it."""
        return (*((self.weights,) if self.weights else ()), *self.stack)


def version_of(run: NamedRun, stage: str, store: Store) -> Version:
    """The model of a run at a stage. Raises InputError."""
    if stage == "base":
        return Version("base", None, ())
    known = [name for name, step in run.stages.items() if step.split("-")[0] in {"train", "adapter", "merge"}]
    if stage not in known:
        raise InputError(
            f"the run {run.name!r} has no stage {stage!r}", nearest(stage, known) + f"it has base, {', '.join(known)}"
        )
    step = run.stages[stage]
    if store.open(step) is None:
        raise InputError(f"{stage} of the run {run.name!r} is not done", f"run it first: {run_again(run.folder)}")
    if step.startswith("merge-"):
        return Version(stage, step, ())
    inputs = store.opened(step).inputs
    return Version(stage, inputs["weights"], (*inputs.get("under", ()), step), step)


def start_of(run: NamedRun, to: Version, store: Store) -> Version:
    """The model that a phase started from, which its own training changed; for others, the unmodified model."""
    if to.trained is None:
        return Version("base", None, ())
    inputs = store.opened(to.trained).inputs
    stack = (*inputs.get("under", ()), *((inputs["adapter"],) if inputs["adapter"] else ()))
    newest = stack[-1] if stack else inputs["weights"]
    name = next((stage for stage, step in run.stages.items() if step == newest), "base")
    return Version(name, inputs["weights"], stack)


def check_base(run: NamedRun, other: NamedRun, store: Store) -> None:
    """Check that two runs are of one base model. Raises InputError."""
    models = []
    for one in (run, other):
        step = next((step for step in one.stages.values() if store.open(step)), None)
        if step is None:
            raise InputError(f"drift: nothing of {one.name} is done", "run it first")
        models.append(store.opened(step).inputs["settings"]["model"])
    if models[0] != models[1]:
        raise InputError(
            f"drift: {other.name} is of another base model than {run.name}: {other.recipe().model.name!r}, not "
            f"{run.recipe().model.name!r}",
            "compare runs that started from the same model",
        )


def deltas_of(version: Version, store: Store) -> dict[str, float] | None:
    """How much of which adapters a version's weights hold beyond the base; None where they hold something else."""
    found: dict[str, float] = dict.fromkeys(version.stack, 1.0)
    weights = version.weights
    while weights is not None:
        inputs = store.opened(weights).inputs
        settings = inputs["settings"]
        if settings.get("method") or settings.get("by") or settings.get("base") == "dequantised":
            return None
        for adapter in inputs.get("under", ()):
            found[adapter] = found.get(adapter, 0.0) + 1.0
        top = inputs["adapter"]
        assert top is not None
        found[top] = found.get(top, 0.0) + settings.get("scale", 1.0)
        weights = inputs["weights"]
    return found


def is_plain(adapter: Path) -> bool:
    """Whether an adapter is LoRA on linear layers and nothing else, so that it can be switched, and has two factors."""
    return all(change.plain and not change.embedding for change in read_adapter(adapter).changes.values())


def weights_folder_of(version: Version, base: Path, store: Store) -> Path:
    """The folder of a version's 16-bit weights; `base` is the model's."""
    return store.opened(version.weights).part("model") if version.weights else base
