"""Merges, exports and dials of finished runs, without printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcft.api import read, reported
from qcft.errors import InputError
from qcft.events import Watch
from qcft.recipe import Goal, Recipe
from qcft.report.card import A_MODEL, AN_ADAPTER, gguf_use, write_card
from qcft.report.curve import curve_points
from qcft.report.shown import Dialled, Exported, GgufWritten, Merged
from qcft.runner.beyond import reach
from qcft.runner.stored import not_done
from qcft.store import Store, read_run


def merge(
    name: str | None,
    to: Path | None,
    runs: Path,
    watch: Watch,
    *,
    phase: str | None = None,
    dequantised: bool = False,
    dtype: str | None = None,
    scale: float | None = None,
    by: str | None = None,
    method: str | None = None,
    density: float = 1.0,
) -> Merged:
    """Merge a run's phase (the last by default), measure what that kept, and write it to `to` with a model card.

    `scale` multiplies the phase's delta; `by` scales it by layer: `layers=0-9:0.5`. Raises QcftError.
    """
    from qcft.runner.delivery import check_place
    from qcft.runner.dialling import scaled
    from qcft.runner.export import deliver_model, goal_for

    named = read_run(runs, name)
    recipe = named.recipe()
    goal = scaled(goal_for(recipe, phase, dequantised, dtype), scale, by)
    goal = replace(goal, method=method, density=density)
    if to is not None:
        check_place(to)
    done = reach(named, recipe, goal, runs, watch)
    assert done.goal is not None
    whole = reported(done, runs)
    folder = done.stages[done.goal].opened.part("model", watch)
    if to is not None:
        onto = "the dequantised 4-bit weights, for use in 16 bits" if dequantised else "the 16-bit weights"
        what = f"{_phases(recipe, goal)}, merged onto {onto}."
        deliver_model(
            recipe,
            folder,
            to,
            lambda work: write_card(work, recipe, whole.table, f"eval/{done.goal}", what, A_MODEL),
            watch,
        )
        folder = to
    return {"folder": str(folder), "stage": done.goal, "kept": whole.table["kept"].get(done.goal)}


def export_adapter(
    name: str | None,
    to: Path,
    runs: Path,
    watch: Watch,
    *,
    phase: str | None = None,
    scale: float | None = None,
    by: str | None = None,
) -> Exported:
    """Write a run's phase (the last by default) as one PEFT adapter for the unmodified model, with a model card.

    `scale` and `by` as in `merge`. Raises QcftError.
    """
    from qcft.runner.delivery import check_place
    from qcft.runner.dialling import scale_by_weight, scaled
    from qcft.runner.export import deliver_adapter, goal_for, phases_until

    named = read_run(runs, name)
    recipe = named.recipe()
    goal = scaled(goal_for(recipe, phase, False, None), scale, by)
    last = goal.phase
    check_place(to)
    stage = f"eval/{last}"
    whole = read(named.name, runs)
    if stage not in whole.stages:
        raise not_done(named, stage)
    what = f"The adapter of {' and '.join(phases_until(recipe, last))}, for the unmodified model."
    if goal.way():
        what += f" Of {last}, it has {goal.share()}; below, {last} is measured with all of its delta."
    deliver_adapter(
        recipe,
        Store(runs),
        whole.stages[stage].step,
        to,
        lambda work: write_card(work, recipe, whole.table, stage, what, AN_ADAPTER),
        watch,
        scale_by_weight(goal, recipe, watch),
    )
    return {"folder": str(to), "phase": last}


@dataclass(frozen=True)
class Elsewhere:
    """What an export writes besides a folder: a GGUF file's type (q8_0 if only a name for Ollama is given), with
    llama.cpp's folder, a name for Ollama, a repository on the hub."""

    gguf: str | None = None
    llama_cpp: Path | None = None
    ollama: str | None = None
    push: str | None = None
    public: bool = False

    @property
    def type(self) -> str | None:
        """The type of the GGUF file; None if no GGUF file is requested."""
        return self.gguf or ("q8_0" if self.ollama is not None else None)

    def check(self, adapter_only: bool) -> None:
        """Raise InputError for flags that cannot be combined."""
        if adapter_only and self.type:
            flag = "--gguf" if self.gguf else "--ollama"
            raise InputError(
                f"{flag} cannot be combined with --adapter-only: a GGUF file holds a whole model", "omit one of them"
            )
        if self.llama_cpp is not None and not self.type:
            raise InputError("--llama-cpp needs --gguf or --ollama", "add --gguf q8_0, or omit --llama-cpp")
        if self.public and not self.push:
            raise InputError("--public needs --push", "add --push USER/REPO, or omit --public")


