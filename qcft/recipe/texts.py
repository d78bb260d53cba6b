"""Refuses texts that a recipe must not contain, as it is stored and shared: access tokens, lone surrogates."""

from __future__ import annotations

from typing import Any

from qcft.errors import InputError
from qcft.safe import without_tokens

MOST = 100_000  # values; far more than any recipe has, but YAML's aliases can expand to more


def check_texts(raw: Any) -> None:
    """Check every text of a recipe given as plain data. Raises InputError."""
    ahead: list[tuple[str, Any]] = [("", raw)]
    seen = 0
    while ahead:
        where, node = ahead.pop()
        seen += 1
        if seen > MOST:
            raise InputError(f"recipe: it has more than {MOST:,} values", "see `qcft recipes` for examples")
        if isinstance(node, dict):
            ahead += [(where, key) for key in node]
            ahead += [(f"{where}.{key}".lstrip("."), value) for key, value in node.items()]
        elif isinstance(node, list):
            ahead += [(f"{where}.{number}".lstrip("."), value) for number, value in enumerate(node)]
        elif isinstance(node, str):
            _check(node, f"recipe: {where[:60] or 'a key'}")


def _check(text: str, where: str) -> None:
    if without_tokens(text) != text:
        raise InputError(
            f"{where} contains an access token or password, and recipes are stored and shared",
            "remove it; log in with `hf auth login`, or set HF_TOKEN (W&B: `wandb login`, or WANDB_API_KEY)",
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {text[:40]!r} contains half a character", "write it as plain UTF-8") from None
