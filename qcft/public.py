"""The Python API of `import qcft`: runs and ablations as objects that notebooks can display, and functions on them.
Paths may be strings; `runs` is the folder that holds the runs; all functions raise QcftError."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qcft import api, deliveries
from qcft.events import Listener, Watch
from qcft.recipe import Recipe
from qcft.report.arms import arms_of
from qcft.report.build import build_report
from qcft.report.comparison import Compared, samples_of
from qcft.report.notebook import in_notebook, samples_in_notebook
from qcft.report.shown import Exported, GgufWritten, Merged
from qcft.report.tidy import COLUMNS, tidy_rows
from qcft.store import ablations, list_runs, read_run, results
from qcft.terminal.progress import notebook_reporter

if TYPE_CHECKING:
    from pandas import DataFrame

    from qcft.check.recipe import Checked
    from qcft.inspect.chat import Chat


@dataclass(frozen=True, repr=False)
class Run(results.Run):
    """A run, finished or not: `stages` by name, `table` of stages and languages, `failed` evaluations. A notebook shows
    its table and its plot."""

    def __repr__(self) -> str:
        return f"<qcft run {self.name!r}: {', '.join(self.stages) or 'nothing done yet'}; {self.folder}>"

    def _repr_html_(self) -> str:
        return in_notebook(build_report(arms_of([api.evidence(self.name, self.folder.parent)])))

    def frame(self) -> DataFrame:
        """The run's numbers, one per row: arm, seed, stage, language, rows_of, measure, value, low, high."""
        return _frame([(self, self.name)])

    def report(self, to: str | Path | None = None) -> Path:
        """Write the run's report, by default into its own folder; returns the page's path."""
        return _report(self.name, self.folder.parent, to)


class Ablation(ablations.AblationIndex):
    """An ablation, finished or not; `states()` has the state of each arm and seed. A notebook shows its arms and their
    plot."""

    def __repr__(self) -> str:
        states = self.states()
        done = sum(state.state == "done" for state in states)
        return f"<qcft ablation {self.name!r}: {done} of {len(states)} runs done; {self.folder}>"

    def _repr_html_(self) -> str:
        arms = self._done()
        return in_notebook(build_report(arms_of([api.evidence(run, self.runs) for run in arms], arms), self.name))

    def frame(self) -> DataFrame:
        """The numbers of every finished run, one per row: arm, seed, stage, language, rows_of, measure, value, low,
        high."""
        return _frame([(api.read(run, self.runs), arm) for run, arm in self._done().items()])

    def report(self, to: str | Path | None = None) -> Path:
        """Write the arms' report, by default into the ablation's folder; returns the page's path."""
        return _report(self.name, self.runs, to)

    def _done(self) -> dict[str, str]:
        return {state.run: state.arm for state in self.states() if state.state == "done"}


class Comparison(dict[str, Any]):
    """Answers of several stages to the same prompts, as `qcft compare --json` prints them. A notebook shows them side
    by side."""

    def _repr_html_(self) -> str:
        return samples_in_notebook(samples_of(cast("Compared", self)))


def run(
    recipe: str | Path | Recipe,
    *,
    set: Mapping[str, Any] | None = None,
    runs: str | Path = "runs",
    listener: Listener | None = None,
) -> Run:
    """Run a whole recipe (a file, a built-in name, or a loaded one).

    `set` changes recipe keys: `{"phase2.replay.ratio": 0.1}`. `listener` is called with every event; by default a
    notebook shows them, and elsewhere nothing is printed. A task that failed is in the run's `failed`.
    """
    with _shown(listener) as shown:
        return Run(**vars(api.run(recipe, set=set, runs=runs, listener=shown)))


def ablate(
    recipe: str | Path,
    *,
    set: Mapping[str, Any] | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    runs: str | Path = "runs",
    listener: Listener | None = None,
) -> Ablation:
    """Run a recipe's arms x seeds in this process (all, or those named), reusing finished steps.

    If an arm fails, the next ones still run; `states()` shows it. `set` and `listener` as for `run`.
    """
    with _shown(listener) as shown:
        done = api.ablate(recipe, set=set, arms=arms, seeds=seeds, runs=runs, listener=shown)
    return Ablation(done.runs, done.name)


def open(name: str | None = None, *, runs: str | Path = "runs") -> Run | Ablation:
    """Open a run or an ablation by its name, or the latest run without a name. Nothing is run."""
    if name is not None and name in ablations.list_ablations(Path(runs)):
        return Ablation(Path(runs), name)
    return Run(**vars(api.read(name, runs)))


def runs(folder: str | Path = "runs") -> list[str]:
    """The names of the runs in a folder, the latest first; `open` takes them."""
    return [found.name for found in list_runs(Path(folder))]


