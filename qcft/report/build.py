"""A report from runs: its sections; those without content are omitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qcft.report.arms import ArmRuns
from qcft.report.cost import cost_section
from qcft.report.curve import dial_section
from qcft.report.document import Document, Section
from qcft.report.drift_section import drift_section
from qcft.report.layers import layers_section
from qcft.report.mix import mix_section
from qcft.report.pareto import ability_section, question_and_answer
from qcft.report.repeat import arms_section, repeat_section
from qcft.report.samples import before_section, samples_section
from qcft.report.similarity_section import similarity_section
from qcft.report.stages import stages_section
from qcft.report.suites import suites_section
from qcft.report.training import training_section

SECTIONS: tuple[Callable[[Sequence[ArmRuns]], Section | None], ...] = (
    before_section,
    ability_section,
    arms_section,
    suites_section,
    stages_section,
    samples_section,
    training_section,
    layers_section,
    mix_section,
    similarity_section,
    drift_section,
    dial_section,
    cost_section,
    repeat_section,
)


def build_report(arms: Sequence[ArmRuns], title: str | None = None) -> Document:
    """The report of one run, or of several as arms; the default title is their names."""
    question, answer = question_and_answer(arms)
    sections = [section(arms) for section in SECTIONS]
    names = [arm.name for arm in arms]
    known = names[0] if len(names) == 1 else f"{len(names)} arms: {', '.join(names)}"
    return Document(title or known, question, answer, tuple(section for section in sections if section))
