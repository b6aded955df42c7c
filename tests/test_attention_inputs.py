"""Where attention's inputs lie, what must not be read of them, and what is refused."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch

from attention_helpers import DTYPES, assert_same_bits, compare, finite, heads
from lmkern import reference
from lmkern.functional import scaled_dot_product_attention as attention
from oracle import outputs_and_gradients

LAYOUTS = {
    "[B, N, H, D]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "[H, B, N, D]": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "[N, B, H, D]": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "part of a row": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "columns first": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [3, 97])
def test_layouts(isa, L, dtype, layout):
    """The same bits from wherever the inputs, and the gradient of the output, lie."""
    inputs = heads(2, 3, L, 130, 24, 20, dtype)
    place = LAYOUTS[layout]
    d_out = torch.randn(2, 3, L, 20).to(dtype)

    def run(*views):
        leaves = [x.detach().requires_grad_() for x in views[:3]]
        out = attention(*leaves, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, views[3])]

    placed = [place(x) for x in (*inputs, d_out)]
    assert all(torch.equal(a, b) for a, b in zip(placed, (*inputs, d_out), strict=True))
    assert_same_bits([run(*inputs, d_out), run(*placed)])


@pytest.mark.parametrize("which", list(itertools.product([False, True], repeat=4)), ids=str)
def test_expanded(which):
    """Dimensions of stride 0, in any of the four."""
    full = (2, 3, 70, 24)
    shape = [n if keep else 1 for n, keep in zip(full, which, strict=True)]
    inputs = [torch.randn(shape), torch.randn(shape), torch.randn(shape)]

    def expanded(f):
        return lambda q, k, v: f(q.expand(full), k.expand(full), v.expand(full), is_causal=True)

    # Of keys that are all the same, gradients cancel: few of their digits are left.
    compare(expanded(attention), expanded(reference.scaled_dot_product_attention), inputs, 1e-3)


def test_gradient_of_the_output_may_be_expanded():
    inputs = [x.requires_grad_() for x in heads(2, 3, 70, 90, 24, 20)]
    out = attention(*inputs)
    ones = torch.ones(())
    expanded = torch.autograd.grad(out, inputs, ones.expand_as(out), retain_graph=True)
    assert_same_bits([torch.autograd.grad(out, inputs, torch.ones_like(out)), expanded])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [2, 70])
def test_nothing_beyond_key_lengths_is_read(isa, L, dtype):
    """Same bits whatever stands there, and zeros for its gradient."""
    q, k, v = heads(3, 2, L, 200, 24, 20, dtype)
    lengths = torch.tensor([200, 70, 0])
    mask = torch.randn(3, 1, L, 200).to(dtype)
    beyond = torch.arange(200) >= lengths[:, None]
    results = []
    for value in (0.0, math.nan, math.inf):
        k, v = (x.masked_fill(beyond[:, None, :, None], value) for x in (k, v))
        results.append(
            outputs_and_gradients(
                finite(lambda *a: attention(*a, key_lengths=lengths, return_lse=True)),
                [q, k, v, mask],
            )
        )
    assert_same_bits(results)
    *_, d_k, d_v, d_mask = results[-1]
    assert (d_k.mT.masked_select(beyond[:, None, None]) == 0).all()
    assert (d_v.mT.masked_select(beyond[:, None, None]) == 0).all()
    assert (d_mask.masked_select(beyond[:, None, None]) == 0).all()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys(isa, kind, dtype):
    """Single rows, a block of them, and one that is left with its last key."""
    q, k, v = heads(2, 3, 150, 130, 24, 20, dtype)
    seen = torch.rand(2, 1, 150, 130) > 0.2
    seen[:, :, 3] = False
    seen[0, :, 64:140] = False
    seen[1, :, 5, :129] = False
    seen[1, :, 5, 129] = True
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    mask = mask if kind == "bool" else mask.to(dtype)
    f = finite(lambda *a: attention(*a, mask, return_lse=True))
    compare(
        f,
        finite(lambda *a: reference.scaled_dot_product_attention(*a, seen, return_lse=True)),
        [q, k, v],
    )
    out, _, d_q, *_ = outputs_and_gradients(f, [q, k, v])
    hidden = ~seen.any(-1, keepdim=True)
    assert (out.masked_select(hidden) == 0).all() and (d_q.masked_select(hidden) == 0).all()


@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_another_dtype(dtype, mask_dtype):
    """Its largest finite value stays finite, -inf stays -inf, and the gradient has the mask's dtype."""
    q, k, v = heads(1, 2, 40, 70, 16, 16, dtype)
    mask = torch.randn(40, 70).to(mask_dtype)
    mask[torch.rand(40, 70) < 0.2] = torch.finfo(mask_dtype).min
    mask[torch.rand(40, 70) < 0.2] = -math.inf
    mask[:, 0] = 0.0
    mask[1] = -math.inf
    mask[1, 5] = torch.finfo(mask_dtype).min  # its only key
    out, *_, d_mask = outputs_and_gradients(attention, [q, k, v, mask])
    assert d_mask.dtype == mask_dtype and d_mask.isfinite().all()
    torch.testing.assert_close(out[:, :, 1], v[:, :, 5], atol=0, rtol=1e-2)
    exact = reference.scaled_dot_product_attention(*(x.double() for x in (q, k, v, mask)))
    low = torch.bfloat16 in (dtype, mask_dtype) or torch.float16 in (dtype, mask_dtype)
    torch.testing.assert_close(out.double(), exact, atol=3e-2 if low else 1e-5, rtol=0)


