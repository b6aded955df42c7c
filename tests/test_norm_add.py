"""lmkern.functional.add_norm and lmkern.nn.AddNorm against the same of torch's operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import _C, reference
from lmkern.functional import add_norm
from lmkern.ops.norm import dropout_keep
from oracle import assert_oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NORMS = ["layer", "rms"]


def arguments(norm, shape, dtype, dims=1):
    """input, residual, input_bias, weight[, bias]"""
    parameters = [torch.randn(shape[-dims:]) for _ in range(3 if norm == "layer" else 2)]
    return [t.to(dtype) for t in (torch.randn(shape), torch.randn(shape), *parameters)]


def run(norm, dims=1, **options):
    """add_norm of these arguments, with the seed that follows from 3."""

    def f(x, residual, input_bias, *p):
        torch.manual_seed(3)
        shape = x.shape[-dims:]
        return add_norm(x, residual, shape, *p, norm=norm, input_bias=input_bias, **options)

    return f


def seed_of_run() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(1 << 62, (), dtype=torch.int64)


def plain(norm, dims=1, dropout_p=0.0, eps=None):
    """The same of torch's operators, with the mask of the kernel."""

    def f(x, residual, input_bias, *p):
        x = x + input_bias
        if dropout_p:
            x = x * dropout_keep(seed_of_run(), x, dropout_p).to(x.dtype)
        s = residual + x
        return reference.norm(s, x.shape[-dims:], *(*p, None)[:2], eps, norm == "rms"), s

    return f


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(9, 41), (7, 3, 59), (111,), (40, 1), (1, 70, 64), (0, 5), (3, 0)], ids=str)  # fmt: skip
def test_oracle(isa, shape, dropout_p, norm, dtype):
    inputs = arguments(norm, shape, dtype)
    if shape[-1] == 1 and norm == "layer":
        for t in inputs[:3]:
            t.zero_()  # of one element nothing is left but rounding errors
    assert_oracle(
        run(norm, dropout_p=dropout_p, eps=1e-2),
        plain(norm, dropout_p=dropout_p, eps=1e-2),
        inputs,
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("norm", NORMS)
def test_oracle_of_many_rows(isa, norm, dropout_p):
    inputs = arguments(norm, (1333, 2, 35), torch.float32, 2)
    assert_oracle(run(norm, 2, dropout_p=dropout_p), plain(norm, 2, dropout_p), inputs)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from(NORMS), st.sampled_from([0.0, 0.5]), st.booleans(), st.booleans())  # fmt: skip
def test_any_option(rows, width, norm, p, affine, biased):
    x, residual = (torch.randn(rows, width, requires_grad=True) for _ in range(2))
    w = torch.randn(width, requires_grad=True) if affine else None
    b = torch.randn(width, requires_grad=True) if biased else None
    torch.manual_seed(3)
    ours = add_norm(x, residual, (width,), w, norm=norm, dropout_p=p, input_bias=b, eps=0.1)
    keep = dropout_keep(seed_of_run(), x, p) if p else None
    theirs = reference.add_norm(
        x, residual, (width,), w, None, 0.1, rms=norm == "rms", input_bias=b, keep=keep
    )
    wanted = [t for t in (x, residual, w, b) if t is not None]
    for outputs in ((0, 1), (0,), (1,)):
        sums = [sum(side[i].pow(3).sum() for i in outputs) for side in (ours, theirs)]
        kept = {"retain_graph": True, "allow_unused": True}
        for a, e in zip(*(torch.autograd.grad(s, wanted, **kept) for s in sums), strict=True):
            torch.testing.assert_close(torch.zeros(()) if a is None else a.sum(0) * 0 + a, torch.zeros_like(a) if e is None else e, atol=1e-3, rtol=1e-4)  # fmt: skip


