"""Times and sizes in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`41 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def remaining(seconds: float) -> str:
    """An estimate of time: `41 s`, `3 min`, `2 h 5 min`; seconds beyond a minute are more than is known."""
    return (
        f"{round(seconds)} s"
        if seconds < 59.5
        else f"{round(seconds / 60)} min"
        if seconds < 3570
        else duration(seconds)
    )


def size(count: float) -> str:
    """`340 kB`, `1.2 GB`; thousands, as disks are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def gib(count: float) -> str:
    """`3.84 GiB`, `12 MiB`, `< 1 MiB`."""
    if count < 2**20 - 1:
        return "< 1 MiB" if count else "0 MiB"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.0f} MiB"
