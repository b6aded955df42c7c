"""lmkern.functional.linear and lmkern.nn.Linear against torch."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import lmkern
from lmkern import _C
from lmkern.functional import linear
from lmkern.ops import linear as op
from oracle import assert_oracle

pytestmark = pytest.mark.cpu_only("CPU kernels")

needs_amx = pytest.mark.skipif(
    "amx" not in _C.supported_isas(), reason="this machine cannot run the amx kernels"
)


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch):
    monkeypatch.setattr(op, "_LEAST_PRODUCTS", 1 << 22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(200, 128), (3, 97, 256), (5, 7), (0, 9), (128,)], ids=str)
def test_oracle(isa, shape, with_bias, dtype):
    inputs = [torch.randn(shape), torch.randn(190, shape[-1])]
    inputs += [torch.randn(190)] if with_bias else []
    assert_oracle(linear, F.linear, [x.to(dtype) for x in inputs])


@needs_amx
def test_kernel_is_called(monkeypatch):
    calls, kernel = [], _C.matmul
    monkeypatch.setattr(_C, "matmul", lambda *a: (calls.append(1), kernel(*a))[1])
    layer = lmkern.nn.Linear(256, 256)
    layer(torch.randn(128, 256, requires_grad=True)).sum().backward()
    assert len(calls) == 3
    with torch.no_grad():
        layer(torch.randn(128, 256))
        layer(torch.randn(8, 256))
    assert len(calls) == 4


@needs_amx
def test_some_gradients_only():
    x, w, b = torch.randn(128, 256), torch.randn(256, 256), torch.randn(256)
    for leaf in (x, w, b):
        leaf.requires_grad_()
        g = torch.randn(128, 256)
        (ours,) = torch.autograd.grad(linear(x, w, b), leaf, g)
        (theirs,) = torch.autograd.grad(F.linear(x, w, b), leaf, g)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        leaf.requires_grad_(False)


@needs_amx
def test_broadcast_gradients_and_strides():
    x = torch.randn(256, 128).t().requires_grad_()
    w = torch.randn(256, 512)[:, ::2].requires_grad_()
    g = torch.randn(1, 256).expand(128, 256)
    ours = torch.autograd.grad(linear(x, w), (x, w), g)
    theirs = torch.autograd.grad(F.linear(x, w), (x, w), g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_amx
def test_second_derivatives_transforms_and_compile():
    x, w = torch.randn(128, 256, requires_grad=True), torch.randn(256, 256, requires_grad=True)

    def penalty(f):
        (d_x,) = torch.autograd.grad(f(x, w).square().sum(), x, create_graph=True)
        return torch.autograd.grad(d_x.square().sum(), w)[0]

    torch.testing.assert_close(penalty(linear), penalty(F.linear), rtol=1e-4, atol=10.0)
    batch = torch.randn(3, 128, 256)
    torch.testing.assert_close(
        torch.func.vmap(linear, (0, None))(batch, w), F.linear(batch, w), rtol=1e-4, atol=1e-3
    )
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(x, w).sum(), w)
    (theirs,) = torch.autograd.grad(F.linear(x, w).sum(), w)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16


@needs_amx
def test_opcheck():
    x, w, b = torch.randn(128, 256), torch.randn(64, 256), torch.randn(64)
    torch.library.opcheck(torch.ops.lmkern.linear_forward.default, (x, w, b))
    torch.library.opcheck(
        torch.ops.lmkern.linear_backward.default, (torch.randn(128, 64), x, w, [True, True, False])
    )


def test_layer_is_torchs_but_for_the_product():
    assert inspect.signature(lmkern.nn.Linear) == inspect.signature(torch.nn.Linear)
    torch.manual_seed(1)
    ours = lmkern.nn.Linear(5, 7)
    torch.manual_seed(1)
    theirs = torch.nn.Linear(5, 7)
    assert repr(ours) == repr(theirs)
    for a, b in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])


def test_bad_shapes_raise_as_torch():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        linear(torch.zeros(2, 3), torch.zeros(4, 5))
