"""The plan: which steps, in which order, and what their ids depend on."""

import json
from dataclasses import replace

import pytest

from qcft.errors import InputError
from qcft.plan import make_plan
from qcft.plan.beyond import plan_beyond
from qcft.prepare.digests import Digests
from qcft.recipe import ByLayer, Dial, Goal, recipe_from
from qcft.steps.step import Step

RAW = {
    "name": "x",
    "model": "m",
    "phases": [
        {"name": "phase1", "data": [{"path": "a", "lang": "en"}]},
        {"name": "phase2", "data": [{"path": "b", "lang": "es"}], "replay": {"ratio": 0.2}},
    ],
}
DIGESTS = Digests("model", {"phase1": "a", "phase2": "b"}, {"phase2": ("a",)}, "held")


def plan(changes=None, digests=DIGESTS):
    return make_plan(recipe_from(RAW, changes or {}), digests)


def test_the_stages_of_two_phases_in_order():
    assert [s.stage for s in plan().steps] == [
        "eval/base-16bit", "eval/base", "phase1", "eval/phase1", "merged", "eval/merged", "kept-merged",
        "replay", "phase2", "eval/phase2",
    ]  # fmt: skip


def test_each_step_loads_what_came_before():
    stages = {s.stage: s for s in plan().steps}
    assert stages["eval/phase1"].adapter == stages["phase1"].id
    assert stages["merged"].adapter == stages["phase1"].id
    assert stages["phase2"].weights == stages["merged"].id == stages["replay"].weights
    assert stages["phase2"].parents == (stages["replay"].id,)
    assert stages["kept-merged"].parents == tuple(stages[f"eval/{s}"].id for s in ("base", "phase1", "merged"))


def test_without_quantisation_the_base_is_measured_once():
    assert [s.stage for s in plan({"model.quantize": "none"}).steps][:2] == ["eval/base", "phase1"]


def test_one_phase_has_nothing_to_merge():
    stages = [s.stage for s in plan({"phase1": None}).steps]
    assert stages == ["eval/base-16bit", "eval/base", "replay", "phase2", "eval/phase2"]


def test_merged_means_every_earlier_delta():
    """Also after a phase that began from the base again."""
    third = {"name": "phase3", "data": [{"path": "c", "lang": "fr"}]}
    raw = {**RAW, "phases": [RAW["phases"][0], {**RAW["phases"][1], "start": "base"}, third]}
    digests = Digests("model", {"phase1": "a", "phase2": "b", "phase3": "c"}, {"phase2": ("a",)}, "held")
    stages = {s.stage: s for s in make_plan(recipe_from(raw), digests).steps}
    assert stages["phase2"].weights is None
    assert (stages["merged"].weights, stages["merged"].adapter) == (None, stages["phase1"].id)
    assert stages["merged-phase2"].weights == stages["merged"].id
    assert stages["merged-phase2"].adapter == stages["phase2"].id
    assert stages["phase3"].weights == stages["merged-phase2"].id
    # Phase 2's adapter meets other weights than its own there: what that kept can't be computed from its probes.
    assert "kept-merged" in stages
    assert "kept-merged-phase2" not in stages


def test_the_system_prompt_replay_speaks_under_is_part_of_its_id():
    before, after = plan().stages(), plan({"phase1.system": "be kind"}).stages()
    assert before["replay"] != after["replay"]
    base = {"phase2.start": "base"}
    assert plan(base).stages()["phase2"] != plan({**base, "phase1.system": "be kind"}).stages()["phase2"]


def test_starting_from_the_base_merges_nothing():
    stages = {s.stage: s for s in plan({"phase2.start": "base"}).steps}
    assert "merged" not in stages
    assert stages["phase2"].weights is None


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"phase2.freeze": "first:2"}, {"phase2", "eval/phase2"}),
        ({"phase2.replay.ratio": 0.1}, {"replay", "phase2", "eval/phase2"}),
        ({"phase2.replay.temperature": 0.1}, {"replay", "phase2", "eval/phase2"}),
        ({"phase2.anchor": "kl"}, {"phase2", "eval/phase2"}),
        ({"phase2.anchor": None, "phase2.replay.loss": "answer"}, set()),
        ({"phase2.replay.loss": "distil"}, {"phase2", "eval/phase2"}),
        ({"phase1.anchor": "target-masked"}, set(plan().stages()) - {"eval/base-16bit", "eval/base"}),
        (
            {"answers.prompts": 3},
            {"eval/base-16bit", "eval/base", "eval/phase1", "eval/merged", "kept-merged", "eval/phase2"},
        ),
        ({"phase2.train.report_to": ["wandb"], "phase2.train.checkpoint_steps": 3, "name": "other"}, set()),
    ],
)
def test_a_change_touches_only_what_depends_on_it(change, changed):
    before, after = plan().stages(), plan(change).stages()
    assert {s for s in before if before[s] != after[s]} == changed


