"""Numbers in a sentence."""

from __future__ import annotations


def counted(count: float, one: str, many: str | None = None) -> str:
    """`1 row`, `1,234 rows`; `many` where the plural is not the singular with an s."""
    return f"{count:,.0f} {one if count == 1 else many or f'{one}s'}"
