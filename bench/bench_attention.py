"""Attention: causal and not, forward and both passes, float32 and bfloat16, against torch's."""

from __future__ import annotations

import pytest
import torch

from attention_cases import (
    PASSES,
    SIZES,
    causal,
    compare_attention,
    flex_peer,
    gradient,
    projected,
    torch_peers,
)


@pytest.mark.parametrize("training", [False, True], ids=PASSES.get)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention(compare, threads, size, is_causal, training):
    B, H, L, _ = size
    torch.manual_seed(0)
    peers = torch_peers(is_causal=is_causal)
    if not training:
        peers["flex"] = flex_peer(causal, (1, L, L)) if is_causal else flex_peer()
    compare_attention(
        compare,
        f"attention {'causal' if is_causal else 'full'} {PASSES[training]} B,H,L,D={size}",
        peers,
        projected(*size),
        gradient(*size) if training else None,
        pairs=B * H * (L * (L + 1) / 2 if is_causal else L * L),
        is_causal=is_causal,
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bf16(compare, threads, size):
    """bfloat16 storage, both passes; each rounds its own way, gradients that cancel most of all."""
    B, H, L, _ = size
    torch.manual_seed(0)
    compare_attention(
        compare,
        f"attention bf16 causal both B,H,L,D={size}",
        torch_peers(is_causal=True),
        projected(*size, torch.bfloat16),
        gradient(*size, torch.bfloat16),
        pairs=B * H * L * (L + 1) / 2,
        tolerance=4e-2,
        is_causal=True,
    )
