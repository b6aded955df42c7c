"""Optimizers of embedding tables: whole training steps, and the optimizer's step alone.

Predicted from bytes: n of the N ids are distinct. A step alone reads the gradient once, N D numbers or,
coalesced, n D, and moves 2, 4 and 6 n D (SGD, Adagrad, Adam), at the rate of a copy. A dense AdamW moves
7 V D, and its gradient at least 2 V D: at most 22 times the bytes of a whole step of ours. torch's SGD
on a coalesced gradient is the same single pass as ours.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lmkern
from harness import Case, assert_close

V, D, N = 50257, 768, 8192
SIZE = f"V,D,N={(V, D, N)}"


def zipf_ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).zipf(1.2, N).clip(max=V) - 1)


@pytest.mark.parametrize("peer", ["dense", "sparse"])
def test_training_step(compare, threads, peer):
    """Embedding forward and backward, and AdamW; torch's dense way, or SparseAdam without decay."""
    ids = zipf_ids()
    d_out = torch.randn(N, D)
    start = torch.randn(V, D)

    def trainer(layer, optimizer, sparse, compiled=False, **options):
        table = layer(V, D, _weight=start.clone(), sparse=sparse)
        instance = optimizer(table.parameters(), lr=1e-3, **options)
        lookup = torch.compile(table, dynamic=False) if compiled else table
        update = torch.compile(instance.step) if compiled else instance.step

        def step():
            lookup(ids).backward(d_out)
            update()
            instance.zero_grad()
            return table.weight, instance

        return step

    def ours():
        return trainer(lmkern.nn.Embedding, lmkern.optim.AdamW, True)

    def dense(**options):
        return trainer(torch.nn.Embedding, torch.optim.AdamW, False, **options)

    def check():
        # In the first step, all that happens to an untouched row is its decay.
        weight, optimizer = ours()()
        optimizer.catch_up()
        assert_close([weight - start], [dense(fused=True)()[0] - start], 1e-3)

    if peer == "dense":
        peers = {"torch": dense(fused=True), "compile": dense(compiled=True)}
    else:
        peers = {"torch": trainer(torch.nn.Embedding, torch.optim.SparseAdam, True)}
    compare(
        Case(
            f"embedding AdamW step, {peer} peer {SIZE}",
            ours=ours(),
            peers=peers,
            check=check,
            bytes=(3 * N + 6 * len(ids.unique())) * D * 4,
        )
    )


@pytest.mark.parametrize("coalesced", [True, False], ids=["coalesced", "as backward leaves it"])
@pytest.mark.parametrize("rule", ["SGD", "Adagrad", "rowwise Adagrad", "SparseAdam", "AdamW"])
def test_optimizer_step(compare, threads, rule, coalesced):
    """With a sparse gradient at hand; AdamW, with its decay, against SparseAdam."""
    torch.manual_seed(0)  # where a sum is zero but for rounding, Adagrad's first step is its sign
    ids = zipf_ids()
    gradient = torch.sparse_coo_tensor(ids[None], torch.randn(N, D), (V, D), check_invariants=True)
    ids = ids.unique()
    gradient = gradient.coalesce() if coalesced else gradient
    start = torch.randn(V, D)

    def stepper(optimizer, gradient=gradient, **options):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient
        instance = optimizer([weight], **options)

        def step():
            instance.step()
            return weight

        return step

    moved = {"SGD": 2, "Adagrad": 4, "rowwise Adagrad": 2}
    name = rule.split()[-1]
    options = {"rowwise": True} if name != rule else {}
    ours = getattr(lmkern.optim, name)
    peer = getattr(torch.optim, {"AdamW": "SparseAdam"}.get(name, name))

    def check():
        change = stepper(ours, **options)() - start
        if name != rule:
            assert (change != 0).any(1).sum() == len(ids)
        elif name == "AdamW":
            theirs = stepper(torch.optim.AdamW, gradient.to_dense())()
            assert_close([change[ids]], [(theirs - start)[ids]], 1e-3)
        else:
            assert_close([change], [stepper(peer)() - start], 1e-3)

    compare(
        Case(
            f"{rule}, {'' if coalesced else 'un'}coalesced {SIZE}",
            ours=stepper(ours, **options),
            peers={"torch": stepper(peer)},
            check=check,
            bytes=(len(gradient._values()) + moved.get(rule, 6) * len(ids)) * D * 4,
        )
    )
