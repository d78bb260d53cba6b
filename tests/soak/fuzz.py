"""Try ten times as many random recipes, data files, texts and damaged steps as the test suite.

python tests/soak/fuzz.py [--examples 2000]
"""

import argparse
import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=2000)
    options = parser.parse_args()
    os.environ["FUZZ_EXAMPLES"] = str(options.examples)
    code = pytest.main([*map(str, sorted(Path(__file__).parents[1].glob("test_fuzz*.py"))), "-v"])
    print(f"{options.examples} examples each: {'no traceback, no hang' if code == 0 else 'FAILED'}")
    sys.exit(code)
