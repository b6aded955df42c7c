"""lmkern.functional.token_position_embedding against the same of torch's operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkern import reference
from lmkern.functional import token_position_embedding
from lmkern.ops.backend import kernels_of
from lmkern.ops.library import has_cuda
from lmkern.ops.norm import dropout_keep
from oracle import assert_oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NORMS = ["layer", "rms", None]
V, P, S = 23, 45, 3


def tables(norm, width, dtype=torch.float32, segment=True):
    """token, position, segment and the norm's parameters"""
    shapes = [(V, width), (P, width)] + [(S, width)] * segment
    shapes += [(width,)] * {"layer": 2, "rms": 1, None: 0}[norm]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def run(f, ids, norm, *, segments=None, seed=3, **options):
    """``f`` of tables like these, with the mask that follows from the seed."""

    def call(token, position, *rest):
        torch.manual_seed(seed)
        segment, rest = (None, rest) if segments is None else (rest[0], rest[1:])
        weight, bias = (*rest, None, None)[:2]
        return f(
            ids, token, position, segment, weight, bias, segments=segments, norm=norm, **options
        )

    return call


def plain(ids, norm, *, dropout_p=0.0, seed=3, **options):
    """The same of torch's operators, with the mask of the kernel."""

    def call(*args):
        shape = (*ids.shape, args[0].shape[1])
        torch.manual_seed(seed)
        keep = None
        if dropout_p:
            number = torch.randint(1 << 62, (), dtype=torch.int64)
            keep = dropout_keep(number, args[0].new_empty(shape), dropout_p).to(args[0].dtype)
        f = reference.token_position_embedding
        return run(f, ids, norm, keep=keep, **options)(*args)

    return call


def ids_like(*shape, rows=V, dtype=torch.int64):
    return torch.randint(rows, shape, dtype=dtype)


def place(kind, shape, dtype=torch.int64):
    """Where the positions come from."""
    if kind == "offset":
        return {"offset": 5}
    if kind == "shared":
        return {"positions": ids_like(*shape[-1:], rows=P, dtype=dtype)}
    return {"positions": ids_like(*shape, rows=P, dtype=dtype)} if kind == "each" else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(9, 41, 59), (7, 3, 4, 111), (40, 16), (41, 1), (2, 0, 5), (0, 7, 5), (3, 4, 0)], ids=str)  # fmt: skip
def test_oracle(isa, shape, dropout_p, norm, dtype):
    ids, args = ids_like(*shape[:-1]), tables(norm, shape[-1], dtype)
    segments = ids_like(*ids.shape, rows=S)
    if shape[-1] == 1 and norm == "layer":
        norm, args = "rms", args[:-1]  # of one element nothing is left but rounding errors
    options = {"dropout_p": dropout_p, "segments": segments, "eps": 1e-2}
    assert_oracle(
        run(token_position_embedding, ids, norm, **options), plain(ids, norm, **options), args
    )


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["arange", "offset", "shared", "each"])
@pytest.mark.parametrize("shape", [(5, 40), (3, 2, 37), (33,), ()], ids=str)
def test_positions(isa, shape, kind, norm, index):
    if kind == "shared" and not shape:
        pytest.skip("no last dimension")
    options = place(kind, shape, index) | {"scale": 3.5, "padding_idx": 4, "dropout_p": 0.1}
    ids, args = ids_like(*shape, dtype=index), tables(norm, 35, segment=False)
    assert_oracle(
        run(token_position_embedding, ids, norm, **options), plain(ids, norm, **options), args
    )


@pytest.mark.parametrize("norm", NORMS)
def test_oracle_of_many_rows(isa, norm):
    ids, args = ids_like(1333, 29), tables(norm, 64)
    options = {"dropout_p": 0.1, "segments": ids_like(1333, 29, rows=S)}
    assert_oracle(
        run(token_position_embedding, ids, norm, **options), plain(ids, norm, **options), args
    )


