"""Attention of one query over a cache of keys: bound by reading it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attention_cases import compare_attention, flex_peer, torch_peers

# (B, H, H_kv, S, D)
SIZES = [
    (1, 12, 12, 1024, 64),
    (8, 12, 12, 1024, 64),
    (1, 32, 32, 4096, 128),
    (1, 32, 8, 4096, 128),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decode(compare, threads, size):
    """With fewer key heads: torch's enable_gqa, keys repeated at each step, and a cache of them
    repeated beforehand, at four times the memory."""
    B, H, H_kv, S, D = size
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, 1, D), torch.randn(B, H_kv, S, D), torch.randn(B, H_kv, S, D)
    grouped = H_kv < H
    peers = torch_peers(enable_gqa=True) if grouped else torch_peers()
    flex = flex_peer()
    peers["flex"] = lambda q, k, v: flex(q, k, v, enable_gqa=grouped)
    if grouped:
        group = H // H_kv
        repeated = [x.repeat_interleave(group, 1) for x in (k, v)]
        peers["repeat"] = lambda q, k, v: F.scaled_dot_product_attention(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        )
        peers["repeated"] = lambda q, k, v: F.scaled_dot_product_attention(q, *repeated)
    compare_attention(
        compare,
        f"decode{' GQA' * grouped} B,H,H_kv,S,D={size}",
        peers,
        [q, k, v],
        None,
        bytes=4 * (k.numel() + v.numel()),
        topic="decode GQA" if grouped else "decode",
        enable_gqa=grouped,
    )
