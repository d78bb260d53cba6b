"""Importing an external adapter as a phase."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypedDict

from qcft.errors import ChangedInput
from qcft.models.adapter_config import CONFIG, WEIGHTS
from qcft.prepare.prepared import adapter_digest
from qcft.prepare.settings import CIRCUMSTANCE, SPREAD, ModelSettings
from qcft.steps.step import Bench, Step, Work
from qcft.store.upkeep import size_of

if TYPE_CHECKING:
    from qcft.training.memory import Planned


class AdapterMetrics(TypedDict):
    """Where the adapter was copied from."""

    adapter: str


@dataclass(frozen=True)
class Adapter(Work[AdapterMetrics]):
    """Copies an adapter, identified by its digest, from its folder."""

    kind: ClassVar[str] = "adapter"
    streams: ClassVar[bool] = True

    model: ModelSettings = field(metadata=SPREAD)
    rows: str
    source: str = field(metadata=CIRCUMSTANCE)

    def do(self, step: Step, bench: Bench, folder: Path) -> AdapterMetrics:
        """Copy it. Raises ChangedInput if it has changed meanwhile."""
        (folder / "adapter").mkdir(exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(self._place() / name, folder / "adapter" / name)
        if adapter_digest(folder / "adapter") != self.rows:
            raise ChangedInput(
                f"adapter: {self.source!r} changed while it was in use",
                "run the same command again to start from the adapter as it is now",
            )
        return {"adapter": self.source}

    def written(self, step: Step, bench: Bench, planned: Planned | None) -> int:
        """The size of the adapter."""
        return size_of(self._place())

    def _place(self) -> Path:
        return Path(os.path.expanduser(self.source))
