"""The weights that attention returns, from a second pass: with every option, and summing to one."""

from __future__ import annotations

import math

import pytest
import torch

from attention_helpers import DTYPES, TOLERANCE, close, compare, heads
from lmkern import reference
from lmkern.functional import scaled_dot_product_attention as attention

B, H, S = 2, 4, 330
SLOPES, SINKS = torch.tensor([0.5, 0.1, 0.01, 0.0]), torch.tensor([0.5, -math.inf, 20.0, -3.0])
BOTTOM_RIGHT = {"causal_align": "bottom_right"}


def option(name, L, dtype=torch.float32):
    seen = torch.rand(B, 1, L, S) > 0.3
    seen[..., 0] = True
    bias = torch.randn(B, 1, L, S).masked_fill(~seen, -math.inf).to(dtype)
    lengths = torch.tensor([S, 65])
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "bottom right": {"is_causal": True, **BOTTOM_RIGHT},
        "bool mask": {"attn_mask": seen},
        "float mask": {"attn_mask": bias},
        "key lengths": {"key_lengths": lengths},
        "window": {"window": (70, 20), **BOTTOM_RIGHT},
        "softcap": {"softcap": 2.0, "scale": 0.7},
        "alibi": {"alibi_slopes": SLOPES, **BOTTOM_RIGHT},
        "sinks": {"sinks": SINKS},
        "all": {
            "attn_mask": bias, "key_lengths": lengths, "window": (500, 20), "softcap": 2.0,
            "alibi_slopes": SLOPES, "sinks": SINKS, **BOTTOM_RIGHT,
        },
    }[name]  # fmt: skip


NAMES = [
    "plain", "causal", "bottom right", "bool mask", "float mask", "key lengths", "window", "softcap",
    "alibi", "sinks", "all",
]  # fmt: skip


@pytest.mark.parametrize("L", [1, 4, 97])
@pytest.mark.parametrize("name", NAMES)
def test_every_option(isa, name, L):
    q, k, v = heads(B, H, L, S, 24, 20, key_heads=2)
    options = {**option(name, L), "enable_gqa": True, "return_lse": True}
    exact = reference.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), return_weights="heads", **options
    )
    for kind in ("heads", "mean"):
        results = attention(q, k, v, return_weights=kind, **options)
        expected = (*exact[:2], exact[2] if kind == "heads" else exact[2].mean(1))
        for what, a, e in zip(("out", "lse", "weights"), results, expected, strict=True):
            close(a, e, 2e-5, f"{what} {kind}")
        alone = attention(q, k, v, **options)  # asking for them changes nothing else
        assert torch.equal(results[0], alone[0]) and torch.equal(results[1], alone[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "all"])
def test_every_dtype(isa, name, dtype):
    q, k, v = heads(B, H, 97, S, 24, 20, dtype)
    options = option(name, 97, dtype)
    exact = reference.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), return_weights="heads", **options
    )[1]
    for kind, expected in (("heads", exact), ("mean", exact.mean(1))):
        weights = attention(q, k, v, return_weights=kind, **options)[1]
        assert weights.dtype == dtype
        close(weights, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_rows_sum_to_one(name):
    """What a sink takes is missing; a row that sees nothing sums to zero."""
    q, k, v = heads(B, H, 97, S, 24, 20)
    options = option(name, 97)
    _, lse, weights = attention(q, k, v, return_lse=True, return_weights="heads", **options)
    assert (weights >= 0).all()
    expected = torch.ones(B, H, 97)
    if "sinks" in options:
        expected = 1 - (SINKS[:, None] - lse).exp()
    expected = expected.masked_fill(lse == -math.inf, 0.0)
    torch.testing.assert_close(weights.sum(-1), expected, atol=1e-5, rtol=0)
    out = attention(q, k, v, **options)
    torch.testing.assert_close(weights @ v, out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["heads", "mean"])
def test_gradient_of_the_weights(kind):
    options = {"is_causal": True, "return_weights": kind, "return_lse": True}
    compare(
        lambda *a: attention(*a, **options),
        lambda *a: reference.scaled_dot_product_attention(*a, **options),
        heads(B, H, 70, 90, 16, 12),
    )


LARGE = [
    -1e4,
    pytest.param(-1e9, marks=pytest.mark.xfail(reason="lse + score cannot tell the keys apart")),
    pytest.param(
        torch.finfo(torch.float32).min,
        marks=pytest.mark.xfail(reason="lse + score cannot tell the keys apart"),
    ),
]


@pytest.mark.parametrize("value", LARGE)
@pytest.mark.parametrize("L", [3, 70])
def test_rows_whose_mask_is_large_and_finite(L, value):
    """All keys of a row that is padding, as transformers builds it: the mean of what is there."""
    q, k, v = heads(1, 2, L, 90, 16, 12)
    q = torch.zeros_like(q)
    mask = torch.zeros(L, 90)
    mask[1] = value
    compare(
        lambda q, k, v: attention(q, k, v, mask, return_weights="heads"),
        lambda q, k, v: reference.scaled_dot_product_attention(
            q, k, v, mask, return_weights="heads"
        ),
        [q, k, v],
        1e-3,
    )


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("L", [3, 70])
def test_masks_that_are_large_and_finite_hide(isa, L, value):
    """Forward and backward, of rows that see another key as well: as -inf does."""
    seen = torch.rand(2, 1, L, 90) > 0.5
    seen[..., 3] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, value)
    compare(
        lambda q, k, v: attention(q, k, v, mask),
        lambda q, k, v: reference.scaled_dot_product_attention(q, k, v, seen),
        heads(2, 2, L, 90, 16, 12),
    )
