"""How the phases trained: curves of the loss over tokens, and how long each arm trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from qcft.report.ablation import count_against, epochs_in_words, trained_length
from qcft.report.arms import ArmRuns, Member, members, shared_by, with_of
from qcft.report.document import Block, Figure, Section, Table
from qcft.report.plots import LONGEST, LOWER, draw, label, look
from qcft.store.metrics import TrainMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class LoggedStep(TypedDict):
    """A step in a training's log: tokens so far, its loss, and the live probe's result if it measured."""

    tokens: int
    loss: float
    english_nll: NotRequired[float]


@dataclass(frozen=True)
class TrainingCurve:
    """One training: its phase and step, the runs that share it, and its log, step by step."""

    phase: str
    step: str
    runs: tuple[Member, ...]
    metrics: TrainMetrics
    seconds: float
    log: tuple[LoggedStep, ...]


def trainings(arms: Sequence[ArmRuns]) -> list[TrainingCurve]:
    """Every done training once, phase by phase."""
    found: dict[str, TrainingCurve] = {}
    phases = dict.fromkeys(phase.name for _, run in members(arms) for phase in run.recipe.phases)
    for phase in phases:
        for member in members(arms):
            stage = member[1].run.stages.get(phase)
            if stage is None or stage.training is None:
                continue
            runs = (*(found[stage.step].runs if stage.step in found else ()), member)
            found[stage.step] = TrainingCurve(
                phase, stage.step, runs, stage.training, stage.seconds, _log(stage.opened.log())
            )
    return list(found.values())


def training_section(arms: Sequence[ArmRuns]) -> Section | None:
    """A plot for each phase, and a table of all trainings."""
    found = trainings(arms)
    blocks: list[Block] = []
    for phase in dict.fromkeys(one.phase for one in found):
        logged = [one for one in found if one.phase == phase and one.log]
        if logged:
            blocks.append(_curves(phase, logged, arms))
        probed = [one for one in logged if any(entry.get("english_nll") is not None for entry in one.log)]
        if probed:
            blocks.append(_english(phase, probed, arms))
    if found:
        blocks.append(_table(found, arms))
    if found and len(arms) > 1:
        blocks.append(_lengths(arms))
    return Section("training", "Training", tuple(blocks)) if blocks else None


def _curves(phase: str, logged: Sequence[TrainingCurve], arms: Sequence[ArmRuns]) -> Figure:
    places = {arm.name: i for i, arm in enumerate(arms)}

    def body(axes: Axes) -> None:
        labelled: set[str] = set()
        for one in logged:
            arm = one.runs[0][0]
            own = look(places[arm.name])
            line: dict[str, Any] = {"color": own.colour, "linestyle": own.line}
            tokens = [entry["tokens"] / 1000 for entry in one.log]
            losses = [entry["loss"] for entry in one.log]
            if len(logged) == 1:
                axes.plot(tokens, losses, linewidth=0.8, alpha=0.45, color=own.colour, label="each step")
            name = "running mean" if len(logged) == 1 else _whose(one, arms)
            axes.plot(tokens, running_mean(losses), linewidth=1.8, label=name if name not in labelled else None, **line)
            labelled.add(name)
        label(axes, "tokens, thousands", f"loss, nats per token\n{LOWER}")

    several = " A line for each run of an arm." if len(logged) > len({one.runs[0][0].name for one in logged}) else ""
    return draw(
        f"training-{phase}",
        f"Training loss of {phase}, per answer token; thick line: running mean over a tenth of the training.{several}",
        f"Training loss of {phase} over the tokens trained on.",
        body,
        height=2.6,
    )


def _whose(one: TrainingCurve, arms: Sequence[ArmRuns]) -> str:
    """The arms that share a training with any of their seeds, in a form short enough for a legend."""
    own = {arm.name: arm for arm, _ in one.runs}
    name = shared_by([(arm, run) for arm in own.values() for run in arm.runs], arms)
    return name if len(name) <= LONGEST else f"{next(iter(own))} and {len(own) - 1} more"


def _english(phase: str, probed: Sequence[TrainingCurve], arms: Sequence[ArmRuns]) -> Figure:
    places = {arm.name: i for i, arm in enumerate(arms)}

    def body(axes: Axes) -> None:
        for one in probed:
            arm, run = one.runs[0]
            own = look(places[arm.name])
            found = [(entry["tokens"], nll) for entry in one.log if (nll := entry.get("english_nll")) is not None]
            axes.plot(
                [tokens / 1000 for tokens, _ in found], [nll for _, nll in found],
                color=own.colour, linestyle=own.line, marker=own.marker,
                markersize=4, label=arm.label(run),
            )  # fmt: skip
        label(axes, "tokens, thousands", f"English NLL\nnats per token, {LOWER}")

    return draw(
        f"english-{phase}",
        f"The live probe: NLL of held-out English rows while {phase} trains.",
        f"English NLL over the tokens that {phase} trained on.",
        body,
        height=2.6,
    )


def running_mean(values: Sequence[float]) -> list[float]:
    """At each place, the mean of the last values: a tenth of all, at least 3."""
    width = max(3, len(values) // 10)
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - width) : i + 1])]


TERMS = {"new_loss": "loss of new rows", "anchor_kl": "anchor KL", "distil_kl": "distilled KL"}


def _table(found: Sequence[TrainingCurve], arms: Sequence[ArmRuns]) -> Table:
    rows: list[dict[str, str]] = []
    records: list[dict[str, object]] = []
    terms = [_terms(one) for one in found]
    shown = [key for key in TERMS if any(one.get(key) is not None for one in terms)]
    for one, own in zip(found, terms, strict=True):
        m, length = one.metrics, trained_length([one.metrics])
        row = {
            "phase": one.phase,
            "steps": f"{m['steps']:,}",
            "rows": f"{m['rows']:,}",
            "tokens": f"{m['tokens']:,}",
            "answer tokens": f"{length['answer_tokens']:,}",
            "epochs": epochs_in_words(length["epochs"]),
            "trainable parameters": f"{m['trainable_parameters']:,}",
            "mean loss": f"{m['loss']:.3f}",
            **{TERMS[key]: "" if (value := own.get(key)) is None else f"{value:.3f}" for key in shown},
            "minutes": f"{one.seconds / 60:.1f}",
        }
        rows.append(with_of(row, one.runs, arms))
        records.append(
            {"phase": one.phase, "step": one.step, "runs": " ".join(run.run.name for _, run in one.runs)}
            | {"steps": m["steps"], "rows": m["rows"], "tokens": m["tokens"]}
            | {"answer_tokens": length["answer_tokens"]}
            | {"trainable_parameters": m["trainable_parameters"], "loss": m["loss"]}
            | {key: cast("object", own.get(key)) for key in shown}
            | {"seconds": one.seconds}
        )
    note = "Rows and tokens are counted over all epochs."
    if shown:
        note += " Loss is cross-entropy; each term is a mean over the answer tokens that have it, in nats."
    return Table.of("training", "Length of training", rows, records, note)


def _terms(one: TrainingCurve) -> dict[str, float | None]:
    """The values of the terms of its loss; empty if it has none."""
    terms = one.metrics.get("terms")
    if not terms:
        return {}
    return {"new_loss": terms["new_loss"], "anchor_kl": terms["anchor_kl"], "distil_kl": terms["distil_kl"]}


def _lengths(arms: Sequence[ArmRuns]) -> Table:
    """All phases of each arm's first run together, compared with the first arm."""
    rows: list[dict[str, str]] = []
    records: list[dict[str, object]] = []
    lengths = {arm.name: trained_length(arm.runs[0].run.trainings()) for arm in arms}
    first = next(iter(lengths.values()))
    for name, length in lengths.items():
        row = {
            "arm": name,
            "optimizer steps": count_against(length["steps"], first["steps"], length is first),
            "answer tokens": count_against(length["answer_tokens"], first["answer_tokens"], length is first),
            "tokens": count_against(length["tokens"], first["tokens"], length is first),
            "epochs": epochs_in_words(length["epochs"]),
        }
        rows.append(row)
        records.append({"arm": name, **length, "epochs": row["epochs"]})
    note = (
        "All phases together, with replay, of each arm's first seed; in brackets the difference from the first arm. "
        "Answer tokens are those with loss. Epochs of each phase."
    )
    return Table.of("lengths", "How long each arm trained", rows, records, note)


def _log(path: Path | None) -> tuple[LoggedStep, ...]:
    """The steps of a training's log; lines that a kill cut short, or that have no loss, are skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and all(isinstance(entry.get(key), int | float) for key in ("loss", "tokens")):
            found.append(cast("LoggedStep", entry))
    return tuple(found)
