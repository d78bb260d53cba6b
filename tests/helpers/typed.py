"""Whether what steps wrote has the keys and types that the package says it has."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from qcft.files import read_json
from qcft.inspect.drift import DriftMetrics
from qcft.steps.adapter import AdapterMetrics
from qcft.steps.merge import MergeMetrics
from qcft.steps.step import Work
from qcft.store import metrics
from qcft.store.opened import StepInputs

METRICS = {
    "probe": metrics.ProbeMetrics,
    "dial": metrics.DialMetrics,
    "kept": metrics.KeptMetrics,
    "train": metrics.TrainMetrics,
    "replay": metrics.ReplayMetrics,
    "layers": metrics.LayersMetrics,
    "suite": metrics.FidelityMetrics,  # the one that the archive has
    "drift": DriftMetrics,
    "merge": MergeMetrics,
    "adapter": AdapterMetrics,
}
FILES = {
    "probe/answers.json": list[metrics.PromptAnswer],
    "probe/samples.json": dict[str, list[metrics.PromptAnswer]] | None,  # not of earlier versions
    "layers/layers.json": metrics.LayersFile,
    "drift/drift.json": metrics.DriftFile,
}


def misfit(value, kind, where=""):
    """Where a value is not of a type, in words; None where it is. Floats may be whole, tuples are lists in JSON."""
    if kind is Any or kind is object:
        return None
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        found = [misfit(value, one, where) for one in inner]
        return None if None in found else found[0]
    if origin is NotRequired:
        return misfit(value, inner[0], where)
    if origin is Literal:
        return None if value in inner else f"{where}: {value!r}"
    if is_typeddict(kind):
        if not isinstance(value, dict):
            return f"{where}: {value!r}"
        hints = get_type_hints(kind, include_extras=True)  # __required_keys__ cannot read postponed annotations
        keys = {key for key in value if not key.startswith("peak_")}
        required = {key for key, hint in hints.items() if get_origin(hint) is not NotRequired}
        if not required <= keys <= hints.keys():
            return f"{where}: {sorted(keys ^ hints.keys())}"
        return next(filter(None, (misfit(value[key], hints[key], f"{where}.{key}") for key in keys)), None)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            return f"{where}: {value!r}"
        pairs = [(one, key) for key, one in value.items()]
        return next(filter(None, (misfit(one, inner[1], f"{where}.{key}") for one, key in pairs)), None)
    if origin is list:
        return next(filter(None, (misfit(one, inner[0], where) for one in value)), None)
    plain = (int, float) if kind is float else NoneType if kind is None else kind
    whole = isinstance(value, plain) and isinstance(value, bool) == (kind is bool)
    return None if whole else f"{where}: {value!r}"


def misfits(runs):
    """What does not match its type in the done steps of a runs folder; steps of an earlier format are skipped."""
    found = []
    for folder in (done.parent for done in runs.glob(".steps/*/done.json")):
        kind, inputs = folder.name.split("-")[0], read_json(folder / "step.json")["inputs"]
        if inputs["format"] != Work.kinds[kind].format:
            continue
        found.append(misfit(inputs, StepInputs, folder.name))
        found.append(misfit(read_json(folder / "done.json")["metrics"], METRICS[kind], folder.name))
        for name, of in FILES.items():
            if name.startswith(f"{kind}/"):
                found.append(misfit(read_json(folder / name.split("/")[1]), of, name))
    return [text for text in found if text]
