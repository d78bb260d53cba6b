"""Two-phase continual fine-tuning of language models on one GPU, in 4 bits.

import qcft
run = qcft.run("recipe.yaml", set={"phase2.replay.ratio": 0.1})
run.table["changes"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, Interrupted, QcftError

if TYPE_CHECKING:
    from qcft.api import ablate, run
    from qcft.store.results import Run, Stage

__version__ = "0.1.0"
__all__ = ["InputError", "Interrupted", "QcftError", "Run", "Stage", "ablate", "run"]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for, so that `import qcft` (and the command line's help) stays quick.
    if name in {"ablate", "run"}:
        import qcft.api

        return getattr(qcft.api, name)
    if name in {"Run", "Stage"}:
        import qcft.store.results

        return getattr(qcft.store.results, name)
    raise AttributeError(f"module 'qcft' has no attribute {name!r}")
