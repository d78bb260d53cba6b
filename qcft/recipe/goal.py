"""What can be asked of a run beyond its recipe: a phase merged for use elsewhere, or dialled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcft.recipe.by_layer import ByLayer

METHODS = (
    "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune",
    "magnitude_prune_svd", "linear", "svd", "cat",
)  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """A phase to be merged beyond what the recipe's own phases need: for use elsewhere.

    `dequantised` merges onto the base as 4 bits hold it; `scale` takes that much of the phase's delta, `by` as
    much of each layer's as it says.
    """

    phase: str
    dequantised: bool = False
    dtype: str | None = None
    scale: float = 1.0
    method: str | None = None
    density: float = 1.0
    by: ByLayer | None = None

    def way(self) -> dict[str, Any]:
        """How much of the delta is taken, and by which of PEFT's methods beyond scaling."""
        if self.by:
            return {"by": str(self.by)}
        method = {"method": self.method, "density": self.density} if self.method else {}
        return {"scale": self.scale, **method} if self.scale != 1 or method else {}

    def share(self) -> str:
        """How much of the delta is taken, in words."""
        return f"its delta with {self.by.label}" if self.by else f"{self.scale:g} of its delta"


@dataclass(frozen=True)
class Dial:
    """A phase's delta to be measured at several scales, and by layers; `method` as `Goal`'s."""

    phase: str
    scales: tuple[float, ...]
    method: str | None = None
    density: float = 1.0
    by: tuple[ByLayer, ...] = ()
