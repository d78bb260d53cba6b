"""Kill an ablation of a tiny model at random times; it must end like one that is not killed, with no step run twice.

python tests/soak/ablation_kills.py [--times 10] [--seed 0]
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import yaml

import qcft
from qcft.events import Watch
from qcft.models.sources import resolve, weights_folder
from qcft.recipe import Model
from tests.helpers.ablation_kills import kill_ablations, table
from tests.helpers.tiny import make_llama


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--span", type=float, default=25, help="seconds of work within which a kill falls")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(weights_folder(resolve(Model(name="smollm2-135m-instruct")), Watch()))
        model = make_llama(place / "model", tokenizer)
        train = {"lr": 1e-3, "batch": 4, "max_length": 256}
        recipe = {
            "name": "soak",
            "model": str(model),
            "heldout": {"share": 0.2, "rows": 4},
            "answers": {"prompts": 2, "max_new_tokens": 8},
            "merge": {"refuse_below": None},
            "phases": {
                "phase1": {"data": [{"path": "qcft:instructions/en", "take": 40, "lang": "en"}], "train": train},
                "phase2": {"data": [{"path": "qcft:passages/es", "take": 40, "lang": "es"}], "train": train},
            },
            "ablation": {
                "seeds": [0, 1],
                "arms": [
                    {"name": "plain"},
                    {"name": "er", "set": {"phase2.replay": {"ratio": 0.2, "kind": "phase1"}}},
                    {"name": "lf", "set": {"phase2.freeze": "first:1"}},
                    {"name": "mixed", "mixed": True},
                ],
            },
        }
        file = place / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        qcft.ablate(file, runs=place / "alone")
        done = kill_ablations(file, place / "killed", "soak", options.times, options.span, options.seed)
        assert table(place / "killed", "soak") == table(place / "alone", "soak")
    print(f"killed {options.times} times, with {', '.join(map(str, done))} steps done: no step done twice, and the end")
    print("is that of the ablation left alone: every score, every training's length")


if __name__ == "__main__":
    main()
