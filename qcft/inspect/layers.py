"""What freezing depends on: change in phase 1 and signal to noise, module by module; and the table of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from qcft.errors import InputError
from qcft.events import Watch
from qcft.inspect.versions import is_plain
from qcft.layers import LinearModule, adapted_in, decoder_layers, linear_modules, lowest_adapted
from qcft.layers.change import change_since, summed_changes
from qcft.layers.snr import snr_of
from qcft.models.adapters import trained_numbers
from qcft.models.load import quiet_libraries
from qcft.models.meta import model_without_weights
from qcft.models.size import quantised_share, share_of_weights
from qcft.models.sources import resolve, weights_folder
from qcft.recipe import Lora, Model, Recipe
from qcft.store import NamedRun, Store
from qcft.store.steps import model_digest


@dataclass(frozen=True)
class Weights:
    """The weights a phase would start from, their name, and the adapters of the phases before it."""

    folder: Path
    digest: str
    name: str
    adapters: tuple[Path, ...] = ()


def weights_of(recipe: Recipe, run: NamedRun | None, store: Store, watch: Watch) -> Weights:
    """What the recipe's last phase starts from, as far as the run is done: its merge, or the unmodified model."""
    quiet_libraries()
    stages = run.stages if run else {}
    earlier = [phase.name for phase in recipe.phases[:-1]]
    done = [stages[name] for name in earlier if name in stages and store.open(stages[name])]
    adapters = tuple(store.opened(step).part("adapter") for step in done)
    places = ["merged", *(f"merged-{name}" for name in earlier)]  # nothing starts from the last phase's own merge
    merges = [stages[stage] for stage in places if stage in stages and store.open(stages[stage])]
    if run and recipe.phases[-1].start == "merged" and merges:
        folder = store.opened(merges[-1]).part("model", watch)
        return Weights(folder, model_digest(store, merges[-1]), f"{run.name}, merged", adapters)
    source = resolve(recipe.model)
    return Weights(weights_folder(source, watch), source.digest, f"{recipe.model.name}, unmodified", adapters)


class ModuleRow(TypedDict):
    """A linear module: whether it carries an adapter, what phase 1 changed of it, its signal to noise."""

    module: str
    shape: list[int]
    adapter: bool
    change: float | None
    snr: float | None


class LayerRow(TypedDict):
    """A decoder layer: the types of module that carry adapters, the change of all, the mean signal to noise."""

    layer: int
    adapted: list[str]
    trainable_parameters: int
    change: float | None
    snr: float | None
    modules: list[ModuleRow]


class LayersTable(TypedDict):
    """What `qcft layers` shows."""

    weights: str
    phase: str
    freeze: str
    targets: str | list[str]
    rank: int
    adapted_modules: int
    linear_modules: int
    trainable_parameters: int
    parameters: int
    adapted_share: float
    quantised_share: float
    frozen_below: int
    layers: list[LayerRow]


def describe_layers(recipe: Recipe, weights: Weights, with_snr: bool, watch: Watch) -> LayersTable:
    """The last phase's layers as plain data: adapters, trainable parameters, change in phase 1, signal to noise.

    Measures the signal-to-noise ratio only when requested, or when the freeze spec uses it. Raises InputError.
    """
    phase = recipe.phases[-1]
    spec = phase.freeze
    model = model_without_weights(weights.folder, recipe.model)
    adapted_in(model, recipe, phase)  # a spec that doesn't fit raises before measuring
    change = None
    if weights.adapters:
        if spec.measure == "change" or all(map(is_plain, weights.adapters)):  # otherwise it is not measured
            change = summed_changes(weights.adapters)
    elif recipe.model.base and len(recipe.phases) == 1:
        base = weights_folder(resolve(Model(name=recipe.model.base)), watch)
        change = change_since(base, weights.folder, model, watch)
    if spec.measure == "change" and change is None:
        raise InputError(
            f"freeze: {spec.text!r} depends on what phase 1 changed, but no phase 1 is done in this run", "run it first"
        )
    snr = snr_of(weights.folder, weights.digest, model, watch) if with_snr or spec.measure == "snr" else None
    measured = snr if spec.measure == "snr" else change
    chosen = set(adapted_in(model, recipe, phase, measured))
    modules = linear_modules(model)
    layers = [
        _layer(i, [m for m in modules if m.layer == i], chosen, recipe.lora, change, snr)
        for i in range(decoder_layers(model)[1])
    ]
    return {
        "weights": weights.name,
        "phase": phase.name,
        "freeze": spec.text,
        "targets": recipe.lora.targets,
        "rank": recipe.lora.r,
        "adapted_modules": len(chosen),
        "linear_modules": len(modules),
        "trainable_parameters": sum(layer["trainable_parameters"] for layer in layers),
        "parameters": sum(p.numel() for p in model.parameters()),
        "adapted_share": share_of_weights(model, sorted(chosen)),
        "quantised_share": quantised_share(model) if recipe.model.quantize == "nf4" else 0.0,
        "frozen_below": lowest_adapted(model, sorted(chosen)),
        "layers": layers,
    }


def _layer(
    number: int,
    modules: list[LinearModule],
    adapted: set[str],
    lora: Lora,
    change: Mapping[str, float] | None,
    snr: Mapping[str, float] | None,
) -> LayerRow:
    names = [module.name for module in modules]
    return {
        "layer": number,
        "adapted": [module.type for module in modules if module.name in adapted],
        "trainable_parameters": sum(
            trained_numbers(lora, module.name, module.shape) for module in modules if module.name in adapted
        ),
        "change": None if change is None else sum(change.get(name, 0.0) for name in names),
        "snr": None if snr is None else sum(snr[name] for name in names) / len(names),
        "modules": [
            {
                "module": module.type,
                "shape": list(module.shape),
                "adapter": module.name in adapted,
                "change": None if change is None else change.get(module.name, 0.0),
                "snr": None if snr is None else snr[module.name],
            }
            for module in modules
        ],
    }