def test_same_numbers_as_torchs_lookups():
    ids, (token, position) = ids_like(4, 20), tables(None, 41, segment=False)
    for dtype in DTYPES:
        t, p = token.to(dtype), position.to(dtype)
        assert torch.equal(token_position_embedding(ids, t, p), t[ids] + p[:20])
        assert torch.equal(token_position_embedding(ids, t), t[ids])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=3), st.integers(1, 70), st.sampled_from(NORMS),
    st.sampled_from(["none", "arange", "offset", "shared", "each"]), st.booleans(), st.booleans(),
    st.sampled_from([0.0, 0.4]), st.sampled_from([1.0, -2.5]), st.sampled_from([None, 0, -1]),
)  # fmt: skip
def test_any_options(shape, width, norm, kind, segmented, affine, p, scale, padding_idx):
    kind = kind if shape or kind != "shared" else "none"
    ids = ids_like(*shape)
    dtype = torch.float64
    token, position, segment, *affines = tables(norm, width, dtype)
    leaves = {"token": token, "position": None if kind == "none" else position,
              "segment": segment if segmented else None}  # fmt: skip
    leaves |= zip(("weight", "bias"), affines if affine else (), strict=False)
    leaves = {k: t.requires_grad_() for k, t in leaves.items() if t is not None}
    options = place(kind, shape) | {"norm": norm, "scale": scale, "eps": 0.1}
    options["segments"] = ids_like(*shape, rows=S) if segmented else None
    torch.manual_seed(3)
    ours = token_position_embedding(ids, **leaves, **options, dropout_p=p, padding_idx=padding_idx)
    torch.manual_seed(3)
    seed = torch.randint(1 << 62, (), dtype=torch.int64)
    keep = dropout_keep(seed, ours.detach(), p) if p else None
    padding = -1 if padding_idx is None else padding_idx % V
    theirs = reference.token_position_embedding(
        ids, **leaves, **options, keep=keep, padding_idx=padding
    )
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    for a, e in zip(
        torch.autograd.grad(ours, list(leaves.values()), g),
        torch.autograd.grad(theirs, list(leaves.values()), g),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("kind", ["arange", "shared", "each"])
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_for_any_thread_count(norm, kind):
    results, before = [], torch.get_num_threads()
    ids, args = ids_like(50, 33), tables(norm, 99)
    options = place(kind, (50, 33)) | {"segments": ids_like(50, 33, rows=S), "dropout_p": 0.2}
    d_out = torch.randn(50, 33, 99)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in args]
            out = run(token_position_embedding, ids, norm, **options)(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_of_the_size_of_the_result_is_saved():
    args = [t.requires_grad_() for t in tables("layer", 64)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(token_position_embedding, ids_like(9, 40), "layer", segments=ids_like(9, 40, rows=S), dropout_p=0.5)(*args)  # fmt: skip
    # tables, weight, ids, segments, seed, statistics
    expected = [V * 64, P * 64, S * 64, 64, 360, 360, 1, 720]
    assert sorted(t.numel() for t in saved) == sorted(expected)


def test_the_same_mask_as_dropout():
    ids, (token, position) = ids_like(4, 20), tables(None, 41, segment=False)
    if token.is_cuda and not has_cuda("dropout"):
        pytest.skip("CUDA has no dropout yet")
    torch.manual_seed(3)
    out = token_position_embedding(ids, token, position, dropout_p=0.5)
    torch.manual_seed(3)
    seed = torch.randint(1 << 62, (), dtype=torch.int64)
    expected = torch.ops.lmkern.dropout(token[ids] + position[:20], seed, 0.5)
    assert torch.equal(out, expected)
    kept = token_position_embedding(ids, token, position, dropout_p=0.5, training=False)
    assert torch.equal(kept, token[ids] + position[:20])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4, "scale": 2.0, "offset": 1}], ids=str)  # fmt: skip
