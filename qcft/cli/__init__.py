"""The command line. Every command's body is a few lines; decisions are made in the rooms below."""

from qcft.cli import runs, init, deliver, ablate, evaluate, inspect, answer, check, upkeep  # noqa: F401, I001 (they register their commands, in this order)
from qcft.cli.main import main
from qcft.cli.options import app

__all__ = ["app", "main"]
