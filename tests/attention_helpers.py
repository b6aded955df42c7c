"""Inputs, torch's answers and thread counts for the tests of attention's kernels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern import reference
from oracle import ZERO, outputs_and_gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [1, 8, 59, 64, 80, 111, 128, 256, 512]
LENGTHS = [0, 1, 3, 4, 5, 97, 1025]
TOLERANCE = {  # relative to the largest element, against the same computation in float64
    torch.float32: 2e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


def heads(B, H, L, S, D, Dv, dtype=torch.float32, key_heads=None):
    """q, k, v of standard normal elements."""
    shapes = [(B, H, L, D), (B, key_heads or H, S, D), (B, key_heads or H, S, Dv)]
    return [torch.randn(s).to(dtype) for s in shapes]


def enlarged(q, k, v, how):
    """The same heads, with larger scores: three times as large ("x3"), or with a dimension of every
    query and a whole key a hundred times as large ("outliers")."""
    if how == "x3":
        return [3 * q, 3 * k, v]
    if how == "outliers":
        q, k = q.clone(), k.clone()
        q[..., q.shape[-1] // 2] *= 100
        k[..., k.shape[-2] // 2 : k.shape[-2] // 2 + 1, :] *= 100
    return [q, k, v]


def seen_keys(L, S, left=-1, right=-1, bottom_right=False, lengths=None):
    """bool [L, S], or [B, 1, L, S] with lengths [B]: which query sees which key."""
    lengths = torch.tensor(S) if lengths is None else lengths[:, None, None, None]
    p = torch.arange(L)[:, None] + ((lengths - L) if bottom_right else 0)
    j = torch.arange(S)
    seen = j < lengths
    if left >= 0:
        seen = seen & (j >= p - left)
    if right >= 0:
        seen = seen & (j <= p + right)
    return seen.expand(*seen.shape[:-2], L, S)


def torch_attention(q, k, v, mask=None, sinks=None, **options):
    """Torch's own. It has sinks as one more key: of value zero, and with the sink as its mask."""
    if sinks is not None:
        H, L, S = q.shape[1], q.shape[2], k.shape[2]
        column = sinks.to(q.dtype)[:, None, None].expand(1, H, L, 1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        rest = q.new_zeros(L, S) if mask is None else mask
        mask = torch.cat([rest.expand(1, H, L, S), column], -1)
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:  # torch's says NaN
        return reference.scaled_dot_product_attention(q, k, v, mask, **options)
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def close(
    actual: Tensor, expected: Tensor, tolerance: float, what: str = "", least: float = ZERO
) -> None:
    """Relative to the largest element, and to it alone: sums of opposite terms have no digits left.

    least: what that element is at least taken for; a truth of zero for 1.
    """
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, {list(expected.shape)}"
    if expected.numel() == 0:
        return
    same = actual == expected  # infinities
    error = torch.where(same, 0.0, (actual.double() - expected.double()).abs()).max().item()
    scale = expected.double().masked_fill(~expected.isfinite(), 0.0).abs().max().item()
    scale = max(scale, least) if max(scale, least) > ZERO else 1.0
    assert error <= tolerance * scale, f"{what}: relative error {error / scale:.1e}"


def compare(ours, theirs, inputs, tolerance=None, least=ZERO):
    """Outputs and gradients of ``ours`` against ``theirs`` in float64."""
    dtype = inputs[0].dtype
    exact = outputs_and_gradients(
        theirs, [x.double() if x.is_floating_point() else x for x in inputs]
    )
    for i, (a, e) in enumerate(zip(outputs_and_gradients(ours, inputs), exact, strict=True)):
        close(a, e, tolerance or TOLERANCE[dtype], f"result {i}", least)


def finite(f):
    """f with its -inf results as 0, so that gradients through them can be asked for."""

    def g(*args):
        results = f(*args)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r.masked_fill(r.detach() == -math.inf, 0.0) for r in results)

    return g


def assert_same_bits(results):
    """Each list of tensors equals the first, bit by bit."""
    results = iter(results)
    first = next(results)
    for other in results:
        for i, (a, b) in enumerate(zip(first, other, strict=True)):
            assert torch.equal(a, b), f"tensor {i} differs by {(a - b).abs().max():.1e}"


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