def test_gradcheck(norm, options):
    ids, segments = torch.tensor([[0, 2, 1], [2, 2, 0]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    args = tables(norm, 5, torch.float64)
    args = [(t[:4] if t.dim() == 2 else t).detach().clone().requires_grad_() for t in args]
    f = run(token_position_embedding, ids, norm, segments=segments, **options)
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)
    each = {"positions": torch.tensor([[0, 3, 1], [3, 3, 0]])} | options | {"offset": 0}
    f = run(token_position_embedding, ids, norm, segments=segments, **each)
    assert torch.autograd.gradgradcheck(f, args)


def test_layouts():
    ids, base = ids_like(6, 20), torch.randn(2 * V, 82)
    position = torch.randn(41, P).t()
    for token in (base[::2, :41], base[::2, ::2], torch.randn(41, V).t()):
        out = token_position_embedding(ids.t(), token, position, norm="layer")
        expected = reference.token_position_embedding(ids.t(), token, position, norm="layer")
        torch.testing.assert_close(out, expected)
    token = torch.randn(V, 41, requires_grad=True)
    one = torch.ones(())
    token_position_embedding(ids, token, dropout_p=0.0).backward(one.expand(6, 20, 41))
    counts = torch.bincount(ids.flatten(), minlength=V).float()
    torch.testing.assert_close(token.grad, counts[:, None].expand(V, 41))


def test_mixed_index_dtypes_and_float32_norms():
    ids, (token, position, segment, w, b) = ids_like(2, 9), tables("layer", 32)
    segments = ids_like(2, 9, rows=S, dtype=torch.int32)
    leaves = [t.bfloat16().requires_grad_() for t in (token, position, segment)]
    leaves += [w.requires_grad_(), b.requires_grad_()]
    out = token_position_embedding(ids, *leaves, segments=segments, norm="layer")
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert out.dtype == torch.bfloat16 and [g.dtype for g in grads] == [t.dtype for t in leaves]
    exact = reference.token_position_embedding(
        ids, *(t.double() for t in leaves), segments=segments, norm="layer"
    )
    torch.testing.assert_close(out.double(), exact, atol=0.05, rtol=0.01)


def test_kernels_are_called(monkeypatch):
    called = []
    args = [t.requires_grad_() for t in tables("layer", 8, segment=False)]
    kernels = kernels_of(args[0])
    for name in ("token_position_forward", "token_position_backward"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1]
        )
    run(token_position_embedding, ids_like(2, 5), "layer")(*args).sum().backward()
    assert called == ["token_position_forward", "token_position_backward"]


X, T, W = torch.tensor([[1, 2]]), torch.zeros(5, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda f: f(X + 4, T), IndexError, r"index 5 at position \[0, 0\] is out of range for V = 5"),
        (lambda f: f(X, T, W, offset=2), IndexError, "positions 2 to 3 are out of range for P = 3"),
        (lambda f: f(X, T, W, offset=-1), IndexError, "positions -1 to 0 are out of range for P = 3"),
        (lambda f: f(X, T, W, positions=X + 1), IndexError, r"positions: index 3 at position \[0, 1\] is out of range for P = 3"),
        (lambda f: f(X, T, None, W, segments=X - 2), IndexError, r"segments: index -1 at position \[0, 0\] is out of range for S = 3"),
        (lambda f: f(X.float(), T), TypeError, "input must be int32 or int64, got torch.float32"),
        (lambda f: f(X, T, W, positions=X.bool()), TypeError, "positions must be int32 or int64, got torch.bool"),
        (lambda f: f(X, T[0]), ValueError, r"token must be \[V, D\], got \[4\]"),
        (lambda f: f(X, T, W[:, :2]), ValueError, r"position must be \[P, D\] = \[3, 4\], got \[3, 2\]"),
        (lambda f: f(X, T, W.double()), TypeError, "position must be float32, got float64"),
        (lambda f: f(X, T, positions=X), ValueError, "positions need a position table"),
        (lambda f: f(X, T, W, positions=X[:, :1]), ValueError, r"positions must be like input \[1, 2\] or its last dimension, got \[1, 1\]"),
        (lambda f: f(X, T, W, positions=X, offset=1), ValueError, "offset must be 0 where positions are given, got 1"),
        (lambda f: f(X, T, None, W), ValueError, "segments must be given with a segment table"),
        (lambda f: f(X, T, None, W, segments=X[0]), ValueError, r"segments must be input's shape = \[1, 2\], got \[2\]"),
        (lambda f: f(X, T, norm="batch"), ValueError, "norm must be 'layer' or 'rms', got 'batch'"),
        (lambda f: f(X, T, weight=T[0]), ValueError, "weight and bias must be None without a norm"),
        (lambda f: f(X, T, bias=T[0], norm="rms"), ValueError, "bias must be None for norm = 'rms'"),
        (lambda f: f(X, T, weight=T, norm="layer"), ValueError, r"weight must be \[D\] = \[4\], got \[5, 4\]"),
        (lambda f: f(X, T, dropout_p=2.0), ValueError, r"dropout_p must be in \[0, 1\], got 2.0"),
        (lambda f: f(X, T, padding_idx=5), ValueError, r"padding_idx must be in \[-5, 5\), got 5"),
        (lambda f: f(X, None), TypeError, "token must be a Tensor, got NoneType"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call(token_position_embedding)
    assert "\n" not in str(caught.value)
