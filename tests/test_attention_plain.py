"""The short way to the attention kernel, for calls without options (ops/attention.py)."""

import pytest
import torch

from lmkern.functional import attention as functional
from lmkern.functional import scaled_dot_product_attention as attention
from lmkern.ops import attention as op


def heads(*sizes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


@pytest.fixture
def calls(monkeypatch):
    """How often the short way was taken with gradients."""
    count = []
    apply = op.PlainAttentionFunction.apply
    monkeypatch.setattr(
        op.PlainAttentionFunction, "apply", lambda *args: count.append(1) or apply(*args)
    )
    return count


SHAPES = [
    ((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    ((2, 3, 1, 8), (2, 3, 7, 8), (2, 3, 7, 5)),
    ((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)),
    ((2, 3, 0, 8), (2, 3, 4, 8), (2, 3, 4, 8)),
    ((4, 8, 300, 64), (4, 8, 300, 64), (4, 8, 300, 64)),  # in the pool
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_it_gives_the_bits_of_the_usual_way(shapes, causal, dtype, calls, monkeypatch):
    options = {} if causal is None else {"is_causal": True, "causal_align": causal}
    results = []
    for _ in range(2):
        q, k, v = heads(*shapes, dtype=dtype)
        out = attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
        d_out = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        out.backward(d_out)
        results.append([out, q.grad, k.grad, v.grad])
        monkeypatch.setattr(functional, "plain_attention", lambda *_: None)
    square = shapes[0][2] in (1, shapes[1][2])
    assert calls == ([1] if square or causal != "bottom_right" else [])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_options_and_errors_take_the_usual_way(calls):
    q, k, v = heads((2, 3, 4, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    attention(q, k, v, is_causal=True, causal_align="bottom_right")
    attention(q, k, v, softcap=3.0)
    attention(q, k, v, return_lse=True)
    assert not calls
    with pytest.raises(ValueError, match="key must be"):
        attention(q, k[..., :5], v)


def test_the_result_is_nobody_s_view():
    """A view from a custom Function could not be written to in place."""
    q, k, v = heads(*[(4, 8, 300, 64)] * 3)
    assert not attention(q, k, v)._is_view() and not attention(q[..., :8, :], k, v)._is_view()


def test_double_backward():
    inputs = heads((1, 2, 5, 3), (1, 2, 4, 3), (1, 2, 4, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradgradcheck(attention, inputs)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, is_causal=True), inputs)


def test_some_gradients_only():
    q, k, v = heads(*[(2, 3, 9, 8)] * 3)
    out = attention(q.detach(), k, v.detach())
    (d_k,) = torch.autograd.grad(out.sum(), k)
    torch.testing.assert_close(d_k, torch.autograd.grad(attention(q, k, v).sum(), k)[0])


def test_one_tensor_thrice():
    (x,) = heads((2, 3, 9, 8))
    attention(x, x, x).square().sum().backward()
    y = x.detach().requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(y, y, y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-5)
