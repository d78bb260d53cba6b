"""What the commands make of their flags: recipes and listings. Prints nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qcft.errors import InputError, nearest
from qcft.events import Watch
from qcft.files import read_json
from qcft.recipe import Recipe, Source, built_in_recipes, load_recipe, parse_assignments, recipe_from
from qcft.store import NamedRun, Store, list_runs, read_run
from qcft.store.ablations import run_states

SHIPPED = "qcft:"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B?", re.IGNORECASE)
LANG_PATH = re.compile(r"([a-z]{2,3}(?:-[A-Za-z0-9]{2,8})?)=(.+)")


def phase1_recipe(
    run: str,
    model: str | None,
    data: list[str],
    adapter: str | None,
    take: int | None,
    freeze: str | None,
    assignments: list[str],
) -> Recipe:
    """The recipe of `qcft phase1`. Raises InputError."""
    if model is None:
        raise InputError(
            "phase1 needs a model", "add --model smollm2-135m-instruct, a hub id, a folder or a .gguf file"
        )
    if not data and adapter is None:
        raise InputError("phase1 has no data", "add --data PATH, or --adapter PATH for an adapter you bring")
    phase: dict[str, Any] = {"name": "phase1"}
    if data:
        phase["data"] = _sources(data, take, default_lang="en")
    if adapter is not None:
        phase["adapter"] = adapter
    if freeze is not None:
        phase["freeze"] = freeze
    raw = {"name": run, "model": {"name": model}, "phases": [phase]}
    return recipe_from(raw, parse_assignments(assignments))


def phase2_recipe(
    runs: Path,
    run: str | None,
    model: str | None,
    data: list[str],
    replay: float | None,
    freeze: str | None,
    take: int | None,
    name: str | None,
    assignments: list[str],
) -> Recipe:
    """The recipe of `qcft phase2`: a run's own with a second phase set, or an instruct model's.

    Raises InputError.
    """
    if model is not None:
        existing = next((found.recipe() for found in list_runs(runs) if found.name == run), None)
        if existing and (existing.model.name != model or existing.phases[0].name != "phase2"):
            raise InputError(
                f"run {run!r} has a phase 1 or another model ({existing.model.name})",
                "leave --model out, or give a new name",
            )
        raw: dict[str, Any] = {"name": run or "phase2", "model": {"name": model}, "phases": []}
    else:
        found = read_run(runs, run) if run is not None else _latest_with_phase1(runs)
        raw = found.recipe().model_dump(mode="json")
        raw["name"] = found.name
    phase = _second_phase(raw, model is not None)
    if data:
        phase["data"] = _sources(data, take, default_lang=None)
    elif not phase["data"]:
        raise InputError("phase2 has no data", "add --data LANG=PATH, for example --data es=data/es.jsonl")
    elif take is not None:
        phase["data"] = [{**source, "take": take} for source in phase["data"]]
    if replay is not None:
        phase["replay"] = {**(phase.get("replay") or {}), "ratio": replay}
    if freeze is not None:
        phase["freeze"] = freeze
    if name is not None:
        raw["name"] = name
    return recipe_from(raw, parse_assignments(assignments))


def layers_table(
    target: str, runs: Path, freeze: str | None, base: str | None, assignments: list[str], snr: bool, watch: Watch
) -> dict[str, Any]:
    """What `qcft layers` shows: a run's last phase, or a model's only one, layer by layer. Raises InputError."""
    from qcft.pipeline.layers import describe_layers, weights_of

    run = next((found for found in list_runs(runs) if found.name == target), None)
    if run is not None:
        raw = run.recipe().model_dump(mode="json")
    else:
        raw = {"name": "layers", "model": {"name": target}, "phases": []}
    phase = _second_phase(raw, run is None)
    if not phase.get("data") and not phase.get("adapter"):
        phase["data"] = ["qcft:instructions/en"]  # stands for data that isn't known yet
    if freeze is not None:
        phase["freeze"] = freeze
    if base is not None:
        raw["model"]["base"] = base
    try:
        recipe = recipe_from(raw, parse_assignments(assignments))
        weights = weights_of(recipe, run, Store(runs), watch)
    except InputError as error:
        names = [found.name for found in list_runs(runs)]
        if run is None and error.message.startswith("model:") and names:
            raise InputError(error.message, nearest(target, names) + f"or a run: {', '.join(names[:8])}") from None
        raise
    return describe_layers(recipe, weights, snr, watch)


def eval_recipe(
    runs: Path,
    run: str | None,
    chosen: dict[str, list[str] | None],
    given: dict[str, int | None],
    local: list[str],
    assignments: list[str],
) -> Recipe:
    """The recipe of `qcft eval`: a run's own, evaluated on what the flags say. `chosen` are lists (suites and tasks
    replace the recipe's together), `given` numbers; what is None stays. Raises InputError."""
    found = read_run(runs, run)
    changes: dict[str, Any] = {
        f"evaluate.{key}": value for key, value in {**chosen, **given}.items() if value is not None
    }
    if chosen["suites"] or chosen["tasks"]:
        changes |= {f"evaluate.{key}": chosen[key] or [] for key in ("suites", "tasks")}
        changes["evaluate.local"] = {}
    for text in local:
        task, equals, path = text.partition("=")
        if not equals or not path:
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
    """The recipe of `qcft replay`: a run's own, or with another ratio or other keys. Raises InputError."""
    found = read_run(runs, run)
    recipe = found.recipe()
    changes: dict[str, Any] = {} if ratio is None else {f"{recipe.phases[-1].name}.replay.ratio": ratio}
    raw = recipe.model_dump(mode="json") | {"name": found.name}
    if ratio is not None and len(recipe.phases) == 1 and recipe.phases[0].name == "phase1":
        raise InputError(
            f"the run {found.name!r} has no phase 2 to replay into", "give it data first: qcft phase2 --data LANG=PATH"
        )
    return recipe_from(raw, changes | parse_assignments(assignments))


