"""Attention under torch.func: one call of the kernel for a mapped batch, and all derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jacrev, vmap

from lmkern.functional import scaled_dot_product_attention as attention

V, B, H, L, S, D = 3, 2, 4, 7, 9, 8


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    return {
        "query": torch.randn(V, B, H, L, D, dtype=dtype),
        "key": torch.randn(V, B, H, S, D, dtype=dtype),
        "value": torch.randn(V, B, H, S, D, dtype=dtype),
        "attn_mask": torch.randn(V, 1, H, L, S, dtype=dtype),
        "alibi_slopes": torch.rand(V, H, dtype=dtype),
        "sinks": torch.randn(V, H, dtype=dtype),
        "key_lengths": torch.randint(1, S + 1, (V, B)),
    }


MAPPED = [
    ("query",),
    ("key", "value"),
    ("query", "key", "value"),
    ("query", "key", "value", "attn_mask"),
    ("attn_mask",),
    ("query", "alibi_slopes"),
    ("sinks",),
    ("query", "key_lengths"),
    ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks", "key_lengths"),
]


def split(names):
    """The tensors that are mapped, and the others without their first dimension."""
    given = tensors()
    return [given[n] for n in names], {n: t[0] for n, t in given.items() if n not in names}


@pytest.mark.parametrize("names", MAPPED, ids=" ".join)
def test_vmap(names):
    mapped, fixed = split(names)
    run = lambda *t: attention(**dict(zip(names, t, strict=True)), **fixed)  # noqa: E731
    with torch.no_grad():
        together = vmap(run)(*mapped)
        for n in range(V):
            torch.testing.assert_close(together[n], run(*(t[n] for t in mapped)))


@pytest.mark.parametrize("wanted", ["query", "key", "value", "attn_mask", "alibi_slopes", "sinks"])
@pytest.mark.parametrize("names", MAPPED, ids=" ".join)
def test_a_gradient_for_each_element(names, wanted):
    mapped, fixed = split(names)
    start = tensors()[wanted][0]
    weight = torch.randn(B, H, L, D)

    def loss(x, *t):
        arguments = {**fixed, **dict(zip(names, t, strict=True))}
        return (attention(**{**arguments, wanted: x}) * weight).sum()

    together = vmap(grad(loss), (None, *(0 for _ in names)))(start, *mapped)
    for n in range(V):
        x = start.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(x, *(t[n] for t in mapped)), x)
        torch.testing.assert_close(together[n], expected, atol=1e-5, rtol=1e-5)


def test_transforms_run_on_the_kernel(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the reference ran")

    monkeypatch.setattr("lmkern.reference.scaled_dot_product_attention", refuse)
    mapped, _ = split(("query", "key", "value"))
    vmap(lambda q, k, v: attention(q, k, v, is_causal=True))(*mapped)
    vmap(grad(lambda q, k, v: attention(q, k, v, window=(2, 0)).sum()))(*mapped)


def test_second_derivatives_and_jacobians():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 3, 2, dtype=torch.float64)
    run = lambda q: attention(q, k, v, is_causal=True)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(run, q)
    torch.testing.assert_close(jacrev(run)(q), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(run)(q), jacobian)
    loss = lambda q: run(q).square().sum()  # noqa: E731
    torch.testing.assert_close(hessian(loss)(q), torch.autograd.functional.hessian(loss, q))
    torch.testing.assert_close(jacrev(grad(loss))(q), torch.autograd.functional.hessian(loss, q))


def test_dropout_and_packed_sequences():
    q, k, v = (tensors()[n][:, 0] for n in ("query", "key", "value"))
    cu = torch.tensor([0, 3, L]), torch.tensor([0, 4, S])
    together = vmap(lambda q, k, v: attention(q, k, v, cu_seqlens=cu))(q, k, v)
    for n in range(V):
        torch.testing.assert_close(together[n], attention(q[n], k[n], v[n], cu_seqlens=cu))
    dropped = vmap(lambda q, k, v: attention(q, k, v, dropout_p=0.5), randomness="different")(
        q, k, v
    )
    assert dropped.shape == together.shape
