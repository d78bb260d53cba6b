"""A step: where it stands in a run, what it depends on, and its work, whose settings its id is made of.

A kind of step is one file beside this one with a frozen dataclass: its fields are its settings, and it does the work,
sums up what came of it, and says what it needs. Nothing else knows the kinds. Work is done on a bench, which has the
store, a model and rows by their digests, but no recipe: results depend on settings alone.
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
SCORES = 1 << 20  # bytes of scores and answers: of the suites that ship, seldom more


@dataclass(frozen=True)
class Work(Settings, ABC, Generic[Metrics]):
    """What a step of one kind does, by its settings, and what it measures. `format` is raised when a change to the code
    changes results."""

    kind: ClassVar[str]
    format: ClassVar[int] = 1
    streams: ClassVar[bool] = False  # weights go through the CPU, and no model is loaded
    kinds: ClassVar[dict[str, type[Work[Any]]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in vars(cls):
            Work.kinds[cls.kind] = cls

    def version(self) -> tuple[str, int]:
        """The kind, as ids begin with it, and its format."""
        return self.kind, self.format

    @abstractmethod
    def do(self, step: Step, bench: Bench, folder: Path) -> Metrics:
        """Do the work in the step's folder, resuming what a killed process left there; its metrics."""

    def summary(self, metrics: Metrics) -> str:
        """What came of it, in a few words."""
        return ""

    def memory(self, step: Step, bench: Bench, free: int) -> dict[str, int] | None:
        """Bytes by part that it holds at most, where it loads a model and does not train it.

        `cache`: keys and values of the answers that are generated at once, as many as fit into `free` bytes where that
        is left open.
        """
        return None

    def written(self, step: Step, bench: Bench, planned: Planned | None) -> int:
        """Bytes that it writes at most; `planned`: how a training would run."""
        return SCORES


@dataclass(frozen=True)
class Stored(Work[Mapping[str, object]]):
    """The work of a done step as its step.json has it, whichever version did it. It is looked at, not done again."""

    stored: tuple[str, int]  # its kind and format
    found: Mapping[str, Any]

    def version(self) -> tuple[str, int]:
        """The kind and the format that were stored."""
        return self.stored

    def settings(self) -> dict[str, Any]:
        """What was stored."""
        return dict(self.found)

    def do(self, step: Step, bench: Bench, folder: Path) -> NoReturn:
        """Refuse. Raises QcftError."""
        raise QcftError(
            f"{step.id} is damaged, and was made by a version of qcft whose {self.stored[0]} steps had other results",
            "run its recipe again: what depends on it is made anew",
        )


@dataclass(frozen=True)
class Step:
    """One unit of work at its `stage` of a run. `weights` is the merge step whose weights are loaded (None: the model
    as it is), `adapter` the step of the adapter live on them, `under` those that lie live and frozen under it, the
    lowest first. `phase` is named in messages."""

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
        """A step as its step.json has it, under its own id, whichever version made it."""
        work = Stored((inputs["kind"], inputs["format"]), inputs["settings"])
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
        """All steps that must be done before it."""
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
    """Where steps are done. `steps` are the plan's and those that it depends on, by id; `shared` is what a kind of step
    keeps from one to the next."""

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
        """Do one step in its folder, resuming what a killed process left there; its metrics. Raises ChangedInput."""
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
        """The step's weights, in `quantize` or as the model is asked for, its adapters live on them."""
        model = load_model(self.weights(step), self.model.asked, quantize)
        return load_stack(model, [self.adapter(one) for one in step.stack]) if step.stack else model
