"""DES as a table, shared by the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcft.files import read_sealed
from qcft.report.arms import Arm
from qcft.report.document import Block, Prose, Section, Table


def similarity_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: the two data sets, each language of a side that has several, the scale's pairs."""
    names = [_short(found[side]["name"]) for side in ("a", "b")]
    rows = [[f"{names[0]} - {names[1]}", *_cells(found["des"])]]
    for entry in found["languages"]:
        side = _short(entry["of"])
        other = next((name for name in names if name != side), side)
        rows.append([f"{side}, {entry['lang']} only - {other}", *_cells(entry)])
    for pair, value in (found["scale"]["paper"] or {}).items():
        rows.append([f"paper: {pair}", f"{value:.3f}", "", ""])
    for word, entry in found["scale"]["qcft"].items():
        rows.append([f"qcft's {word} pair", *_cells(entry)])
    return [f"DES by {found['encoder']['name']}", "value", "95% interval", "rows"], rows


def similarity_section(arms: Sequence[Arm]) -> Section | None:
    """What `qcft similarity` left beside a run's report."""
    blocks: list[Block] = []
    several = sum(len(arm.runs) for arm in arms) > 1
    for arm in arms:
        for run in arm.runs:
            found = read_sealed(run.run.folder / "report" / "similarity.json")
            if found:
                titles, rows = similarity_rows(found)
                records = tuple(dict(zip(titles, row, strict=True)) for row in rows)
                of = f" of {arm.label(run)}" if several else ""
                name = f"similarity-{run.run.name}" if several else "similarity"
                cells = tuple(map(tuple, rows))
                blocks.append(Table(name, f"Similarity of the data{of}", tuple(titles), cells, records, words=(0, 3)))
                blocks.append(Prose(tuple(found["says"])))
    return Section("similarity", "How alike the phases' instructions are", tuple(blocks)) if blocks else None


def _short(name: str) -> str:
    """What was named; of a path the last folder and the name."""
    return ", ".join(str(Path(*Path(part).parts[-2:])) if ":" not in part else part for part in name.split(","))


def _cells(entry: Mapping[str, Any]) -> list[str]:
    return [
        f"{entry['value']:.3f}",
        f"[{entry['low']:.3f}, {entry['high']:.3f}]",
        " and ".join(f"{n:,}" for n in entry["rows"]),
    ]
