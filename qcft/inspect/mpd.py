"""Model parameter difference (MPD): how far the weights of two models of one base are apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qcft.errors import InputError
from qcft.events import Watch
from qcft.inspect.versions import Version, deltas_of, is_plain, weights_folder_of
from qcft.layers import linear_modules
from qcft.layers.change import change_between, squared_norm
from qcft.models.adapters import lora_factors
from qcft.prepare.model import PreparedModel
from qcft.store import Store
from qcft.store.metrics import LayerDifference, Pair, ParameterDifference


def parameter_difference(
    since: Version, to: Version, prepared: PreparedModel, store: Store, watch: Watch
) -> tuple[ParameterDifference, list[LayerDifference]]:
    """Model parameter difference (MPD) of two models of one base, and of each layer.

    MPD = 1/n sum_i ||W_i - W'_i||_2 (arXiv 2410.16006), here over the n weight matrices of the decoder layers' linear
    modules, which are all that adapters change. In the paper the largest pair has 1.00: likewise `scaled` is relative
    to the largest of the three pairs of base, from and to. `norm` is the L2 norm of the whole difference.

    From the adapters' factors where the models differ by plain LoRA, up to the rounding of merges to 16 bits; else
    streamed from the weights. `mpd` is None, and `reason` says why, where neither is possible.
    """
    base = Version("base", None, ())
    names = [module.name for module in linear_modules(prepared.meta_model)]
    pairs: dict[Pair, tuple[Version, Version]] = {
        "from-to": (since, to),
        "base-from": (base, since),
        "base-to": (base, to),
    }
    found: dict[Pair, float | None] = {}
    norms: dict[str, float] = {}
    reason = None
    for key, pair in pairs.items():
        try:
            each = module_norms(*pair, names, prepared, store, watch)
            found[key] = sum(each.values()) / len(names)
            if key == "from-to":
                norms = each
        except InputError as error:
            if key == "from-to":
                reason = error.message
                watch.note(f"{error.message}; {error.hint}", "warning")
            found[key] = None
    known = found["from-to"] is not None
    largest = max((value for value in found.values() if value), default=0.0)
    by_layer: dict[int, list[float]] = {}
    for module in linear_modules(prepared.meta_model):
        by_layer.setdefault(module.layer, []).append(norms.get(module.name, 0.0))
    whole: ParameterDifference = {
        "mpd": found["from-to"],
        "scaled": {key: value / largest if value is not None and largest else value for key, value in found.items()},
        "pairs": found,
        "norm": _norm(norms.values()) if known else None,
        "matrices": len(names),
        "reason": reason,
    }
    return whole, [
        {"mpd": sum(values) / len(values) if known else None, "norm": _norm(values) if known else None}
        for _, values in sorted(by_layer.items())
    ]


def module_norms(
    since: Version, to: Version, names: Sequence[str], prepared: PreparedModel, store: Store, watch: Watch
) -> dict[str, float]:
    """||W - W'||_F of each linear module. Raises InputError where it cannot be computed."""
    deltas = [deltas_of(version, store) for version in (since, to)]
    if deltas[0] is not None and deltas[1] is not None:
        moved = Counter(deltas[1])
        moved.subtract(deltas[0])
        left = {adapter: scale for adapter, scale in moved.items() if scale}
        if all(is_plain(store.opened(adapter).part("adapter")) for adapter in left):
            return _factor_norms(left, names, store)
    if since.stack or to.stack:
        raise InputError(
            f"drift: {since.name} and {to.name} differ by more than plain LoRA, so MPD needs the weights of both",
            "merge a live adapter first (qcft merge RUN --stage PHASE) and name the merge with --from or --to",
        )
    folders = [weights_folder_of(version, prepared.folder, store) for version in (since, to)]
    squares = change_between(
        folders[0], folders[1], prepared.meta_model, names, watch, f"difference from {since.name} to {to.name}"
    )
    return {name: square**0.5 for name, square in squares.items()}


def _factor_norms(moved: Mapping[str, float], names: Sequence[str], store: Store) -> dict[str, float]:
    factors: dict[str, list[Any]] = {name: [] for name in names}
    for adapter, times in moved.items():
        for weight, a, b, scale in lora_factors(store.opened(adapter).part("adapter")):
            factors.setdefault(weight.removesuffix(".weight"), []).append((a, b, times * scale))
    return {name: squared_norm(own) ** 0.5 if own else 0.0 for name, own in factors.items()}


def _norm(values: Iterable[float]) -> float:
    return float(sum(value**2 for value in values) ** 0.5)