def test_windows_larger_than_anything():
    q, k, v = heads(1, 2, 70, 90, 16, 16)
    whole = attention(q, k, v, window=(3, None))
    for far in (90, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 63, 1 << 70):
        assert torch.equal(whole, attention(q, k, v, window=(3, far)))
        assert torch.equal(attention(q, k, v), attention(q, k, v, window=(far, far)))
        few = attention(q[:, :, :2], k, v, window=(far, 3), causal_align="bottom_right")
        assert torch.equal(
            few, attention(q[:, :, :2], k, v, window=(-1, 3), causal_align="bottom_right")
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (1, 2, 69, 89)])
def test_a_mask_with_nan_is_refused(dtype, at):
    q, k, v = heads(2, 3, 70, 90, 16, 16, dtype)
    mask = torch.zeros(2, 3, 70, 90, dtype=dtype)
    mask[at] = math.nan
    for m in (mask, mask.mT.contiguous().mT, mask[at[0] : at[0] + 1]):
        with pytest.raises(ValueError, match="attn_mask must not contain NaN"):
            attention(q, k, v, m)


MEASURE = """
import resource, sys, torch
from lmkern.functional import scaled_dot_product_attention as attention
torch.set_num_threads(2)
lengths = torch.tensor([{n}])
slopes, sinks = torch.tensor([0.1]).requires_grad_(), torch.zeros(1).requires_grad_()
options = {{
    "plain": {{}},
    "causal": {{"is_causal": True}},
    "mask": {{"attn_mask": torch.zeros({n}).requires_grad_()}},
    "all": {{"is_causal": True, "window": (9000, 0), "softcap": 9.0, "alibi_slopes": slopes,
             "sinks": sinks, "key_lengths": lengths, "dropout_p": 0.1}},
}}["{name}"]
def run(n):
    q, k, v = (torch.randn(1, 1, n, 16).requires_grad_() for _ in range(3))
    if n < {n}:
        attention(q, k, v).sum().backward()
    else:
        attention(q, k, v, **options).sum().backward()
run(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run({n})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "name", ["causal", *(pytest.param(n, marks=pytest.mark.long) for n in ("plain", "mask", "all"))]
)
def test_memory_is_linear_in_length(name):
    """L = 16384 in a process of its own: the scores of the one head alone would be 1 GiB."""
    n = 16384
    script = MEASURE.format(n=n, name=name)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    tensors = 8 * n * 16 * 4  # q, k, v, out and their gradients
    scratch = 24 << 20  # of the allocators and two threads: a few times the tensors, no more
    assert int(done.stdout) * 1024 < tensors + scratch, f"{int(done.stdout) / 1024:.0f} MiB"
