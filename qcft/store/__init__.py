"""The runs folder: steps that are claimed, resumed, finished and verified; runs that name them."""

from qcft.store.runs import NamedRun, list_runs, open_run, read_run
from qcft.store.steps import Store

__all__ = ["NamedRun", "Store", "list_runs", "open_run", "read_run"]
