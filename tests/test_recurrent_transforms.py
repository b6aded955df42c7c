"""Recurrent layers under torch.func, torch.compile, torch.export and DistributedDataParallel."""

from __future__ import annotations

import os

import pytest
import torch

import lmkern

KINDS = ["LSTM", "GRU", "RNN"]


def first(output):
    return output[0]


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_the_batch_is_one_call(kind):
    module = getattr(lmkern.nn, kind)(4, 6)
    x = torch.randn(3, 5, 2, 4)
    h0 = torch.randn(3, 1, 2, 6)
    state = (lambda h: (h, h)) if kind == "LSTM" else (lambda h: h)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda v, h: module(v, state(h))[0])(x, h0)
        for n in range(3):
            torch.testing.assert_close(
                mapped[n], module(x[n], state(h0[n]))[0], atol=1e-6, rtol=1e-5
            )
    lengths = torch.tensor([5, 2])
    mapped = torch.func.vmap(lambda v: module(v, lengths=lengths)[0])(x)
    torch.testing.assert_close(mapped[1], module(x[1], lengths=lengths)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_stacked_weights(kind):
    modules = [getattr(lmkern.nn, kind)(4, 6) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(5, 2, 4)
    run = lambda p: torch.func.functional_call(modules[0], (p, buffers), (x,))[0]  # noqa: E731
    outputs = torch.func.vmap(run)(parameters)
    outputs.square().sum().backward()
    for n, module in enumerate(modules):
        y = module(x)[0]
        torch.testing.assert_close(outputs[n], y)
        y.square().sum().backward()
        grad = parameters["weight_hh_l0"].grad
        assert grad is not None
        torch.testing.assert_close(grad[n], module.weight_hh_l0.grad)


def test_gradients_for_each_sample():
    module = lmkern.nn.GRU(4, 6)
    parameters = dict(module.named_parameters())
    x = torch.randn(3, 5, 1, 4)

    def loss(p, v):
        return torch.func.functional_call(module, p, (v,))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(3):
        alone = torch.func.grad(loss)(parameters, x[n])
        for name, value in alone.items():
            torch.testing.assert_close(each[name][n], value)


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_jacobians_and_nested_gradients(kind):
    module = getattr(lmkern.nn, kind)(2, 3, dtype=torch.float64)
    x = torch.randn(2, 1, 2, dtype=torch.float64)
    f = lambda v: module(v)[0].sin().sum()  # noqa: E731
    hessian = torch.func.hessian(f)(x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(f, x))
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(f))(x), hessian)
    nested = torch.func.grad(lambda v: torch.func.grad(f)(v).square().sum())(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), leaf)
    torch.testing.assert_close(nested, expected)
    tangent = torch.ones_like(x)
    _, forward = torch.func.jvp(f, (x,), (tangent,))
    torch.testing.assert_close(forward, (torch.func.grad(f)(x) * tangent).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "recompute": True}], ids=str)
def test_compile_and_export(kind, options):
    module = getattr(lmkern.nn, kind)(4, 6, num_layers=2, bidirectional=True, **options)
    x, lengths = torch.randn(5, 3, 4), torch.tensor([5, 0, 3])
    reset = torch.rand(5, 3) < 0.3
    compiled = torch.compile(
        lambda v: module(v, lengths=lengths, reset_mask=reset)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    ours, expected = (v.clone().requires_grad_() for v in (x, x))
    y, z = compiled(ours), module(expected, lengths=lengths, reset_mask=reset)[0]
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(ours.grad, expected.grad)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x)[0], module(x)[0])


def test_distributed_data_parallel(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        module = lmkern.nn.LSTM(4, 6)
        parallel = torch.nn.parallel.DistributedDataParallel(module)
        x = torch.randn(5, 2, 4)
        parallel(x)[0].sum().backward()
        grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        module.zero_grad()
        module(x)[0].sum().backward()
        assert len(grads) == 4
        for ours, p in zip(grads, module.parameters(), strict=True):
            torch.testing.assert_close(ours, p.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_inference_in_chunks_equals_training(isa, one_thread):
    """x' of a long sequence is made a few steps at a time in inference, and whole in training."""
    for kind, reverse in (("lstm", False), ("gru", True), ("rnn", False)):
        G, I, H = {"lstm": 4, "gru": 3, "rnn": 1}[kind], 9, 64
        T, B = (2400 // G, 8)
        w = (
            torch.randn(G * H, I) / 3,
            torch.randn(G * H, H) / 8,
            torch.randn(G * H),
            torch.randn(G * H),
        )
        x, h0 = torch.randn(T, B, I), torch.randn(B, H)
        hx = (h0, torch.randn(B, H)) if kind == "lstm" else h0
        run = getattr(lmkern.functional, kind)
        with torch.no_grad():
            chunked = run(x, *w, hx, reverse=reverse)
        whole = run(x, *(t.requires_grad_() for t in w), hx, reverse=reverse)
        torch.testing.assert_close(chunked, whole, atol=2e-5, rtol=1e-5)
