"""lmkern.functional.scaled_dot_product_attention against torch's."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import lmkern
from lmkern import _C, reference
from lmkern.functional import scaled_dot_product_attention as attention
from oracle import assert_oracle, outputs_and_gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, H, L, S, D, Dv
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 97, 65, 59, 20),
    (1, 2, 130, 200, 64, 64),
    (1, 1, 7, 1025, 111, 8),
    (2, 1, 33, 31, 80, 128),
]


def heads(B, H, L, S, D, Dv, dtype=torch.float32, key_heads=None):
    shapes = [(B, H, L, D), (B, key_heads or H, S, D), (B, key_heads or H, S, Dv)]
    return [torch.randn(s).to(dtype) for s in shapes]


def torch_math(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_oracle(isa, size, dtype, causal):
    assert_oracle(
        lambda *a: attention(*a, is_causal=causal),
        lambda *a: F.scaled_dot_product_attention(*a, is_causal=causal),
        heads(*size, dtype),
    )


@pytest.mark.parametrize("factor", [3.0, 100.0])
def test_oracle_large_scores_and_outliers(isa, factor):
    q, k, v = heads(1, 2, 97, 130, 64, 64)
    if factor > 10:
        q[..., 5, :] *= factor
        k[..., 7, :] *= factor
    else:
        q, k = q * factor, k * factor
    assert_oracle(attention, F.scaled_dot_product_attention, [q, k, v])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "bool-broadcast", "float-broadcast", "strided"])
def test_masks(isa, kind, dtype):
    q, k, v = heads(2, 3, 70, 90, 16, 16, dtype)
    shape = (2, 1, 1, 90) if "broadcast" in kind else (2, 3, 70, 90)
    if kind.startswith("float"):
        mask = torch.randn(shape).to(dtype)
        mask[..., :5] = -math.inf
    elif kind == "strided":
        mask = (torch.rand(90, 70) > 0.3).t()
    else:
        mask = torch.rand(shape) > 0.3
    mask = mask.clone() if kind != "strided" else mask
    if kind != "strided":
        mask[..., 0] = mask[..., 0] if mask.dtype == torch.bool else 0.0

    def theirs(q, k, v):
        m = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, m)

    assert_oracle(lambda q, k, v: attention(q, k, v, mask), theirs, [q, k, v])


def test_rows_that_see_nothing(isa):
    q, k, v = heads(1, 2, 70, 90, 16, 16)
    mask = torch.ones(70, 90, dtype=torch.bool)
    mask[3] = False
    mask[64:] = False  # a whole tile, for some widths
    out, d_q, d_k, d_v = outputs_and_gradients(lambda q, k, v: attention(q, k, v, mask), [q, k, v])
    assert (out[:, :, ~mask.any(1)] == 0).all() and (d_q[:, :, ~mask.any(1)] == 0).all()
    for x in (out, d_q, d_k, d_v):
        assert x.isfinite().all()
    additive = torch.zeros(70, 90).masked_fill(~mask, -math.inf)
    other = outputs_and_gradients(lambda q, k, v: attention(q, k, v, additive), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip((out, d_q, d_k, d_v), other, strict=True))


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 0, 5, 4, 4), (1, 2, 5, 0, 4, 4), (0, 2, 5, 5, 4, 4), (2, 0, 5, 5, 4, 4)],
    ids=str,
)
def test_empty(isa, shape):
    q, k, v = heads(*shape)
    out, d_q, d_k, d_v = outputs_and_gradients(attention, [q, k, v])
    assert out.shape == (*shape[:3], shape[5])
    for x in (out, d_q, d_k, d_v):
        assert (x == 0).all()


@pytest.mark.parametrize("lead", [(), (2,), (0, 3), (2, 0, 3)], ids=str)
def test_zero_extents_of_any_rank(lead):
    q, k = torch.randn(*lead, 0, 4), torch.randn(*lead, 5, 4)
    assert attention(q, k, k).shape == (*lead, 0, 4)
    assert (attention(k, q, q) == 0).all() and attention(k, q, q).shape == (*lead, 5, 4)


def test_kernels_are_called(monkeypatch):
    called = []
    for name in ("attention_forward", "attention_backward"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1])
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    attention(q, q, q).sum().backward()
    assert called == ["attention_forward", "attention_backward"]


@pytest.mark.parametrize("size", [(1, 2, 70, 2100, 256, 144), (1, 1, 1100, 300, 64, 64)], ids=str)
def test_oracle_large(isa, size):
    assert_oracle(attention, F.scaled_dot_product_attention, heads(*size))


def test_large_finite_mask_of_a_wider_dtype_stays_finite():
    q, k, v = heads(1, 1, 3, 4, 8, 8, torch.bfloat16)
    mask = torch.full((3, 4), torch.finfo(torch.float32).min)
    torch.testing.assert_close(
        attention(q, k, v, mask),
        v.float().mean(2, keepdim=True).expand(1, 1, 3, 8).bfloat16(),
        atol=1e-2,
        rtol=1e-2,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_grouped_queries(isa, causal, dtype):
    assert_oracle(
        lambda *a: attention(*a, is_causal=causal, enable_gqa=True),
        lambda *a: F.scaled_dot_product_attention(*a, is_causal=causal, enable_gqa=True),
        heads(2, 6, 40, 70, 32, 32, dtype, key_heads=2),
    )


def test_scale_and_views_of_one_projection(isa):
    qkv = torch.randn(2, 50, 3, 4, 24)

    def split(f):
        return lambda x: f(*(t.transpose(1, 2) for t in x.unbind(2)), is_causal=True, scale=0.3)

    assert_oracle(split(attention), split(F.scaled_dot_product_attention), [qkv])


def test_last_dimension_strided():
    q, k, v = (x.mT.contiguous().mT for x in heads(2, 3, 20, 30, 8, 8))
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    "shapes",
    [
        [(9, 4), (7, 4), (7, 5)],
        [(3, 9, 4), (3, 7, 4), (3, 7, 5)],
        [(2, 5, 3, 9, 4), (2, 5, 3, 7, 4), (2, 5, 3, 7, 5)],
        [(2, 3, 9, 4), (1, 3, 7, 4), (2, 1, 7, 5)],
    ],
    ids=str,
)
def test_leading_dimensions(shapes):
    q, k, v = (torch.randn(s) for s in shapes)
    for mask in (None, torch.rand(9, 7) > 0.2):
        ours, theirs = (
            attention(q, k, v, mask),
            reference.scaled_dot_product_attention(q, k, v, mask),
        )
        torch.testing.assert_close(ours, theirs)


def test_output_layout_merges_heads_without_a_copy():
    out = attention(*heads(2, 3, 9, 9, 8, 8))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_gradcheck(causal):
    args = [x.requires_grad_() for x in heads(1, 2, 5, 6, 3, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: attention(*a, is_causal=causal), args)
    assert torch.autograd.gradgradcheck(lambda *a: attention(*a, is_causal=causal), args)


@pytest.mark.parametrize("size", [(1, 1, 300, 700, 16, 16), (2, 3, 100, 100, 64, 64)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_same_bits_for_any_thread_count(isa, size, causal):
    """One thread takes whole heads, several split queries from keys: same terms, same order."""
    inputs, before = heads(*size), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(
                outputs_and_gradients(lambda *a: attention(*a, is_causal=causal), inputs)
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.integers(1, 150),
    st.integers(1, 70), st.integers(1, 70), st.booleans(), st.sampled_from(["none", "bool", "float"]),
    st.sampled_from(_C.supported_isas()),
)  # fmt: skip
def test_any_size(B, H, L, S, D, Dv, causal, mask_kind, isa):
    before = _C.isa()
    _C.set_isa(isa)
    try:
        inputs = heads(B, H, L, S, D, Dv)
        mask = None
        if not causal and mask_kind != "none":
            mask = torch.rand(L, S) > 0.5 if mask_kind == "bool" else torch.randn(L, S)
        ours = outputs_and_gradients(lambda *a: attention(*a, mask, is_causal=causal), inputs)
        theirs = outputs_and_gradients(
            lambda *a: reference.scaled_dot_product_attention(*a, mask, is_causal=causal), inputs
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    finally:
        _C.set_isa(before)


def test_opcheck():
    q, k, v = heads(2, 2, 5, 6, 4, 3)
    ops = torch.ops.lmkern
    mask = torch.randn(1, 2, 5, 6)
    slopes, sinks, lengths = torch.rand(2, 2), torch.rand(2), torch.tensor([6, 4])
    seed = torch.tensor(3)
    for problem in (
        (q, k, v, mask, slopes, sinks, lengths, None, None, seed, 0.5, 2.0, 3, 0, True, 0.1),
        (q, k, v, None, None, None, None, None, None, None, 0.5, 0.0, -1, -1, False, 0.0),
        (q[:1], k[:1], v[:1], None, None, None, None, torch.tensor([0, 2, 5]),
         torch.tensor([0, 4, 6]), None, 0.5, 0.0, -1, -1, False, 0.0),
    ):  # fmt: skip
        torch.library.opcheck(ops.attention_forward.default, problem)
        out, lse = ops.attention_forward(*problem)
        torch.library.opcheck(ops.attention_backward.default, (out, lse, *problem, out, lse, True))
        if problem[7] is None:
            torch.library.opcheck(ops.attention_weights.default, (*problem, lse, False, False))


def test_compile_fullgraph():
    inputs = heads(2, 2, 17, 17, 8, 8)

    def f(q, k, v):
        return attention(q, k, v, is_causal=True)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        outputs_and_gradients(compiled, inputs), outputs_and_gradients(f, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_compile_with_one_tensor_for_all():
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    compiled = torch.compile(lambda x: attention(x, x, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), attention(q, q, q))


def test_autocast():
    q, k, v = heads(2, 2, 17, 17, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(q, k, v), atol=3e-2, rtol=3e-2)


def test_functorch():
    q, k, v = heads(1, 2, 5, 6, 4, 3, torch.float64)
    mapped = torch.func.vmap(lambda x: attention(x, k, v))(torch.stack([q, q + 1]))
    torch.testing.assert_close(mapped[1], attention(q + 1, k, v))
    grad = torch.func.grad(lambda x: attention(x, k, v).sum())(q)
    leaf = q.clone().requires_grad_()
    attention(leaf, k, v).sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


def test_dropout_and_mask_gradient():
    q, k, v = heads(1, 2, 50, 60, 4, 3)
    assert torch.equal(attention(q, k, v, dropout_p=1.0), torch.zeros(1, 2, 50, 3))
    torch.manual_seed(0)
    first = attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(first, attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, attention(q, k, v))
    mask = torch.randn(50, 60, requires_grad=True)
    attention(q, k, v, mask).sum().backward()
    other = mask.detach().clone().requires_grad_()
    F.scaled_dot_product_attention(q, k, v, other).sum().backward()
    torch.testing.assert_close(mask.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_signature_is_torchs():
    parameters = list(inspect.signature(attention).parameters.values())
    assert [p.name for p in parameters[:8]] == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ]  # fmt: skip
    assert [p.default for p in parameters[3:8]] == [None, 0.0, False, None, False]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[8:])


def _bad(**change):
    q, k, v = heads(1, 4, 5, 6, 8, 8)
    return {**{"query": q, "key": k, "value": v}, **change}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (_bad(key=torch.zeros(1, 4, 6, 7)), ValueError, r"key must be \[..., S, D\] = \[1, 4, 6, 8\], got \[1, 4, 6, 7\]"),
        (_bad(value=torch.zeros(1, 4, 7, 8)), ValueError, r"key must be"),
        (_bad(key=torch.zeros(1, 3, 6, 8)), ValueError, "leading dimensions must broadcast"),
        (_bad(query=torch.zeros(1, 5, 5, 8), enable_gqa=True), ValueError, "multiple of key's, got 5 and 4"),
        (_bad(attn_mask=torch.ones(5, 6), is_causal=True), ValueError, "attn_mask must be None"),
        (_bad(attn_mask=torch.ones(5, 7)), ValueError, r"attn_mask must broadcast to \[1, 4, 5, 6\], got \[5, 7\]"),
        (_bad(attn_mask=torch.ones(5, 6, dtype=torch.int64)), TypeError, "attn_mask must be bool or floating"),
        (_bad(attn_mask=torch.full((5, 6), math.nan)), ValueError, "attn_mask must not contain NaN"),
        (_bad(key=torch.zeros(1, 4, 6, 8).double()), TypeError, "key must be float32, got float64"),
        (_bad(value=[1]), TypeError, "value must be a Tensor, got list"),
        (_bad(dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
        (_bad(query=torch.zeros(8)), ValueError, "query must be"),
        (_bad(key=torch.zeros(1, 4, 6, 8, device="meta")), ValueError, r"key must be on \S+ like query, got meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        attention(**arguments)
    assert "\n" not in str(caught.value)


def test_meta_device():
    q, k, v = (x.to("meta") for x in heads(2, 3, 5, 6, 8, 4))
    assert attention(q, k, v).shape == (2, 3, 5, 4)
    assert lmkern.functional.scaled_dot_product_attention is attention
