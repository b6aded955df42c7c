"""lmkern.functional.layer_norm and rms_norm, and their layers, against torch."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import _C
from lmkern.functional import layer_norm, rms_norm
from oracle import assert_oracle, relative_error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PAIRS = {"layer": (layer_norm, F.layer_norm), "rms": (rms_norm, F.rms_norm)}
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


def parameters(norm: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(2 if norm == "layer" else 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", PAIRS)
@pytest.mark.parametrize(
    ("lead", "shape"),
    [((9,), (41,)), ((7, 3), (59,)), ((), (111,)), ((40,), (1,)), ((2, 3), (4, 5)), ((70,), (256,)), ((0,), (5,)), ((3,), (0,))],
    ids=str,
)  # fmt: skip
def test_oracle(isa, lead, shape, norm, dtype):
    ours, theirs = PAIRS[norm]
    inputs = [(3 * torch.randn(*lead, *shape) + 1).to(dtype), *parameters(norm, shape, dtype)]
    if shape == (1,) and norm == "layer":
        inputs[0].zero_()  # of one element nothing is left but rounding errors
    assert_oracle(
        lambda x, *p: ours(x, shape, *p, eps=1e-3), lambda x, *p: theirs(x, shape, *p, eps=1e-3), inputs
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", PAIRS)
def test_oracle_of_many_rows(isa, norm, dtype):
    """More rows than blocks have of them, and a thread for each of several blocks."""
    ours, theirs = PAIRS[norm]
    inputs = [torch.randn(1333, 70).to(dtype), *parameters(norm, (70,), dtype)]
    assert_oracle(lambda x, *p: ours(x, (70,), *p), lambda x, *p: theirs(x, (70,), *p), inputs)


@pytest.mark.parametrize("norm", PAIRS)
def test_oracle_without_parameters(isa, norm):
    ours, theirs = PAIRS[norm]
    assert_oracle(lambda x: ours(x, (43,)), lambda x: theirs(x, (43,)), [torch.randn(5, 43)])
    if norm == "layer":
        only_bias = [torch.randn(5, 43), torch.randn(43)]
        assert_oracle(
            lambda x, b: layer_norm(x, (43,), None, b),
            lambda x, b: F.layer_norm(x, (43,), None, b),
            only_bias,
        )


@pytest.mark.parametrize("norm", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_parameters_of_narrow_inputs(isa, norm, dtype):
    ours, theirs = PAIRS[norm]
    inputs = [torch.randn(50, 41).to(dtype), *parameters(norm, (41,), torch.float32)]
    assert_oracle(lambda x, *p: ours(x, (41,), *p), lambda x, *p: theirs(x, (41,), *p), inputs)
    out = ours(inputs[0], (41,), *(p.requires_grad_() for p in inputs[1:]))
    out.sum().backward()
    assert out.dtype == dtype and all(p.grad.dtype == torch.float32 for p in inputs[1:])


@pytest.mark.parametrize("D", [59, 768, 5000])
def test_a_mean_of_10000_costs_no_accuracy(isa, D):
    x = torch.randn(20, D) + 1e4
    exact = F.layer_norm(x.double(), (D,))
    error = relative_error(layer_norm(x, (D,)), exact)
    assert error <= min(2e-6, 2 * relative_error(F.layer_norm(x, (D,)), exact) + 1e-6)
    inputs = [x, torch.randn(D), torch.randn(D)]
    assert_oracle(
        lambda x, w, b: layer_norm(x, (D,), w, b),
        lambda x, w, b: F.layer_norm(x, (D,), w, b),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_eps_is_torchs(dtype):
    for scale in (1e-2, 1e-4):
        x = torch.full((1, 8), scale, dtype=dtype)
        torch.testing.assert_close(rms_norm(x, (8,)), F.rms_norm(x, (8,)))
        torch.testing.assert_close(layer_norm(x, (8,)), F.layer_norm(x, (8,)))


def test_constant_infinite_and_nan_rows():
    x = torch.randn(5, 40)
    x[0], x[1, 3], x[2, 3], x[3] = 7.0, float("inf"), float("nan"), 0.0
    for ours, theirs in PAIRS.values():
        torch.testing.assert_close(ours(x, (40,)), theirs(x, (40,)), equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(1, 3),
    st.sampled_from(list(PAIRS)),
    st.booleans(),
    st.sampled_from(DTYPES[:2]),
)
def test_any_shape(shape, dims, norm, affine, dtype):
    ours, theirs = PAIRS[norm]
    normalized = tuple(shape[-dims:])
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    p = [q.requires_grad_() for q in parameters(norm, normalized, dtype)] if affine else []
    results = [f(x, normalized, *p, eps=0.1) for f in (ours, theirs)]
    torch.testing.assert_close(*results)
    g = torch.randn_like(x)
    for a, b in zip(*(torch.autograd.grad(y, [x, *p], g) for y in results), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", PAIRS)
def test_strides(norm):
    ours, theirs = PAIRS[norm]
    wide = torch.randn(6, 4, 90)
    for x in (
        wide[..., 10:50],
        wide[:, 0, ::2],
        wide.transpose(0, 1),
        wide[0, :1].expand(8, 90),
        wide[:, :, :1].expand(6, 4, 33),
        wide[:, 2, 5:47],
    ):
        leaf, shape = x.detach().requires_grad_(), x.shape[-1:]
        p = [torch.randn(2 * shape[0])[::2].requires_grad_() for _ in range(1 + (norm == "layer"))]
        a, b = (f(leaf, shape, *p, eps=1.0) for f in (ours, theirs))
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()
        for g in (torch.randn(a.shape).transpose(0, -1).contiguous().transpose(0, -1), torch.ones(()).expand(a.shape)):  # fmt: skip
            for i, j in zip(
                torch.autograd.grad(a, [leaf, *p], g, retain_graph=True),
                torch.autograd.grad(b, [leaf, *p], g, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(i, j, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", PAIRS)
def test_same_bits_for_any_thread_count(norm):
    x, g = torch.randn(1000, 96), torch.randn(1000, 96)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [x.clone(), *(torch.ones(96) for _ in range(1 + (norm == "layer")))]
            leaves = [t.requires_grad_() for t in leaves]
            out = PAIRS[norm][0](leaves[0], (96,), *leaves[1:])
            out.backward(g)
            results.append([out.detach(), *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_some_gradients():
    x, w, b = torch.randn(5, 9), torch.randn(9), torch.randn(9)
    for wanted in ([x], [w], [b], [x, b]):
        for t in (x, w, b):
            t.requires_grad_(any(t is other for other in wanted))
        ours, theirs = (f(x, (9,), w, b) for f in PAIRS["layer"])
        for a, e in zip(
            torch.autograd.grad(ours.square().sum(), wanted),
            torch.autograd.grad(theirs.square().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", PAIRS)
def test_gradcheck(norm):
    inputs = [torch.randn(3, 2, 5, dtype=torch.float64), *parameters(norm, (5,), torch.float64)]
    inputs = [t.requires_grad_() for t in inputs]
    f = PAIRS[norm][0]
    assert torch.autograd.gradcheck(lambda x, *p: f(x, (5,), *p), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *p: f(x, (5,), *p), inputs)


def test_opcheck_and_compile():
    x, w, b = torch.randn(3, 2, 5), torch.randn(2, 5), torch.randn(2, 5)
    for rms in (False, True):
        torch.library.opcheck(torch.ops.lmkern.norm_forward.default, (x, w, None if rms else b, 2, 1e-5, rms))  # fmt: skip
        out, statistics = torch.ops.lmkern.norm_forward(x, w, None, 2, 1e-5, rms)
        torch.library.opcheck(torch.ops.lmkern.norm_backward.default, (out, x, statistics, w, 2, True, not rms))  # fmt: skip
    compiled = torch.compile(
        lambda x, w, b: layer_norm(x, (2, 5), w, b) + rms_norm(x, (2, 5), w, 1e-3),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    expected = F.layer_norm(x, (2, 5), w, b) + F.rms_norm(x, (2, 5), w, 1e-3)
    torch.testing.assert_close(compiled(x, w, b), expected)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    found = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    expected = F.layer_norm(x, (2, 5), w, b) + F.rms_norm(x, (2, 5), w, 1e-3)
    for a, e in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", PAIRS)
def test_functorch(norm):
    ours, theirs = PAIRS[norm]
    x, w = torch.randn(4, 3, 7), torch.randn(7)
    for transform in (
        lambda f: torch.func.vmap(lambda x: f(x, (7,), w))(x),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x, (7,), w).square().sum()))(x),
        lambda f: torch.func.jvp(lambda x: f(x, (7,), w), (x,), (x + 1,))[1],
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


@pytest.mark.parametrize("norm", PAIRS)
def test_autocast_is_torchs(norm):
    ours, theirs = PAIRS[norm]
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(4, 8), torch.randn(4, 8).bfloat16()):
            a, b = (f(x, (8,), torch.ones(8)) for f in (ours, theirs))
            assert a.dtype == b.dtype == x.dtype
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fallback_allowed")
def test_what_has_no_kernel_runs_as_in_torch():
    x = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float64):
        w = torch.randn(8, dtype=dtype)
        torch.testing.assert_close(rms_norm(x, (8,), w), F.rms_norm(x, (8,), w))
    z = torch.randn(3, 8, dtype=torch.complex64)
    torch.testing.assert_close(rms_norm(z, (8,)), F.rms_norm(z, (8,)))


def test_kernels_are_called(monkeypatch):
    called = []
    for name in ("norm_forward", "norm_backward"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1])
    for layer in (lmkern.nn.LayerNorm(7), lmkern.nn.RMSNorm(7)):
        layer(torch.randn(2, 7)).sum().backward()
    assert called == ["norm_forward", "norm_backward"] * 2


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"elementwise_affine": False}, {"dtype": torch.float64}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_layers_are_torchs_but_for_the_kernel(name, options):
    ours, theirs = getattr(lmkern.nn, name), getattr(torch.nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    names = [list(inspect.signature(layer.forward).parameters) for layer in (ours, theirs)]
    assert names[0] == names[1]
    a, b = ours((3, 4), **options), theirs((3, 4), **options)
    assert repr(a) == repr(b) and list(a.state_dict()) == list(b.state_dict())
    x = torch.randn(2, 3, 4, dtype=options.get("dtype"))
    torch.testing.assert_close(a(x), b(x))


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((X, (7,)), ValueError, r"input must be \[\*, \*normalized_shape\] with normalized_shape = \[7\] .*got \[4, 8\]"),
        ((X, ()), ValueError, r"normalized_shape = \[\] of at least one dimension"),
        ((X[0], (4, 8)), ValueError, r"normalized_shape = \[4, 8\] .*got \[8\]"),
        ((X, 8), TypeError, "normalized_shape must be a sequence of ints, got int"),
        (([1.0], (1,)), TypeError, "input must be a Tensor, got list"),
        ((X, (8,), torch.ones(7)), ValueError, r"weight must be normalized_shape = \[8\], got \[7\]"),
        ((X, (8,), None, torch.ones(1, 8)), ValueError, r"bias must be normalized_shape = \[8\], got \[1, 8\]"),
        ((X, (8,), [1.0]), TypeError, "weight must be a Tensor, got list"),
        ((X, (8,), torch.ones(8, device="meta")), ValueError, r"weight must be on \S+ like input"),
        ((X, (8,), torch.ones(8).bfloat16()), TypeError, "weight must be float32, got bfloat16"),
        ((X.bfloat16(), (8,), None, torch.ones(8).half()), TypeError, "bias must be bfloat16, got float16"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(args, error, match):
    with pytest.raises(error, match=match) as caught:
        layer_norm(*args)
    assert "\n" not in str(caught.value)
