"""AlpacaEval's prompts; its judge compares the models' answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcft.errors import InputError
from qcft.hub import unreachable
from qcft.measure.local import check_local, read_local
from qcft.recipe import ALPACA_EVAL

ALPACA_HUB, ALPACA_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"


def alpaca_prompts(local: str | None) -> list[dict[str, Any]]:
    """AlpacaEval's prompts, from a local file or from the hub. Raises InputError."""
    if local is None:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(ALPACA_HUB, ALPACA_FILE, repo_type="dataset"))
        except (OSError, ValueError) as error:
            hint = f"give a local copy, evaluate.local: {{{ALPACA_EVAL}: PATH}}, or remove the task"
            raise unreachable(f"evaluate: the data of {ALPACA_EVAL}", ALPACA_HUB, error, hint) from None
    else:
        path = check_local(ALPACA_EVAL, local)
    records = read_local(path)
    if "instruction" not in records[0]:
        raise InputError(
            f"evaluate.local: {ALPACA_EVAL}: {str(path)!r} has no column 'instruction'",
            f"it has {', '.join(records[0])}",
        )
    return records
