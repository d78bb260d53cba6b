"""Two-phase continual fine-tuning of language models on one GPU, in 4 bits.

import qcft
run = qcft.run("recipe.yaml", set={"phase2.replay.ratio": 0.1})
run.frame()                              # all numbers, one per row; in a notebook, `run` shows its table and its plot
qcft.compare(run, prompts=["Hola"])      # answers of the stages side by side
qcft.open("quickstart").report()         # an earlier run
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, Interrupted, QcftError

if TYPE_CHECKING:
    from qcft.public import (
        Ablation,
        Comparison,
        Run,
        ablate,
        chat,
        check_recipe,
        compare,
        export,
        merge,
        open,
        run,
        runs,
    )
    from qcft.store.results import Stage

__version__ = "0.1.0"
__all__ = [
    "Ablation",
    "Comparison",
    "InputError",
    "Interrupted",
    "QcftError",
    "Run",
    "Stage",
    "ablate",
    "chat",
    "check_recipe",
    "compare",
    "export",
    "merge",
    "open",
    "run",
    "runs",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import qcft` (and the command line's help) stays quick.
    if name == "Stage":
        import qcft.store.results

        return qcft.store.results.Stage
    if name in __all__:
        import qcft.public

        return getattr(qcft.public, name)
    raise AttributeError(f"module 'qcft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "__doc__"]
