"""The recipe: its schema, its specs, and how it is read and changed. Does not import torch."""

from qcft.recipe.ablation import AblationSpec, ArmSpec
from qcft.recipe.anchor import Anchor
from qcft.recipe.arms import ArmRun, chosen_arms, expand_ablation, load_ablation
from qcft.recipe.by_layer import ByLayer, parse_by_layer
from qcft.recipe.evaluate import ALPACA_EVAL, FIDELITY, SUITES, Evaluate, Fidelity
from qcft.recipe.freeze import FreezeSpec, frozen_layers, frozen_modules, parse_freeze
from qcft.recipe.goal import Dial, Goal
from qcft.recipe.load import built_in_recipes, load_recipe, parse_assignments, read_recipe, recipe_from
from qcft.recipe.parts import Source
from qcft.recipe.peft import Peft
from qcft.recipe.replay import Filters, Replay, ReplayPart
from qcft.recipe.schema import (
    TESTS,
    Answers,
    Forgetting,
    HeldOut,
    Lora,
    MeasuredPhase,
    MergeLimits,
    Model,
    Phase,
    Recipe,
    Temperature,
    Train,
)

__all__ = [
    "ALPACA_EVAL",
    "FIDELITY",
    "SUITES",
    "TESTS",
    "AblationSpec",
    "Anchor",
    "Answers",
    "ArmRun",
    "ArmSpec",
    "ByLayer",
    "Dial",
    "Evaluate",
    "Fidelity",
    "Filters",
    "Forgetting",
    "FreezeSpec",
    "Goal",
    "HeldOut",
    "Lora",
    "MeasuredPhase",
    "MergeLimits",
    "Model",
    "Peft",
    "Phase",
    "Recipe",
    "Replay",
    "ReplayPart",
    "Source",
    "Temperature",
    "Train",
    "built_in_recipes",
    "chosen_arms",
    "expand_ablation",
    "frozen_layers",
    "frozen_modules",
    "load_ablation",
    "load_recipe",
    "parse_assignments",
    "parse_by_layer",
    "parse_freeze",
    "read_recipe",
    "recipe_from",
]