def check_recipe(
    recipe: str | Path | Recipe,
    *,
    set: Mapping[str, Any] | None = None,
    runs: str | Path = "runs",
    measure: bool = False,
    listener: Listener | None = None,
) -> Checked:
    """What a recipe needs, as `qcft check --json` prints it: memory, time, disk. Nothing is trained or written.

    `measure`: run a few real optimizer steps and time them.
    """
    from qcft.check.recipe import check_recipe as checked

    loaded = api.loaded_recipe(recipe, set)
    with _shown(listener) as shown:
        return checked(loaded, Path(runs), Watch(shown), measure=measure)


def merge(
    run: str | results.Run | None = None,
    to: str | Path | None = None,
    *,
    stage: str | None = None,
    scale: float = 1.0,
    runs: str | Path = "runs",
    listener: Listener | None = None,
) -> Merged:
    """Merge a run's phase (`stage`, the last by default) and all phases before it into one 16-bit model, in the run or
    in the new folder `to`. Returns its `folder`, its `stage` and what merging `kept`. `scale` multiplies the last
    delta."""
    name, at = _named(run, runs)
    with _shown(listener) as shown:
        return deliveries.merge(name, _path(to), at, Watch(shown), phase=stage, scale=scale)


def export(
    run: str | results.Run | None = None,
    *,
    to: str | Path,
    stage: str | None = None,
    adapter_only: bool = False,
    gguf: str | None = None,
    llama_cpp: str | Path | None = None,
    ollama: str | None = None,
    push: str | None = None,
    public: bool = False,
    runs: str | Path = "runs",
    listener: Listener | None = None,
) -> Merged | Exported | GgufWritten:
    """Write a phase's model (the last by default), or one PEFT adapter of all phases, to a new folder with a card.

    `gguf` (f16, bf16, q8_0, q4_k_m) writes one file for llama.cpp and Ollama instead, and measures what it kept;
    `llama_cpp` is llama.cpp's folder, `ollama` a name for the model in Ollama. `push` uploads the folder to the
    repository USER/REPO on the hub, private unless `public`.
    """
    name, at = _named(run, runs)
    elsewhere = deliveries.Elsewhere(gguf, _path(llama_cpp), ollama, push, public)
    with _shown(listener) as shown:
        return deliveries.export(
            name, Path(to), at, Watch(shown), phase=stage, adapter_only=adapter_only, elsewhere=elsewhere
        )


def compare(
    run: str | results.Run | None = None,
    *,
    prompts: Sequence[str] = (),
    stages: Sequence[str] = (),
    other: str | None = None,
    rows: int | None = None,
    langs: Sequence[str] = (),
    max_new_tokens: int | None = None,
    to: str | Path | None = None,
    runs: str | Path = "runs",
    listener: Listener | None = None,
) -> Comparison:
    """The greedy answers of a run's stages (base and each finished phase by default) to the same prompts, or to `rows`
    held-out rows of each of `langs`; `other` names a second run, `to` an HTML page to write."""
    from qcft.inspect.compare import Comparing, compare_stages

    name, at = _named(run, runs)
    asked = Comparing(name, other, _several(stages), _several(prompts), None, rows, _several(langs), max_new_tokens)
    with _shown(listener) as shown:
        return Comparison(compare_stages(asked, at, Watch(shown), _path(to)))


def chat(
    run: str | results.Run | None = None,
    *,
    stage: str | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    system: str | None = None,
    runs: str | Path = "runs",
    listener: Listener | None = None,
) -> Chat:
    """A chat with a stage of a run, the last finished phase by default: `chat.answer("Hola")` returns the answer by
    stage, `chat.use("base")` switches the stage, `chat.both()` lets two stages answer."""
    from qcft.inspect.chat import Chat

    name, at = _named(run, runs)
    return Chat(name, at, Watch(listener), stage, temperature, max_new_tokens, system)


@contextmanager
def _shown(listener: Listener | None) -> Iterator[Listener | None]:
    """The listener; without one, in a notebook, a reporter that shows the work there."""
    reporter = None if listener else notebook_reporter()
    try:
        yield listener or reporter
    finally:
        if reporter:
            reporter.close()


def _named(run: str | results.Run | None, runs: str | Path) -> tuple[str, Path]:
    """The name of a run and its runs folder."""
    if isinstance(run, results.Run):
        return run.name, run.folder.parent
    return read_run(Path(runs), run).name, Path(runs)


def _path(to: str | Path | None) -> Path | None:
    return None if to is None else Path(to)


def _several(given: str | Sequence[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given


def _report(name: str, runs: Path, to: str | Path | None) -> Path:
    return Path(api.report([name], runs, Watch(), _path(to))["page"])


def _frame(found: Sequence[tuple[results.Run, str]]) -> DataFrame:
    from pandas import DataFrame

    rows = [
        row
        for one, arm in found
        for row in tidy_rows(one.table, arm, read_run(one.folder.parent, one.name).recipe().seed)
    ]
    return DataFrame(rows, columns=[*COLUMNS]).astype({"value": float, "low": float, "high": float})
