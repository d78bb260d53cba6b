"""The `evaluate` section: suites of lm-eval's tasks, languages, limits, local copies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qcft.recipe.parts import Count, Part

FIDELITY, ALPACA_EVAL = "fidelity", "alpaca_eval"  # tasks that are qcft's own work, not lm-eval's

# The paper's tasks (arXiv 2410.16006). `{lang}` stands for one task per language.
SUITES: dict[str, tuple[str, ...]] = {
    "english": ("ifeval", "hellaswag", "mmlu", "xlsum_en", ALPACA_EVAL),
    "multilingual": ("mlqa_{lang}_{lang}", "xquad_{lang}", "xlsum_{lang}", "global_mmlu_{lang}", FIDELITY),
}


class Fidelity(Part):
    """Checks in which language the model answers: greedy answers to held-out prompts of each language."""

    prompts: Annotated[Count, Field(ge=1)] = 16
    max_new_tokens: Annotated[Count, Field(ge=1)] = 64


class Evaluate(Part):
    """Which tasks, and how. `limit`: items of each task, or of a group together; `shots` and `max_new_tokens` (a
    limit): lm-eval's own where null; `stages`: by their names in `eval/`; `local`: files that replace a task's data
    on the hub."""

    suites: list[Literal["english", "multilingual"]] = []
    tasks: list[str] = []
    languages: list[str] | None = None
    stages: list[str] | None = None
    limit: Annotated[Count, Field(ge=1)] | None = None
    shots: Annotated[Count, Field(ge=0)] | None = None
    max_new_tokens: Annotated[Count, Field(ge=1)] | None = None
    batch: Annotated[Count, Field(ge=1)] | Literal["auto"] = "auto"
    local: dict[str, str] = {}
    fidelity: Fidelity = Fidelity()

    @property
    def asks_for_something(self) -> bool:
        """Whether any task is named."""
        return bool(self.suites or self.tasks)