def export(
    name: str | None,
    to: Path,
    runs: Path,
    watch: Watch,
    *,
    phase: str | None = None,
    scale: float | None = None,
    by: str | None = None,
    adapter_only: bool = False,
    elsewhere: Elsewhere | None = None,
) -> Merged | Exported | GgufWritten:
    """Write a run's phase (the last by default) to `to` as a model, an adapter or a GGUF file, and upload the folder
    if `elsewhere.push` is set. Raises QcftError; invalid requests are refused before any work."""
    from qcft.runner.upload import check_upload, upload

    elsewhere = elsewhere or Elsewhere()
    elsewhere.check(adapter_only)
    if elsewhere.push:
        check_upload(elsewhere.push, elsewhere.public)
    found: Merged | Exported | GgufWritten
    if adapter_only:
        found = export_adapter(name, to, runs, watch, phase=phase, scale=scale, by=by)
    elif elsewhere.type:
        found = export_gguf(name, to, runs, watch, elsewhere, phase=phase, scale=scale, by=by)
    else:
        found = merge(name, to, runs, watch, phase=phase, scale=scale, by=by)
    if elsewhere.push:
        found["pushed"] = upload(to, elsewhere.push, elsewhere.public, watch)
    return found


def export_gguf(
    name: str | None,
    to: Path,
    runs: Path,
    watch: Watch,
    how: Elsewhere,
    *,
    phase: str | None = None,
    scale: float | None = None,
    by: str | None = None,
) -> GgufWritten:
    """Write a run's phase, merged, as one GGUF file with a model card, and a Modelfile for Ollama if requested; measure
    what the file kept. `scale` and `by` as in `merge`. Raises QcftError."""
    from qcft.models.ollama import create
    from qcft.runner.delivery import check_place, whole_folder
    from qcft.runner.dialling import scaled
    from qcft.runner.export import goal_for
    from qcft.runner.gguf import check_gguf_asked, kept_in_file, kept_line, write_file

    named = read_run(runs, name)
    recipe = named.recipe()
    goal = scaled(goal_for(recipe, phase, False, None), scale, by)
    check_place(to)
    kind = str(how.type)
    asked = check_gguf_asked(recipe, kind, how.llama_cpp, how.ollama, watch)
    done = reach(named, recipe, goal, runs, watch)
    assert done.goal is not None
    table = reported(done, runs).table
    model = done.stages[done.goal].opened.part("model", watch)
    what = f"{_phases(recipe, goal)}, merged onto the 16-bit weights, as a GGUF file of type {kind.upper()}."
    with whole_folder(to) as work:
        file = work / f"{recipe.name}-{goal.phase}-{kind.upper()}.gguf"
        write_file(recipe, model, file, asked, watch)
        kept = kept_in_file(read_run(runs, named.name), done.goal, file, model, runs, watch)
        what += f" {kept_line(kept, recipe.model.quantize)}"
        write_card(work, recipe, table, f"eval/{done.goal}", what, gguf_use(file.name, how.ollama))
    watch.note(f"{file.name}: {kept_line(kept, recipe.model.quantize)}")
    made = how.ollama if how.ollama is not None and create(how.ollama, to, watch) else None
    return {"folder": str(to), "stage": done.goal, "kept": kept, "file": str(to / file.name), "type": kind,
            "ollama": made}  # fmt: skip


def _phases(recipe: Recipe, goal: Goal) -> str:
    """The phases that a merged model has, and how much of the last if not all of it, for its card."""
    from qcft.runner.export import phases_until

    part = f" (of the last: {goal.share()})" if goal.way() else ""
    return f"{' and '.join(phases_until(recipe, goal.phase))}{part}"


def dial(
    name: str | None,
    scales: str | None,
    runs: Path,
    watch: Watch,
    *,
    phase: str | None = None,
    method: str | None = None,
    density: float = 1.0,
    by: Sequence[str] = (),
    merge_at: float | None = None,
    share: float | None = None,
    to: Path | None = None,
) -> Dialled:
    """Measure EA (English) and MA (the other languages) at each scale of a phase's delta, and scaled `by` layers
    (`layers=0-9:0.5`, `auto`); draw the curve of these and of the points that the run already has. `merge_at` also
    merges one scale, `share` also picks the point that keeps this share of the languages' gain.

    Raises QcftError.
    """
    from qcft.inspect.pick import check_share, pick
    from qcft.runner.delivery import check_place
    from qcft.runner.dialling import AUTO, SCALES, check_scalable, dial_for, with_measured, with_patterns

    named = read_run(runs, name)
    recipe = named.recipe()
    wanted = dial_for(recipe, phase, scales or SCALES, method, density, merge_at, by)
    check_scalable(wanted, named, runs)
    if share is not None:
        check_share(share)
    if to is not None:
        check_place(to)
    if any(text.strip() == AUTO for text in by):
        wanted = with_patterns(wanted, named, recipe, runs, watch)
    wanted = with_measured(wanted, named, runs, new_scales=scales is not None or not (by or share is not None))
    done = reach(named, recipe, wanted, runs, watch)
    assert done.goal is not None
    points = curve_points(done.stages[done.goal].metrics)
    reported(done, runs)
    drawing = done.folder / "report" / "plots" / f"{done.goal}.svg"
    found: Dialled = {"run": named.name, "phase": wanted.phase, "points": points, "drawing": str(drawing)}
    if share is not None:
        found["pick"] = pick(done, recipe, wanted, share, runs)
    if merge_at is not None:
        found["merged"] = merge(
            named.name, to, runs, watch, phase=wanted.phase, scale=merge_at, method=method, density=density
        )
    return found
