"""The plan: the steps that a recipe comes to, with ids that say what each rests on."""

from qcft.plan.planner import make_plan
from qcft.plan.steps import FORMATS, Digests, Live, Plan, Step

__all__ = ["FORMATS", "Digests", "Live", "Plan", "Step", "make_plan"]
