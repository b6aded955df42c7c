"""lmkern.functional.gelu and .silu, with and without bias, and their layers against torch."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import _C
from lmkern.functional import gelu, silu
from oracle import assert_oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def gelu_tanh(x, *, bias=None):
    return gelu(x, "tanh", bias=bias)


def torch_gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


FUNCTIONS = {"gelu": (gelu, F.gelu), "gelu_tanh": (gelu_tanh, torch_gelu_tanh), "silu": (silu, F.silu)}  # fmt: skip
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (9, 7, 41), (3, 59), (70, 111), (5, 1), (0,), (4, 0), (0, 8)], ids=str)  # fmt: skip
def test_oracle(isa, shape, dtype, name):
    ours, theirs = FUNCTIONS[name]
    assert_oracle(ours, theirs, [(3 * torch.randn(shape)).to(dtype)])


@each_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 7, 41), (1, 59), (200, 111), (5, 1), (700, 64), (0, 8), (3, 0)], ids=str)  # fmt: skip
def test_oracle_with_bias(isa, shape, dtype, name):
    ours, theirs = FUNCTIONS[name]
    x, bias = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert_oracle(lambda x, b: ours(x, bias=b), lambda x, b: theirs(x + b), [x, bias])


@each_function
def test_whole_range(isa, name):
    """Right of 0 to a few ULP; left of it, where torch's 1 + erf has no digits left, still to five."""
    ours, _ = FUNCTIONS[name]
    x = torch.cat([torch.linspace(-8, 20, 40001), torch.linspace(-1, 1, 10001) ** 3])
    x64 = x.double()
    exact = (
        x64
        * {
            "gelu": torch.special.erfc(-x64 / math.sqrt(2)) / 2,
            "gelu_tanh": torch.sigmoid(math.sqrt(8 / math.pi) * (x64 + 0.044715 * x64**3)),
            "silu": torch.sigmoid(x64),
        }[name]
    )
    error = ours(x).double() - exact
    assert (error.abs() <= torch.where(x > 0, 4e-7, 8e-6) * exact.abs()).all()
    assert error[x < 0].abs().max() <= 6.1e-8


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_and_special_values(isa, dtype, name):
    ours, _ = FUNCTIONS[name]
    big = torch.finfo(dtype).max
    x = torch.tensor([0.0, 1e3, big, math.inf, -1e3, -big, -math.inf, math.nan], dtype=dtype)
    x.requires_grad_()
    y = ours(x)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    assert y[:-1].tolist() == [0, 1e3, big, math.inf, 0, 0, 0] and y[-1].isnan()
    assert d_x[:-1].tolist() == [0.5, 1, 1, 1, 0, 0, 0] and d_x[-1].isnan()