def replay_shown(run: str, stages: dict[str, Path], show: int, left_out: bool) -> dict[str, Any]:
    """A run's last replay: what it is made of, and the first `show` of its rows, or of those left out."""
    stage = [stage for stage in stages if stage == "replay" or stage.startswith("replay-")][-1]
    file = stages[stage] / ("left_out.jsonl" if left_out else "replay.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    return {
        "run": run,
        "stage": stage,
        "file": str(file),
        **(read_json(stages[stage] / "done.json") or {})["metrics"],
        "samples": [json.loads(line) for line in lines[:show]],
    }


def similarity_table(
    a: str, b: str | None, runs: Path, encoder: str | None, take: int | None, column: str | None, watch: Watch
) -> dict[str, Any]:
    """What `qcft similarity` shows: DES of two data sets, or of a run's last two phases where only a run is named.

    Two phases of one run are also kept beside its report. Raises InputError.
    """
    from qcft.api import keep_similarity
    from qcft.models.encoders import LABSE
    from qcft.pipeline.similarity import Side, measure_similarity

    if b is None:
        phases = [phase.name for phase in read_run(runs, a).recipe().phases]
        if len(phases) < 2:
            raise InputError(f"the run {a!r} has one phase, {phases[0]}", "name another data set, or phase, as B")
        a, b = (f"{a}:{phase}" for phase in phases[-2:])
    sides = []
    for text in (a, b):
        sources = _phase_sources(text, runs)
        if sources is None:
            sources = [one for raw in _sources(text.split(","), None, None) for one in Source(**raw).expanded()]
        limited = (one.model_copy(update={"take": take}) if take else one for one in sources)
        sides.append(Side(text, tuple(limited), column))
    found = measure_similarity(sides[0], sides[1], LABSE if encoder is None else encoder, watch)
    names = [text.rpartition(":")[0] for text in (a, b)]
    if names[0] == names[1] and (runs / names[0] / "run.json").is_file() and _phase_sources(a, runs):
        keep_similarity(names[0], found, runs)
    return found


def text_files(given: list[str]) -> dict[str, Path]:
    """Text files by language, from `[LANG=]FILE`. Raises InputError."""
    files: dict[str, Path] = {}
    for text in given:
        match = LANG_PATH.fullmatch(text)
        lang, path = (match[1], match[2]) if match else ("text", text)
        if not Path(path).is_file():
            raise InputError(f"--text: there is no file {path!r}", "give a text file, a sentence a line")
        if lang in files:
            raise InputError(f"--text names {lang} twice", "write LANG=FILE, one file for each language")
        files[lang] = Path(path)
    return files


def _phase_sources(text: str, runs: Path) -> list[Source] | None:
    """The sources of `RUN:PHASE` or `RECIPE:PHASE`; None where the text is no such thing."""
    name, colon, phase_name = text.rpartition(":")
    if not colon or text.startswith(SHIPPED) or Path(text).exists():
        return None
    if (runs / name / "run.json").is_file():
        recipe = read_run(runs, name).recipe()
    elif Path(name).is_file() or name in built_in_recipes():
        recipe = load_recipe(name)
    else:
        raise InputError(f"{name!r} is no run in {str(runs)!r} and no recipe", "write RUN:PHASE, or the path of data")
    names = [phase.name for phase in recipe.phases]
    if phase_name not in names:
        raise InputError(
            f"{name} has no phase {phase_name!r}", nearest(phase_name, names) + f"it has {', '.join(names)}"
        )
    phase = recipe.phase(phase_name)
    if phase.adapter:
        raise InputError(f"{text} is an adapter made elsewhere, whose data is not known", "name its data set instead")
    return phase.sources()


