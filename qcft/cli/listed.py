"""What `qcft ls` lists: runs and ablations, as numbers for scripts and as a table. Prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcft.errors import InputError, QcftError
from qcft.files import read_json
from qcft.measure.results import finished_run
from qcft.recipe import Phase, Recipe
from qcft.store import NamedRun, Store, list_runs
from qcft.store.ablations import AblationIndex, ArmState, readable_ablations
from qcft.store.holding import holders
from qcft.store.opened import run_again
from qcft.store.runs import RUN


def runs_listed(runs: Path) -> list[dict[str, Any]]:
    """Runs, the latest first, then ablations; `problem` says why one cannot be read.

    `english`: how far the last phase moved English since the first (since the base where there is one phase), NLL in
    nats per answer token; null where it is not measured. `run` is the name to give to other commands.
    """
    ablations, problems = readable_ablations(runs)
    states = {ablation.name: ablation.states() for ablation in ablations}
    arms = {one.run: (name, one) for name, those in states.items() for one in those}
    store = Store(runs)
    listed = [_run(run, store, arms.get(run.name)) for run in list_runs(runs)]
    listed += [_ablation(ablation, states[ablation.name]) for ablation in ablations]
    return listed + [_entry("ablation", name, state="damaged", problem=text) for name, text in problems.items()]


def in_columns(listed: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The same as table cells, the most important columns first."""
    return [
        {
            "run": one["run"],
            "state": one["state"],
            "done": _of(one),
            "English": f"{one['english']['value']:+.3f}" if one["english"] else "-",
            "data": _data(one["data"]),
            "replay": "-" if one["replay"] is None else f"{one['replay']:g}",
            "freeze": one["freeze"] or "-",
            "made": (one["made"] or "-")[:10],
            "ablation": one["ablation"] or "-",
            "model": Path(one["model"]).name if one["model"] else "-",
        }
        for one in listed
    ]


def _entry(kind: str, name: str, **known: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(
        ("made", "ablation", "model", "replay", "freeze", "english", "steps", "done", "runs", "problem")
    )
    return {"run": name, "kind": kind, "state": "to do", "phases": [], "data": {}, **unknown, **known}


def _run(run: NamedRun, store: Store, arm: tuple[str, ArmState] | None) -> dict[str, Any]:
    made = (read_json(run.folder / RUN) or {}).get("created")
    ablation = arm[0] if arm else None
    try:  # one that cannot be read does not hide the others
        if run.problem:
            raise InputError(run.problem)
        recipe = run.recipe()
        damaged = [step for step in run.stages.values() if store.state(step) == "done" and store.record(step) is None]
        if damaged:
            raise InputError(f"{damaged[0]}: done.json is altered; `{run_again(run.folder)}` rebuilds it")
    except InputError as error:
        return _entry("run", run.name, made=made, ablation=ablation, state="damaged", problem=error.message)
    todo = [step for step in run.stages.values() if store.state(step) != "done"]
    at_work = holders(run.folder) or any(map(store.is_claimed, todo))
    alone = "running" if at_work else "to do" if todo else "done"
    last = recipe.phases[-1]
    return _entry(
        "run",
        run.name,
        state=arm[1].state if arm else alone,
        phases=[phase.name for phase in recipe.phases],
        data={phase.name: _languages(phase) for phase in recipe.phases},
        made=made,
        ablation=ablation,
        model=recipe.model.name,
        replay=last.replay.ratio if last.replay and last.replay.ratio else None,
        freeze=None if last.freeze.kind == "none" else str(last.freeze),
        english=_english(run, recipe, store),
        steps=len(run.stages),
        done=len(run.stages) - len(todo),
    )


def _ablation(ablation: AblationIndex, states: list[ArmState]) -> dict[str, Any]:
    document, kinds = ablation.document, [one.state for one in states]
    state = next((kind for kind in ("running", "failed", "to do") if kind in kinds), "done")
    return _entry(
        "ablation",
        ablation.name,
        state=state,
        made=document["created"],
        model=document["recipe"].get("model", {}).get("name"),
        runs=len(states),
        done=kinds.count("done"),
    )


def _english(run: NamedRun, recipe: Recipe, store: Store) -> Mapping[str, Any] | None:
    """How far the last phase moved a run's first English group; None where it is not measured."""
    try:
        table = finished_run(run, recipe, run.stages, store).table
    except QcftError:  # a file was altered: `qcft show` says which
        return None
    names = [group["name"] for group in table["groups"] if group["english"]]
    return table["changes"][0]["groups"].get(names[0]) if names and table["changes"] else None


def _languages(phase: Phase) -> list[str]:
    if phase.adapter:
        return ["adapter"]
    return list(dict.fromkeys(str(source.lang or "?") for source in phase.sources()))


def _data(data: Mapping[str, list[str]]) -> str:
    return " > ".join(", ".join(languages) for languages in data.values()) or "-"


def _of(one: Mapping[str, Any]) -> str:
    if one["done"] is None:
        return "-"
    return f"{one['done']} of {one['runs']} runs" if one["runs"] is not None else f"{one['done']} of {one['steps']}"
