"""The cost of one pass of a training: its own code, run on tensors that have shapes but no data.

Every allocation is counted. So this needs no rule of thumb about layers, attention or checkpointing, and works for
models of any family. The bytes of the weights are counted separately (`memory`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qcft.layers import decoder_layers, linear_modules, lowest_adapted
from qcft.models.adapters import add_lora, keep_adapters_in_fp32
from qcft.models.size import quantised_modules
from qcft.private import of
from qcft.recipe import Lora
from qcft.training.attention import attend_by_rows
from qcft.training.checkpointing import recompute_activations
from qcft.training.divergence import divergence
from qcft.training.head import HEAD_WORDS, first_word
from qcft.training.prefix import take_out

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HEAD_TOKENS = 4096  # whose logits TRL's fused head (trl.kernels) has in memory at a time


@dataclass(frozen=True)
class Footprint:
    """The cost of one pass, forward and backward. `activations`: bytes beyond weights, adapters and gradients at the
    peak; `logits`: the part of them for the head's logits and their temporaries; `flops`: multiplications and additions
    of its matrix products; `moved`: bytes that all other operations read and write."""

    activations: float
    logits: float
    flops: float
    moved: float

    def plus(self, other: Footprint, times: float) -> Footprint:
        """This plus `times` the other, field by field."""
        mine, theirs = vars(self), vars(other)
        return Footprint(**{key: mine[key] + times * theirs[key] for key in mine})


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: rows of `lengths` tokens, of which `answers` bear loss.

    `padded`: all rows are padded to the longest one, instead of packed one after the other. `by_rows`: attention runs
    row by row.
    """

    lengths: tuple[int, ...]
    answers: int
    padded: bool = False
    by_rows: bool = False

    @property
    def tokens(self) -> int:
        """The number of tokens in the pass, with padding."""
        return len(self.lengths) * max(self.lengths) if self.padded else sum(self.lengths)


@dataclass(frozen=True)
class SecondPass:
    """An extra forward pass, for each training pass, of the model that the phase started from. `shared`: the frozen
    layers under the adapters run once for both; `copied`: that model has adapters of its own."""

    shared: bool = False
    copied: bool = False


@dataclass(frozen=True)
class TrainingShape:
    """The settings of a training that affect the cost of a pass. `modules`: full names of the adapted modules; `cut`:
    the frozen layers under them do not run, as their output is stored; `second`: the pass of the starting model."""

    modules: tuple[str, ...]
    lora: Lora
    quantize: str
    checkpointing: bool
    cut: bool = False
    device: str = "cpu"
    second: SecondPass | None = None


def footprint(model: PreTrainedModel, shape: TrainingShape, one: Pass) -> Footprint:
    """The cost of one pass through a model without weights (on the meta device), which is not changed.

    Layers of one kind cost the same, so only one or two of each kind run; the difference is the cost per layer.
    """
    kinds = _kinds(model, shape)
    kept = {kind: layers[:1] for kind, layers in kinds.items()}
    first = run_layers(model, shape, one, [i for layers in kept.values() for i in layers])
    total = first
    for kind, layers in kinds.items():
        if len(layers) > 1:
            more = {**kept, kind: layers[:2]}
            second = run_layers(model, shape, one, [i for some in more.values() for i in some])
            total = total.plus(second.plus(first, -1), len(layers) - 1)
    # The head needs the same memory whatever is under it.
    return replace(total, logits=first.logits)


def _kinds(model: PreTrainedModel, shape: TrainingShape) -> dict[Any, list[int]]:
    """The layers that run, grouped by what affects their cost: the shapes of their weights, the modules with adapters,
    whether the backward pass goes through them."""
    prefix, count = decoder_layers(model)
    below = lowest_adapted(model, list(shape.modules))
    adapted: list[set[str]] = [set() for _ in range(count)]
    for module in linear_modules(model):
        if module.name in shape.modules:
            adapted[module.layer].add(module.type)
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * count
    layers: Any = model.get_submodule(prefix)
    kinds: dict[Any, list[int]] = {}
    for i in range(below if shape.cut else 0, count):
        made_of = tuple((name, tuple(p.shape)) for name, p in layers[i].named_parameters())
        # The input of the lowest adapted layer has no gradients, that of the layer above it has.
        side = -1 if i < below else min(i - below, 1)
        kinds.setdefault((made_of, types[i], frozenset(adapted[i]), side), []).append(i)
    return kinds


