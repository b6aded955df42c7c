"""lmkern.functional.lstm and lmkern.nn.LSTM against torch."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import lmkern
from lmkern import _C, reference
from lmkern.functional import lstm
from oracle import assert_oracle, outputs_and_gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# (T, B, I, H); 41 and 59 are no multiple of any vector
SIZES = [(1, 1, 1, 1), (9, 7, 5, 41), (5, 20, 3, 64), (17, 1, 8, 59), (3, 33, 16, 100)]


def weights(
    T: int, B: int, I: int, H: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """x, w_ih, w_hh, b_ih, b_hh, h0, c0 at a scale where gates neither saturate nor idle."""
    shapes = [(T, B, I), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,), (B, H), (B, H)]
    scales = [1.0, I**-0.5, H**-0.5, 0.5, 0.5, 1.0, 1.0]
    return [(torch.randn(s) * k).to(dtype) for s, k in zip(shapes, scales, strict=True)]


def torch_lstm(x, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse=False):
    """torch's own operator: one layer, one direction."""
    if reverse:
        y, h, c = torch_lstm(x.flip(0), w_ih, w_hh, b_ih, b_hh, h0, c0)
        return y.flip(0), h, c
    y, h, c = torch._VF.lstm(
        x, (h0[None], c0[None]), [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, False, False, False
    )
    return y, h[0], c[0]


def flat(x, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse=False):
    y, (h, c) = lstm(x, w_ih, w_hh, b_ih, b_hh, (h0, c0), reverse=reverse)
    return y, h, c


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_oracle(isa, size, dtype, reverse):
    assert_oracle(
        lambda *a: flat(*a, reverse=reverse),
        lambda *a: torch_lstm(*a, reverse=reverse),
        weights(*size, dtype),
    )


@pytest.mark.parametrize(
    "size", [(2, 40, 300, 300), (12, 3, 64, 333), (100, 2, 8, 520), (3, 2, 8, 1030)], ids=str
)
def test_oracle_divided_among_threads(isa, size):
    assert_oracle(flat, torch_lstm, weights(*size))


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_gradcheck(reverse):
    args = [x.requires_grad_() for x in weights(3, 2, 3, 5, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: flat(*a, reverse=reverse), args)
    assert torch.autograd.gradgradcheck(lambda *a: flat(*a, reverse=reverse), args, atol=1e-4)


def test_gradients_asked_for_one_by_one():
    inputs = weights(4, 3, 5, 6)
    full = outputs_and_gradients(flat, inputs)[3:]
    for i, expected in enumerate(full):
        leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
        y, h, c = flat(*leaves)
        generator = torch.Generator().manual_seed(1)
        g = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).float()
            for o in (y, h, c)
        ]
        (grad,) = torch.autograd.grad((y, h, c), [leaves[i]], g)
        assert torch.equal(grad, expected)


def test_gradient_through_final_state_only():
    inputs = weights(4, 3, 5, 6)
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    flat(*ours)[2].sum().backward()
    torch_lstm(*theirs)[2].sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def test_backward_twice_gives_the_same():
    inputs = [x.requires_grad_() for x in weights(4, 3, 5, 6)]
    y = flat(*inputs)[0].sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    second = torch.autograd.grad(y, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [(20, 2, 16, 320), (20, 48, 16, 96)], ids=str)
def test_same_bits_for_any_thread_count(isa, size):
    inputs = weights(*size)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            x = inputs[0]
            gates = torch.randn(
                x.shape[0], x.shape[1], 4 * size[3], generator=torch.Generator().manual_seed(2)
            )
            y, cells = x.new_empty(*size[:2], size[3]), x.new_empty(*size[:2], size[3])
            h_n, c_n = (x.new_empty(size[1], size[3]) for _ in range(2))
            _C.lstm_forward(gates, inputs[2], inputs[5], inputs[6], y, h_n, c_n, cells, False)
            d_gates, d_c0 = torch.empty_like(gates), torch.empty_like(c_n)
            _C.lstm_backward(y, h_n, c_n, inputs[2], inputs[6], gates, cells, d_gates, d_c0, False)
            results.append((y, h_n, c_n, gates, cells, d_gates, d_c0))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_kernels_are_called(monkeypatch):
    called = []
    for name in ("lstm_forward", "lstm_backward"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1])
    lmkern.nn.LSTM(5, 7)(torch.randn(4, 2, 5))[0].sum().backward()
    assert called == ["lstm_forward", "lstm_backward"]


