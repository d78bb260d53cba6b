"""Answers to prompts, in batches sorted by length; finished answers are removed from the batch.

transformers' own continuous batching (`generate_batch`, 5.23) was slower on a CPU and needed ten times the memory:
`python tests/benchmarks/replay.py --continuous` compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from qcft.data.mix import stable_seed
from qcft.errors import QcftError
from qcft.events import Watch
from qcft.models.halving import attempt
from qcft.models.load import evaluating

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEGMENT = 16  # tokens between two checks for finished answers
NUCLEUS = 128  # most likely tokens, tried first: sorting a whole vocabulary costs more than the model's own pass


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy.

    Each prompt has a random generator of its own, seeded with `seed` and its position, so that its answer does not
    depend on the batch it is in.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer's text, its number of tokens without the end of turn, and whether it is finished."""

    text: str
    tokens: int
    finished: bool


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    end_ids: list[int],
    sampling: Sampling,
    batch: int,
    watch: Watch,
    label: str | None = None,
) -> list[Answer]:
    """Answer each prompt (token ids), in the order of the prompts; reports progress if given a `label`."""

    def on_progress(done: int, tokens: int) -> None:
        if label is None:
            watch.check_stop()
        else:
            watch.progress(label, done, len(prompts), "answers", tokens=f"{tokens:,} tokens")

    return answer_batches(model, tokenizer, prompts, end_ids, sampling, batch, on_progress)[0]


def answer_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    end_ids: list[int],
    sampling: Sampling,
    batch: int,
    on_progress: Callable[[int, int], None],
) -> tuple[list[Answer], list[list[int]]]:
    """Answer each prompt; also returns which prompts were batched together.

    Prompts are sorted by length. A batch that does not fit into memory is tried again at half its size, which is the
    limit for later batches too. `on_progress(answers finished, tokens generated)` is called every few tokens. Raises
    QcftError if not even a single prompt fits.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    batches: list[list[int]] = []
    made = 0
    with evaluating(model):
        while len(answers) < len(order):
            chosen = order[len(answers) : len(answers) + batch]

            def in_batch(done: int, tokens: int, before: int = len(answers), so_far: int = made) -> None:
                on_progress(before + done, so_far + tokens)

            given = [prompts[i] for i in chosen]
            sequences = attempt(partial(_generate, model, tokenizer, given, chosen, end_ids, sampling, in_batch))
            if sequences is None:
                if len(chosen) == 1:
                    raise QcftError(
                        f"memory ran out while answering a prompt of {len(prompts[chosen[0]])} tokens",
                        "lower max_new_tokens or train.max_length, or use a smaller model",
                    )
                batch = max(1, len(chosen) // 2)
                continue
            for i, sequence in zip(chosen, sequences, strict=True):
                answers[i] = _answer(tokenizer, sequence, end_ids)
                made += answers[i].tokens
            batches.append(chosen)
    return [answers[i] for i in range(len(prompts))], batches


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    positions: list[int],
    end_ids: list[int],
    sampling: Sampling,
    on_progress: Callable[[int, int], None],
) -> list[list[int]]:
    """One batch's new tokens. `generate` runs for a few tokens at a time, then continues without finished answers."""
    import torch

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    ends = torch.tensor(end_ids, device=model.device)
    nucleus = Nucleus(sampling, positions) if sampling.temperature > 0 else None
    made: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    cache: Any = None
    cache_name = _cache_name()
    left = sampling.max_new_tokens
    while live and left > 0:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **{cache_name: cache},
            max_new_tokens=min(left, SEGMENT) if cache is None or _can_shrink(cache) else left,
            do_sample=False,  # the nucleus leaves one token to choose
            logits_processor=[nucleus] if nucleus else [],
            eos_token_id=end_ids,
            pad_token_id=pad,
            return_dict_in_generate=True,
        )
        new = output.sequences[:, ids.shape[1] :]
        left -= new.shape[1]
        for row, tokens in zip(live, new.tolist(), strict=True):
            made[row] += tokens
        going = torch.nonzero(~torch.isin(new, ends).any(dim=1)).flatten()
        cache = getattr(output, cache_name, None)
        keep = going if _can_shrink(cache) else torch.arange(len(live), device=model.device)
        if len(keep) < len(live):
            cache.batch_select_indices(keep)
            if nucleus:
                nucleus.keep(keep.tolist())
        ids = output.sequences[keep]
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)[keep]
        live = [live[i] for i in keep.tolist()]
        on_progress(len(prompts) - len(going), sum(len(tokens) for tokens in made))
        if not len(going):
            break
    return made


def _cache_name() -> str:
    """transformers' name for the KV cache, as an argument and in the output: `cache` since version 5.24."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def _can_shrink(cache: Any) -> bool:
    """Whether rows can be removed from a KV cache: not if layers keep another kind of state."""
    layers: Any = getattr(cache, "layers", None)
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)


class Nucleus:
    """Top-p sampling (Holtzman et al. 2020, arXiv 1904.09751) that keeps one token; each row has its own generator."""

    def __init__(self, sampling: Sampling, positions: list[int]) -> None:
        import torch

        self.temperature, self.top_p = sampling.temperature, sampling.top_p
        seeds = [stable_seed(f"{sampling.seed}:{position}") for position in positions]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows x vocabulary) that are minus infinity except for the drawn token."""
        import torch

        scores = scores.float() / self.temperature
        count = min(NUCLEUS, scores.shape[-1])
        whole = torch.logsumexp(scores, dim=-1, keepdim=True)
        while True:
            likeliest, tokens = torch.topk(scores, count, dim=-1)
            upto = torch.cumsum(torch.exp(likeliest - whole), dim=-1)
            if count == scores.shape[-1] or bool((upto[:, -1] >= self.top_p).all()):
                break
            count = min(8 * count, scores.shape[-1])
        inside = torch.cat([torch.zeros_like(upto[:, :1]), upto[:, :-1]], dim=-1) < self.top_p
        drawn = torch.stack([torch.rand((), generator=generator) for generator in self.generators])
        upto = torch.where(inside, upto, 0.0)
        target = drawn.to(upto.device) * upto.max(dim=-1).values
        place = (inside & (upto <= target[:, None])).sum(dim=-1, keepdim=True)
        place = torch.minimum(place, inside.sum(dim=-1, keepdim=True) - 1)
        chosen = torch.gather(tokens, 1, place)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _answer(tokenizer: PreTrainedTokenizerBase, sequence: list[int], end_ids: list[int]) -> Answer:
    end = next((i for i, token in enumerate(sequence) if token in end_ids), None)
    kept = sequence if end is None else sequence[:end]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    return Answer(text.strip(), len(kept), end is not None)
