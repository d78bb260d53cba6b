"""A step: its place in a run, its dependencies, and its work, whose settings make its id.

A kind of step is one file in this folder with a frozen dataclass: its fields are the settings, and its methods do the
work, summarise the result, and estimate memory and disk. Outside this folder few places name a kind. Work is done on a
bench, which has the store, a model and rows by their digests, but no recipe, so results depend only on settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypeVar

from qcft.errors import QcftError
from qcft.events import Watch
from qcft.models.adapters import load_stack
from qcft.models.load import free_memory, load_model
from qcft.prepare.model import PreparedModel
from qcft.prepare.rows import Rows
from qcft.prepare.settings import Settings
from qcft.steps.unchanged import inputs_unchanged
from qcft.store import Store
from qcft.store.opened import StepInputs, step_id
from qcft.store.steps import model_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcft.models.inputs import Inputs
    from qcft.training.memory import Planned

Metrics = TypeVar("Metrics", bound=Mapping[str, object])
SCORES = 1 << 20  # bytes of scores and answers; more is rare with the suites that come with qcft


@dataclass(frozen=True)
class Work(Settings, ABC, Generic[Metrics]):
    """The work of one kind of step: its settings, and its metrics. `format` is raised when a change to the code changes
    results."""

    kind: ClassVar[str]
    format: ClassVar[int] = 1
    streams: ClassVar[bool] = False  # weights are read one by one on the CPU, and no model is loaded
    kinds: ClassVar[dict[str, type[Work[Any]]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in vars(cls):
            Work.kinds[cls.kind] = cls

    def version(self) -> tuple[str, int]:
        """The kind, with which ids begin, and its format."""
        return self.kind, self.format

    @abstractmethod
    def do(self, step: Step, bench: Bench, folder: Path) -> Metrics:
        """Do the work in the step's folder, resuming from what a killed process left; returns the metrics."""

    def summary(self, metrics: Metrics) -> str:
        """The result, in a few words."""
        return ""

    def memory(self, step: Step, bench: Bench, free: int) -> dict[str, int] | None:
        """The highest memory by part, in bytes, of work that loads a model and does not train it.

        `cache`: the KV cache of the answers that are generated at once; if their number is auto, as many as fit into
        `free` bytes.
        """
        return None

    def written(self, step: Step, bench: Bench, planned: Planned | None) -> int:
        """The most bytes that it writes; `planned`: how a training would run."""
        return SCORES


@dataclass(frozen=True)
class StoredWork(Work[Mapping[str, object]]):
    """The work of a finished step, from its step.json, by any version of qcft. It is only read, never done again."""

    stored: tuple[str, int]  # its kind and format
    found: Mapping[str, Any]

    def version(self) -> tuple[str, int]:
        """The kind and the format that were stored."""
        return self.stored

    def settings(self) -> dict[str, Any]:
        """The stored settings."""
        return dict(self.found)

    def do(self, step: Step, bench: Bench, folder: Path) -> NoReturn:
        """Always refuse. Raises QcftError."""
        raise QcftError(
            f"{step.id} is damaged, and was made by a version of qcft whose {self.stored[0]} steps had other results",
            "run its recipe again: what depends on it is rebuilt",
        )


@dataclass(frozen=True)
class Step:
    """One unit of work at its `stage` of a run. `weights` is the merge step whose weights are loaded (None: the model's
    own), `adapter` the step of the active adapter, `under` those of the active, frozen adapters under it, the lowest
    first. `phase` is used in messages."""

    work: Work[Any]
    stage: str
    title: str
    phase: str | None = None
    weights: str | None = None
    adapter: str | None = None
    parents: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", step_id(self.inputs()))

    @classmethod
    def stored(cls, id: str, stage: str, inputs: StepInputs) -> Step:
        """A step from its step.json, under its own id, by any version of qcft."""
        work = StoredWork((inputs["kind"], inputs["format"]), inputs["settings"])
        places = (inputs["weights"], inputs["adapter"], tuple(inputs["parents"]), tuple(inputs.get("under", ())))
        step = cls(work, stage, stage, None, *places)
        object.__setattr__(step, "id", id)
        return step

    @property
    def kind(self) -> str:
        """The kind of its work."""
        return self.work.version()[0]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its work."""
        return self.work.settings()

    @property
    def stack(self) -> tuple[str, ...]:
        """The steps of the adapters on its weights, the lowest first."""
        return (*self.under, self.adapter) if self.adapter else self.under

    @property
    def depends_on(self) -> tuple[str, ...]:
        """All steps that must be finished first."""
        return tuple(one for one in (self.weights, self.adapter, *self.under, *self.parents) if one)

    def inputs(self) -> StepInputs:
        """Everything that changes the step's result."""
        kind, form = self.work.version()
        found: StepInputs = {
            "kind": kind,
            "format": form,
            "weights": self.weights,
            "adapter": self.adapter,
            "settings": self.settings,
            "parents": list(self.parents),
        }
        if self.under:
            found["under"] = list(self.under)
        return found


class Bench:
    """Does steps. `steps`: those of the plan and those it depends on, by id; `shared`: what a kind of step keeps from
    one step to the next."""

    def __init__(
        self, model: PreparedModel, rows: Rows, inputs: Inputs, steps: Mapping[str, Step], store: Store, watch: Watch
    ) -> None:
        self.model = model
        self.rows = rows
        self.steps = steps
        self.store = store
        self.watch = watch
        self.shared: Any = None
        self._inputs = inputs

    def do(self, step: Step, folder: Path) -> Mapping[str, object]:
        """Do one step in its folder, resuming from what a killed process left; its metrics. Raises ChangedInput."""
        if self.shared is not None and not self.shared.serves(step):
            self.shared = None
            free_memory()
        with inputs_unchanged(self._inputs, self.store):
            try:
                metrics: Mapping[str, object] = step.work.do(step, self, folder)
                return metrics
            finally:
                free_memory()

    def adapter(self, step: str) -> Path:
        """The folder of a step's adapter."""
        return self.store.opened(step).part("adapter")

    def weights(self, step: Step) -> Path:
        """The folder of the 16-bit weights a step loads."""
        if step.weights is None:
            return self.model.folder
        return self.store.opened(step.weights).part("model", self.watch)

    def weights_digest(self, step: Step) -> str:
        """The digest of those weights."""
        return self.model.model.digest if step.weights is None else model_digest(self.store, step.weights)

    def load(self, step: Step, quantize: str | None = None) -> PreTrainedModel:
        """The step's weights, in `quantize` or as the recipe's model has it, with its adapters active."""
        model = load_model(self.weights(step), self.model.asked, quantize)
        return load_stack(model, [self.adapter(one) for one in step.stack]) if step.stack else model
