"""Bias + activation, gated activations and dropout: what stands between the matrix products of a layer.

All are bound by memory, so the prediction is bytes over the copy rate: forward one read and one write,
backward two reads and one write of each element, gated twice as much of the input; results are fresh.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness import Case, assert_agree
from lmkern import functional


def _tanh(x):
    return F.gelu(x, approximate="tanh")


def _swiglu(x):
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def _geglu(x):
    gate, value = x.chunk(2, -1)
    return F.gelu(gate) * value


# name: (ours(x, bias), torch's(x), elements of the input for each of the output)
FUNCTIONS = {
    "gelu": (functional.gelu, F.gelu, 1),
    "gelu tanh": (lambda x, bias: functional.gelu(x, "tanh", bias=bias), _tanh, 1),
    "silu": (functional.silu, F.silu, 1),
    "swiglu": (functional.swiglu, _swiglu, 2),
    "geglu": (functional.geglu, _geglu, 2),
}

# (function, N, D, bias, dtype)
CASES = [
    ("gelu", 4096, 3072, True, torch.float32),
    ("gelu tanh", 4096, 3072, True, torch.float32),
    ("gelu", 4096, 3072, False, torch.float32),
    ("silu", 4096, 3072, False, torch.float32),
    ("swiglu", 4096, 2048, False, torch.float32),
    ("geglu", 4096, 2048, True, torch.float32),
    ("gelu", 4096, 3072, True, torch.bfloat16),
    ("swiglu", 4096, 2048, False, torch.bfloat16),
    ("gelu", 64, 768, True, torch.float32),
]


def _step(call, x, bias, d_out):
    """The output; with d_out also the gradients."""
    if d_out is None:
        with torch.no_grad():
            return [call(x, bias)]
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    out = call(leaves[0], leaves[1] if bias is not None else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}x{c[2]}-{c[3]}-{c[4]}")
def test_activation(compare, threads, case, training):
    name, N, D, with_bias, dtype = case
    function, peer, inputs = FUNCTIONS[name]
    x = torch.randn(N, inputs * D).to(dtype)
    bias = torch.randn(inputs * D).to(dtype) if with_bias else None
    d_out = torch.randn(N, D).to(dtype) if training else None

    def ours(x, bias):
        return function(x, bias=bias)

    def theirs(x, bias):
        return peer(x if bias is None else x + bias)

    if name == "gelu tanh":
        ours = function
    compiled = torch.compile(theirs, dynamic=False)
    calls = {"torch": theirs, "compile": compiled}
    peers = {p: lambda call=call: _step(call, x, bias, d_out) for p, call in calls.items()}

    def run():
        return _step(ours, x, bias, d_out)

    moved = (inputs + 1) + training * (2 * inputs + 1)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    compare(
        Case(
            f"{'bias + ' * with_bias}{name} {'both' if training else 'forward'} "
            f"N,D={N},{D}{' bf16' * (dtype == torch.bfloat16)}",
            ours=run,
            peers=peers,
            check=lambda: assert_agree(run, peers, tolerance),
            bytes=moved * N * D * x.element_size(),
        )
    )


@pytest.mark.parametrize("training", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout(compare, threads, training, dtype):
    N, D, p = 4096, 768, 0.1
    x = torch.randn(N, D).to(dtype)
    d_out = torch.randn(N, D).to(dtype) if training else None

    def step(call):
        return _step(lambda x, bias: call(x, p), x, None, d_out)

    def check():
        out = step(functional.dropout)[0]
        kept = out != 0
        torch.testing.assert_close(out[kept], (x / (1 - p))[kept])
        assert abs(kept.float().mean() - (1 - p)) < 0.01

    compiled = torch.compile(F.dropout, dynamic=False)
    compare(
        Case(
            f"dropout {'both' if training else 'forward'} "
            f"N,D={N},{D}{' bf16' * (dtype == torch.bfloat16)}",
            ours=lambda: step(functional.dropout),
            peers={"torch": lambda: step(F.dropout), "compile": lambda: step(compiled)},
            check=check,
            bytes=(2 + 2 * training) * N * D * x.element_size(),
        )
    )
