"""Attention's kernel for a few queries, against the one for many: the same queries, with others beside
them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_helpers import DTYPES, TOLERANCE, WIDTHS, close, enlarged, heads
from lmkern import _C, reference
from lmkern.functional import scaled_dot_product_attention as attention

MANY = 9  # queries, of which the first or the last few are compared
CHUNK = [1, 2, 63, 64, 65, 511, 512, 513, 1025, 1600]  # keys: chunks of 512, vectors of 16
H = 4
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True, "causal_align": "bottom_right"},
    "top left": {"is_causal": True},
    "window": {"window": (300, 0), "causal_align": "bottom_right"},
    "narrow": {"window": (2, 1), "causal_align": "bottom_right"},
    "first": {"window": (2, 1)},
    "softcap": {"softcap": 2.0, "scale": 0.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.01, 0.0]), "causal_align": "bottom_right"},
    "sinks": {"sinks": torch.tensor([0.5, -math.inf, 20.0, -3.0])},
    "key lengths": {"key_lengths": "some"},
    "bool mask": {"attn_mask": "bool"},
    "float mask": {"attn_mask": "float"},
    "all": {
        "key_lengths": "some", "attn_mask": "float", "softcap": 2.0, "window": (600, 2),
        "alibi_slopes": torch.tensor([[0.5, 0.1, 0.01, 0.0]] * 2), "sinks": torch.randn(4),
        "causal_align": "bottom_right",
    },
}  # fmt: skip


def with_tensors(options, S):
    """The options, with masks for MANY queries and lengths for keys."""
    options = dict(options)
    if options.get("key_lengths") == "some":
        options["key_lengths"] = torch.tensor([S, S // 3])
    seen = torch.rand(2, 1, MANY, S) > 0.3
    if options.get("attn_mask") == "bool":
        options["attn_mask"] = seen
    elif options.get("attn_mask") == "float":
        options["attn_mask"] = torch.randn(2, H, MANY, S).masked_fill(~seen, -math.inf)
    return options


def check(inputs, options, counts=(1, 2, 3, 4), tolerance=None):
    q, k, v = inputs
    whole = attention(q, k, v, return_lse=True, **options)
    last = options.get("causal_align") == "bottom_right"
    for n in counts:
        rows = slice(-n, None) if last else slice(n)
        few = dict(options)
        if "attn_mask" in few:
            few["attn_mask"] = few["attn_mask"][:, :, rows].to(
                torch.bool if few["attn_mask"].dtype == torch.bool else q.dtype
            )
        results = attention(q[:, :, rows], k, v, return_lse=True, **few)
        for name, a, b in zip(("out", "lse"), results, whole, strict=True):
            close(a, b[:, :, rows], tolerance or TOLERANCE[q.dtype], f"{name}, {n} queries")


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("S", CHUNK)
def test_options(isa, S, name):
    check(heads(2, H, MANY, S, 24, 20), with_tensors(OPTIONS[name], S))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "all"])
def test_dtypes(isa, name, dtype):
    for how in ("", "x3", "outliers"):
        options = with_tensors(OPTIONS[name], 700)
        if name == "causal" and dtype != torch.float64:  # scores of 1e4 have errors of 1e-3
            check(enlarged(*heads(2, H, MANY, 700, 64, 64, dtype), how), options, tolerance=2e-2)
        else:
            check(heads(2, H, MANY, 700, 64, 64, dtype), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_widths(isa, D, dtype):
    for Dv in (D, WIDTHS[(4 * D + 1) % 9]):
        check(heads(2, H, MANY, 530, D, Dv, dtype), {"is_causal": True}, (1, 4))


@pytest.mark.parametrize("group", [1, 2, 4, 5, 8, 16, 64])
def test_groups_of_heads(isa, group):
    options = {"enable_gqa": True, "is_causal": True, "causal_align": "bottom_right"}
    check(heads(2, 2 * group, MANY, 513, 32, 32, key_heads=2), options)


@pytest.mark.parametrize("lengths", [[0, 0], [0, 1], [512, 0], [511, 513], [1025, 1]], ids=str)
@pytest.mark.parametrize("sink", [False, True])
def test_lengths(isa, lengths, sink):
    """What stands beyond the lengths is not seen, even if it is NaN; nothing seen gives zeros."""
    q, k, v = heads(2, 4, 3, 1025, 16, 16)
    sinks = torch.randn(4) if sink else None
    options = {"key_lengths": torch.tensor(lengths), "sinks": sinks, "return_lse": True}
    expected = reference.scaled_dot_product_attention(q, k, v, **options)
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = math.nan, math.nan
    for a, e in zip(attention(q, k, v, **options), expected, strict=True):
        close(a, e, 2e-5)
        assert not a.isnan().any()


@pytest.mark.parametrize("cu_q", [[0, 1, 2, 3], [0, 4, 4, 5], [0, 0, 2, 5], [0, 3, 3, 3]], ids=str)
def test_packed(isa, cu_q):
    """Sequences of different numbers of queries, none included, in one call."""
    cu_k = [0, 600, 601, 1700]
    q, k, v = (x[0] for x in heads(1, 4, cu_q[-1], 1700, 24, 20, key_heads=2))
    options = {
        "cu_seqlens": (torch.tensor(cu_q), torch.tensor(cu_k)), "is_causal": True, "enable_gqa": True,
        "causal_align": "bottom_right", "alibi_slopes": torch.rand(3, 4), "return_lse": True,
    }  # fmt: skip
    results = attention(q, k, v, **options)
    expected = reference.scaled_dot_product_attention(q, k, v, **options)
    for a, e in zip(results, expected, strict=True):
        close(a, e, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_caches_are_read_where_they_lie(isa, dtype):
    """[B, S, H, D] in memory, a part of a longer cache, every other row, one row for all."""
    q = torch.randn(2, 4, 2, 32).to(dtype)
    cache = torch.randn(2, 1400, 4, 70).to(dtype)
    for view in (
        cache.transpose(1, 2)[:, :, 100:700],
        cache.transpose(1, 2)[:, :, ::2],
        cache[:, :1, :].transpose(1, 2).expand(2, 4, 600, 70),
        cache[:1, :, :1].transpose(1, 2).expand(2, 4, 1400, 70),
    ):
        k, v = view[..., 1:33], view[..., 35:68]  # not aligned either
        actual = attention(q, k, v, is_causal=True, causal_align="bottom_right")
        expected = attention(
            q, k.contiguous(), v.contiguous(), is_causal=True, causal_align="bottom_right"
        )
        assert torch.equal(actual, expected)
        close(
            actual,
            reference.scaled_dot_product_attention(
                q.double(), k.double(), v.double(), is_causal=True, causal_align="bottom_right"
            ),
            TOLERANCE[dtype],
        )


def test_rows_that_a_mask_hides(isa):
    q, k, v = heads(1, 2, 4, 1100, 16, 16)
    mask = torch.ones(4, 1100, dtype=torch.bool)
    mask[1], mask[2, :512], mask[3, 512:] = False, False, False  # all, and one or two of the chunks
    for m in (mask, torch.zeros(4, 1100).masked_fill(~mask, -math.inf)):
        out, lse = attention(q, k, v, m, return_lse=True)
        expected = reference.scaled_dot_product_attention(q, k, v, m, return_lse=True)
        close(out, expected[0], 2e-5)
        close(lse, expected[1], 2e-5)
        assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -math.inf).all()


@pytest.mark.parametrize(
    ("what", "queries"),
    [(what, n) for what in "qkv" for n in (1, 4, 5, 70)],
)
def test_not_a_number_stays_one(isa, queries, what):
    """As in torch: an error upstream must not turn into zeros."""
    inputs = dict(zip("qkv", heads(1, 2, queries, 600, 16, 16), strict=True))
    inputs[what][0, 0, 0, 3] = math.nan
    out = attention(*inputs.values())
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs.values())
    assert (out.isnan() == expected.isnan()).all()


def test_gradients(isa):
    """The log-sum-exp that a few queries leave serves the backward pass of many."""
    for n in (1, 4):
        q, k, v = (x.requires_grad_() for x in heads(2, 4, n, 700, 24, 20, key_heads=2))
        out = attention(q, k, v, enable_gqa=True)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        exact = reference.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), enable_gqa=True
        )
        expected = torch.autograd.grad(exact, (q, k, v), torch.ones_like(exact))
        for a, e in zip(grads, expected, strict=True):
            close(a, e, 2e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any(data):
    draw = data.draw
    B, groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 9))
    n, S = draw(st.integers(1, 4)), draw(st.integers(0, 1100))
    D, Dv = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 99)))
    heads_ = groups * group
    q, k, v = heads(B, heads_, n, S, D, Dv, dtype, groups)
    options = {
        "is_causal": draw(st.booleans()),
        "causal_align": draw(st.sampled_from(["top_left", "bottom_right"])),
        "window": draw(st.sampled_from([None, (5, 3), (None, 700), (600, None)])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "sinks": draw(st.sampled_from([None, torch.randn(heads_)])),
        "alibi_slopes": draw(st.sampled_from([None, torch.rand(B, heads_)])),
        "key_lengths": draw(st.sampled_from([None, torch.randint(0, S + 1, (B,))])),
        "enable_gqa": True,
        "return_lse": True,
    }
    isa = draw(st.sampled_from(_C.supported_isas()))
    before = _C.isa()
    _C.set_isa(isa)
    try:
        results = attention(q, k, v, **options)
    finally:
        _C.set_isa(before)
    exact = reference.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    for a, e in zip(results, exact, strict=True):
        close(a, e, TOLERANCE[dtype])
