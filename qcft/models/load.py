"""Loading a model and its tokenizer, in 4 bits or 16, on the GPU or the CPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, QcftError, is_out_of_memory, short
from qcft.models.gpus import asked_device
from qcft.recipe import Model

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def device() -> str:
    """Where work runs: `cuda` (the current card), or `cpu` if there is no card or QCFT_DEVICE asks for it.

    Raises InputError if QCFT_DEVICE is not a device.
    """
    import torch

    return "cuda" if asked_device() != "cpu" and torch.cuda.is_available() else "cpu"


def compute_dtype() -> torch.dtype:
    """bf16, or fp16 on cards without it."""
    import torch

    if device() == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def load_tokenizer(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a chat template and a pad token. Raises InputError."""
    from qcft.data.render import start_rendering
    from qcft.data.template import set_chat_template

    start_rendering()  # in parallel with the imports
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # it reads config.json too, which may hold anything
        raise InputError(
            f"model: no tokenizer could be read from {str(folder)!r}: {short(error)}",
            "the folder needs tokenizer.json and a complete config.json"
            if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file()
            else "it has only tokenizer.model, which transformers converts if possible: pip install sentencepiece "
            "protobuf tiktoken",
        ) from None
    if tokenizer.eos_token is None:
        raise InputError(
            f"model: the tokenizer of {model.name!r} has no EOS token",
            "set eos_token in tokenizer_config.json to the token that ends its texts",
        )
    set_chat_template(tokenizer, model.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, model: Model, quantize: str | None = None, sharded: bool = False) -> PreTrainedModel:
    """Load a model as the recipe asks (`quantize` overrides it), ready to be trained or measured.

    NF4 with double quantisation and 16-bit compute. Training and measuring use the same kernels: on some CPUs
    bitsandbytes repacks 4-bit weights in place for evaluation, which changes results and cannot be undone for training,
    so 4-bit modules always stay in training mode (see `evaluating`). `sharded`: the 4-bit weights are stored as 16-bit
    numbers, which FSDP can shard.
    """
    import torch
    from transformers import BitsAndBytesConfig, GenerationConfig

    from qcft.models.meta import auto_class, read_config

    quantize = quantize or model.quantize
    options: dict[str, Any] = {
        "dtype": compute_dtype(),
        "use_safetensors": True,
        "trust_remote_code": model.trust_remote_code,
        "device_map": {"": torch.cuda.current_device() if device() == "cuda" else "cpu"},
    }
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    if quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(),
            **({"bnb_4bit_quant_storage": compute_dtype()} if sharded else {}),
        )
    elif device() == "cuda" and _bytes_of(folder) > 0.85 * torch.cuda.mem_get_info()[0]:
        options["device_map"] = "auto"  # 16 bits do not fit on the card: the rest stays in main memory
    try:
        config = read_config(folder, model)
        loaded, info = auto_class(config).from_pretrained(folder, config=config, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            where = "on the GPU" if device() == "cuda" else "into memory"
            raise QcftError(f"the model does not fit {where}", "use a smaller model, or free memory") from None
        raise QcftError(f"model: {str(folder)!r} cannot be loaded: {short(error)}", "check the model folder") from None
    missing = sorted({name for name, _ in loaded.named_parameters()} & set(info["missing_keys"]))
    if missing:
        raise QcftError(
            f"model: {str(folder)!r} lacks {len(missing)} weights, such as {missing[0]}, which would be random numbers",
            "fetch the model again",
        )
    # A new one, so that greedy means greedy: checkpoints may set repetition penalties and similar options.
    old = loaded.generation_config
    loaded.generation_config = GenerationConfig(bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id)
    return loaded


@contextmanager
def evaluating(model: PreTrainedModel, sharded: bool = False) -> Iterator[None]:
    """Inference: no gradients, no dropout, and the 4-bit kernels of training (see `load_model`).

    `sharded`: the weights are sharded with FSDP, and gathered at a new address for each pass. Raises QcftError if
    bitsandbytes repacked the 4-bit weights all the same, as that would change the results of later training.
    """
    import bitsandbytes as bnb
    import torch

    quantised = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    places = [module.weight.data_ptr() for module in quantised]
    was_training = model.training
    model.eval()
    for module in quantised:
        module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for module in quantised:
            module.training = True
    if not sharded and places != [module.weight.data_ptr() for module in quantised]:
        raise QcftError(
            f"bitsandbytes {bnb.__version__} repacks the weights of an evaluated model, although this is disabled",
            "install a version that qcft was tested with: pip install 'bitsandbytes<0.51'",
        )


def free_memory() -> None:
    """Release the memory of models that are no longer referenced."""
    import torch

    gc.collect()
    if sys.platform == "linux":
        # glibc keeps freed blocks between tensors of odd sizes: over a run this added up to over a gigabyte.
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory() -> tuple[str, int]:
    """The kind of memory and its peak in bytes: GPU memory since the last reset, or the process's resident set."""
    import torch

    if device() == "cuda":
        return "GPU", torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return "RAM", 0  # Python's standard library does not report it there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "RAM", peak if sys.platform == "darwin" else peak * 1024


def free_bytes() -> int:
    """Free memory where work runs, in bytes: on the GPU, else RAM that is available without swapping."""
    import torch

    if device() == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def quiet_libraries() -> None:
    """Silence the progress bars and log messages of the libraries; events report what matters."""
    import logging
    import warnings

    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    for name in ("bitsandbytes", "trl", "accelerate", "peft", "gguf", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|trl|peft|bitsandbytes|accelerate|datasets)\b")


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_gguf(file: Path, folder: Path, model: Model) -> PreTrainedModel:
    """A GGUF file's weights, dequantised to 16 bits, with the config of the `folder` that it was converted from.

    The file's own metadata are not used: transformers does not read the scaling of rotary embeddings from them. Raises
    QcftError if transformers cannot read the file, or weights are missing in it.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    from qcft.models.meta import read_config

    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, config=read_config(folder, model).get_text_config(),
            dtype=compute_dtype(), quantization_config=GgufConfig(dequantize=True), output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # any error is possible for a family whose GGUF files transformers does not read
        raise QcftError(f"transformers cannot read it: {short(error)}", "measure it with llama.cpp") from None
    if missing := sorted({name for name, _ in loaded.named_parameters()} & set(info["missing_keys"])):
        raise QcftError(f"transformers finds no {missing[0]} in it", "measure it with llama.cpp")
    return loaded.to(device())
