"""Requests beyond a run's recipe: to merge a phase for use elsewhere, or to dial it."""

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
    """A phase to merge for use elsewhere, beyond the merges that the recipe's phases need.

    `dequantised` merges onto the dequantised 4-bit base; `scale` multiplies the phase's delta, `by` scales it by layer.
    """

    phase: str
    dequantised: bool = False
    dtype: str | None = None
    scale: float = 1.0
    method: str | None = None
    density: float = 1.0
    by: ByLayer | None = None

    def way(self) -> dict[str, Any]:
        """How much of the delta is used, and with which of PEFT's methods beyond scaling."""
        if self.by:
            return {"by": str(self.by)}
        method = {"method": self.method, "density": self.density} if self.method else {}
        return {"scale": self.scale, **method} if self.scale != 1 or method else {}

    def share(self) -> str:
        """How much of the delta is used, in words."""
        return f"its delta with {self.by.label}" if self.by else f"{self.scale:g} of its delta"


@dataclass(frozen=True)
class Dial:
    """A phase whose delta is measured at several scales, and by layers; `method` as in `Goal`."""

    phase: str
    scales: tuple[float, ...]
    method: str | None = None
    density: float = 1.0
    by: tuple[ByLayer, ...] = ()
