"""Attention's kernels against the reference in float64: any option with any other, over sizes of
several tiles, any layout, dtype, instruction set and number of threads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_helpers import TOLERANCE, compare, finite, heads, threads
from lmkern import _C, reference
from lmkern.functional import scaled_dot_product_attention as attention

LENGTHS = st.one_of(st.integers(1, 9), st.integers(1, 200), st.sampled_from([64, 65, 128, 129]))
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([64, 80, 128]))
DTYPES = [torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16]


def any_case(draw):
    """(ours, theirs, inputs, dtype) of a random call."""
    dtype = draw(st.sampled_from(DTYPES), "dtype")
    B, groups, repeat = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    L, S, D, Dv = draw(LENGTHS, "L"), draw(LENGTHS, "S"), draw(WIDTHS, "D"), draw(WIDTHS, "Dv")
    H = groups * repeat
    seed = draw(st.integers(0, 999), "seed")
    torch.manual_seed(seed)
    inputs = heads(B, H, L, S, D, Dv, dtype, groups)
    if draw(st.booleans(), "merged"):
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    names, wide = [], torch.promote_types(dtype, torch.float32)
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]), "mask")
    options = {
        "is_causal": kind == "causal",
        "scale": draw(st.sampled_from([None, 0.3]), "scale"),
        "window": draw(
            st.one_of(st.none(), st.tuples(*[st.one_of(st.none(), st.integers(0, 150))] * 2)),
            "window",
        ),
        "softcap": draw(st.sampled_from([None, 3.0]), "softcap"),
        "causal_align": draw(st.sampled_from(["top_left", "bottom_right"]), "align"),
        "return_lse": draw(st.booleans(), "lse"),
        "return_weights": None,
    }
    shape = [n if draw(st.booleans()) else 1 for n in (B, H, L, S)]
    if kind == "bool":
        options["attn_mask"] = torch.rand(shape) > 0.3
    elif kind == "float":
        mask = torch.randn(shape).to(dtype)
        mask[torch.rand(shape) < 0.2] = -math.inf
        inputs.append(mask)
        names.append("attn_mask")
    if draw(st.booleans(), "slopes"):
        inputs.append(torch.rand(B, H, dtype=wide) / 16)
        names.append("alibi_slopes")
    if draw(st.booleans(), "sinks"):
        inputs.append(torch.randn(H, dtype=wide))
        names.append("sinks")
    if draw(st.booleans(), "lengths"):
        options["key_lengths"] = torch.randint(0, S + 1, (B,))
    p = draw(st.sampled_from([0.0, 0.0, 0.3]), "dropout")
    keep = None
    if p > 0:
        torch.manual_seed(seed)
        drawn = torch.randint(1 << 62, ())
        q, k, v = (x.double() for x in inputs[:3])
        keep = torch.ops.lmkern.attention_weights(
            q, k, v, None, None, None, None, None, None, drawn, 1.0, 0.0, -1, -1, False, p,
            q.new_zeros(B, H, L), False, True,
        )  # fmt: skip

    def ours(q, k, v, *more):
        torch.manual_seed(seed)
        more = dict(zip(names, more, strict=True))
        return attention(q, k, v, dropout_p=p, enable_gqa=True, **options, **more)

    def theirs(q, k, v, *more):
        more = dict(zip(names, more, strict=True))
        return reference.scaled_dot_product_attention(
            q, k, v, keep=keep, enable_gqa=True, **options, **more
        )

    return finite(ours), finite(theirs), inputs, dtype


def check(data):
    ours, theirs, inputs, dtype = any_case(data.draw)
    # A gradient may be a sum of many terms that cancel: of a query that sees a single key, of a mask
    # that is broadcast, of a slope, whose terms are multiplied with distances. Small mistakes in 16
    # bits are found elsewhere.
    (B, H, L, _), (S, Dv) = inputs[0].shape, inputs[2].shape[2:]
    longest = max(L, S) if dtype.itemsize == 2 else max(1, L / 16, S / 16)
    least = 0.1 * math.sqrt(B * H * L * Dv) * longest
    before = _C.isa()
    _C.set_isa(data.draw(st.sampled_from(_C.supported_isas()), "isa"))
    try:
        with threads(data.draw(st.integers(1, 3), "threads")):
            compare(ours, theirs, inputs, 4 * TOLERANCE[dtype], least)
    finally:
        _C.set_isa(before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any(data):
    check(data)


@pytest.mark.long
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_many(data):
    check(data)
