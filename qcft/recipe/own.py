"""The recipe that `qcft init` writes, as text with a comment on each key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcft.recipe.load import recipe_from
from qcft.recipe.schema import Recipe
from qcft.recipe.yaml_file import read_yaml

GB = 1 << 30
# Models that need no account, with the smallest GPU memory (bytes) that each is suggested for: well over what
# `qcft check` estimates for it (tests/README.md has the table), which leaves room for long rows.
SUGGESTED = (
    (12 * GB, "Qwen/Qwen2.5-7B-Instruct"),
    (4 * GB, "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    (0, "smollm2-135m-instruct"),
)
PLAIN = re.compile(r"[A-Za-z][\w./-]*")
TRAIN = """\
    train:
      lr: 2e-4                  # the learning rate; a smaller one learns, and forgets, less
      epochs: 1                 # how often each row is trained on
      batch: 16                 # rows of an optimizer step
      micro_batch: auto         # rows at once: as many as fit in memory
      max_length: 1024          # tokens of a row; longer rows are dropped
"""


@dataclass(frozen=True)
class OwnRecipe:
    """The parts of the recipe. `first`, `second`: the sources of each phase as plain data; no `first`: the model itself
    is phase 1."""

    name: str
    model: str
    first: Sequence[Mapping[str, Any]]
    second: Sequence[Mapping[str, Any]]
    replay: float
    freeze: str

    def text(self) -> str:
        """The recipe as the text of a file."""
        phases = [self._first()] if self.first else []
        return "".join([self._head(), "phases:\n", *phases, self._second(), ARMS])

    def recipe(self) -> Recipe:
        """The validated recipe. Raises InputError."""
        return recipe_from(read_yaml(self.text()))

    def _head(self) -> str:
        return f"""\
# Two-phase continual fine-tuning: a model learns other languages, and keeps its English.
# Every key: recipes/README.md. Any key can be changed for one run: qcft run FILE --set phase2.train.lr=1e-4
version: 1
{_line("name", self.name)} # of the run, in the folder runs/
model:
{_line("  name", self.model)} # a hub id, a folder or a .gguf file
  quantize: nf4                 # 4-bit weights while training; none: 16-bit weights
lora:
  r: 16                         # rank of the adapters: how much they can learn
  alpha: 32                     # their scale; twice the rank is common
heldout:
  share: 0.1                    # share of all rows set aside for measuring, never trained on
  data:                         # more test sets; this one is English that nothing trains on
    - {{path: "qcft:dialogues/en", lang: en}}
"""

    def _first(self) -> str:
        return f"""\
  - name: phase1                # English; without this phase the model itself is phase 1
    data:
{_sources(self.first)}{TRAIN}"""

    def _second(self) -> str:
        return f"""\
  - name: phase2                # the other languages
    data:                       # `take: 2000` in a source trains on its first 2,000 rows only
{_sources(self.second)}\
    {f"replay: {self.replay:g}":<27} # share of rows that are English answers of the model before this phase; 0: none
{_line("    freeze", self.freeze)} # layers without adapters, such as first:0.5 or snr:0.5; none: all are trained
{TRAIN}"""


ARMS = """\
# Which remedy keeps most English? Remove the `# ` from the lines below, then: qcft ablate FILE
# ablation:
#   seeds: [0, 1, 2]            # each arm runs once with each seed
#   arms:                       # each changes some keys of the recipe above
#     - {name: plain, set: {phase2.replay: null, phase2.freeze: none}}
#     - {name: replay, set: {phase2.freeze: none}, grid: {phase2.replay.ratio: [0.1, 0.2]}}
#     - {name: freeze, set: {phase2.replay: null, phase2.freeze: "first:0.5"}}
#     - {name: both, set: {phase2.replay: 0.2, phase2.freeze: "first:0.5"}}
"""


def suggested_model(vram: int | None) -> str:
    """A model that trains on a GPU of so many bytes; None: on a CPU."""
    return next(model for least, model in SUGGESTED if (vram or 0) >= least)


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    entries = [
        ", ".join(f"{key}: {_written(value)}" for key, value in source.items() if value is not None)
        for source in sources
    ]
    return "".join(f"      - {{{entry}}}\n" for entry in entries)


def _line(key: str, value: str) -> str:
    """A key and its value, padded to the column where comments start."""
    return f"{key + ': ' + _written(value):<31}"


def _written(text: str) -> str:
    """A text as YAML, in quotes where it would be read as something else."""
    return text if PLAIN.fullmatch(text) and read_yaml(text) == text else json.dumps(text, ensure_ascii=False)
