"""Attention: forward, and forward + backward, against torch's fused CPU kernel and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness import Case, assert_close
from lmkern.functional import scaled_dot_product_attention

# (B, H, L, D)
SIZES = [(1, 8, 128, 64), (4, 8, 512, 64), (1, 12, 1024, 64), (1, 8, 4096, 64), (1, 16, 1024, 128)]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention(compare, threads, size, causal, training):
    B, H, L, D = size
    torch.manual_seed(0)
    # Heads as a model has them: views of one projection.
    qkv = [x.transpose(1, 2) for x in torch.randn(B, L, 3, H, D).unbind(2)]
    d_out = torch.randn(B, L, H, D).transpose(1, 2)

    def step(attention):
        if not training:
            with torch.no_grad():
                return [attention(*qkv, is_causal=causal)]
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = attention(*leaves, is_causal=causal)
        out.backward(d_out)
        return [out.detach(), *(x.grad for x in leaves)]

    compiled = torch.compile(F.scaled_dot_product_attention, dynamic=False)
    products = 7 if training else 2
    compare(
        Case(
            f"attention {'causal' if causal else 'full'} {'both' if training else 'forward'} "
            f"B,H,L,D={size}",
            ours=lambda: step(scaled_dot_product_attention),
            peers={
                "sdpa": lambda: step(F.scaled_dot_product_attention),
                "compile": lambda: step(compiled),
            },
            check=lambda: assert_close(
                step(scaled_dot_product_attention), step(F.scaled_dot_product_attention), 1e-4
            ),
            flops=2 * products * B * H * D * (L * (L + 1) / 2 if causal else L * L),
        )
    )