def test_an_anchor_is_known_by_its_weight_and_nothing_is_where_there_is_none():
    def settings(changes):
        return plan(changes).step("phase2").settings

    assert not {"anchor", "replay_loss"} & settings({}).keys()
    assert settings({"phase2.anchor": "kl"})["anchor"] == {"kind": "kl", "weight": 0.01}
    assert settings({"phase2.anchor": {}})["anchor"] == {"kind": "target-masked", "weight": 1.0}
    assert settings({"phase2.anchor": "kl"}) == settings({"phase2.anchor": {"kind": "kl", "weight": 0.01}})
    assert settings({"phase2.replay.loss": "distil"})["replay_loss"] == "distil"


def test_everything_depends_on_the_model_and_the_seed_on_training():
    other = Digests("other", DIGESTS.phases, DIGESTS.replay, DIGESTS.held_out)
    assert not set(plan().stages().values()) & set(plan(digests=other).stages().values())
    before, after = plan().stages(), plan({"seed": 1}).stages()
    assert before["phase1"] != after["phase1"]
    assert before["eval/base"] == after["eval/base"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"phase2.replay.ratio": 0.5}, True),
        ({"phase2.replay.unit": "tokens", "phase2.replay.on_shortfall": "repeat"}, True),
        ({"phase2.replay.filters.language": "de"}, True),
        ({"phase2.freeze": "first:2", "phase2.train.lr": 1}, True),
        ({"phase2.replay.temperature": 0}, False),
        ({"phase2.replay.max_new_tokens": 9}, False),
        ({"phase1.system": "be kind"}, False),
        ({"phase1.train.lr": 1}, False),
        ({"seed": 1}, False),
    ],
)
def test_a_pool_depends_on_what_is_generated_not_on_how_much_is_drawn(change, same):
    before, after = plan(), plan(change)
    assert (before.pools.keys() == after.pools.keys()) is same
    pool = next(iter(after.pools.values()))
    assert pool.weights == after.step("replay").weights == after.step("merged").id


def test_a_plan_up_to_a_stage_has_what_it_depends_on():
    assert [s.stage for s in plan().up_to("replay")] == ["phase1", "merged", "replay"]
    assert [s.stage for s in plan({"phase2.replay.kind": "phase1"}).up_to("replay")] == ["replay"]


def chained(*starts):
    phases = [{"name": f"p{i}", "data": [{"path": "a", "lang": "en"}]} for i in range(len(starts) + 1)]
    for phase, start in zip(phases[1:], starts, strict=True):
        phase["start"] = start
    digests = Digests("model", {p["name"]: p["name"] for p in phases}, {}, "held")
    return make_plan(recipe_from({**RAW, "phases": phases}), digests)


def beyond(made, goal, seed=0):
    """What is planned for a goal, from a run that has all steps of a plan."""
    phases = [{"name": one.phase.name, "data": [{"path": "a"}], "start": one.phase.start} for one in made.live.values()]
    phases[0].pop("start")
    stored = [Step.stored(step.id, step.stage, json.loads(json.dumps(step.inputs()))) for step in made.steps]
    return plan_beyond(recipe_from({**RAW, "phases": phases, "seed": seed}), stored, goal)


def test_a_stack_has_one_base_and_a_continued_adapter_replaces_its_start():
    made = chained("stacked", "continue", "stacked")
    steps = {s.stage: s for s in made.steps}
    p0, p1, p2, p3 = (steps[f"p{i}"].id for i in range(4))
    assert not [s for s in made.steps if s.kind == "merge"]
    assert (steps["p1"].under, steps["p1"].adapter) == ((p0,), None)
    assert (steps["p2"].under, steps["p2"].adapter) == ((p0,), p1)
    assert (steps["p3"].under, steps["p3"].adapter) == ((p0, p2), None)
    assert (steps["eval/p3"].under, steps["eval/p3"].adapter) == ((p0, p2), p3)
    assert made.live["p3"].phases == ("p0", "p1", "p2", "p3")


def test_only_a_continued_adapter_on_a_quantised_model_says_how_it_is_carried():
    made = chained("stacked", "continue", "stacked")
    assert [s.stage for s in made.steps if "carried" in s.settings] == ["p2"]


def test_a_merged_phase_after_a_stack_merges_it_in_one_step():
    steps = {s.stage: s for s in chained("stacked", "merged").steps}
    merged = steps["merged-p1"]
    assert (merged.under, merged.adapter) == ((steps["p0"].id,), steps["p1"].id)
    assert steps["p2"].weights == merged.id
    assert steps["kept-merged-p1"].parents == tuple(steps[f"eval/{s}"].id for s in ("base", "p1", "merged-p1"))


