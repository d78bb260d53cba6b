"""Memory that runs out, in each library's words: known as such, and met with smaller parts everywhere."""

import os
import subprocess
import sys

import pytest
import torch

from qcft import QcftError
from qcft.errors import is_out_of_memory
from qcft.events import Watch
from qcft.measure.score import score_rows
from qcft.models.generate import Sampling, answer_prompts
from qcft.models.halving import in_halves
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Model
from qcft.store.states import RowStates
from qcft.training.attention import attend_by_rows
from qcft.training.prefix import fill_states, row_key

from .helpers.training import rows_of

# As they were seen, or as the libraries' sources have them.
MESSAGES = [
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1 GiB"
    ),
    torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError(
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131, please'
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
    ),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 9663676416 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError("std::bad_alloc"),
    MemoryError("Unable to allocate 2.00 GiB for an array with shape (536870912,)"),
    OSError(12, "Cannot allocate memory"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x64 and 32x64)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    RuntimeError(
        "out of resource: shared memory, Required: 180224, Hardware limit: 101376."
    ),  # of a block, whatever is free
    OSError(28, "No space left on device"),
    ValueError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", MESSAGES, ids=lambda error: str(error)[:40])
def test_out_of_memory_is_known_by_its_many_names(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40])
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_memory_that_really_runs_out():
    """PyTorch's CPU allocator and oneDNN in a process that may not grow."""
    code = (
        "import resource, torch\n"
        "from qcft.errors import is_out_of_memory\n"
        "a = torch.ones(256, 256, dtype=torch.bfloat16); a @ a\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))\n"
        "try:\n"
        "    torch.ones(1 << 30)\n"
        "except Exception as error:\n"
        "    assert is_out_of_memory(error), error\n"
        "else:\n"
        "    raise SystemExit('it fits')\n"
    )
    if sys.platform != "linux":
        pytest.skip("limits of this kind are Linux's")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


class Full:
    """A model that fails as `error` says when more than `most` rows, or tokens, are run at once."""

    def __init__(self, model, error, most, size=len):
        self.seen, self.fell, self.error, self.most, self.size = [], 0, error, most, size
        self.hook = model.get_input_embeddings().register_forward_pre_hook(self.forward)

    def forward(self, module, arguments):
        rows = self.size(arguments[0])
        if rows > self.most:
            self.fell += 1
            raise self.error
        self.seen.append(rows)


@pytest.mark.parametrize("error", [MESSAGES[2], MESSAGES[5], MESSAGES[9], MESSAGES[12]], ids=lambda e: str(e)[:40])
def test_scoring_and_answering_are_halved_until_they_fit(tiny_model, error):
    model, tokenizer = load_model(tiny_model, Model(name="tiny")), load_tokenizer(tiny_model, Model(name="tiny"))
    rows = rows_of(tokenizer)
    plain = score_rows(model, rows, Watch(), "scoring")
    prompts = [row.input_ids[:10] for row in rows[:6]]
    sampling = Sampling(max_new_tokens=4)
    said = answer_prompts(model, tokenizer, prompts, [tokenizer.eos_token_id], sampling, 6, Watch())
    full = Full(model, error, most=2)
    scored = score_rows(model, rows, Watch(), "scoring")
    assert full.fell
    assert max(full.seen) == 2
    assert [one.tokens for one in scored] == [one.tokens for one in plain]
    assert [one.nll for one in scored] == pytest.approx([one.nll for one in plain], rel=0.02)
    fell = full.fell
    again = answer_prompts(model, tokenizer, prompts, [tokenizer.eos_token_id], sampling, 6, Watch())
    assert full.fell > fell
    assert [len(one.text) > 0 for one in again] == [len(one.text) > 0 for one in said]
    full.most = 0
    with pytest.raises(QcftError, match=r"memory ran out while scoring a row of \d+ tokens"):
        score_rows(model, rows, Watch(), "scoring")


def test_states_of_frozen_layers_are_computed_in_halves(tiny_model, tmp_path):
    rows = rows_of(load_tokenizer(tiny_model, Model(name="tiny")), 6)
    found = []
    for most in (10**6, 2 * max(len(row.input_ids) for row in rows)):
        model = load_model(tiny_model, Model(name="tiny"))
        assert attend_by_rows(model, 96)
        full = Full(model, MESSAGES[3], most, torch.Tensor.numel)
        states = RowStates(tmp_path / str(most), model.config.hidden_size, 2)
        states.folder.mkdir()
        fill_states(model, 1, rows, states, Watch())
        assert max(full.seen) <= most
        found.append((full.fell, [states.read(row_key(row)).tobytes() for row in rows]))
    assert found[0][0] == 0 < found[1][0]
    assert found[0][1] == found[1][1]


def test_halves_keep_their_order():
    def work(items):
        if len(items) > 3:
            raise RuntimeError("could not create a primitive")
        return [2 * item for item in items]

    assert in_halves(work, range(11), "while doubling") == [2 * item for item in range(11)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_segments_that_grow_unless_the_user_says_otherwise(monkeypatch, given, expected):
    from qcft.runner.libraries import set_environment

    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_environment()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == (expected if sys.platform != "win32" else None)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
