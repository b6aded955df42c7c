"""Embedding: lookup, and lookup + dense gradient, with Zipf-distributed ids.

Predicted from bytes: forward 2 N D, gradient N D read and U D written, of U distinct ids; Zipf's stay
in cache, so both go above copy bandwidth. torch's gradient writes V D besides.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from harness import Case, assert_agree
from lmkern.functional import embedding

# (V, D, N)
SIZES = [(50257, 768, 8192), (10000, 256, 4096)]


def zipf_ids(rows: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).zipf(1.2, count).clip(max=rows) - 1)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_embedding(compare, threads, size, training):
    V, D, N = size
    ids, d_out = zipf_ids(V, N), torch.randn(N, D)
    table = torch.randn(V, D)

    def stepper(lookup):
        # A weight of its own: a step that drops the peer's gradient would pay for freeing it.
        weight = torch.nn.Parameter(table.clone())

        def step():
            if not training:
                with torch.no_grad():
                    return [lookup(ids, weight)]
            weight.grad = None
            out = lookup(ids, weight)
            out.backward(d_out)
            return [out.detach(), weight.grad]

        return step

    ours = stepper(embedding)
    peers = {
        "torch": stepper(F.embedding),
        "compile": stepper(torch.compile(F.embedding, dynamic=False)),
    }
    distinct = ids.unique().numel()
    compare(
        Case(
            f"embedding {'both' if training else 'forward'} V,D,N={size}",
            ours=ours,
            peers=peers,
            check=lambda: assert_agree(ours, peers, 1e-5),
            bytes=(2 * N + training * (N + distinct)) * D * 4,
        )
    )
