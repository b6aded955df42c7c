"""Layer norm, RMS norm, and either fused with dropout and the residual connection before it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness import Case, assert_agree, infer, train
from lmkern.functional import add_norm, layer_norm, rms_norm

# (N, D)
SIZES = [(4096, 768), (2048, 2048), (512, 384)]


def parameters(width: int, count: int) -> list[torch.Tensor]:
    return [torch.randn(width).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm(compare, threads, norm, size, training):
    N, D = size
    x, d_out = torch.randn(N, D), torch.randn(N, D)
    p = parameters(D, 2 if norm == "layer" else 1)
    ours, theirs = (layer_norm, F.layer_norm) if norm == "layer" else (rms_norm, F.rms_norm)

    def step(f):
        def call(x):
            return [f(x, (D,), *p)]

        return lambda: train(call, [x], [d_out], p) if training else infer(call, [x])

    peers = {"torch": step(theirs), "compile": step(torch.compile(theirs, dynamic=False))}
    compare(
        Case(
            f"{norm}_norm {'both' if training else 'forward'} N,D={size}",
            ours=step(ours),
            peers=peers,
            check=lambda: assert_agree(step(ours), peers, 1e-5),
            bytes=(5 if training else 2) * N * D * 4,
        )
    )


@pytest.mark.parametrize("training", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_add_norm(compare, threads, size, norm, dropout_p, training):
    N, D = size
    inputs, d_outputs = ([torch.randn(N, D) for _ in range(2)] for _ in range(2))
    p = parameters(D, 2 if norm == "layer" else 1)
    if not training and dropout_p:
        pytest.skip("no dropout without training")

    def ours(x, residual, rate):
        return add_norm(x, residual, (D,), *p, norm=norm, dropout_p=rate)

    def theirs(x, residual, rate):
        s = residual + F.dropout(x, rate)
        return (F.layer_norm if norm == "layer" else F.rms_norm)(s, (D,), *p), s

    def step(f, rate=dropout_p):
        def call(x, residual):
            return f(x, residual, rate)

        return lambda: train(call, inputs, d_outputs, p) if training else infer(call, inputs)

    compiled = torch.compile(theirs, dynamic=False)
    # Masks differ: what is computed is compared without dropout.
    without = {"torch": step(theirs, 0.0), "compile": step(compiled, 0.0)}
    moved = (4 + (5 if dropout_p else 4) * training) * N * D * 4
    compare(
        Case(
            f"add_{norm}_norm p={dropout_p} {'both' if training else 'forward'} N,D={size}",
            ours=step(ours),
            peers={"torch": step(theirs), "compile": step(compiled)},
            check=lambda: assert_agree(step(ours, 0.0), without, 1e-5),
            bytes=moved,
            topic=f"add_norm p={dropout_p} {'both' if training else 'forward'}",
        )
    )
