"""lmkern.functional.linear_cross_entropy and the layers on it, against torch's linear + cross_entropy."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern.functional import linear_cross_entropy
from lmkern.functional import loss as losses
from lmkern.ops import linear_cross_entropy as op
from oracle import assert_oracle, relative_error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


WAYS = {
    "few": None,  # a linear layer and a cross entropy
    "kept": {},
    "kept in chunks": {"_CHUNK": 0, "_LEAST_CLASSES": 4, "_GRAIN": 1},
    "by rows": {"_KEPT": 0, "_CHUNK": 0, "_LEAST_CLASSES": 1, "_GRAIN": 1},
    "by classes": {"_KEPT": 0, "_LEAST_CLASSES": 1, "_GRAIN": 1},
}


def take(way, patch):
    if WAYS[way] is None:
        return
    patch.setattr(losses, "_FEW_LOGITS", -1)
    for name, value in WAYS[way].items():
        patch.setattr(op, name, value)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Small cases, too, take all ways: logits that are kept, and chunks of both layouts."""
    take(request.param, monkeypatch)


def plain(x, w, b, y, **options):
    """In the dtype of the sums: logits rounded to 16 bits are what the fused loss avoids."""
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = F.cross_entropy(F.linear(x.to(wide), w.to(wide), b.to(wide)), y, **options)
    return loss.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(9, 7, 41), (1, 1, 1), (5, 59, 111), (97, 41, 250)], ids=str)
