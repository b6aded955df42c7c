"""EmbeddingBag: 64 bags of 64 Zipf-distributed ids, forward and dense gradient.

Predicted from bytes: N D read and U D written, of U distinct ids; torch's gradient writes V D besides.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench_embedding import zipf_ids
from harness import Case, assert_agree
from lmkern.functional import embedding_bag

BAGS, LENGTH = 64, 64
SIZES = [(50257, 768), (10000, 256)]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_embedding_bag(compare, threads, size, mode, training):
    V, D = size
    ids, d_out = zipf_ids(V, BAGS * LENGTH).view(BAGS, LENGTH), torch.randn(BAGS, D)
    table = torch.randn(V, D)

    def stepper(bag):
        # A weight of its own: a step that drops the peer's gradient would pay for freeing it.
        weight = torch.nn.Parameter(table.clone())

        def step():
            if not training:
                with torch.no_grad():
                    return [bag(ids, weight, mode=mode)]
            weight.grad = None
            out = bag(ids, weight, mode=mode)
            out.backward(d_out)
            return [out.detach(), weight.grad]

        return step

    ours = stepper(embedding_bag)
    peers = {
        "torch": stepper(F.embedding_bag),
        "compile": stepper(torch.compile(F.embedding_bag, dynamic=False)),
    }
    distinct = ids.unique().numel()
    compare(
        Case(
            f"embedding_bag {mode} {'both' if training else 'forward'} V,D={size}",
            ours=ours,
            peers=peers,
            check=lambda: assert_agree(ours, peers, 1e-5),
            bytes=(ids.numel() + training * distinct) * D * 4,
        )
    )
