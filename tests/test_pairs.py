"""Two commands on one run, in every order: nothing that one made is lost by another, nor listed by `gc`.

Called below the report, which each of them writes and which takes longer than all else.
"""

import pytest
import yaml

from qcft.cli.flags import eval_recipe, phase2_recipe
from qcft.events import Watch
from qcft.files import read_json, write_json
from qcft.inspect.drift import DriftRequest, measure_drift
from qcft.recipe import recipe_from
from qcft.runner.beyond import reach
from qcft.runner.dialling import dial_for
from qcft.runner.export import goal_for
from qcft.runner.recipe import run_recipe
from qcft.store import read_run
from qcft.store.upkeep import unused_steps

from .helpers.tiny import make_recipe


def beyond(runs, goal):
    run = read_run(runs, "tiny")
    reach(run, run.recipe(), goal(run.recipe()), runs, Watch())


def again(recipe, runs, up_to=None):
    run_recipe(recipe, runs, Watch(), up_to)


def same_phase2(runs):
    return phase2_recipe(
        runs, "tiny", None, [], dict.fromkeys(("replay", "replay_loss", "freeze", "anchor")), {}, [], None, []
    )[0]


def evaluated(runs):
    return eval_recipe(runs, "tiny", {"suites": None, "tasks": ["fidelity"], "stages": ["phase2"]}, {}, [], [])


ADDING = {  # what adds stages that the recipe does not have
    "dial": lambda runs: beyond(runs, lambda recipe: dial_for(recipe, None, "0,1", None, 1.0)),
    "merge": lambda runs: beyond(runs, lambda recipe: goal_for(recipe, None, False, None)),
    "merge dequantised": lambda runs: beyond(runs, lambda recipe: goal_for(recipe, None, True, None)),
    "drift": lambda runs: measure_drift(DriftRequest("tiny", rows=1), runs, Watch()),
    "drift apart": lambda runs: measure_drift(DriftRequest("tiny", rows=1, apart=True), runs, Watch()),
    "eval": lambda runs: again(evaluated(runs), runs),
}
COMMANDS = {
    **ADDING,
    "run": lambda runs: again(recipe_from(read_run(runs, "tiny").recipe().model_dump(mode="json")), runs),
    "phase2": lambda runs: again(same_phase2(runs), runs),
    "replay": lambda runs: again(read_run(runs, "tiny").recipe(), runs, "replay"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, color_data):
    """A run with what each command adds to it: the runs folder, run.json as the recipe's run left it, the additions."""
    runs = tmp_path_factory.mktemp("pairs") / "runs"
    raw = {**make_recipe(tiny_model, color_data), "evaluate": {"fidelity": {"prompts": 1, "max_new_tokens": 4}}}
    again(recipe_from(raw), runs)
    files = {name: (runs / "tiny" / name).read_text() for name in ("run.json", "recipe.yaml")}
    added = {}
    for name, command in ADDING.items():
        before = read_run(runs, "tiny").stages
        command(runs)
        added[name] = {stage: step for stage, step in read_run(runs, "tiny").stages.items() if stage not in before}
    return runs, files, added


@pytest.mark.parametrize("first", ADDING)
def test_nothing_that_one_command_made_is_lost_by_another(made, first):
    runs, files, added = made
    assert added[first]
    for second, command in COMMANDS.items():
        for name, text in files.items():
            (runs / "tiny" / name).write_text(text)
        document = read_json(runs / "tiny" / "run.json")
        document["stages"] |= added[first]  # as after the first command alone
        write_json(runs / "tiny" / "run.json", document)
        command(runs)
        stages = read_run(runs, "tiny").stages
        assert document["stages"].items() <= stages.items(), second
        for stage, step in stages.items():
            assert (runs / "tiny" / stage).resolve() == (runs / ".steps" / step).resolve(), (second, stage)
        assert not {one.step for one in unused_steps(runs)} & set(stages.values()), second
        assert yaml.safe_load((runs / "tiny" / "recipe.yaml").read_text())["name"] == "tiny"
