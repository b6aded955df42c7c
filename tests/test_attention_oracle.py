"""The oracle rule for attention's kernels: every option, sizes about the edges of their tiles, inputs
that are large, every dtype and instruction set."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from attention_helpers import (
    DTYPES,
    LENGTHS,
    WIDTHS,
    compare,
    enlarged,
    heads,
    seen_keys,
    torch_attention,
)
from lmkern import reference
from lmkern.functional import scaled_dot_product_attention as attention
from oracle import EPSILON, assert_oracle, outputs_and_gradients, relative_error

HOW = ["", "x3", "outliers"]
KEY_LENGTHS = torch.tensor([130, 33])


def case(kind, L, S, dtype, H=2):
    """(ours, theirs) of q, k, v for one option. Each query sees a key.

    Masks, slopes and sinks are constants here: asked for their gradient, torch leaves its fused
    kernel, which is the one to compare with. Theirs: test_attention_gradients.py.
    """
    seen = torch.rand(2, H, L, S) > 0.4
    seen[..., :2] = True
    bias = torch.randn(2, H, L, S).masked_fill(~seen, -math.inf).to(dtype)
    slopes, sinks = 2.0 ** -torch.arange(1.0, H + 1), torch.randn(H).to(dtype)
    distances = slopes[:, None, None] * (torch.arange(L)[:, None] - torch.arange(S)).abs()
    bottom_right = {"causal_align": "bottom_right"}
    ours, mask, theirs = {  # our options, torch's mask, torch's options
        "plain": ({}, None, {}),
        "causal": ({"is_causal": True}, None, {"is_causal": True}),
        "bottom right": (
            {"is_causal": True, **bottom_right}, seen_keys(L, S, right=0, bottom_right=True), {},
        ),
        "bool mask": ({"attn_mask": seen}, seen, {}),
        "float mask": ({"attn_mask": bias}, bias, {}),
        "key lengths": (
            {"key_lengths": KEY_LENGTHS}, seen_keys(L, S, lengths=KEY_LENGTHS), {},
        ),
        "window": ({"window": (40, 7), **bottom_right}, seen_keys(L, S, 40, 7, True), {}),
        "softcap": ({"softcap": 3.0, "is_causal": True}, None, None),
        "alibi": ({"alibi_slopes": slopes}, -distances[None], {}),
        "sinks": ({"sinks": sinks}, None, {"sinks": sinks}),
        "gqa": (
            {"is_causal": True, "enable_gqa": True}, None, {"is_causal": True, "enable_gqa": True},
        ),
    }[kind]  # fmt: skip

    def peer(q, k, v):
        if theirs is None:  # which torch does not have
            return reference.scaled_dot_product_attention(q, k, v, **ours)
        additive = mask is not None and mask.dtype != torch.bool
        return torch_attention(q, k, v, mask.to(q.dtype) if additive else mask, **theirs)

    return lambda q, k, v: attention(q, k, v, **ours), peer


KINDS = [
    "plain", "causal", "bottom right", "bool mask", "float mask", "key lengths", "window", "softcap",
    "alibi", "sinks", "gqa",
]  # fmt: skip


def assert_oracle_on_average(ours, theirs, draws):
    """The oracle rule for the errors' geometric means over several inputs.

    Where one key outshines all others, the largest error is that of the one query between two keys.
    """
    rows = []
    for inputs in draws:
        exact = outputs_and_gradients(theirs, [x.double() for x in inputs])
        results = (outputs_and_gradients(f, inputs) for f in (ours, theirs))
        rows.append(
            [[relative_error(r, e) for r, e in zip(rs, exact, strict=True)] for rs in results]
        )
    actual, peer = (torch.tensor(rows) + 1e-9).log().mean(0).exp()
    limit = 2 * peer + EPSILON[draws[0][0].dtype]
    assert (actual <= limit).all(), f"errors {actual.tolist()}, allowed {limit.tolist()}"


def check(kind, size, dtype, how=""):
    L, S, D, Dv = size
    H, key_heads = (6, 2) if kind == "gqa" else (2, 2)
    ours, theirs = case(kind, L, S, dtype, H)
    draws = [
        enlarged(*heads(2, H, L, S, D, Dv, dtype, key_heads), how)
        for _ in range(6 if how == "outliers" else 1)
    ]
    inputs = draws[0]
    if dtype == torch.float64:  # no exacter peer: rounding grows with the scores
        compare(ours, theirs, inputs, 1e-11)
    elif Dv != D or min(L, S) < 9:  # no fused kernel of torch's, or one whose error is luck
        compare(ours, theirs, inputs)
    elif how == "outliers":
        assert_oracle_on_average(ours, theirs, draws)
    else:
        assert_oracle(ours, theirs, inputs)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_options(kind, dtype, how):
    check(kind, (97, 130, 64, 64), dtype, how)  # torch's fused kernel wants Dv = D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set(isa, kind, dtype):
    check(kind, (70, 130, 80, 48), dtype)


# Every width and every length in each dtype, if not every pair of them: that is the long test.
SIZES = [
    (LENGTHS[(i + 3) % 7], LENGTHS[(3 * i + 1) % 7], D, WIDTHS[(4 * i + 2) % 9])
    for i, D in enumerate(WIDTHS)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype):
    for kind in ("plain", "causal"):
        check(kind, size, dtype)


@pytest.mark.parametrize("L", LENGTHS)
def test_lengths(L):
    for S in LENGTHS:
        inputs = heads(1, 2, L, S, 24, 20)
        for causal in (False, True):
            assert_oracle(
                lambda *a, c=causal: attention(*a, is_causal=c),
                lambda *a, c=causal: torch_attention(*a, is_causal=c),
                inputs,
            )


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_all_sizes(D, dtype):
    for L, S in itertools.product(LENGTHS, LENGTHS):
        check("causal" if (L + S) % 2 else "plain", (L, S, D, WIDTHS[(L + S + D) % 9]), dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_options_and_widths(isa, kind, dtype):
    for i, D in enumerate(WIDTHS):
        check(kind, (129, 200, D, D), dtype, HOW[i % 2])
