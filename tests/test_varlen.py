"""One kernel for the attention of all rows, with row by row as the reference; by arithmetic of our own on a CPU."""

from inspect import signature

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: F401 (the reference depends on it)

from qcft.training import attention

LENGTHS = (7, 30, 1, 12)
HAS_KERNEL = {"enable_gqa", "num_splits"} <= signature(varlen_attn).parameters.keys()  # torch 2.11 lacks it


class Layer(torch.nn.Module):
    """What transformers' attention reads from a layer."""

    is_causal = True
    num_key_value_groups = 2
    training = False


def states(device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, heads, sum(LENGTHS), 64) for heads in (4, 2, 2)]
    return [torch.randn(size, generator=generator).to(device, torch.bfloat16) for size in sizes]


def attend(parts, **options):
    options |= {"row_lengths": LENGTHS, "scaling": 0.1, "dropout": 0.0}
    found, _ = attention.packed_attention(Layer(), *parts, None, **options)
    return found


@pytest.fixture
def kernel(monkeypatch):
    """The operator that PyTorch has on cards only, for a CPU; what it was given."""
    given = []

    def rows(q, k, v, starts, starts_k, longest, longest_k, causal, scale, window, gqa, *rest):
        given.append((starts.tolist(), longest, causal, gqa, rest[-1]))
        out = torch.empty_like(q)
        for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            one = [part[a:b].transpose(0, 1)[None].float() for part in (q, k, v)]
            made = scaled_dot_product_attention(*one, is_causal=causal, scale=scale, enable_gqa=gqa)
            out[a:b] = made[0].transpose(0, 1).to(q.dtype)
        return out, out.new_empty(0), out.new_empty(0)

    from torch.nn.attention import varlen

    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", rows, raising=False)
    assert varlen.varlen_attn
    return given


@pytest.mark.skipif(not HAS_KERNEL, reason="torch's kernel lacks what is asked of it")
def test_one_kernel_is_given_all_rows_in_their_order(kernel):
    parts = states()
    reference = attend(parts)
    found = attention.by_one_kernel(*parts, LENGTHS, 0.1)
    assert kernel == [([0, 7, 37, 38, 50], 30, True, True, 1)]
    assert found.shape == reference.shape
    assert (found.float() - reference.float()).norm() < 1e-2 * reference.float().norm()


def test_it_is_used_only_where_it_is_set_and_on_cards_that_have_it(monkeypatch):
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.delenv("QCFT_VARLEN", raising=False)
    assert not attention.one_kernel(card)
    monkeypatch.setenv("QCFT_VARLEN", "1")
    assert attention.one_kernel(card) is HAS_KERNEL
    assert not attention.one_kernel(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert not attention.one_kernel(card)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_card_it_gives_the_same_and_rows_do_not_leak(monkeypatch):
    parts = [part.requires_grad_() for part in states("cuda")]
    reference = attend(parts)
    reference.square().sum().backward()
    slopes = [part.grad.clone() for part in parts]
    monkeypatch.setenv("QCFT_VARLEN", "1")
    for part in parts:
        part.grad = None
    found = attend(parts)
    found.square().sum().backward()
    for one, other in zip([found, *(part.grad for part in parts)], [reference, *slopes], strict=True):
        assert (one.float() - other.float()).norm() < 1e-2 * other.float().norm()
    changed = [part.detach().clone() for part in parts]
    for part in changed:
        part[:, :, 7:37] += 1
    again = attend(changed)
    assert not torch.equal(again[:, 7:37], found[:, 7:37])
    assert torch.equal(again[:, :7], found[:, :7])
    assert torch.equal(again[:, 37:], found[:, 37:])