def test_oracle(way, sizes, dtype):
    n, d, c = sizes
    x, w, b = (torch.randn(s).to(dtype) for s in ((n, d), (c, d), (c,)))
    y = torch.randint(0, c, (n,))
    y[0] = -100
    for options in (
        {"reduction": "sum"},
        {"reduction": "none"},
        {"reduction": "sum", "label_smoothing": 0.2},
    ):
        assert_oracle(
            lambda x, w, b, o=options: linear_cross_entropy(x, w, y, linear_bias=b, **o),
            lambda x, w, b, o=options: plain(x, w, b, y, **o),
            [x, w, b],
        )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_options(data):
    # Of a single number, errors are luck; of one class, the gradient is what rounding leaves of 0.
    n, d, c = (data.draw(st.integers(least, most)) for least, most in ((4, 12), (4, 20), (4, 90)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, w, b = torch.randn(n, d), torch.randn(c, d), torch.randn(c)
    options = {
        "weight": torch.rand(c) if data.draw(st.booleans()) else None,
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.3])),
        "reduction": data.draw(st.sampled_from(["none", "sum"])),
    }
    cap, zeta = data.draw(st.sampled_from([None, 3.0])), data.draw(st.sampled_from([0.0, 0.1]))
    probable = data.draw(st.booleans())
    y = torch.rand(n, c) if probable else torch.randint(0, c, (n,))

    def expected(x, w, b):
        z = F.linear(x, w, b)
        z = cap * torch.tanh(z / cap) if cap else z
        goal = y.to(z.dtype) if probable else y
        o = {k: v.to(z.dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        extra = zeta * z.logsumexp(1).square()
        return F.cross_entropy(z, goal, **o) + (extra if o["reduction"] == "none" else extra.sum())

    small = pytest.MonkeyPatch()
    take(data.draw(st.sampled_from(sorted(WAYS))), small)
    try:
        assert_oracle(
            lambda x, w, b: linear_cross_entropy(
                x, w, y.to(x.dtype) if probable else y, linear_bias=b, softcap=cap, z_loss=zeta,
                **options,
            ),
            expected,
            [x, w, b],
        )  # fmt: skip
    finally:
        small.undo()


def test_any_upstream_gradient(way):
    x, w = torch.randn(9, 7, requires_grad=True), torch.randn(41, 7, requires_grad=True)
    y, g = torch.randint(0, 41, (9,)), torch.randn(9)
    ours = linear_cross_entropy(x, w, y, reduction="none")
    theirs = F.cross_entropy(F.linear(x, w), y, reduction="none")
    for a, b in zip(
        torch.autograd.grad(ours, (x, w), g), torch.autograd.grad(theirs, (x, w), g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_add_up_over_micro_batches(way):
    """Sums, divided by the tokens of all, are the gradient of the whole batch's mean."""
    x, y = torch.randn(20, 7), torch.randint(0, 41, (20,))
    y[13:] = -100
    w = torch.randn(41, 7, requires_grad=True)
    (whole,) = torch.autograd.grad(linear_cross_entropy(x, w, y), w)
    for part in (slice(0, 5), slice(5, 20)):
        (linear_cross_entropy(x[part], w, y[part], reduction="sum") / 13).backward()
    torch.testing.assert_close(w.grad, whole)


def test_backward_twice(way):
    x, w = torch.randn(9, 7, requires_grad=True), torch.randn(41, 7, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.randint(0, 41, (9,)))
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (x, w))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradient_is_summed_in_float32(way, dtype):
    """In 16 bits, a sum of many equal numbers stops growing."""
    n, c = 4000, 64
    x, w = torch.ones(n, 1).to(dtype), torch.zeros(c, 1).to(dtype).requires_grad_()
    linear_cross_entropy(x, w, torch.zeros(n, dtype=torch.int64), reduction="sum").backward()
    exact = torch.full((c, 1), n / c, dtype=torch.float64)
    exact[0] -= n
    assert relative_error(w.grad, exact) < 1e-2


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 0, 5), (2, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_shapes(way, shape, reduction):
    w, target = torch.randn(41, 5), torch.randint(41, shape[:-1])
    for requires_grad in (False, True):
        x = torch.randn(shape, requires_grad=requires_grad)
        logits = F.linear(x, w)
        expected = F.cross_entropy(
            logits.reshape(-1, 41), target.flatten(), reduction=reduction
        ).reshape(shape[:-1] if reduction == "none" else ())
        loss = linear_cross_entropy(x, w, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        also, lse = linear_cross_entropy(x, w, target, reduction=reduction, return_lse=True)
        torch.testing.assert_close(also, expected, equal_nan=True)
        torch.testing.assert_close(lse, logits.logsumexp(-1))


def test_shift():
    x, w, y = torch.randn(3, 8, 5), torch.randn(11, 5), torch.randint(0, 11, (3, 8))
    y[1, 4] = -100
    logits = (x @ w.t())[:, :-1].transpose(1, 2)
    for reduction in ("mean", "sum", "none"):
        ours = linear_cross_entropy(x, w, y, shift=True, reduction=reduction)
        theirs = F.cross_entropy(logits, y[:, 1:], reduction=reduction)
        torch.testing.assert_close(ours, theirs)
    loss, lse, accuracy = linear_cross_entropy(
        x, w, y, shift=True, return_lse=True, return_accuracy=True
    )
    torch.testing.assert_close(lse, logits.logsumexp(1))
    assert accuracy == (logits.argmax(1) == y[:, 1:])[y[:, 1:] != -100].float().mean()
    torch.testing.assert_close(loss, F.cross_entropy(logits, y[:, 1:]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_shift_of_other_integers(dtype):
    x, w, y = torch.randn(2, 4, 5), torch.randn(200, 5), torch.randint(0, 200, (2, 4))
    ours = linear_cross_entropy(x, w, y.to(dtype), shift=True)
    torch.testing.assert_close(ours, linear_cross_entropy(x, w, y, shift=True))


def test_several_losses_for_an_input():
    x, w, b = torch.randn(4, 5), torch.randn(7, 2, 3, 5), torch.randn(7, 2, 3)
    y = torch.randint(0, 7, (4, 2, 3))
    assert_oracle(
        lambda x, w, b: linear_cross_entropy(x, w, y, linear_bias=b),
        lambda x, w, b: F.cross_entropy(torch.einsum("nd,cijd->ncij", x, w) + b, y),
        [x, w, b],
    )


def test_nothing_counts(way):
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    y = torch.full((3,), -100)
    assert linear_cross_entropy(x, w, y).isnan()
    linear_cross_entropy(x, w, y, reduction="sum").backward()
    assert (x.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_tokens(shape):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    y = torch.zeros(shape[:-1], dtype=torch.int64)
    linear_cross_entropy(x, w, y, reduction="sum").backward()
    assert x.grad.shape == shape and (w.grad == 0).all()
    assert linear_cross_entropy(x, w, y).isnan()


def test_masked_classes(way):
    """A chunk of which every logit is -inf adds nothing."""
    x, w = torch.randn(4, 3), torch.randn(40, 3)
    bias = torch.full((40,), -float("inf"))
    bias[7] = bias[33] = 0.0
    y = torch.tensor([7, 33, 33, 7])
    ours = linear_cross_entropy(x, w, y, linear_bias=bias, reduction="none")
    torch.testing.assert_close(ours, F.cross_entropy(F.linear(x, w, bias), y, reduction="none"))


def test_second_derivatives(way):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(9, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, -100, 4])

    def f(x, w, b):
        return linear_cross_entropy(x, w, y, linear_bias=b, reduction="none", softcap=2.0)

    assert torch.autograd.gradcheck(f, [x, w, b])
    assert torch.autograd.gradgradcheck(f, [x, w, b])


def test_transforms_and_compile():
    x, w, y = torch.randn(4, 6, 5), torch.randn(9, 5), torch.randint(0, 9, (4, 6))
    ours = torch.func.vmap(torch.func.grad(lambda x, y: linear_cross_entropy(x, w, y)))(x, y)
    theirs = torch.func.vmap(torch.func.grad(lambda x, y: F.cross_entropy(F.linear(x, w), y)))(x, y)
    torch.testing.assert_close(ours, theirs)
    leaf = w.clone().requires_grad_()
    compiled = torch.compile(
        lambda w: linear_cross_entropy(x, w, y), fullgraph=True, backend="aot_eager"
    )
    (a,) = torch.autograd.grad(compiled(leaf), leaf)
    (b,) = torch.autograd.grad(linear_cross_entropy(x, leaf, y), leaf)
    torch.testing.assert_close(a, b)


def test_opcheck():
    x, w, y = torch.randn(3, 5), torch.randn(7, 5), torch.randint(0, 7, (1, 3))
    rest = (y, None, None, -100, 0.0, False)
    torch.library.opcheck(
        torch.ops.lmkern.linear_cross_entropy_forward.default, (x, w, None, True, *rest)
    )
    lse, likelihood, total, _, *saved, z = torch.ops.lmkern.linear_cross_entropy_forward(
        x, w, None, True, *rest
    )
    torch.library.opcheck(
        torch.ops.lmkern.linear_cross_entropy_backward.default,
        (x, w, None, z, [True, True, False], *saved, lse, likelihood, total, *rest),
    )


def test_autocast():
    x, w, y = torch.randn(6, 5), torch.randn(9, 5), torch.randint(0, 9, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, y)
    torch.testing.assert_close(loss.float(), F.cross_entropy(F.linear(x, w), y), rtol=2e-2, atol=0)


def test_memory():
    """At most an eighth of the logits at a time, and every class in exactly one chunk."""
    for rows, classes in [(1024, 10000), (512, 50257), (4096, 32000), (1, 10**7), (10**6, 300)]:
        parts = list(op.chunks(rows, classes, 64))
        assert [first for first, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == classes
        if not op._keeps(rows, classes):
            assert max(end - first for first, end in parts) <= classes / 8
    assert list(op.chunks(0, 7, 5)) == [(0, 7)]


def test_layer_is_torchs():
    theirs = getattr(torch.nn, "LinearCrossEntropyLoss", None)
    if theirs is None:
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    names = list(inspect.signature(theirs).parameters)
    assert (
        list(inspect.signature(lmkern.nn.LinearCrossEntropyLoss).parameters)[: len(names)] == names
    )
    for options in (
        {}, {"bias": True, "weight": torch.rand(7)}, {"out_features": (2, 3), "bias": True},
        {"ignore_index": 1, "label_smoothing": 0.1, "reduction": "none"},
    ):  # fmt: skip
        torch.manual_seed(1)
        a = lmkern.nn.LinearCrossEntropyLoss(5, 7, **options)
        torch.manual_seed(1)
        b = theirs(5, 7, **options)
        b.load_state_dict(a.state_dict())
        a.load_state_dict(b.state_dict())
        x, y = torch.randn(4, 5), torch.randint(0, 7, (4, *options.get("out_features", ())))
        torch.testing.assert_close(a(x, y), b(x, y))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_adaptive_softmax(reduction):
    torch.manual_seed(1)
    ours = lmkern.nn.AdaptiveLogSoftmaxWithLoss(
        16, 40, [5, 12], head_bias=True, reduction=reduction
    )
    torch.manual_seed(1)
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(16, 40, [5, 12], head_bias=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, y = torch.randn(9, 16), torch.randint(0, 40, (9,))
    y[:3] = torch.tensor([1, 6, 30])
    a, b = ours(x, y), theirs(x, y)
    torch.testing.assert_close(a.output, b.output)
    expected = {"mean": b.loss, "sum": -b.output.sum(), "none": -b.output}[reduction]
    torch.testing.assert_close(a.loss, expected)
    a.loss.sum().backward()
    expected.sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    assert torch.equal(ours.predict(x), theirs.predict(x))
    torch.testing.assert_close(ours(x[1], y[1]).output, b.output[1])


@pytest.mark.parametrize("ignore", [0, 5, 6, 17, -1])
def test_adaptive_softmax_ignores(ignore):
    """5 and 6 are also numbers of clusters in the head."""
    layer = lmkern.nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 9], ignore_index=ignore)
    x, y = torch.randn(7, 8), torch.tensor([0, 3, ignore, 17, 4, 6, 12])
    keep = y != ignore
    some, rest = layer(x, y), layer(x[keep], y[keep])
    torch.testing.assert_close(some.loss, rest.loss)
    assert (some.output[~keep] == 0).all()
    with pytest.raises(IndexError, match="target 20 is out of range for 20 classes"):
        layer(x[:1], y[:1] + 20)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"linear_weight": torch.zeros(7, 4)}, ValueError, r"linear_weight must be \[C, D\] with D = 5"),
        ({"linear_bias": torch.zeros(6)}, ValueError, r"linear_bias must be \[C\] = \[7\], got \[6\]"),
        ({"target": torch.tensor([0, 7])}, IndexError, "target 7 at position 1 is out of range for 7 classes"),
        ({"target": torch.tensor([0])}, ValueError, r"target must be .* = \[2\], got \[1\]"),
        ({"target": torch.zeros(2, 7), "shift": True}, ValueError, "target must be class indices"),
        ({"input": [1.0]}, TypeError, "input must be a Tensor, got list"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must be \[C\] = \[7\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(change, error, match):
    good = {"input": torch.zeros(2, 5), "linear_weight": torch.zeros(7, 5), "target": torch.tensor([0, 1])}  # fmt: skip
    with pytest.raises(error, match=match) as caught:
        linear_cross_entropy(**{**good, **change})
    assert "\n" not in str(caught.value)
