"""The one place that imports from within qcft what the command line and `qcft.run` do not offer.

python -m tests.gpu.insides replay RECIPE RUNS    what `qcft replay` does, without a run that is there already
"""

import sys
from pathlib import Path


def replay(recipe: str, runs: str) -> None:
    """Generate a recipe's replay and do nothing else.

    `qcft replay` asks for a named run, which only `qcft run` makes, by measuring the base twice first: for the 8B model
    that is half a minute of a card.
    """
    from qcft.api import replay_watched
    from qcft.events import Watch
    from qcft.recipe import load_recipe

    replay_watched(load_recipe(recipe), Path(runs), Watch(lambda event: print(event, flush=True)))


if __name__ == "__main__":
    {"replay": replay}[sys.argv[1]](*sys.argv[2:])
