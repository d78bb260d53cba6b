"""The anchor of a phase: a loss term that keeps it close to the model it starts from, on its own rows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from qcft.recipe.parts import Number, Part

WEIGHTS = {"target-masked": 1.0, "kl": 0.01}  # of each kind, where none is given


class Anchor(Part):
    """KL(q || p) from the model q that the phase starts from to the model p that trains, on the answer tokens of new
    rows. `target-masked`: over all tokens but the target, so that learning the target costs nothing; `kl`: over all
    tokens. `weight` multiplies it in the loss, beside the cross-entropy (null: 1.0 and 0.01); 0 only measures it.
    """

    kind: Literal["target-masked", "kl"] = "target-masked"
    weight: Number | None = None

    @field_validator("weight")
    @classmethod
    def _not_below_zero(cls, value: float | None) -> float | None:
        if value is not None and value < 0:
            raise ValueError(f"{value:g} is below 0 | give 0, which only measures the divergence, or more, such as 1.0")
        return value

    @property
    def strength(self) -> float:
        """The weight, by default that of the kind."""
        return WEIGHTS[self.kind] if self.weight is None else self.weight

    def resolved(self) -> Anchor:
        """The same with its weight written out."""
        return Anchor(kind=self.kind, weight=self.strength)

    def __str__(self) -> str:
        return f"{self.kind}:{self.strength:g}"


def as_mapping(value: Any) -> Any:
    """`KIND` or `KIND:WEIGHT` as a mapping; anything else unchanged."""
    if not isinstance(value, str):
        return value
    kind, colon, weight = value.partition(":")
    return {"kind": kind.strip(), "weight": weight.strip()} if colon else {"kind": kind.strip()}


def check_anchor(value: Any) -> Any:
    """Check the form and the kind of an anchor, before its fields are validated. Raises ValueError."""
    value = as_mapping(value)
    if value is None or isinstance(value, Anchor):
        return value
    if not isinstance(value, dict):
        raise ValueError(
            f"{value!r} is not an anchor | give {' or '.join(WEIGHTS)}, or {{kind: kl, weight: 0.01}}; null for none"
        )
    kind = value.get("kind", "target-masked")
    if not isinstance(kind, str) or kind not in WEIGHTS:
        raise ValueError(f"there is no anchor {kind!r} | use {' or '.join(WEIGHTS)}, also with a weight, as in kl:0.01")
    return value
