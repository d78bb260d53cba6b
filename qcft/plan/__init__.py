"""The plan: the steps that a recipe comes to, with ids that say what each rests on."""

from qcft.plan.plan import PhaseModel, Plan
from qcft.plan.planner import make_plan

__all__ = ["PhaseModel", "Plan", "make_plan"]
