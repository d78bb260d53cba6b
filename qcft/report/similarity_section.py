"""DES as a table, shared by the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from qcft.files import read_sealed
from qcft.measure.similarity import SimilarityFound, SimilarityRecord
from qcft.report.arms import ArmRuns, members, whose
from qcft.report.document import Block, Prose, Section, Table


def similarity_rows(found: SimilarityFound) -> list[dict[str, str]]:
    """The rows of a table: the two data sets, each language of a side that has several, the scale's pairs."""
    return [{f"DES by {found['encoder']['name']}": what, **_cells(entry)} for what, entry in _entries(found)]


def _entries(found: SimilarityFound) -> list[tuple[str, SimilarityRecord | float]]:
    """The compared pairs and their similarity; for the paper's pairs only the value."""
    names = [_short(side["name"]) for side in (found["a"], found["b"])]
    entries: list[tuple[str, SimilarityRecord | float]] = [(f"{names[0]} - {names[1]}", found["des"])]
    for entry in found["languages"]:
        side = _short(entry["of"])
        other = next((name for name in names if name != side), side)
        entries.append((f"{side}, {entry['lang']} only - {other}", entry))
    entries += [(f"paper: {pair}", value) for pair, value in (found["scale"]["paper"] or {}).items()]
    return entries + [(f"qcft's {word} pair", entry) for word, entry in found["scale"]["qcft"].items()]


def similarity_section(arms: Sequence[ArmRuns]) -> Section | None:
    """The results that `qcft similarity` stored in a run's report folder."""
    blocks: list[Block] = []
    several = len(members(arms)) > 1
    for arm, run in members(arms):
        found = cast("SimilarityFound | None", read_sealed(run.run.folder / "report" / "similarity.json"))
        if found:
            rows = similarity_rows(found)
            of = f" of {arm.label(run)}" if several else ""
            name = f"similarity-{run.run.name}" if several else "similarity"
            values = [
                {**whose(arm, run), "measure": "DES", "between": what, **_numbers(entry)}
                for what, entry in _entries(found)
            ]
            title = f"Similarity of the data{of}"
            blocks.append(Table.of(name, title, rows, rows, words={"rows"}, values=values))
            blocks.append(Prose(tuple(found["says"])))
    return Section("similarity", "How similar the phases' instructions are", tuple(blocks)) if blocks else None


def _short(name: str) -> str:
    """A short name; of a path the last folder and the file's name."""
    return ", ".join(str(Path(*Path(part).parts[-2:])) if ":" not in part else part for part in name.split(","))


def _cells(entry: SimilarityRecord | float) -> dict[str, str]:
    if isinstance(entry, float):
        return {"value": f"{entry:.3f}", "95% interval": "", "rows": ""}
    return {
        "value": f"{entry['value']:.3f}",
        "95% interval": f"[{entry['low']:.3f}, {entry['high']:.3f}]",
        "rows": " and ".join(f"{n:,}" for n in entry["rows"]),
    }


def _numbers(entry: SimilarityRecord | float) -> dict[str, object]:
    if isinstance(entry, float):
        return {"value": entry}
    return {key: entry[key] for key in ("value", "low", "high")}