def run_layers(model: PreTrainedModel, shape: TrainingShape, one: Pass, layers: list[int]) -> Footprint:
    """Run a pass through these layers of the model, and the head."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    prefix, count = decoder_layers(model)
    below = lowest_adapted(model, list(shape.modules))
    reduced = copy.deepcopy(model)
    if reduced.config._attn_implementation not in {"eager", "sdpa"}:
        reduced.set_attn_implementation("sdpa")  # whose kernel stores the same as flash attention
    by_rows = one.by_rows and attend_by_rows(reduced, max(one.lengths))
    modules = [m for m in shape.modules if int(m[len(prefix) + 1 :].split(".")[0]) in layers]
    take_out(reduced, [i for i in range(count) if i not in layers])
    if shape.quantize == "nf4":
        _stand_in(reduced)
    adapted = add_lora(reduced, modules, shape.lora)
    keep_adapters_in_fp32(adapted)
    if shape.checkpointing:
        recompute_activations(adapted, below)
    adapted.train()
    head = reduced.get_output_embeddings()
    with FakeTensorMode():
        _without_data(adapted)
        counted = _counting()
        inputs = _inputs(one, by_rows)
        with counted, torch.autocast("cpu", torch.bfloat16), _autocast_for(shape.device):
            states = of(reduced.base_model(**inputs, use_cache=False), "transformers:BaseModelOutput.last_hidden_state")
            scored = states.reshape(-1, states.shape[-1])[torch.zeros(one.answers, dtype=torch.long)]
            leaf = scored.detach().requires_grad_()
            before, counted.peak, top = counted.live, counted.live, counted.peak
            _score(leaf, head, shape.device)
            if shape.second:
                _diverge(leaf, head)
            logits = counted.peak - before
            counted.peak = max(top, counted.peak)
        with counted:
            scored.backward(leaf.grad)
        del states, scored, leaf
        if shape.second:
            if shape.second.shared:
                take_out(reduced, range(below))
            if not shape.second.copied:
                adapted.base_model.disable_adapter_layers()
            with counted, torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _autocast_for(shape.device):
                reduced.base_model(**inputs, use_cache=False)
    return Footprint(counted.peak, logits, counted.flops, counted.moved)


@contextmanager
def _autocast_for(device: str) -> Iterator[None]:
    """Show PEFT the autocast of the training's device: it checks that of CUDA, and without it casts the input of an
    adapter to the adapter's fp32."""
    import torch

    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", device == "cuda")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def _inputs(one: Pass, by_rows: bool) -> dict[str, Any]:
    import torch

    size = (len(one.lengths), max(one.lengths)) if one.padded else (1, sum(one.lengths))
    inputs: dict[str, Any] = {"input_ids": torch.zeros(size, dtype=torch.long)}
    inputs["attention_mask" if one.padded else "position_ids"] = torch.ones(size, dtype=torch.long)
    if by_rows:
        inputs["row_lengths"] = one.lengths
    return inputs


def _score(states: torch.Tensor, head: Any, device: str) -> None:
    """Score answer tokens (tokens, hidden size) like TRL's fused head, and compute the gradient of their states."""
    import torch

    if device == "cpu":
        first_word(states, head.weight, head.bias).backward()  # type: ignore[no-untyped-call]
        return
    # On a GPU a kernel reduces each block of logits in place: it needs the block, and gradients summed in fp32.
    words = len(head.weight)
    for start in range(0, len(states), HEAD_TOKENS):
        rows = states.detach()[start : start + HEAD_TOKENS]
        for _ in range(3):  # forward, again in the backward pass, and back to the states
            block = rows.new_empty(len(rows), HEAD_WORDS)
            for first in range(0, words, HEAD_WORDS):
                width = min(HEAD_WORDS, words - first)
                torch.mm(rows, head.weight[first : first + width].t(), out=block[:, :width])
    states.grad = torch.zeros(states.shape).to(states.dtype)


