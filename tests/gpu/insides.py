"""The only file of the check that imports internals of qcft, for what the command line and `qcft.run` do not offer.

python -m tests.gpu.insides replay RECIPE RUNS    the same as `qcft replay`, without an existing run
python -m tests.gpu.insides varlen                attention by one kernel (QCFT_VARLEN) and attention row by row
"""

import json
import os
import sys
import time
from pathlib import Path


def replay(recipe: str, runs: str) -> None:
    """Generate a recipe's replay and nothing else.

    `qcft replay` needs a named run. Only `qcft run` creates one, and it measures the base twice first: for the 8B model
    that is half a minute on a card.
    """
    from qcft.api import replay_watched
    from qcft.events import Watch
    from qcft.recipe import load_recipe

    replay_watched(load_recipe(recipe), Path(runs), Watch(lambda event: print(event, flush=True)))


def varlen() -> None:
    """How far one kernel for all rows is from a kernel for each, values and gradients relative to the largest; whether
    another first row changes the second, of which no bit may change; and milliseconds of both, backward included.

    Prints a JSON object. If the card or torch has no such kernel, and on a CPU, `kernel` is false and rows are
    compared with rows.
    """
    import torch

    from qcft.training.attention import one_kernel, packed_attention

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ["QCFT_VARLEN"] = "1"
    kernel = one_kernel(where)
    lengths = (700, 61, 1, 266, 512, 508) if where.type == "cuda" else (7, 5, 1)
    heads, shared, width = (32, 8, 128) if where.type == "cuda" else (4, 2, 16)
    torch.manual_seed(0)
    given = [torch.randn(1, count, sum(lengths), width, device=where).bfloat16() for count in (heads, shared, shared)]
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = (
        True,
        heads // shared,
    )  # attributes that transformers' own function reads

    def run(by_kernel: bool, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        os.environ["QCFT_VARLEN"] = "1" if by_kernel else "0"
        leaves = [part.clone().requires_grad_() for part in parts]
        out, _ = packed_attention(module, *leaves, None, row_lengths=lengths, scaling=width**-0.5)
        out.float().square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())

    def milliseconds(by_kernel: bool) -> float:
        times = []
        for _ in range(8):
            if where.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run(by_kernel, given)
            if where.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return round(1000 * sorted(times)[len(times) // 2], 3)

    one, rows = run(True, given), run(False, given)
    first = lengths[0]
    others = [torch.cat([torch.randn_like(part[:, :, :first]), part[:, :, first:]], dim=2) for part in given]
    found = {
        "kernel": kernel,
        "values_off": off(one[0], rows[0]),
        "gradients_off": max(map(off, one[1:], rows[1:])),
        "rows_see_each_other": not torch.equal(run(True, others)[0][:, first:], one[0][:, first:]),
        "kernel_ms": milliseconds(True),
        "rows_ms": milliseconds(False),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    {"replay": replay, "varlen": varlen}[sys.argv[1]](*sys.argv[2:])
