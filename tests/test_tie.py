"""One weight as embedding table and as head (functional/_tie.py)."""

import pytest
import torch
import torch.nn.functional as F

import lmkern.functional as lf
from lmkern.functional import _tie, loss

V, D, N = 30, 8, 40


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def inputs(request):
    torch.manual_seed(0)
    weight = torch.randn(V, D, dtype=request.param).requires_grad_()
    return weight, torch.randint(V, (N,)), torch.randint(V, (N,))


def own_loss(x, head, targets):
    return lf.linear_cross_entropy(x, head, targets)


def plain_loss(x, head, targets):
    return F.cross_entropy(x @ head.t(), targets)


@pytest.mark.parametrize("use", [own_loss, plain_loss])
def test_the_gradient_is_that_of_both_uses(inputs, use):
    weight, ids, targets = inputs
    table, head = lf.tie(weight)
    use(lf.embedding(ids, table, sparse=True).tanh(), head, targets).backward()
    wide = weight.detach().double().requires_grad_()
    plain_loss(F.embedding(ids, wide).tanh(), wide, targets).backward()
    assert weight.grad is not None and not weight.grad.is_sparse
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[weight.dtype]
    torch.testing.assert_close(weight.grad.double(), wide.grad, atol=tolerance, rtol=tolerance)


def test_rows_are_added_in_place(inputs, monkeypatch):
    weight, ids, targets = inputs
    monkeypatch.setattr(loss, "_FEW_LOGITS", 0)  # a chunked loss hands its gradient over
    owned = []
    is_owned = _tie._is_owned
    monkeypatch.setattr(_tie, "_is_owned", lambda g: owned.append(is_owned(g)) or owned[-1])
    table, head = lf.tie(weight)
    own_loss(lf.embedding(ids, table, sparse=True), head, targets).backward()
    assert owned == [True]


def uses_of_a_gradient():
    other = torch.zeros(V, D, dtype=torch.float64, requires_grad=True)
    return {
        "expanded": (lambda head: head.sum(), None),
        "shared with another leaf": (lambda head: (head + other).square().sum(), other),
        "retained": (lambda head: head.retain_grad() or head.square().sum(), None),
        "hooked": (lambda head: head.register_hook(lambda g: g.mul(2)) and head.cos().sum(), None),
    }


@pytest.mark.parametrize("use", uses_of_a_gradient())
def test_a_gradient_that_others_hold_is_left_alone(use):
    torch.manual_seed(0)
    ids = torch.randint(V, (N,))
    grads = []
    for tied in (True, False):
        torch.manual_seed(1)
        weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
        function, other = uses_of_a_gradient()[use]
        table, head = lf.tie(weight) if tied else (weight, weight.view_as(weight))
        (lf.embedding(ids, table, sparse=tied).tanh().sum() + function(head)).backward()
        grads.append(
            [
                weight.grad,
                head.grad if use == "retained" else None,
                None if other is None else other.grad,
            ]
        )
    for ours, theirs in zip(*grads, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("used", ["table", "head"])
def test_one_use_alone(used):
    weight = torch.randn(V, D, requires_grad=True)
    table, head = lf.tie(weight)
    ids = torch.tensor([3, 3, 5])
    out = lf.embedding(ids, table, sparse=True).sum() if used == "table" else head.square().sum()
    out.backward()
    expected = torch.zeros(V, D)
    expected[3], expected[5] = 2, 1
    torch.testing.assert_close(weight.grad, expected if used == "table" else 2 * weight.detach())


def test_double_backward():
    torch.manual_seed(0)
    ids, targets = torch.randint(V, (5,)), torch.randint(V, (5,))

    def of(weight):
        table, head = lf.tie(weight)
        return own_loss(lf.embedding(ids, table, sparse=True).tanh(), head, targets)

    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (weight,))
    assert torch.autograd.gradgradcheck(of, (weight,))


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="tie: weight must be a Tensor, got int"):
        lf.tie(3)


def test_without_gradients_or_under_a_transform_it_is_the_weight():
    weight = torch.randn(V, D)
    assert all(part is weight for part in lf.tie(weight))
    weight.requires_grad_()
    with torch.no_grad():
        assert all(part is weight for part in lf.tie(weight))
    gradient = torch.func.grad(lambda w: sum(part.sum() for part in lf.tie(w)))(weight.detach())
    torch.testing.assert_close(gradient, torch.full((V, D), 2.0))
