"""Turns flags into recipes. Prints nothing."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from qcft.cli.data_flags import LANG_PATH, sources_of, tests_of
from qcft.errors import InputError
from qcft.recipe import Recipe, built_in_recipes, load_recipe, parse_assignments, recipe_from
from qcft.recipe.load import changed
from qcft.store import NamedRun, list_runs, read_run

LARGEST = 1 << 50  # bytes
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT])i?B?", re.IGNORECASE)


def phase1_recipe(
    run: str,
    model: str | None,
    data: list[str],
    adapter: str | None,
    keys: dict[str, Any],
    tests: list[str],
    freeze: str | None,
    anchor: str | None,
    assignments: list[str],
) -> Recipe:
    """The recipe of `qcft phase1`; `keys` are set for every source. Raises InputError."""
    if model is None:
        raise InputError(
            "phase1 needs a model", "add --model smollm2-135m-instruct, a hub id, a folder or a .gguf file"
        )
    if not data and adapter is None:
        raise InputError("phase1 has no data", "add --data PATH, or --adapter PATH for an existing adapter")
    phase: dict[str, Any] = {"name": "phase1"}
    if data:
        phase["data"] = sources_of(data, keys, lang="en")
    if adapter is not None:
        phase["adapter"] = adapter
    phase |= {key: given for key, given in {"freeze": freeze, "anchor": anchor}.items() if given is not None}
    raw: dict[str, Any] = {"name": run, "model": {"name": model}, "phases": [phase]}
    if tests:
        raw["heldout"] = {"data": tests_of(tests, keys)}
    return recipe_from(raw, parse_assignments(assignments))


def phase2_recipe(
    runs: Path,
    run: str | None,
    model: str | None,
    data: list[str],
    remedies: dict[str, Any],
    keys: dict[str, Any],
    tests: list[str],
    name: str | None,
    assignments: list[str],
) -> tuple[Recipe, str | None]:
    """The recipe of `qcft phase2`, and the name of the run that it continues (None with `model`).

    It is that run's recipe with its second phase set, or a new one for an instruct model. `remedies`: the values of
    --replay, --replay-loss, --freeze and --anchor, None where not given; `keys` are set for every source.
    Raises InputError.
    """
    of = None
    if model is not None:
        existing = next((found.recipe() for found in list_runs(runs) if found.name == run), None)
        if existing:
            _check_continues(existing, model)
        raw: dict[str, Any] = {"name": run or "phase2", "model": {"name": model}, "phases": []}
    else:
        found = read_run(runs, run) if run is not None else _latest_with_phase1(runs)
        raw = found.recipe().model_dump(mode="json")
        raw["name"] = of = found.name
    phase = second_phase(raw, model is not None)
    if data:
        phase["data"] = sources_of(data, keys)
    elif not phase["data"]:
        raise InputError("phase2 has no data", "add --data LANG=PATH, for example --data es=data/es.jsonl")
    else:
        phase["data"] = [{**source, **keys} for source in phase["data"]]
    if tests:
        raw["heldout"] = {**(raw.get("heldout") or {}), "data": tests_of(tests, keys)}
    of_replay = {"ratio": remedies["replay"], "loss": remedies["replay_loss"]}
    if given := {key: value for key, value in of_replay.items() if value is not None}:
        phase["replay"] = {**(phase.get("replay") or {}), **given}
        if "ratio" not in phase["replay"] and not any(
            text.startswith(f"{phase['name']}.replay") for text in assignments
        ):
            raise InputError("--replay-loss: the phase has no replay", "add --replay 0.2")
    phase |= {key: remedies[key] for key in ("freeze", "anchor") if remedies[key] is not None}
    if name is not None:
        raw["name"] = name
    return recipe_from(raw, parse_assignments(assignments)), of


def checked_recipe(
    runs: Path,
    target: str | None,
    model: str | None,
    data: list[str],
    remedies: dict[str, Any],
    assignments: list[str],
) -> Recipe:
    """The recipe of `qcft check`: a file, a built-in one, a run's, or that of `qcft phase2` with the same flags.

    Raises InputError.
    """
    names = [run.name for run in list_runs(runs)]
    is_recipe = target is not None and (target in built_in_recipes() or Path(target).is_file())
    if model is not None or data or any(value is not None for value in remedies.values()):
        if model is None and is_recipe and target not in names:
            raise InputError(
                f"{target!r} is a recipe; --data, --replay, --replay-loss, --freeze, --anchor are for phase 2 of a run",
                "change the recipe's own keys, for example --set phase2.replay.ratio=0.2",
            )
        return phase2_recipe(runs, target, model, data, remedies, {}, [], None, assignments)[0]
    if target is None or (target in names and not is_recipe):
        found = read_run(runs, target)
        raw = found.recipe().model_dump(mode="json") | {"name": found.name}
        return recipe_from(raw, parse_assignments(assignments))
    return load_recipe(target, parse_assignments(assignments))


def eval_recipe(
    runs: Path,
    run: str | None,
    chosen: dict[str, list[str] | None],
    given: dict[str, int | None],
    local: list[str],
    assignments: list[str],
) -> Recipe:
    """The recipe of `qcft eval`: a run's own, with `evaluate` changed by the flags.

    `chosen` are lists (suites and tasks replace the recipe's together), `given` are numbers; None keeps the recipe's
    value. Raises InputError.
    """
    found = read_run(runs, run)
    changes: dict[str, Any] = {
        f"evaluate.{key}": value for key, value in {**chosen, **given}.items() if value is not None
    }
    if chosen["suites"] or chosen["tasks"]:
        changes |= {f"evaluate.{key}": chosen[key] or [] for key in ("suites", "tasks")}
        changes["evaluate.local"] = {}
    for text in local:
        task, _, path = text.partition("=")
        if not task.strip() or not path.strip():
            raise InputError(f"--local {text!r} is not TASK=PATH", "for example --local xquad_es=xquad/es.jsonl")
        changes["evaluate.local"] = {**changes.get("evaluate.local", {}), task: str(Path(path).absolute())}
    raw = found.recipe().model_dump(mode="json") | {"name": found.name}
    recipe = recipe_from(raw, changes | parse_assignments(assignments))
    if not recipe.evaluate.asks_for_something:
        raise InputError(
            f"the recipe of {found.name!r} names nothing to evaluate on",
            "add --suite english, --suite multilingual, or --task NAME (hellaswag, xquad_es, fidelity ...)",
        )
    return recipe


def replay_recipe(runs: Path, run: str | None, ratio: float | None, assignments: list[str]) -> Recipe:
    """The recipe of `qcft replay`: a run's own, with another ratio or other keys where given. Raises InputError."""
    found = read_run(runs, run)
    recipe = found.recipe()
    changes: dict[str, Any] = {} if ratio is None else {f"{recipe.phases[-1].name}.replay.ratio": ratio}
    raw = recipe.model_dump(mode="json") | {"name": found.name}
    if ratio is not None and len(recipe.phases) == 1 and recipe.phases[0].name == "phase1":
        raise InputError(
            f"the run {found.name!r} has no phase 2 to add replay to",
            "give it data first: qcft phase2 --data LANG=PATH",
        )
    return recipe_from(raw, changes | parse_assignments(assignments))


def text_files(given: list[str]) -> dict[str, Path]:
    """Text files by language, from `[LANG=]FILE`. Raises InputError."""
    files: dict[str, Path] = {}
    for text in given:
        match = LANG_PATH.fullmatch(text)
        lang, path = (match[1], match[2]) if match else ("text", text)
        if not Path(path).is_file():
            raise InputError(f"--text: there is no file {path!r}", "give a text file with one sentence per line")
        if lang in files:
            raise InputError(f"--text names {lang} twice", "write LANG=FILE, one file for each language")
        files[lang] = Path(path)
    return files


def parse_size(text: str) -> int:
    """Bytes of `8GB`, `7.5 GiB`, `8192M`, all in powers of 1,024, as GPUs are sold. Raises InputError."""
    match = SIZE.fullmatch(text.strip())
    if not match or not float(match[1]):
        unit = f"{text.strip()}GB" if re.fullmatch(r"[0-9]{1,6}", text.strip()) else "8GB or 7.5GiB"
        raise InputError(f"--vram {text[:40]!r} is not a size", f"give it with its unit, such as {unit}")
    size = float(match[1]) * 1024 ** " KMGT".index(match[2].upper())
    if size > LARGEST:
        raise InputError(f"--vram {text[:40]!r} is larger than any GPU", "give the size of one GPU, such as 80GB")
    return int(size)


def split(text: str | None) -> list[str]:
    """The words of a comma-separated list."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def words(flag: str, text: str | None) -> list[str]:
    """The words of a flag's comma-separated list, empty if it is not given. Raises InputError for an empty list."""
    found = split(text)
    if text is not None and not found:
        raise InputError(f"{flag} {text!r} names nothing", f"give names, such as {flag} A,B, or omit {flag}")
    return found


def parse_seeds(text: str | None) -> list[int]:
    """The seeds of a comma-separated list. Raises InputError."""
    seeds = words("--seeds", text)
    for word in seeds:
        if not re.fullmatch(r"[0-9]{1,10}", word):
            raise InputError(f"--seeds: {word[:40]!r} is not a whole number below 2^32", "for example --seeds 0,1")
    return [int(word) for word in seeds]


def second_phase(raw: dict[str, Any], only: bool) -> dict[str, Any]:
    """The second phase of a raw recipe, added if missing; `only`: there is no first phase."""
    phases: list[dict[str, Any]] = raw["phases"]
    single_second = len(phases) == 1 and phases[0]["name"] == "phase2"
    position = 0 if only or single_second else 1
    if len(phases) <= position:
        phases.append({"name": "phase2", "data": []})
    return phases[position]


def _check_continues(existing: Recipe, model: str) -> None:
    """Check that `qcft phase2 RUN --model MODEL` continues a run that it started itself. Raises InputError."""
    hint = "omit --model, or give a new name"
    if existing.phases[0].name != "phase2":
        raise InputError(f"run {existing.name!r} has a phase before phase 2: {existing.phases[0].name}", hint)
    named = changed({"model": {"name": model}}, {})["model"]["name"]  # as a run stores it: a local folder's whole path
    if existing.model.name != named:
        raise InputError(f"run {existing.name!r} has another model: {existing.model.name}", hint)


def _latest_with_phase1(runs: Path) -> NamedRun:
    for run in list_runs(runs):
        with suppress(InputError):  # one that cannot be read does not hide the others
            if "phase1" in run.stages or len(run.recipe().phases) > 1:
                return run
    raise InputError(
        f"there is no run with a phase 1 in {str(runs)!r}",
        "start with `qcft phase1 NAME --model M --data D`, or `qcft phase2 NAME --model M --data LANG=PATH`",
    )
