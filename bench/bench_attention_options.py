"""Attention's padding, windows, dropout and weights, against what torch has for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lmkern
from attention_cases import (
    PASSES,
    compare_attention,
    flex_peer,
    gradient,
    masked_peers,
    projected,
    step,
    torch_peers,
)
from harness import Case, assert_agree, assert_close, infer
from lmkern import reference
from lmkern.functional import scaled_dot_product_attention


@pytest.mark.parametrize("training", [False, True], ids=PASSES.get)
@pytest.mark.parametrize("size", [(8, 8, 512, 64), (4, 12, 1024, 64)], ids=str)
def test_padding(compare, threads, size, training):
    """Lengths uniform in [L / 4, L], against a mask."""
    B, H, L, _ = size
    torch.manual_seed(0)
    lengths = torch.linspace(L / 4, L, B).round().long()[torch.randperm(B)]
    peers = masked_peers(torch.arange(L) < lengths[:, None, None, None])
    if not training:
        peers["flex"] = flex_peer(lambda b, h, i, j: j < lengths[b], (B, L, L))
    compare_attention(
        compare,
        f"attention padding {PASSES[training]} B,H,L,D={size}",
        peers,
        projected(*size),
        gradient(*size) if training else None,
        pairs=H * L * int(lengths.sum()),
        key_lengths=lengths,
    )


@pytest.mark.parametrize("training", [False, True], ids=PASSES.get)
def test_window(compare, threads, training):
    """Each query sees 256 keys: itself and those before it."""
    size, window = (1, 8, 4096, 64), 256
    B, H, L, _ = size
    torch.manual_seed(0)
    i, j = torch.arange(L)[:, None], torch.arange(L)
    mask = (j <= i) & (j > i - window)
    peers = masked_peers(mask)
    if not training:
        peers["flex"] = flex_peer(lambda b, h, i, j: (j <= i) & (j > i - window), (1, L, L))
    compare_attention(
        compare,
        f"attention window {window} {PASSES[training]} B,H,L,D={size}",
        peers,
        projected(*size),
        gradient(*size) if training else None,
        pairs=B * H * int(mask.sum()),
        window=(window - 1, 0),
    )


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("size", [(4, 8, 512, 64), (1, 12, 1024, 64)], ids=str)
def test_dropout(compare, threads, size, is_causal):
    """Both passes. Every contender drops other weights: ours are checked against their own mask."""
    B, H, L, _ = size
    rate = 0.1
    torch.manual_seed(0)
    inputs, d_out = projected(*size), gradient(*size)

    def check():
        torch.manual_seed(1)
        seed = torch.randint(1 << 62, ())
        lse = torch.zeros(B, H, L)
        keep = torch.ops.lmkern.attention_weights(
            *inputs, None, None, None, None, None, None, seed, 1.0, 0.0, -1, -1, False, rate, lse,
            False, True,
        )  # fmt: skip
        assert abs((keep > 0).double().mean() - (1 - rate)) < 1e-3
        torch.manual_seed(1)
        options = {"is_causal": is_causal}
        assert_close(
            step(
                lambda *a: scaled_dot_product_attention(*a, dropout_p=rate, **options),
                inputs,
                d_out,
            ),
            step(
                lambda *a: reference.scaled_dot_product_attention(*a, keep=keep, **options),
                inputs,
                d_out,
            ),
            1e-4,
        )

    compare_attention(
        compare,
        f"attention dropout {'causal' if is_causal else 'full'} both B,H,L,D={size}",
        torch_peers(dropout_p=rate, is_causal=is_causal),
        inputs,
        d_out,
        pairs=B * H * (L * (L + 1) / 2 if is_causal else L * L),
        check=check,
        topic="attention dropout both",
        dropout_p=rate,
        is_causal=is_causal,
    )


@pytest.mark.parametrize("average", [True, False], ids=["mean", "heads"])
@pytest.mark.parametrize("size", [(8, 128, 512, 8), (4, 512, 768, 12)], ids=str)
def test_need_weights(compare, threads, size, average):
    """nn.MultiheadAttention's default, which torch computes unfused; its evaluation's fast path too."""
    B, L, E, H = size
    torch.manual_seed(0)
    ours = lmkern.nn.MultiheadAttention(E, H, batch_first=True).eval()
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict())
    unfused = torch.nn.MultiheadAttention(E, H, batch_first=True)  # what training runs
    unfused.load_state_dict(ours.state_dict())
    x = torch.randn(B, L, E)

    def run(module):
        return infer(lambda x: module(x, x, x, average_attn_weights=average), [x])

    compiled = torch.compile(theirs, dynamic=False)
    modules = {"eager": unfused, "fast path": theirs, "compile": compiled}
    peers = {name: lambda m=m: run(m) for name, m in modules.items()}
    compare(
        Case(
            f"need_weights {'mean' if average else 'heads'} B,L,E,H={size}",
            ours=lambda: run(ours),
            peers=peers,
            check=lambda: assert_agree(lambda: run(ours), peers, 1e-4),
            flops=2 * B * L * (4 * E * E + 2 * L * E),
            topic="need_weights",
        )
    )


@pytest.mark.parametrize("size", [(4, 8, 512, 64)], ids=str)
def test_mask_gradient(compare, threads, size):
    """A learned bias for all batches, such as T5's: both passes, and the bias's gradient."""
    B, H, L, _ = size
    torch.manual_seed(0)
    compare_attention(
        compare,
        f"attention bias gradient B,H,L,D={size}",
        {
            "sdpa": F.scaled_dot_product_attention,
            "compile": torch.compile(F.scaled_dot_product_attention, dynamic=False),
        },
        [*projected(*size), torch.randn(1, H, L, L)],
        gradient(*size),
        pairs=B * H * L * L,
    )