def test_a_goal_is_planned_from_the_steps_of_a_run():
    made = chained("merged")
    merged, measured, kept = beyond(made, Goal("p1")).steps
    steps = {s.stage: s for s in made.steps}
    assert (merged.stage, merged.weights, merged.adapter) == ("merged-p1", steps["merged"].id, steps["p1"].id)
    assert (measured.stage, measured.weights) == ("eval/merged-p1", merged.id)
    assert kept.parents == (steps["eval/merged"].id, steps["eval/p1"].id, measured.id)
    there = beyond(made, Goal("p0"))  # the run has that merge already
    assert [s.id for s in there.steps] == [steps[name].id for name in ("merged", "eval/merged", "kept-merged")]
    at = beyond(made, Goal("p1", scale=0.7))
    assert at.stage == "merged-p1-at-0.7"
    assert [s.kind for s in at.steps] == ["merge", "probe"]
    assert beyond(made, Goal("p0", dtype="float32")).stage == "merged-float32"  # phase 2 depends on the other
    (dialled,) = beyond(made, Dial("p1", (0.0, 1.0))).steps
    assert dialled.stage == "dial-p1"
    assert (dialled.weights, dialled.adapter) == (merged.weights, merged.adapter)
    assert "by" not in dialled.settings  # the ids of dials before there were layers
    by = ByLayer.of([(0, 4, 0.5)])
    (layered,) = beyond(made, Dial("p1", (0.0, 1.0), by=(by,))).steps
    assert layered.settings == {**dialled.settings, "by": ["layers=0-4:0.5"]}
    half = beyond(made, Goal("p1", by=by))
    assert half.stage == "merged-p1-at-layers-0-4x0.5"
    settings = half.steps[0].settings
    assert settings.pop("by") == "layers=0-4:0.5"
    assert "scale" not in settings


def test_a_merge_that_is_drawn_depends_on_the_seed():
    """DARE drops by chance. Ids of the default seed are those of before it was one of the settings."""
    made, drawn = chained("merged"), Goal("p1", scale=0.5, method="dare_linear", density=0.5)
    ids = {seed: beyond(made, drawn, seed).steps[0] for seed in (0, 1)}
    assert ids[0].id != ids[1].id
    assert ("seed" in ids[0].settings, ids[1].settings["seed"]) == (False, 1)
    assert beyond(made, Goal("p1", scale=0.5), 0).steps[0].id == beyond(made, Goal("p1", scale=0.5), 1).steps[0].id


def test_a_stack_is_merged_at_once_and_a_missing_stage_is_named():
    merged, _, kept = beyond(chained("stacked", "stacked"), Goal("p2")).steps
    assert len(merged.under) == 2
    assert kept.settings["phases"] == ["p0", "p1", "p2"]
    made = chained("merged")
    without = replace(made, steps=tuple(step for step in made.steps if step.stage != "eval/p1"))
    with pytest.raises(KeyError, match="eval/p1"):
        beyond(without, Goal("p1"))


def every_stage(raw):
    """The stages that some plan of a recipe makes: its own, and those of all that can be asked for beyond it."""
    names = [phase["name"] for phase in raw["phases"]]
    digests = Digests("model", dict.fromkeys(names, "a"), dict.fromkeys(names, ("a",)), "held", tasks={"t": "d"})
    ways = [
        {},
        {"by": ByLayer.of([(0, 1, 0.5)])},
        {"dequantised": True},
        {"scale": 0.5},
        {"scale": 0.5, "method": "ties", "density": 0.2},
    ]
    goals = [Goal(name, **way) for name in names for way in ways]
    goals += [Dial(name, (0.0, 1.0), *how) for name in names for how in [(), ("ties", 0.2)]]
    made = make_plan(recipe_from(raw), digests)
    return {*made.stages(), *(step.stage for goal in goals for step in beyond(made, goal).steps)}


def with_phases(*names):
    phases = [{"name": name, "data": [{"path": "a", "lang": "es"}], "freeze": "snr:0.5"} for name in names]
    for phase in phases[1:]:
        phase["replay"] = {"ratio": 0.2, "kind": "english"}
    return {"name": "x", "model": "m", "evaluate": {"stages": ["base"]}, "phases": phases}


def test_no_phase_can_have_the_name_of_another_stage():
    """Whatever stage a plan makes beside the phases' own, a recipe with a phase of its name is refused."""
    names = ["a", "b", "c"]
    stages = every_stage(with_phases(*names))
    taken = {word for stage in stages for word in stage.split("/")[:2]} - {*names} | {"run.json", "Merged", "a.path"}
    assert {"eval", "abilities", "base-16bit", "merged-b", "kept-merged", "merged-c-at-0.5-ties-0.2"} <= taken
    assert {"dial-a", "dial-b-ties-0.2", "replay-c", "layers-b", "merged-a-dequantised"} <= taken
    for name in taken - {"t"}:
        with pytest.raises(InputError, match="would be mistaken for") as refused:
            recipe_from(with_phases("a", name, "c"))
        assert "rename the phase" in refused.value.hint
    for name in ("a-dequantised", "a-at-0.5", "a-ties-0.2", "A-at-1"):  # merged-a-dequantised is whose?
        with pytest.raises(InputError, match="a stage that qcft makes of 'a'"):
            recipe_from(with_phases("a", name, "c"))


def test_phases_with_similar_names_have_separate_stages():
    names = ["es", "es-run-2", "mergedly", "keptsake", "dialect", "based"]
    stages = every_stage(with_phases(*names))
    assert {*names} <= stages
    assert {f"merged-{name}" for name in names[1:]} <= stages
