"""Check that an external adapter matches its config and fits the model: each key in its file is checked."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, short
from qcft.models.adapter_config import CONFIG, PREFIX, WEIGHTS
from qcft.models.deltas import FACTOR
from qcft.models.tensors import FLOATS, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS = 10  # limit for matching the patterns of a config against a model's names
MATCH = "import json, re, sys; d = json.load(sys.stdin); [re.match(p, n) for p in d[0] for n in d[1]]"


def check_fit(folder: Path, model: PreTrainedModel) -> None:
    """Add an adapter with this config to a copy of the model without weights, and compare its keys with those in the
    file. Raises InputError for the first key that is missing, unexpected, not finite or has a different shape."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils.save_and_load import get_peft_model_state_dict

    _check_patterns(folder, [name for name, _ in model.named_modules()])
    stored = stored_tensors(folder / WEIGHTS)
    unnamed = next((name for name in stored if not (name.startswith(PREFIX) and name.isprintable())), None)
    if unnamed is not None:
        raise InputError(
            f"adapter: {str(folder)!r} holds {unnamed!r}, whose name does not begin with {PREFIX}",
            "PEFT would ignore it: save the adapter with PEFT's save_pretrained",
        )
    for name, one in stored.items():
        if one.dtype not in FLOATS:
            raise InputError(f"adapter: {str(folder)!r} holds {name} of type {one.dtype}", "save it in 16 or 32 bits")
        if not bool(torch.isfinite(one.read()).all()):
            raise InputError(f"adapter: {str(folder)!r} holds {name}, which is not finite", "train it again")
    modules = {name for name, _ in model.named_modules()}
    foreign = sorted(
        found[1]
        for name in stored
        if (found := FACTOR.fullmatch(name.removeprefix(PREFIX))) is not None and found[1] not in modules
    )
    if foreign:
        raise InputError(
            f"adapter: {str(folder)!r} changes {foreign[0]}, which the model lacks", "it was made for another model"
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
        adapted = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except Exception as error:  # a bad config may raise anything
        raise InputError(
            f"adapter: {str(folder)!r} does not fit the model: {type(error).__name__}: {short(error, 200)}",
            "its config is inconsistent, or it was made for another model",
        ) from None
    missing = sorted(wanted.keys() - stored.keys())
    # Whole embeddings that PEFT saved replace those of the model.
    left = sorted(stored.keys() - wanted.keys() - adapted.state_dict().keys())
    odd = sorted(name for name in wanted.keys() & stored.keys() if tuple(wanted[name].shape) != stored[name].shape)
    if missing or left:
        name, what = (missing[0], "lacks") if missing else (left[0], "holds")
        more = f" and {len(missing or left) - 1} more" if len(missing or left) > 1 else ""
        says = "which its config requires" if missing else "which its config does not mention"
        raise InputError(
            f"adapter: {str(folder)!r} {what} {name}{more}, {says}",
            "copy it again, or save it again with PEFT's save_pretrained",
        )
    if odd:
        has, wants = (" x ".join(map(str, one[odd[0]].shape)) for one in (stored, wanted))
        raise InputError(
            f"adapter: {str(folder)!r} holds {odd[0]} of {has}, but its config and the model need {wants}",
            "it was made for another model, or its config was altered",
        )


def _check_patterns(folder: Path, names: list[str]) -> None:
    """Refuse patterns that cannot be compiled, or take too long to match; a subprocess with a time limit tries them."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    patterns = [*_patterns(config)]
    try:
        for pattern in patterns:
            re.compile(pattern)
        asked = json.dumps([patterns, names])
        command = [sys.executable, "-I", "-c", MATCH]
        if patterns:
            subprocess.run(command, input=asked, text=True, timeout=SECONDS, check=True, capture_output=True)
    except re.error as error:
        raise InputError(f"adapter: {str(folder)!r} has an invalid pattern: {error}", "save it again") from None
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        raise InputError(
            f"adapter: {str(folder)!r} has a pattern in its config that takes over {SECONDS} s to match",
            "name its target modules one by one",
        ) from None


def _patterns(config: dict[str, Any]) -> Iterable[str]:
    """The regular expressions in an adapter's config, without those that are just a name."""
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = config.get(key)
        found = [value] if isinstance(value, str) else value if isinstance(value, (list, dict)) else []
        yield from (str(one) for one in found if not re.fullmatch(r"[\w.-]+", str(one)))
