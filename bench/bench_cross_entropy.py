"""Cross entropy: of a linear layer in chunks of classes, and of given logits; forward and backward.

Predictions. Of the linear form, one product more than three, 8 N D V FLOPs beside 6, against a torch
that writes the logits once and passes over them in memory four times more. Of given logits, two reads
and one write against torch's three reads and three writes of as many bytes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness import Case, assert_close
from lmkern.functional import cross_entropy, linear_cross_entropy

# (N, D, V)
LINEAR = [(1024, 256, 10000), (512, 768, 50257), (4096, 512, 32000)]
# [N, V] or [N, V, P]
LOGITS = [(1024, 10000), (768, 65), (64, 1000, 49)]


def plain(x, weight, target):
    return F.cross_entropy(F.linear(x, weight), target)


@pytest.mark.parametrize("size", LINEAR, ids=str)
def test_linear_cross_entropy(compare, threads, size):
    N, D, V = size
    x, weight = torch.randn(N, D), torch.randn(V, D) / D**0.5
    target = torch.randint(0, V, (N,))

    def step(loss):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        value = loss(*leaves, target)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    compiled = torch.compile(plain, dynamic=False)
    peers = {"torch": lambda: step(plain), "compile": lambda: step(compiled)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        chunked = lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)  # noqa: E731
        peers["chunked"] = lambda: step(chunked)
    compare(
        Case(
            f"linear cross entropy both N,D,V={size}",
            ours=lambda: step(linear_cross_entropy),
            peers=peers,
            check=lambda: assert_close(step(linear_cross_entropy), step(plain), 1e-4),
            flops=6.0 * N * D * V,
        )
    )


@pytest.mark.parametrize("size", LOGITS, ids=str)
def test_cross_entropy(compare, threads, size):
    logits = torch.randn(size)
    target = torch.randint(0, size[1], (size[0], *size[2:]))

    def step(loss):
        leaf = logits.detach().requires_grad_()
        value = loss(leaf, target)
        value.backward()
        return [value.detach(), leaf.grad]

    compiled = torch.compile(F.cross_entropy, dynamic=False)
    compare(
        Case(
            f"cross entropy both logits={size}",
            ours=lambda: step(cross_entropy),
            peers={"torch": lambda: step(F.cross_entropy), "compile": lambda: step(compiled)},
            check=lambda: assert_close(step(cross_entropy), step(F.cross_entropy), 1e-4),
            bytes=3.0 * logits.numel() * 4,
        )
    )
