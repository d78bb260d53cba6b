"""Kill a merge of the embedded SmolLM2-135M at random times; its folder must be complete or absent each time.

python tests/soak/merge_kills.py [--times 20] [--seed 0]
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file

from qcft.events import Watch
from qcft.files import write_json
from qcft.models.sources import resolve, weights_folder
from qcft.models.tensors import stored_weights
from qcft.recipe import Model
from tests.helpers.merge_kills import kill_merges


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = weights_folder(resolve(Model(name="smollm2-135m-instruct")), Watch())
    with tempfile.TemporaryDirectory() as place:
        adapter = Path(place) / "adapter"
        adapter.mkdir()
        factors = {}
        for name, stored in stored_weights(base).items():
            if "_proj" in name:
                module = "base_model.model." + name.removesuffix(".weight")
                factors[f"{module}.lora_A.weight"] = torch.randn(16, stored.shape[1]) * 0.02
                factors[f"{module}.lora_B.weight"] = torch.randn(stored.shape[0], 16) * 0.02
        save_file(factors, adapter / "adapter_model.safetensors")
        write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 16, "lora_alpha": 32})
        killed = kill_merges(base, adapter, Path(place) / "out", options.times, options.seed, 50_000_000, 1 << 19)
    print(f"{options.times} merges, {killed} killed on the way: whole or not there each time, and the next run whole")


if __name__ == "__main__":
    main()
