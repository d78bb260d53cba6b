"""A new kind of step is one class: it is run, resumed, listed, summed up and reused like any other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qcft.events import StepEnded, Watch
from qcft.files import write_text
from qcft.plan.plan import Plan
from qcft.prepare.settings import ADDED, CIRCUMSTANCE
from qcft.recipe import load_recipe, recipe_from
from qcft.runner import planned
from qcft.runner.recipe import run_recipe
from qcft.steps.step import Step, StoredWork, Work
from qcft.store import Store


@dataclass(frozen=True)
class Count(Work):
    """Counts the held-out rows, group by group."""

    kind: ClassVar[str] = "count"

    held_out: str
    times: int = 1
    loudly: bool = field(default=False, metadata=ADDED)
    stop_after: int | None = field(default=None, metadata=CIRCUMSTANCE)

    def do(self, step: Step, bench: Any, folder: Path) -> dict[str, Any]:
        """Write a file for each group; those that are there stay."""
        for number, group in enumerate(bench.rows.groups(self.held_out)):
            if number == self.stop_after:
                bench.watch.ask_to_stop()
                bench.watch.check_stop()
            place = folder / f"{number}.txt"
            if not place.is_file():
                write_text(place, str(len(group.rows) * self.times))
        return {"groups": len(list(folder.glob("*.txt")))}

    def summary(self, metrics: Mapping[str, Any]) -> str:
        """How many groups."""
        return f"{metrics['groups']} groups"


@pytest.fixture
def counted(monkeypatch):
    """A plan that ends with a step of the new kind."""

    def add(**settings):
        def make_plan(recipe, digests):
            step = Step(Count(digests.held_out, **settings), "count", "count the held-out rows", parents=())
            return Plan((step,))

        monkeypatch.setattr(planned, "make_plan", make_plan)

    return add


def test_it_runs_resumes_is_listed_and_summed_up(counted, qcft, raw_recipe, tmp_path):
    from qcft import Interrupted

    recipe, runs, events = recipe_from(raw_recipe), tmp_path / "runs", []
    counted(stop_after=1)
    with pytest.raises(Interrupted):
        run_recipe(recipe, runs, Watch())
    counted()
    done = run_recipe(recipe, runs, Watch(events.append))
    (step,) = (one.step for one in done.stages.values())
    assert {file.name for file in (runs / ".steps" / step).glob("*.txt")} >= {"0.txt", "1.txt"}
    (ended,) = (event for event in events if isinstance(event, StepEnded))
    assert ended.summary == f"{done.stages['count'].metrics['groups']} groups"
    assert "tiny" in qcft("ls")[1]
    before = (runs / ".steps" / step / "done.json").stat().st_mtime_ns
    assert run_recipe(recipe, runs, Watch()).stages["count"].step == step
    assert (runs / ".steps" / step / "done.json").stat().st_mtime_ns == before
    assert load_recipe(runs / "tiny" / "recipe.yaml").name == "tiny"
    assert Store(runs).opened(step).inputs["settings"] == {
        "held_out": Count.settings(_of(step, runs))["held_out"],
        "times": 1,
    }


def _of(step, runs):
    return Count(Store(runs).opened(step).inputs["settings"]["held_out"])


def test_its_id_is_made_of_its_settings_alone():
    """Of all settings, but for what was added later and has its default, and for circumstances."""
    plain = Step(Count("rows"), "count", "")
    assert plain.id == Step(Count("rows", stop_after=3), "elsewhere", "another title", "phase2").id
    others = [Count("others"), Count("rows", 2), Count("rows", loudly=True)]
    assert len({plain.id, *(Step(one, "count", "").id for one in others)}) == 4
    assert plain.settings == {"held_out": "rows", "times": 1}
    assert Step.stored(plain.id, "count", plain.inputs()).settings == plain.settings
    assert isinstance(Step.stored(plain.id, "count", plain.inputs()).work, StoredWork)


def test_a_step_sees_the_rows_of_its_digests_and_no_recipe(raw_recipe, tmp_path):
    from qcft import QcftError

    prepared = planned.PlannedRecipe(recipe_from(raw_recipe), Watch())
    bench = prepared.bench(Store(tmp_path), Watch())
    assert not [name for place in (bench, bench.model, bench.rows) for name in vars(place) if "recipe" in name]
    assert bench.rows.groups(prepared.held_out_digest()) == prepared.groups
    own = prepared.rows_digest(prepared.recipe.phases[0])
    assert bench.rows.phase("phase1", own).rows == tuple(prepared.rows["phase1"])
    for asked in (
        lambda: bench.rows.groups("another"),
        lambda: bench.rows.phase("phase1", "another"),
        lambda: bench.rows.phase("phase2", own),
        lambda: bench.rows.pool("phase2", 0, "another"),
    ):
        with pytest.raises(QcftError, match="changed since the step was planned"):
            asked()
