"""lmkern.functional.swiglu and .geglu, in one tensor or two, and their layers, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern.functional import geglu, swiglu
from oracle import assert_oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def geglu_tanh(*args, **options):
    return geglu(*args, approximate="tanh", **options)


FUNCTIONS = {
    "swiglu": (swiglu, F.silu),
    "geglu": (geglu, F.gelu),
    "geglu_tanh": (geglu_tanh, lambda x: F.gelu(x, approximate="tanh")),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def halves(activation, gate_first=True):
    def call(x, bias=None):
        first, second = (x if bias is None else x + bias).chunk(2, -1)
        return activation(first) * second if gate_first else first * activation(second)

    return call


@each_function
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(82,), (9, 7, 82), (3, 118), (200, 222), (5, 2), (0, 8), (4, 0)], ids=str)  # fmt: skip
def test_oracle(isa, shape, dtype, gate_first, name):
    ours, activation = FUNCTIONS[name]
    theirs = halves(activation, gate_first)
    x, bias = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert_oracle(lambda x: ours(x, gate_first=gate_first), theirs, [x])
    assert_oracle(lambda x, b: ours(x, bias=b, gate_first=gate_first), theirs, [x, bias])


@each_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (41,), (9, 7, 41), (300, 59), (5, 1), (0, 8)], ids=str)
def test_oracle_of_two_tensors(isa, shape, dtype, name):
    ours, activation = FUNCTIONS[name]
    pair = [torch.randn(shape).to(dtype) for _ in range(2)]
    assert_oracle(ours, lambda gate, up: activation(gate) * up, pair)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.integers(0, 70),
    st.booleans(),
    st.sampled_from(["halves", "transposed", "gaps", "pair", "chunks"]),
)
def test_any_shape_and_strides(name, lead, width, with_bias, layout):
    ours, activation = FUNCTIONS[name]
    x = torch.randn(*lead, 2 * width)
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "gaps":
        x = torch.randn(*lead, 2 * width + 3)[..., 1 : 2 * width + 1]
    if layout in ("pair", "chunks"):
        leaves = [t.clone() if layout == "pair" else t for t in x.chunk(2, -1)]
        expected = lambda gate, up: activation(gate) * up  # noqa: E731
        call = ours
    else:
        leaves = [x, torch.randn(4 * width)[::2]] if with_bias else [x]
        expected = halves(activation)
        call = lambda x, bias=None: ours(x, bias=bias)  # noqa: E731
    leaves = [t.detach().requires_grad_() for t in leaves]
    out, exact = call(*leaves), expected(*leaves)
    torch.testing.assert_close(out, exact)
    g = torch.randn(*lead, 1).expand_as(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, g), torch.autograd.grad(exact, leaves, g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_same_bits_for_any_thread_count():
    x, bias, g = torch.randn(999, 262), torch.randn(262), torch.randn(999, 131)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
            out = swiglu(leaves[0], bias=leaves[1])
            results.append([out, *torch.autograd.grad(out, leaves, g)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_function
def test_gradcheck(name):
    ours, _ = FUNCTIONS[name]
    x, bias, gate, up = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 8), (8,), (3, 4), (3, 4))
    )
    for call, inputs in (
        (lambda x, b: ours(x, bias=b), [x, bias]),
        (lambda x: ours(x, gate_first=False), [x]),
        (ours, [gate, up]),
        (lambda gate: ours(gate, gate), [gate]),
    ):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_opcheck():
    op, backward = torch.ops.lmkern.activation_forward, torch.ops.lmkern.activation_backward
    x, bias = torch.randn(3, 6), torch.randn(6)
    for args in (
        (x, None, bias, "silu", True, True),
        (torch.randn(8, 3).t(), None, None, "gelu", True, False),
        (x, torch.randn(6, 3).t(), None, "gelu_tanh", True, True),
    ):
        torch.library.opcheck(op.default, args)
        torch.library.opcheck(backward.default, (op(*args), *args))


@pytest.mark.parametrize("pair", [False, True])
def test_compile_fullgraph(pair):
    x = torch.randn(4, 6, requires_grad=True)

    def loss(x):
        return (swiglu(x, x) if pair else swiglu(x)).square().sum()

    def expected(x):
        return (F.silu(x) * x if pair else halves(F.silu)(x)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(x), x)
    (theirs,) = torch.autograd.grad(expected(x), x)
    torch.testing.assert_close(ours, theirs)


def test_functorch():
    x, bias = torch.randn(3, 5, 8), torch.randn(8)
    mapped = torch.func.vmap(lambda x: swiglu(x, bias=bias))(x)
    torch.testing.assert_close(mapped, halves(F.silu)(x, bias))
    mapped = torch.func.vmap(geglu)(x, x)
    torch.testing.assert_close(mapped, F.gelu(x) * x)


def test_layers():
    x = torch.randn(4, 10)
    for layer, expected, text in (
        (lmkern.nn.SwiGLU(), halves(F.silu), "SwiGLU()"),
        (lmkern.nn.SwiGLU(gate_first=False), halves(F.silu, False), "SwiGLU(gate_first=False)"),
        (lmkern.nn.GeGLU(), halves(F.gelu), "GeGLU(approximate='none')"),
        (lmkern.nn.GeGLU("tanh", gate_first=False), halves(FUNCTIONS["geglu_tanh"][1], False), "GeGLU(approximate='tanh', gate_first=False)"),
    ):  # fmt: skip
        torch.testing.assert_close(layer(x), expected(x))
        assert repr(layer) == text and not list(layer.state_dict())


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: swiglu(torch.zeros(2, 5)), ValueError, r"input must be \[..., 2D\], two halves, got \[2, 5\]"),
        (lambda: swiglu(torch.tensor(1.0)), ValueError, r"swiglu: input must be \[..., 2D\], two halves, got \[\]"),
        (lambda: swiglu(X, bias=torch.zeros(2)), ValueError, r"bias must be \[2D\] = \[4\], got \[2\]"),
        (lambda: swiglu(X, torch.zeros(4, 2)), ValueError, r"swiglu: up must be like the gate = \[2, 4\], got \[4, 2\]"),
        (lambda: swiglu(X, X, bias=torch.zeros(4)), ValueError, r"bias is for input \[..., 2D\], not for gate and up"),
        (lambda: swiglu(X, X.double()), TypeError, "up must be float32, got float64"),
        (lambda: geglu(X, "tanh"), TypeError, "geglu: up must be a Tensor, got str"),
        (lambda: geglu(X, approximate="x"), ValueError, "geglu: approximate must be 'none' or 'tanh', got 'x'"),
    ],
    ids=range(8),
)  # fmt: skip
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
