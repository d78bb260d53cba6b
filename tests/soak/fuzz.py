"""Ten times as many random recipes and data files as the suite tries.

python tests/soak/fuzz.py [--examples 2000]
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from hypothesis import settings

from tests import conftest, test_fuzz


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = conftest.make_tokenizer(folder / "tokenizer")
        for test, given in (
            (test_fuzz.test_recipes_with_anything_anywhere, {}),
            (test_fuzz.test_anything_set, {}),
            (test_fuzz.test_recipe_files_of_any_bytes, {"folder": folder}),
            (test_fuzz.test_data_of_any_kind, {"folder": folder, "tokenizer": tokenizer}),
        ):
            settings(test_fuzz.many, max_examples=options.examples)(test)(**given)
            print(f"{test.__name__}: {options.examples} examples, no traceback, no hang")


if __name__ == "__main__":
    main()