def _diverge(states: torch.Tensor, head: Any) -> None:
    """Compare answer tokens with those of another model, and compute the gradient of their states."""
    import torch

    rows, words = len(states), len(head.weight)
    targets, masked = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
    divergence(head, states, torch.empty_like(states), targets, masked, words)[0].sum().backward()  # type: ignore[no-untyped-call]


def _stand_in(model: PreTrainedModel) -> None:
    """Replace the quantised modules by modules with the same cost as those of bitsandbytes.

    Those of bitsandbytes have a kind of tensor that does not work without data.
    """
    import bitsandbytes as bnb
    import torch
    from torch import nn

    class Product(torch.autograd.Function):
        """x W^T with W dequantised from 4 bits for each use, in the forward pass and again in the backward pass."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
            ctx.shape = shape
            return x @ x.new_empty(shape).t()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return grad @ grad.new_empty(ctx.shape), None

    class Quantised(bnb.nn.Linear4bit):  # type: ignore[misc]
        def __init__(self, linear: nn.Linear) -> None:
            nn.Module.__init__(self)
            self.shape = linear.weight.shape
            self.out_features, self.in_features = self.shape
            packed = torch.empty((linear.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
            weight: Any = nn.Parameter(packed, requires_grad=False)
            weight.compress_statistics, weight.quant_type = True, "nf4"  # which PEFT checks
            self.weight, self.bias = weight, linear.bias
            self.compute_dtype, self.quant_state = torch.bfloat16, None

        def forward(self, x: torch.Tensor) -> Any:
            product: Any = Product.apply(x.to(torch.bfloat16), self.shape)  # type: ignore[no-untyped-call]
            if self.bias is not None:
                product = product + self.bias
            return product.to(x.dtype)

        @property
        def W_q(self) -> Any:
            """PEFT recognises a module that dequantises its own weight, which DoRA needs, by this name."""
            return self.weight

        def dequantize(self) -> torch.Tensor:
            return torch.empty(self.shape, dtype=torch.bfloat16, device=self.weight.device)

    for name in quantised_modules(model):
        model.set_submodule(name, Quantised(model.get_submodule(name)))
    model.is_loaded_in_4bit = True


def _without_data(model: Any) -> None:
    """Replace tensors on the meta device by tensors of the same shapes that act as on a CPU, but without data."""
    import torch
    from torch import nn

    made: dict[int, Any] = {}  # so that tied weights stay tied
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    one: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if held is module._parameters:
                        one = nn.Parameter(one, requires_grad=tensor.requires_grad)
                        if tensor.requires_grad:
                            one.grad = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (one, tensor)
                held[name] = made[id(tensor)][0]


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """The flops of attention without a mask, for both matrix products, by the shapes (batch, heads, tokens, head size).
    All query heads count, as those that share keys and values (grouped-query attention) have their own products.

    PyTorch's own counter does not support shared heads before 2.12, or CPU kernels before 2.15.
    """
    batch, heads, tokens, size = query
    return 2 * batch * heads * tokens * key[2] * (size + value[3])


def _counting() -> Any:
    """A dispatch mode that counts the bytes of tensors created under it while they live, and each operation's work."""
    import torch
    from torch.utils import flop_counter
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    registry: Any = flop_counter.flop_registry

    class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.live = self.peak = self.moved = 0
            self.flops = 0.0
            self.known: weakref.WeakSet[Any] = weakref.WeakSet()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            out = func(*args, **kwargs)
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self._count(tensor.untyped_storage(), given)
            self.peak = max(self.peak, self.live)
            packet = func._overloadpacket
            if "scaled_dot_product" in str(packet):
                backward = "backward" in str(packet)  # where the gradient comes first
                q, k, v = [t.shape for t in args if isinstance(t, torch.Tensor)][backward:][:3]
                self.flops += (2.5 if backward else 1) * attention_flops(q, k, v)
            elif packet in registry:
                self.flops += registry[packet](*args, **kwargs, out_val=out)
            elif not func.is_view:
                tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
                self.moved += sum(t.numel() * t.element_size() for t in tensors)
            return out

        def _count(self, storage: Any, given: set[int]) -> None:
            if storage not in self.known and storage._cdata not in given:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())

        def _gone(self, count: int) -> None:
            self.live -= count

    return Counted()
