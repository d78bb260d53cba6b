"""A recipe for sharing: without the folders of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qcft.recipe.schema import Recipe

TEXT = "system"  # a prompt, which may begin with a slash as `/no_think` does


def without_folders(path: str) -> str:
    """The last name of an absolute path; a hub id or a built-in name unmodified."""
    return Path(path).name if Path(path).is_absolute() else path


def shared_yaml(recipe: Recipe) -> str:
    """The recipe as YAML; of paths on this machine only the last name is kept."""
    return yaml.safe_dump(shared(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def shared(value: Any) -> Any:
    """Settings, by key or by dotted key; of paths on this machine only the last name is kept."""
    if isinstance(value, dict):
        return {key: one if key.rpartition(".")[2] == TEXT else shared(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shared(one) for one in value]
    return without_folders(value) if isinstance(value, str) else value
