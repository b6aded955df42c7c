"""lmkern.functional.cross_entropy on given logits, against torch."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import _C
from lmkern.functional import cross_entropy
from oracle import assert_oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (7,),
    (9, 41),
    (1, 1),
    (5, 1025),
    (3, 59, 4),
    (2, 7, 3, 41),
    (2, 111, 1),
    (0, 5),
    (2, 5, 0),
]
OPTIONS = [
    {},
    {"weight": True},
    {"label_smoothing": 0.1},
    {"weight": True, "label_smoothing": 0.3},
    {"ignore_index": 2},
]


def case(shape, dtype, options, probabilities=False):
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = (torch.randn(shape) * 3).to(dtype)
    options = dict(options)
    if options.get("weight"):
        options["weight"] = torch.rand(classes).to(dtype) + 0.5
    if probabilities:
        target = torch.rand(shape).to(dtype)
    else:
        target = torch.randint(0, classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    return logits, target, options


def same(logits, target, options, **more):
    cast = lambda o, like: {k: v.to(like.dtype) if k == "weight" else v for k, v in o.items()}  # noqa: E731
    goal = lambda like: target.to(like.dtype) if target.is_floating_point() else target  # noqa: E731
    assert_oracle(
        lambda z: cross_entropy(z, goal(z), **cast(options, z), **more),
        lambda z: F.cross_entropy(z, goal(z), **cast(options, z), **more),
        [logits],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_oracle(isa, shape, dtype, reduction):
    for options in OPTIONS:
        same(*case(shape, dtype, options), reduction=reduction)


@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s], ids=str)
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_mean(shape, options):
    same(*case(shape, torch.float32, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_probabilities(isa, shape, dtype):
    for options in OPTIONS[:4]:
        same(*case(shape, dtype, options, True), reduction="none")


def test_mean_of_probabilities():
    same(*case((9, 41), torch.float32, {}, True))


def torch_loss(z, y, *, z_loss=0.0, softcap=None, **options):
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    options = {k: v.to(z.dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    valid = y != options.get("ignore_index", -100)
    loss = F.cross_entropy(z, y, reduction="none", **options)
    return loss + (z_loss * z.logsumexp(1).square()).where(valid, 0)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_options(data):
    positions = data.draw(st.sampled_from([(), (1,), (3,), (17,), (2, 9)]))
    n, c = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 70))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(n, c, *positions) * data.draw(st.sampled_from([0.1, 3.0, 30.0]))
    target = torch.randint(0, c, (n, *positions))
    options = {
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.2, 1.0])),
        "ignore_index": data.draw(st.sampled_from([-100, 0])),
        "softcap": data.draw(st.sampled_from([None, 5.0])),
        "z_loss": data.draw(st.sampled_from([0.0, 0.1])),
        "weight": torch.rand(c) if data.draw(st.booleans()) else None,
    }
    assert_oracle(
        lambda z: cross_entropy(z, target, reduction="none", **options),
        lambda z: torch_loss(z, target, **options),
        [logits],
    )


def test_lse_and_accuracy():
    z, y = torch.randn(9, 41, 3), torch.randint(0, 41, (9, 3))
    y[0] = -100
    assert_oracle(
        lambda z: cross_entropy(z, y, return_lse=True),
        lambda z: (F.cross_entropy(z, y), z.logsumexp(1)),
        [z],
    )
    loss, accuracy = cross_entropy(z, y, return_accuracy=True)
    assert torch.allclose(loss, F.cross_entropy(z, y))
    assert accuracy == (z.argmax(1) == y)[1:].float().mean()
    assert len(cross_entropy(z, y, return_lse=True, return_accuracy=True)) == 3


def test_nothing_counts():
    z, y = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    loss = cross_entropy(z, y)
    assert loss.isnan() and F.cross_entropy(z, y).isnan()
    cross_entropy(z, y, reduction="sum").backward()
    assert (z.grad == 0).all()


def test_ignored_rows_may_hold_anything():
    z = torch.randn(3, 40)
    z[1] = float("nan")
    z.requires_grad_()
    cross_entropy(z, torch.tensor([0, -100, 1]), label_smoothing=0.1).backward()
    assert z.grad.isfinite().all() and (z.grad[1] == 0).all()


@pytest.mark.parametrize("positions", [(), (5,)], ids=str)
def test_extreme_logits(isa, positions):
    inf = float("inf")
    rows = [[1e4, -1e4, 0.0], [-inf, 0.0, 1.0], [-inf, -inf, 2.0], [inf, 0.0, 1.0], [float("nan"), 0.0, 1.0], [-inf, -inf, -inf]]  # fmt: skip
    z = torch.tensor(rows).repeat(1, 20)
    z = z.reshape(6, 60, *(1 for _ in positions)).expand(6, 60, *positions)
    y = torch.full((6, *positions), 2)
    ours, theirs = (f(z, y, reduction="none") for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    a, b = (z.clone().requires_grad_() for _ in range(2))
    cross_entropy(a, y, reduction="none")[:3].sum().backward()
    F.cross_entropy(b, y, reduction="none")[:3].sum().backward()
    torch.testing.assert_close(a.grad[:3], b.grad[:3])


@pytest.mark.parametrize("transpose", [False, True])
def test_strides(transpose):
    y = torch.randint(0, 7, (9, 4))
    base = torch.randn(9, 4, 7) if transpose else torch.randn(9, 14, 8)
    view = (lambda x: x.transpose(1, 2)) if transpose else (lambda x: x[:, ::2, ::2])
    assert_oracle(
        lambda x: cross_entropy(view(x), y, reduction="none"),
        lambda x: F.cross_entropy(view(x), y, reduction="none"),
        [base],
    )
    z = torch.randn(1, 7).expand(9, 7).requires_grad_()
    (ours,) = torch.autograd.grad(cross_entropy(z, y[:, 0], reduction="sum"), z)
    (theirs,) = torch.autograd.grad(F.cross_entropy(z, y[:, 0], reduction="sum"), z)
    torch.testing.assert_close(ours, theirs)


def test_same_bits_for_any_thread_count():
    results, before = [], torch.get_num_threads()
    z, y = torch.randn(97, 1025), torch.randint(0, 1025, (97,))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = z.clone().requires_grad_()
            loss = cross_entropy(leaf, y, reduction="none", label_smoothing=0.1)
            loss.sum().backward()
            results.append((loss, leaf.grad))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_second_derivatives():
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y, weight = torch.tensor([1, -100, 4]), torch.rand(5, dtype=torch.float64)
    for options in (
        {},
        {"label_smoothing": 0.1, "weight": weight},
        {"softcap": 2.0, "z_loss": 0.1},
    ):
        f = lambda z, o=options: cross_entropy(z, y, reduction="none", **o)  # noqa: E731
        assert torch.autograd.gradcheck(f, [z])
        assert torch.autograd.gradgradcheck(f, [z])


def test_probabilities_and_weights_have_gradients():
    z, t = torch.randn(4, 6, requires_grad=True), torch.rand(4, 6, requires_grad=True)
    ours = torch.autograd.grad(cross_entropy(z, t), (z, t))
    theirs = torch.autograd.grad(F.cross_entropy(z, t), (z, t))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_and_compile():
    z, y = torch.randn(4, 6, 5), torch.randint(0, 5, (4, 6))
    ours = torch.func.vmap(torch.func.grad(lambda z, y: cross_entropy(z, y)))(z, y)
    theirs = torch.func.vmap(torch.func.grad(lambda z, y: F.cross_entropy(z, y)))(z, y)
    torch.testing.assert_close(ours, theirs)
    leaf = z[0].clone().requires_grad_()
    compiled = torch.compile(
        lambda z: cross_entropy(z, y[0], label_smoothing=0.1), fullgraph=True, backend="aot_eager"
    )
    (a,) = torch.autograd.grad(compiled(leaf), leaf)
    (b,) = torch.autograd.grad(F.cross_entropy(leaf, y[0], label_smoothing=0.1), leaf)
    torch.testing.assert_close(a, b)


def test_opcheck():
    z, y = torch.randn(3, 7, 2), torch.randint(0, 7, (3, 2))
    rest = (y, None, None, -100, 0.0, True)
    torch.library.opcheck(torch.ops.lmkern.cross_entropy_forward.default, (z, *rest))
    lse, likelihood, total, _, *saved = torch.ops.lmkern.cross_entropy_forward(z, *rest)
    torch.library.opcheck(
        torch.ops.lmkern.cross_entropy_backward.default,
        (z, *saved, lse, likelihood, total, *rest),
    )


def test_autocast_computes_in_float32():
    z, y = torch.randn(3, 7).bfloat16(), torch.tensor([1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = cross_entropy(z, y), F.cross_entropy(z, y)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_kernels_are_called(monkeypatch):
    called = []
    for name in ("cross_entropy_forward", "cross_entropy_backward"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1])
    lmkern.nn.CrossEntropyLoss()(
        torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1])
    ).backward()
    assert called == ["cross_entropy_forward", "cross_entropy_backward"]


def test_layer():
    ours = lmkern.nn.CrossEntropyLoss(
        torch.rand(5), ignore_index=1, label_smoothing=0.1, z_loss=0.0
    )
    theirs = torch.nn.CrossEntropyLoss(ours.weight, ignore_index=1, label_smoothing=0.1)
    z, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(ours(z, y), theirs(z, y))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    names = list(inspect.signature(F.cross_entropy).parameters)
    assert list(inspect.signature(cross_entropy).parameters)[: len(names)] == names
    with pytest.warns(UserWarning, match="deprecated"):
        assert cross_entropy(z, y, reduce=False).shape == (4,)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((torch.zeros(2, 3), torch.tensor([0, 3])), {}, IndexError, "target 3 at position 1 is out of range for 3 classes"),
        ((torch.zeros(2, 3), torch.tensor([0])), {}, ValueError, r"target must be .* = \[2\], got \[1\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), {}, ValueError, r"target must be like the logits = \[2, 3\]"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool)), {}, TypeError, "target must be int64 or floating, got torch.bool"),
        ((torch.zeros(()), torch.tensor(0)), {}, ValueError, r"input must be floating \[C\]"),
        ((torch.zeros(2, 3), torch.tensor([0, 1])), {"weight": torch.zeros(2)}, ValueError, r"weight must be \[C\] = \[3\], got \[2\]"),
        ((torch.zeros(2, 3), torch.tensor([0, 1])), {"label_smoothing": 2.0}, ValueError, "label_smoothing must be in"),
        ((torch.zeros(2, 3), torch.tensor([0, 1])), {"reduction": "max"}, ValueError, "reduction must be 'none'"),
        ((torch.zeros(2, 3), torch.tensor([0, 1])), {"softcap": -1.0}, ValueError, "softcap must be > 0"),
        (("x", torch.tensor([0, 1])), {}, TypeError, "input must be a Tensor, got str"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(arguments, options, error, match):
    with pytest.raises(error, match=match) as caught:
        cross_entropy(*arguments, **options)
    assert "\n" not in str(caught.value)