def test_empty_batch():
    module = lmkern.nn.LSTM(3, 4)
    y, (h, _) = module(torch.randn(5, 0, 3))
    assert y.shape == (5, 0, 4) and h.shape == (1, 0, 4)
    y.sum().backward()
    assert (module.weight_hh_l0.grad == 0).all()


def test_inputs_are_not_written():
    inputs = weights(4, 3, 5, 6)
    kept = [x.clone() for x in inputs]
    outputs_and_gradients(flat, inputs)
    flat(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 20), st.integers(1, 70),
    st.booleans(), st.booleans(), st.sampled_from(_C.supported_isas()),
)  # fmt: skip
def test_any_size(T, B, I, H, bias, state, isa):
    before = _C.isa()
    _C.set_isa(isa)
    try:
        x, w_ih, w_hh, b_ih, b_hh, h0, c0 = weights(T, B, I, H)
        args = (x, w_ih, w_hh, b_ih if bias else None, b_hh if bias else None)
        hx = (h0, c0) if state else None
        y, (h, c) = lstm(*args, hx=hx)
        expected = reference.lstm(*args, *(hx or ()))
        for a, b in zip((y, h, c), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    finally:
        _C.set_isa(before)


def test_strided_arguments():
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = weights(6, 4, 5, 7)
    expected = flat(x, w_ih, w_hh, b_ih, b_hh, h0, c0)

    def strided(t):
        return t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2, -1)[..., ::2]

    actual = flat(*(strided(t) for t in (x, w_ih, w_hh, b_ih, b_hh, h0, c0)))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- compile, fake, autocast, functorch ---------------------------------------------------------


def test_opcheck():
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = weights(3, 2, 4, 5)
    ops = torch.ops.lmkern
    for save in (False, True):
        torch.library.opcheck(
            ops.lstm_forward.default, (x, w_ih, w_hh, b_ih, b_hh, h0, c0, False, save)
        )
    torch.library.opcheck(
        ops.lstm_forward.default, (x, w_ih, w_hh, None, None, None, None, True, True)
    )
    y, h, _, gates, cells = ops.lstm_forward(x, w_ih, w_hh, b_ih, b_hh, h0, c0, False, True)
    for need in (True, False):
        torch.library.opcheck(
            ops.lstm_backward.default,
            (y, h, None, x, w_ih, w_hh, h0, c0, y, gates, cells, False, need, need),
        )


def test_compile_fullgraph():
    inputs = weights(4, 3, 5, 6)
    compiled = torch.compile(flat, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        outputs_and_gradients(compiled, inputs), outputs_and_gradients(flat, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_meta_device():
    y, (h, _) = lmkern.nn.LSTM(3, 4, device="meta")(torch.empty(5, 2, 3, device="meta"))
    assert y.shape == (5, 2, 4) and h.shape == (1, 2, 4) and y.device.type == "meta"


def test_autocast():
    module = lmkern.nn.LSTM(8, 16)
    x = torch.randn(5, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and module.weight_hh_l0.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x)[0], atol=3e-2, rtol=3e-2)


def test_functorch_and_forward_mode():
    args = weights(3, 2, 4, 5, torch.float64)
    x, rest = args[0], args[1:]
    jacobian = torch.func.jacrev(lambda v: flat(v, *rest)[0].sum(0))(x)
    expected = torch.autograd.functional.jacobian(lambda v: flat(v, *rest)[0].sum(0), x)
    torch.testing.assert_close(jacobian, expected)
    batch = torch.stack([x, x + 1])
    mapped = torch.func.vmap(lambda v: flat(v, *rest)[0])(batch)
    torch.testing.assert_close(mapped[1], flat(x + 1, *rest)[0])
    tangent = torch.func.jvp(lambda v: flat(v, *rest)[0].sum(0), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, expected.sum((2, 3, 4)))


def test_unsupported_dtype_runs_the_reference():
    lmkern._warnings._warn_first_time.cache_clear()
    inputs = [x.half() for x in weights(3, 2, 4, 5)]
    with pytest.warns(lmkern.LmkernWarning, match="float16"):
        y, _, _ = flat(*inputs)
    torch.testing.assert_close(
        y.float(), flat(*(x.float() for x in inputs))[0], atol=1e-2, rtol=1e-2
    )


# ---- the layer ----------------------------------------------------------------------------------


def pair(*args, **kwargs):
    torch.manual_seed(3)
    theirs = torch.nn.LSTM(*args, **kwargs)
    torch.manual_seed(3)
    return lmkern.nn.LSTM(*args, **kwargs), theirs


OPTIONS = [
    {},
    {"num_layers": 3},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True, "num_layers": 2},
    {"dtype": torch.float64},
    {"bidirectional": True, "batch_first": True, "bias": False, "num_layers": 2},
]


