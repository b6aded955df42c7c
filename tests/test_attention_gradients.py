"""Gradients of attention's masks, slopes, sinks and log-sum-exp, over sizes of more than one tile."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from attention_helpers import DTYPES, compare, enlarged, finite, heads
from lmkern import reference
from lmkern.functional import scaled_dot_product_attention as attention
from oracle import outputs_and_gradients

WHOLE = (2, 3, 97, 130)
MASKS = [
    tuple(n if keep else 1 for n, keep in zip(WHOLE, kept, strict=True))
    for kept in itertools.product([False, True], repeat=4)
]


def both(**options):
    """(ours, reference) of q, k, v and whichever of mask, slopes, sinks ``names`` says."""
    names = options.pop("names", ())

    def call(f):
        return lambda q, k, v, *more: f(q, k, v, **dict(zip(names, more, strict=True)), **options)

    return call(attention), call(reference.scaled_dot_product_attention)


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_broadcast_in_any_of_their_dimensions(dtype, shape):
    inputs = [*heads(*WHOLE, 16, 12, dtype), torch.randn(shape).to(dtype)]
    compare(*both(names=["attn_mask"]), inputs)


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_with_everything_else(isa, shape):
    """GQA, lengths, a window, a softcap; some of the mask hides its keys."""
    mask = torch.randn(shape)
    mask[torch.rand(shape) < 0.1] = -math.inf
    B, H, L, S = WHOLE
    ours, theirs = both(
        names=["attn_mask", "alibi_slopes", "sinks"], enable_gqa=True, softcap=4.0, window=(60, 9),
        key_lengths=torch.tensor([130, 70]), causal_align="bottom_right",
    )  # fmt: skip
    inputs = heads(B, H, L, S, 16, 12, key_heads=1)
    compare(ours, theirs, [*inputs, mask, torch.rand(B, H) / 8, torch.randn(H)])


@pytest.mark.parametrize("shape", [(130,), (97, 1), (3, 97, 130), (3, 1, 1), (1,), ()], ids=str)
def test_masks_of_fewer_dimensions(shape):
    compare(*both(names=["attn_mask"]), [*heads(*WHOLE, 8, 8), torch.randn(shape)])


@pytest.mark.parametrize("L, S", [(0, 5), (5, 0), (1, 1), (1, 70), (65, 1), (4, 1025)])
@pytest.mark.parametrize("kept", list(itertools.product([False, True], repeat=2)), ids=str)
def test_masks_of_odd_sizes(kept, L, S):
    shape = (2, 1, L if kept[0] else 1, S if kept[1] else 1)
    compare(*both(names=["attn_mask"]), [*heads(2, 2, L, S, 8, 8), torch.randn(shape)])


def test_a_strided_mask():
    wide = torch.randn(2, 3, 130, 2 * 97)
    ours, theirs = both(names=["attn_mask"])

    def strided(f):
        return lambda q, k, v, m: f(q, k, v, m[..., ::2].mT)

    compare(strided(ours), strided(theirs), [*heads(*WHOLE, 8, 8), wide])


@pytest.mark.parametrize("how", ["", "x3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3), (2, 1)], ids=str)
def test_slopes(shape, dtype, how):
    inputs = [*enlarged(*heads(*WHOLE, 16, 12, dtype), how), (torch.rand(shape) / 8).to(dtype)]
    for align in ("top_left", "bottom_right"):
        ours, theirs = both(names=["alibi_slopes"], causal_align=align)
        # the reference wants them [B, H]; a sum of distances has few digits in 16 bits
        compare(
            ours,
            lambda q, k, v, a, f=theirs: f(q, k, v, a.expand(2, 3)),
            inputs,
            {torch.bfloat16: 6e-2, torch.float16: 1e-2}.get(dtype),
        )


@pytest.mark.parametrize("how", ["", "x3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_sinks(causal, dtype, how):
    sinks = torch.tensor([-2.0, 3.0, 30.0]).to(dtype)  # of a head that sees hardly any key, too
    inputs = [*enlarged(*heads(*WHOLE, 16, 12, dtype), how), sinks]
    compare(*both(names=["sinks"], is_causal=causal, return_lse=True), inputs)


def test_a_sink_that_is_not_there():
    """-inf is no sink, and where no key is seen either, all is zero."""
    q, k, v = heads(2, 3, 70, 90, 8, 8)
    sinks = torch.tensor([-math.inf, 0.0, -math.inf])
    lengths = torch.tensor([90, 0])
    options = {"names": ["sinks"], "key_lengths": lengths, "return_lse": True}
    ours, theirs = both(**options)
    compare(finite(ours), finite(theirs), [q, k, v, sinks])
    assert torch.equal(attention(q, k, v, sinks=sinks)[:, ::2], attention(q, k, v)[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("only_lse", [False, True])
def test_log_sum_exp(isa, only_lse, dtype):
    ours, theirs = both(is_causal=True, return_lse=True, softcap=6.0)
    pick = (lambda r: r[1]) if only_lse else (lambda r: r)
    inputs = heads(*WHOLE, 24, 20, dtype)
    if only_lse:  # which does not depend on v
        v = inputs.pop()
        compare(
            lambda q, k: pick(ours(q, k, v)), lambda q, k: pick(theirs(q, k, v.double())), inputs
        )
    else:
        compare(ours, theirs, inputs)


def test_only_what_is_asked_for():
    """Any subset of the inputs may want a gradient; those that do get the same one."""
    inputs = [*heads(1, 2, 40, 70, 8, 8), torch.randn(40, 70), torch.rand(2), torch.randn(2)]

    def f(q, k, v, mask, slopes, sinks):
        return attention(q, k, v, mask, alibi_slopes=slopes, sinks=sinks)

    whole = outputs_and_gradients(f, inputs)[1:]
    weight = torch.randn(
        1, 2, 40, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for wanted in itertools.product([False, True], repeat=6):
        if not any(wanted):
            continue
        leaves = [x.clone().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
        f(*leaves).backward(weight.float())
        for leaf, w, g in zip(leaves, wanted, whole, strict=True):
            assert (leaf.grad is not None) == w
            assert not w or torch.equal(leaf.grad, g)