def recipes_listed() -> list[dict[str, str]]:
    """Built-in recipes with the comment that heads them."""
    listed = []
    for name, path in built_in_recipes().items():
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.lstrip("# ").strip())
        listed.append({"name": name, "about": " ".join(comment)})
    return listed


def size_of(text: str) -> int:
    """Bytes of `8GB`, `7.5 GiB`, `8192M`, all by 1,024 as cards are sold. Raises InputError."""
    match = SIZE.fullmatch(text.strip())
    if not match or not float(match[1]):
        unit = f", as {text.strip()}GB" if text.strip().isdecimal() else ""
        raise InputError(f"--vram {text!r} is no size", f"give it with its unit{unit or ', as 8GB or 7.5GiB'}")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper()))


def recipe_text(name: str) -> str:
    """A built-in recipe as it is written. Raises InputError."""
    known = built_in_recipes()
    if name not in known:
        raise InputError(
            f"there is no built-in recipe {name!r}", nearest(name, list(known)) + f"there is {', '.join(known)}"
        )
    return known[name].read_text(encoding="utf-8")


def runs_listed(runs: Path) -> list[dict[str, str]]:
    """Runs with their model, phases, how many of their steps are done, and whether they are done."""
    listed = []
    store, in_ablations = Store(runs), run_states(runs)
    for run in list_runs(runs):
        try:
            recipe = run.recipe()
            model, phases = recipe.model.name, ", ".join(phase.name for phase in recipe.phases)
        except InputError as error:  # one that cannot be read does not hide the others
            model, phases = "?", error.message
        todo = [step for step in run.stages.values() if store.state(step) != "done"]
        alone = "done" if not todo else "running" if any(map(store.is_claimed, todo)) else "to do"
        listed.append(
            {
                "run": run.name,
                "model": model,
                "phases": phases,
                "steps done": f"{len(run.stages) - len(todo)} of {len(run.stages)}",
                "state": in_ablations.get(run.name, alone),
            }
        )
    return listed


def plan_listed(recipe: Recipe, runs: Path, watch: Watch) -> list[dict[str, Any]]:
    """The steps a recipe comes to, and the state of each."""
    from qcft.pipeline.run import plan_recipe

    plan, states = plan_recipe(recipe, runs, watch)
    return [
        {
            "id": step.id,
            "stage": step.stage,
            "title": step.title,
            "state": states[step.id],
            "seconds": (read_json(runs / ".steps" / step.id / "done.json") or {}).get("seconds"),
        }
        for step in plan.steps
    ]


def split(text: str | None) -> list[str]:
    """The words of a comma-separated list."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def parse_seeds(text: str | None) -> list[int]:
    """The seeds of a comma-separated list. Raises InputError."""
    for word in split(text):
        if not word.isdigit():
            raise InputError(f"--seeds: {word!r} is not a whole number", "for example --seeds 0,1")
    return [int(word) for word in split(text)]


def _sources(data: list[str], take: int | None, default_lang: str | None) -> list[dict[str, Any]]:
    sources = []
    for given in data:
        match = LANG_PATH.fullmatch(given)
        lang, path = (match[1], match[2]) if match else (default_lang, given)
        # Absolute, so that the run can be gone on with from another folder.
        path = str(Path(path).absolute()) if Path(path).exists() else path
        sources.append({"path": path, "lang": lang, "take": take})
    return sources


def _second_phase(raw: dict[str, Any], only: bool) -> dict[str, Any]:
    """The second phase of a raw recipe, added when it is not there; `only` when there is no first."""
    phases: list[dict[str, Any]] = raw["phases"]
    single_second = len(phases) == 1 and phases[0]["name"] == "phase2"
    position = 0 if only or single_second else 1
    if len(phases) <= position:
        phases.append({"name": "phase2", "data": []})
    return phases[position]


def _latest_with_phase1(runs: Path) -> NamedRun:
    for run in list_runs(runs):
        if "phase1" in run.stages or len(run.recipe().phases) > 1:
            return run
    raise InputError(
        f"there is no run with a phase 1 in {str(runs)!r}",
        "start with `qcft phase1 NAME --model M --data D`, or `qcft phase2 NAME --model M --data LANG=PATH`",
    )
