"""The plan: the steps of a recipe, with ids that are digests of what each depends on."""

from qcft.plan.plan import PhaseModel, Plan
from qcft.plan.planner import make_plan

__all__ = ["PhaseModel", "Plan", "make_plan"]