def test_dropout_is_philox_of_the_flat_index(isa):
    """The convention of csrc/cpu/dropout.h, in integers of any size."""
    seed, p = 0x0123456789ABCDEF, 0.3

    def philox(counter: list[int]) -> list[int]:
        key, low32 = [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
        for _ in range(10):
            a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = [(b >> 32) ^ counter[1] ^ key[0], b & low32, (a >> 32) ^ counter[3] ^ key[1], a & low32]  # fmt: skip
            key = [(key[0] + 0x9E3779B9) & low32, (key[1] + 0xBB67AE85) & low32]
        return counter

    words = [w for quad in range(100) for w in philox([quad, 0, 0, 0])]
    expected = torch.tensor([(w >= round(p * 2**32)) / (1 - p) for w in words])
    for shape in ((400,), (25, 16), (5, 80), (19, 21)):
        x = torch.ones(shape)
        args = (x, 0 * x, None, None, None, torch.tensor(seed), 1, 1.0, True, p)
        _, kept, _ = torch.ops.lmkern.add_norm_forward(*args)
        torch.testing.assert_close(kept.flatten(), expected[: x.numel()])


def test_dropout_rate_and_seeds():
    x = torch.ones(300, 1000)
    kept = add_norm(x, 0 * x, (1000,), dropout_p=0.1)[1]
    assert abs((kept == 0).float().mean().item() - 0.1) < 0.003
    assert kept.max().item() == pytest.approx(1 / 0.9)
    assert not torch.equal(kept, add_norm(x, 0 * x, (1000,), dropout_p=0.1)[1])
    assert torch.equal(add_norm(x, x, (1000,), dropout_p=0.1, training=False)[1], 2 * x)
    assert torch.equal(add_norm(x, x, (1000,), dropout_p=1.0)[1], x)


@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_for_any_thread_count(norm):
    results, before = [], torch.get_num_threads()
    inputs = arguments(norm, (700, 99), torch.float32)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in inputs]
            outputs = run(norm, dropout_p=0.2)(*leaves)
            torch.autograd.backward(outputs, inputs[:2])
            results.append([*outputs, *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_mask_is_kept():
    x = torch.randn(50, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # fmt: skip
        add_norm(x, x.detach(), (64,), torch.ones(64), dropout_p=0.5)
    assert sorted(saved) == [1, 64, 100, 50 * 64]  # seed, weight, statistics, sum


def test_mixed_dtypes_are_promoted_and_broadcasts_are_right():
    x, residual = torch.randn(4, 6, 33), torch.randn(33).expand(4, 6, 33)
    for a, b in ((x.bfloat16(), residual), (x, residual.bfloat16()), (x.transpose(0, 1)[:4, :4], x[:, :4])):  # fmt: skip
        y, s = add_norm(a, b, (33,))
        torch.testing.assert_close(s, a + b)
        torch.testing.assert_close(y, F.layer_norm(a + b, (33,)))
    same = x.clone().requires_grad_()
    add_norm(same, same, (33,))[1].sum().backward()
    assert (same.grad == 2).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(norm, dropout_p):
    inputs = [t.requires_grad_() for t in arguments(norm, (3, 5), torch.float64)]
    assert torch.autograd.gradcheck(run(norm, dropout_p=dropout_p), inputs)
    assert torch.autograd.gradgradcheck(run(norm, dropout_p=dropout_p), inputs)


def test_opcheck_and_compile():
    x, residual, input_bias, w, b = arguments("layer", (3, 2, 5), torch.float32)
    seed = torch.tensor(7)
    args = (x, residual, input_bias, w, b, seed, 1, 1e-5, False, 0.5)
    torch.library.opcheck(torch.ops.lmkern.add_norm_forward.default, args)
    out, s, statistics = torch.ops.lmkern.add_norm_forward(*args)
    for p, need in ((0.5, True), (0.0, False)):
        grad_args = (out, x, s, statistics, w, seed, 1, p, need, need, need)
        torch.library.opcheck(torch.ops.lmkern.add_norm_backward.default, grad_args)
    for p in (0.0, 0.5):
        f = torch.compile(
            lambda *t, p=p: add_norm(*t[:2], (5,), t[3], t[4], input_bias=t[2], dropout_p=p),
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        leaves = [t.detach().requires_grad_() for t in (x, residual, input_bias, w, b)]
        y, s = f(*leaves)
        torch.testing.assert_close(y, F.layer_norm(s, (5,), w, b))
        grads = torch.autograd.grad(y.square().sum() + s.sum(), leaves)
        assert all(g.isfinite().all() for g in grads)


def test_functorch():
    x, residual, input_bias, w, b = arguments("layer", (4, 3, 7), torch.float32)

    def f(x, residual):
        return add_norm(x, residual, (7,), w, b, input_bias=input_bias)[0]

    expected = F.layer_norm(x + input_bias + residual, (7,), w, b)
    torch.testing.assert_close(torch.func.vmap(f)(x, residual), expected)
    _, tangent = torch.func.jvp(f, (x, residual), (x, residual))
    assert tangent.shape == x.shape


def test_layer():
    torch.manual_seed(3)
    layer = lmkern.nn.AddNorm(7, dropout=0.5)
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.load_state_dict(torch.nn.LayerNorm(7).state_dict())
    x, residual = torch.randn(4, 7), torch.randn(4, 7)
    y, s = layer.eval()(x, residual)
    torch.testing.assert_close(s, x + residual)
    torch.testing.assert_close(y, F.layer_norm(s, (7,)))
    assert not torch.equal(layer.train()(x, residual)[1], s)
    rms = lmkern.nn.AddNorm((7,), norm="rms", dtype=torch.float64)
    assert list(rms.state_dict()) == ["weight"] and rms.weight.dtype == torch.float64
    y, s = rms(x.double(), residual.double(), torch.ones(7).double())
    torch.testing.assert_close(y, F.rms_norm(x.double() + residual.double() + 1, (7,)))
    assert not list(lmkern.nn.AddNorm(7, elementwise_affine=False).parameters())
    assert list(lmkern.nn.AddNorm(7, bias=False).state_dict()) == ["weight"]
    assert "norm='layer', dropout=0.5" in repr(layer)


def test_kernels_are_called(monkeypatch):
    called = []
    for name in ("norm_forward", "norm_backward"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1])
    lmkern.nn.AddNorm(7)(torch.randn(2, 7), torch.randn(2, 7))[0].sum().backward()
    assert called == ["norm_forward", "norm_backward"]


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: add_norm(X, X[:3], (8,)), ValueError, r"residual must be input's shape = \[4, 8\], got \[3, 8\]"),
        (lambda: add_norm(X, None, (8,)), TypeError, "residual must be a Tensor, got NoneType"),
        (lambda: add_norm(X, X, (7,)), ValueError, r"normalized_shape = \[7\]"),
        (lambda: add_norm(X, X, (8,), norm="batch"), ValueError, "norm must be 'layer' or 'rms', got 'batch'"),
        (lambda: add_norm(X, X, (8,), None, X[0], norm="rms"), ValueError, "bias must be None for norm = 'rms'"),
        (lambda: add_norm(X, X, (8,), dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
        (lambda: add_norm(X, X, (8,), input_bias=X), ValueError, r"input_bias must be normalized_shape = \[8\], got \[4, 8\]"),
        (lambda: lmkern.nn.AddNorm(8, norm="x"), ValueError, "norm must be 'layer' or 'rms', got 'x'"),
        (lambda: lmkern.nn.AddNorm(8, dropout=-1.0), ValueError, r"dropout must be in \[0, 1\], got -1.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
