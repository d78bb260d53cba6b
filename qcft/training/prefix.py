"""The prefix cache: the output of the lowest, frozen layers is computed once per row, stored, and read in training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from qcft.data.encode import EncodedRow
from qcft.data.mix import in_groups
from qcft.errors import QcftError
from qcft.events import Watch
from qcft.layers import decoder_layers
from qcft.models.halving import in_halves
from qcft.models.load import compute_dtype, evaluating, free_memory
from qcft.recipe import Train
from qcft.store.states import RowStates
from qcft.training.attention import FAMILIES, NAME

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PASS_TOKENS = 2048
SMALL = 10**9  # bytes; up to this size, states are stored even for a training that sees each row once


def row_key(row: EncodedRow) -> str:
    """The key of a tokenised row: the digest of its token ids."""
    return hashlib.sha256(repr(row.input_ids).encode()).hexdigest()[:24]


def cannot_split(model: PreTrainedModel, train: Train) -> str | None:
    """The reason why a model's lowest layers cannot run separately from the rest, or None if they can."""
    config: Any = model.config
    if config.model_type not in FAMILIES:
        return f"qcft does not know how to split {config.model_type}"
    if getattr(config, "attention_dropout", 0):
        return "its attention has dropout, so that each pass is different"
    if "neftune_noise_alpha" in train.sft:
        return "NEFTune adds noise under the frozen layers"
    return None


def fill_states(model: PreTrainedModel, below: int, rows: Sequence[EncodedRow], states: RowStates, watch: Watch) -> int:
    """Compute and store the output of the layers under `below` for rows that are not stored yet; returns their number.

    Uses the kernels, precision and attention of training. A pass has several rows if attention runs row by row, else
    one, so that a row's states do not depend on others.
    """
    by_key = {row_key(row): row for row in rows}
    missing = states.missing(by_key)
    together = model.config._attn_implementation == NAME
    done = 0
    for keys in in_groups(missing, lambda key: len(by_key[key].input_ids), PASS_TOKENS if together else 1):
        watch.progress(f"caching the first {below} layers", done, len(missing), "rows")
        run = partial(_run_prefix, model, below, together)
        computed = in_halves(run, [by_key[key] for key in keys], f"while caching the first {below} layers of a row")
        states.add([(key, _as_integers(one)) for key, one in zip(keys, computed, strict=True)])
        done += len(keys)
    if missing:
        watch.progress(f"caching the first {below} layers", done, len(missing), "rows")
    return len(missing)


class Prefix:
    """A model without its lowest layers: stored states replace their output."""

    def __init__(self, model: PreTrainedModel, below: int, states: RowStates) -> None:
        from torch import nn

        class StoredStates(nn.Module):
            """Replaces the embedding, and returns the states of the next rows."""

            current: torch.Tensor

            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                return self.current

        self.below = below
        self.states = states
        self.device = model.device
        self.stored = StoredStates()
        take_out(model, range(below))
        model.set_input_embeddings(self.stored)  # a head that is tied to the embedding keeps the weights
        free_memory()

    def show(self, rows: Iterable[EncodedRow], padded: bool = False) -> None:
        """Start the next pass from the stored states of these rows: one after the other, or `padded` on the right with
        zeros, which the attention mask hides."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        states = [torch.from_numpy(self.states.read(row_key(row))).view(compute_dtype()) for row in rows]
        joined = pad_sequence(states, batch_first=True) if padded else torch.cat(states)[None]
        self.stored.current = joined.to(self.device)


def take_out(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """Remove layers from a model; the others keep their indices and names."""
    from torch import nn

    class PassThrough(nn.Module):
        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    modules: Any = model.get_submodule(decoder_layers(model)[0])
    for i in layers:
        modules[i] = PassThrough()


@contextmanager
def caught_below(model: PreTrainedModel, below: int) -> Iterator[list[torch.Tensor]]:
    """Keep the input of layer `below` in the passes that are run, if there are layers under it."""
    layers: Any = model.get_submodule(decoder_layers(model)[0])
    caught: list[torch.Tensor] = []
    if not below:
        yield caught
        return
    hook = layers[below - 1].register_forward_hook(lambda module, arguments, output: caught.append(output))
    try:
        yield caught
    finally:
        hook.remove()


@contextmanager
def begun_at(model: PreTrainedModel, below: int, states: torch.Tensor) -> Iterator[None]:
    """Start passes at layer `below` with these states as its input; the layers under it do not run."""
    from torch import nn

    class StatesStored(nn.Module):
        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return states

    modules: Any = model.get_submodule(decoder_layers(model)[0])
    removed = list(modules[:below])
    for i in range(below):
        modules[i] = StatesStored()
    try:
        yield
    finally:
        for i, layer in enumerate(removed):
            modules[i] = layer


def _run_prefix(model: PreTrainedModel, below: int, together: bool, rows: Sequence[EncodedRow]) -> list[torch.Tensor]:
    """The input of layer `below` for each row: tensors of shape (tokens, hidden size)."""
    import torch

    class Reached(Exception):
        """The pass has reached layer `below`; the rest is not needed."""

    caught: list[torch.Tensor] = []

    def catch(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        caught.append(arguments[0] if arguments else options["hidden_states"])
        raise Reached

    lengths = tuple(len(row.input_ids) for row in rows)
    ids = torch.tensor([token for row in rows for token in row.input_ids], device=model.device)[None]
    positions = torch.cat([torch.arange(length) for length in lengths]).to(model.device)[None]
    layers: Any = model.get_submodule(decoder_layers(model)[0])
    hook = layers[below].register_forward_pre_hook(catch, with_kwargs=True)
    autocast = torch.autocast(model.device.type, compute_dtype(), enabled=compute_dtype() != torch.float32)
    try:
        with evaluating(model), autocast:
            model(
                input_ids=ids, position_ids=positions, use_cache=False, **({"row_lengths": lengths} if together else {})
            )
    except Reached:
        pass
    finally:
        hook.remove()
    if caught[0].dtype != compute_dtype():
        raise QcftError(f"the layers of this model give {caught[0].dtype}, not {compute_dtype()}", "please report this")
    return list(torch.split(caught[0][0].cpu(), list(lengths)))


def _as_integers(states: torch.Tensor) -> Any:
    import torch

    return states.contiguous().view(torch.int32 if states.element_size() == 4 else torch.int16).numpy()


def worth_storing(train: Train, needed: int, again: bool) -> bool:
    """Whether to store states of `needed` bytes: as asked, or if they are few or are read `again`."""
    return train.prefix_cache is True or (train.prefix_cache == "auto" and (needed <= SMALL or again))