def test_signature_is_torchs():
    ours = inspect.signature(lmkern.nn.LSTM).parameters
    theirs = inspect.signature(torch.nn.RNNBase).parameters
    assert list(ours) == [n for n in theirs if n != "mode"]
    for name, parameter in ours.items():
        assert parameter.default == theirs[name].default, name


@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 3}], ids=str)
def test_same_parameters_as_torch(options):
    ours, theirs = pair(5, 7, **options)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("state", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("unbatched", [False, True], ids=["", "unbatched"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_equals_torch(options, unbatched, state):
    ours, theirs = pair(5, 7, **options)
    dtype = options.get("dtype", torch.float32)
    x = torch.randn(*((6, 5) if unbatched else (6, 4, 5)), dtype=dtype)
    batch = () if unbatched else (6 if options.get("batch_first") else 4,)
    rows = ours.num_layers * (2 if ours.bidirectional else 1)
    hx = tuple(torch.randn(rows, *batch, 7, dtype=dtype) for _ in range(2)) if state else None
    y, (h, c) = ours(x, hx)
    expected, (eh, ec) = theirs(x, hx)
    for a, b in ((y, expected), (h, eh), (c, ec)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    (y.sum() + h.sum()).backward()
    (expected.sum() + eh.sum()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_dropout_between_layers_only_in_training():
    ours = lmkern.nn.LSTM(5, 7, num_layers=2, dropout=0.5)
    x = torch.randn(6, 4, 5)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])


@pytest.mark.usefixtures("fallback_allowed")
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequence(enforce_sorted):
    ours, theirs = pair(5, 7, num_layers=2, bidirectional=True)
    lengths = [6, 4, 1] if enforce_sorted else [4, 1, 6]
    packed = pack_padded_sequence(torch.randn(6, 3, 5), lengths, enforce_sorted=enforce_sorted)
    hx = (torch.randn(4, 3, 7), torch.randn(4, 3, 7))
    for state in (None, hx):
        a, (h, c) = ours(packed, state)
        b, (eh, ec) = theirs(packed, state)
        torch.testing.assert_close(pad_packed_sequence(a)[0], pad_packed_sequence(b)[0])
        torch.testing.assert_close((h, c), (eh, ec))


@pytest.mark.usefixtures("fallback_allowed")
def test_projection():
    ours, theirs = pair(5, 7, proj_size=3, bidirectional=True)
    x = torch.randn(6, 2, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_copy_pickle_to():
    ours, _ = pair(5, 7)
    x = torch.randn(6, 2, 5)
    expected = ours(x)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x)[0], expected)
    torch.testing.assert_close(ours.double()(x.double())[0].float(), expected)
    ours.flatten_parameters()


def test_weights_written_through_data_are_seen():
    """`.data` does not count up a tensor's version: a pack cached on it would go stale."""
    ours, theirs = pair(5, 40)
    x = torch.randn(6, 2, 5)
    ours(x)
    for module in (ours, theirs):
        module.weight_hh_l0.data.mul_(2)
    torch.testing.assert_close(ours.eval()(x)[0], theirs(x)[0])


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"w_hh": torch.zeros(28, 6)}, ValueError, r"lstm: w_hh must be \[4H, H\] = \[24, 6\], got \[28, 6\]"),
        ({"w_ih": torch.zeros(28, 4)}, ValueError, r"lstm: w_ih must be \[4H, I\] = \[28, 5\], got \[28, 4\]"),
        ({"b_ih": torch.zeros(27)}, ValueError, r"b_ih must be \[4H\] = \[28\]"),
        ({"b_ih": None}, ValueError, "b_ih and b_hh must be given together"),
        ({"h0": torch.zeros(2, 7)}, ValueError, r"h0 must be \[B, H\] = \[3, 7\], got \[2, 7\]"),
        ({"x": torch.zeros(4, 5)}, ValueError, r"input must be \[T, B, I\], got \[4, 5\]"),
        ({"x": torch.zeros(0, 3, 5)}, ValueError, "at least one time step"),
        ({"x": [[1.0]]}, TypeError, "input must be a Tensor, got list"),
        ({"w_hh": torch.zeros(28, 7, dtype=torch.float64)}, TypeError, "w_hh must be float32, got float64"),
        ({"c0": torch.zeros(3, 7, device="meta")}, ValueError, "c0 must be on cpu like input, got meta"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(change, error, match):
    names = ["x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0"]
    good = dict(zip(names, weights(4, 3, 5, 7), strict=True))
    with pytest.raises(error, match=match) as caught:
        flat(**{**good, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "hx", "error", "match"),
    [
        (torch.zeros(6, 2, 4), None, ValueError, "input must have 5 features"),
        (torch.zeros(5), None, ValueError, "input must be 2-D or 3-D"),
        (torch.zeros(0, 2, 5), None, ValueError, "at least one time step"),
        (torch.zeros(6, 2, 5), torch.zeros(1, 2, 7), TypeError, "hx must be a pair"),
        (
            torch.zeros(6, 2, 5),
            (torch.zeros(1, 3, 7), torch.zeros(1, 2, 7)),
            ValueError,
            "h_0 must be",
        ),
        ("text", None, TypeError, "input must be a Tensor or PackedSequence, got str"),
    ],
    ids=str,
)
def test_bad_layer_input(x, hx, error, match):
    with pytest.raises(error, match=match):
        lmkern.nn.LSTM(5, 7)(x, hx)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"hidden_size": 0},
        {"num_layers": 0},
        {"dropout": 1.5},
        {"proj_size": 7},
        {"input_size": 2.5},
    ],
    ids=str,
)
def test_bad_constructor(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        lmkern.nn.LSTM(**{"input_size": 5, "hidden_size": 7, **kwargs})


def test_kernel_checks_before_it_writes():
    """The raw binding: shapes are checked in C++, and nothing has been written when they are wrong."""
    gates = torch.full((2, 3, 8), 5.0)
    y = torch.full((2, 3, 2), 5.0)
    h = torch.full((3, 2), 5.0)
    with pytest.raises(
        ValueError, match=r"lstm_forward: c_n must be \[B, H\] = \[3, 2\], got \[3, 3\]"
    ):
        _C.lstm_forward(gates, torch.zeros(8, 2), None, None, y, h, torch.zeros(3, 3), None, False)
    with pytest.raises(TypeError, match="w_hh must be float32, got float64"):
        _C.lstm_forward(gates, torch.zeros(8, 2).double(), None, None, y, h, h.clone(), None, False)
    with pytest.raises(ValueError, match="y must be contiguous"):
        _C.lstm_forward(
            gates, torch.zeros(8, 2), None, None, torch.zeros(2, 2, 3).mT, h, h.clone(), None, False
        )
    assert (gates == 5).all() and (y == 5).all() and (h == 5).all()


def test_packed_helpers_agree():
    """pack_sequence of equal lengths is the same as a plain batch."""
    ours, _ = pair(5, 7)
    rows = [torch.randn(4, 5) for _ in range(3)]
    y, _ = ours(torch.stack(rows, 1))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmkern.LmkernWarning)
        z, _ = ours(pack_sequence(rows))
    torch.testing.assert_close(pad_packed_sequence(z)[0], y, atol=1e-5, rtol=1e-5)