@each_function
def test_tail_is_smooth_where_it_ends(isa, name):
    x = torch.linspace(-90, -9, 3001, dtype=torch.float64).requires_grad_()
    y = FUNCTIONS[name][0](x)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    for values in (y, FUNCTIONS[name][0](x.float().detach()).double()):
        torch.testing.assert_close(values, FUNCTIONS[name][1](x), rtol=0, atol=1e-6)
    assert d_x.abs().max() < 2e-3 and not d_x.isnan().any()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(1, 140),
    st.booleans(),
    st.booleans(),
)
def test_any_shape_and_strides(name, lead, width, with_bias, transposed):
    ours, theirs = FUNCTIONS[name]
    x = torch.randn(*lead, width)
    if transposed and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    bias = torch.randn(2 * width)[::2] if with_bias else None
    leaves = [t.requires_grad_() for t in (x, bias) if t is not None]
    out = ours(x, bias=bias)
    expected = theirs(x if bias is None else x + bias)
    torch.testing.assert_close(out, expected)
    g = torch.randn(*lead, 1).expand_as(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rows_with_gaps_and_many_dimensions():
    wide = torch.randn(40, 64)
    for x in (wide[:, 3:40], wide[::2, :37], wide.t(), wide[:1].expand(9, 64), wide[:, :1]):
        bias = torch.randn(x.shape[1])
        torch.testing.assert_close(gelu(x), F.gelu(x))
        torch.testing.assert_close(gelu(x, bias=bias), F.gelu(x + bias))
    deep = torch.randn(1, 2, 1, 2, 1, 2, 1, 2, 1, 3, requires_grad=True)
    torch.testing.assert_close(silu(deep), F.silu(deep))
    silu(deep).sum().backward()
    assert deep.grad.shape == deep.shape


@each_function
def test_same_bits_for_any_thread_count(name):
    x, bias, g = torch.randn(999, 131), torch.randn(131), torch.randn(999, 131)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
            out = FUNCTIONS[name][0](leaves[0], bias=leaves[1])
            results.append([out, *torch.autograd.grad(out, leaves, g)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bias_gradient_accumulates_in_float32():
    x = torch.zeros(20_000, 3, dtype=torch.bfloat16)
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    gelu(x, bias=bias).sum().backward()
    assert bias.grad.tolist() == [9984.0] * 3  # the bfloat16 next to 10,000


def test_kernels_are_called(monkeypatch):
    called = []
    for name in ("activation_forward", "activation_backward"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1])
    x = torch.randn(5, requires_grad=True)
    for layer in (lmkern.nn.GELU("tanh"), lmkern.nn.SiLU()):
        layer(x).sum().backward()
    assert called == ["activation_forward", "activation_backward"] * 2


@each_function
def test_gradcheck(name):
    ours, _ = FUNCTIONS[name]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, [x])
    assert torch.autograd.gradcheck(lambda x, b: ours(x, bias=b), [x, bias])
    assert torch.autograd.gradgradcheck(lambda x, b: ours(x, bias=b), [x, bias])


def test_opcheck():
    op, backward = torch.ops.lmkern.activation_forward, torch.ops.lmkern.activation_backward
    x, bias = torch.randn(3, 6), torch.randn(6)
    for args in ((x, None, bias, "gelu", False, True), (x.t(), None, None, "silu", False, True)):
        torch.library.opcheck(op.default, args)
        torch.library.opcheck(backward.default, (op(*args), *args))


@pytest.mark.parametrize("with_bias", [False, True])
def test_compile_fullgraph(with_bias):
    x, bias = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    inputs = [x, bias] if with_bias else [x]

    def loss(*inputs):
        return gelu(inputs[0], bias=inputs[1] if with_bias else None).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*inputs), inputs)
    theirs = torch.autograd.grad(F.gelu(sum(inputs)).square().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_functorch_and_forward_mode():
    x, bias = torch.randn(3, 4), torch.randn(4)
    mapped = torch.func.vmap(lambda x: gelu(x, bias=bias))(x)
    torch.testing.assert_close(mapped, F.gelu(x + bias))
    grad = torch.func.grad(lambda x: silu(x).sum())(x)
    torch.testing.assert_close(grad, torch.func.grad(lambda x: F.silu(x).sum())(x))
    _, tangent = torch.func.jvp(gelu, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.func.jvp(F.gelu, (x,), (torch.ones_like(x),))[1])


def test_autocast_casts_a_bias_that_a_linear_layer_would_have():
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    bias = torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = gelu(x, bias=bias)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and bias.grad.dtype == torch.float32
    torch.testing.assert_close(out, F.gelu(x + bias.bfloat16()), rtol=2e-2, atol=2e-2)


def test_inplace_silu():
    x, bias = torch.randn(3, 4), torch.randn(4)
    expected = F.silu(x + bias)
    assert silu(x, True, bias=bias) is x
    torch.testing.assert_close(x, expected)
    leaf = torch.randn(3, requires_grad=True)
    hidden = leaf * 2
    silu(hidden, inplace=True).sum().backward()
    torch.testing.assert_close(leaf.grad, _gradient(lambda v: F.silu(v * 2), leaf))


def _gradient(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


@pytest.mark.usefixtures("fallback_allowed")
def test_other_devices_and_dtypes_run_torchs_operators():
    assert gelu(torch.zeros(2, 3, device="meta"), bias=torch.zeros(3, device="meta")).shape == (
        2,
        3,
    )
    with pytest.raises(NotImplementedError):  # as in torch
        gelu(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", ["GELU", "SiLU"])
def test_layers_are_torchs_but_for_the_kernel(name):
    ours, theirs = getattr(lmkern.nn, name), getattr(torch.nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs) and issubclass(ours, theirs)
    assert repr(ours()) == repr(theirs())
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours()(x), theirs()(x))
    if name == "GELU":
        torch.testing.assert_close(ours("tanh")(x), theirs("tanh")(x))
    else:
        assert ours(inplace=True)(x) is x


def test_convert_swaps_layers_without_parameters():
    model = torch.nn.Sequential(
        torch.nn.GELU("tanh"), torch.nn.SiLU(), torch.nn.Dropout(0.3)
    ).eval()
    x = torch.randn(3, 4)
    expected = model(x)
    lmkern.convert(model)
    assert [type(m) for m in model] == [lmkern.nn.GELU, lmkern.nn.SiLU, lmkern.nn.Dropout]
    torch.testing.assert_close(model(x), expected)
    lmkern.revert(model)
    assert [type(m) for m in model] == [torch.nn.GELU, torch.nn.SiLU, torch.nn.Dropout]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: gelu([1.0]), TypeError, "gelu: input must be a Tensor, got list"),
        (lambda: gelu(torch.zeros(3), "erf"), ValueError, "gelu: approximate must be 'none' or 'tanh', got 'erf'"),
        (lambda: gelu(torch.zeros(2, 3), bias=torch.zeros(4)), ValueError, r"bias must be \[D\] = \[3\], got \[4\]"),
        (lambda: gelu(torch.zeros(2, 3), bias=torch.zeros(1, 3)), ValueError, r"bias must be \[D\] = \[3\], got \[1, 3\]"),
        (lambda: silu(torch.zeros(3), bias=torch.zeros(3).double()), TypeError, "bias must be float32, got float64"),
        (lambda: silu(torch.zeros(3), bias=1.0), TypeError, "silu: bias must be a Tensor, got float"),
        (lambda: silu(torch.zeros(3), bias=torch.zeros(3, device="meta")), ValueError, r"bias must be on \S+ like input, got meta"),
    ],
    ids=range(7),
)  # fmt: skip
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
