"""Embedding: lookup, and lookup + dense gradient, with Zipf-distributed ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from harness import Case, assert_close
from lmkern.functional import embedding

# (V, D, N)
SIZES = [(50257, 768, 8192), (10000, 256, 4096)]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_embedding(compare, threads, size, training):
    V, D, N = size
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.zipf(1.2, N).clip(max=V) - 1)
    weight = torch.randn(V, D)
    d_out = torch.randn(N, D)

    def step(lookup):
        if not training:
            with torch.no_grad():
                return [lookup(ids, weight)]
        leaf = weight.detach().requires_grad_()
        out = lookup(ids, leaf)
        out.backward(d_out)
        return [out.detach(), leaf.grad]

    compiled = torch.compile(F.embedding, dynamic=False)
    moved = 2 * N * D * 4 + (training * (N * D + V * D) * 4)
    compare(
        Case(
            f"embedding {'both' if training else 'forward'} V,D,N={size}",
            ours=lambda: step(embedding),
            peers={"torch": lambda: step(F.embedding), "compile": lambda: step(compiled)},
            check=lambda: assert_close(step(embedding), step(F.embedding), 1e-5),
            bytes=moved,
        )
    )
