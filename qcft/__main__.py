"""`python -m qcft`."""

import sys
from pathlib import Path

if not sys.flags.safe_path:
    working = sys.path.pop(0)  # put first by -m: a datasets.py lying there would be loaded in place of the library
    if Path(__file__).parents[1] == Path(working):  # a checkout that is not installed
        sys.path.append(working)

from qcft.cli import main

if __name__ == "__main__":
    main()
