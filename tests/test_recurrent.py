"""lmkern.functional.{lstm,gru,rnn} and the ops under them, without options, against torch.

Layers and cells: test_recurrent_layers.py, test_recurrent_modules.py. Options:
test_recurrent_options.py, test_recurrent_layer_options.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import _C, reference
from oracle import assert_oracle, outputs_and_gradients
from recurrent_helpers import CELLS, call, torch_layer, weights

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (T, B, I, H); 41 and 59 are no multiple of any vector
SIZES = [(1, 1, 1, 1), (9, 7, 5, 41), (5, 20, 3, 64), (17, 1, 8, 59), (3, 33, 16, 100)]

flat = functools.partial(call, "lstm")
torch_lstm = functools.partial(torch_layer, "lstm")


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_oracle(isa, cell, dtype, reverse):
    sizes = (
        SIZES[1:2]
        if cell in ("rnn_relu", "rnn_sigmoid")
        else SIZES[1:4]
        if dtype.itemsize == 2
        else SIZES
    )
    for size in sizes:
        inputs = weights(cell, *size, dtype)
        if cell == "rnn_relu" and dtype.itemsize == 2:  # rounding must not cross the kink
            inputs[3][::2], inputs[3][1::2] = 8.0, -8.0
            inputs[2] *= 0.25
        assert_oracle(
            functools.partial(call, cell, reverse=reverse),
            functools.partial(torch_layer, cell, reverse=reverse),
            inputs,
        )


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize(
    "size", [(2, 40, 300, 300), (12, 3, 64, 333), (100, 2, 8, 520), (3, 2, 8, 1030)], ids=str
)
def test_oracle_divided_among_threads(isa, size, cell):
    assert_oracle(
        functools.partial(call, cell), functools.partial(torch_layer, cell), weights(cell, *size)
    )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_gradcheck(reverse, cell):
    args = [x.requires_grad_() for x in weights(cell, 3, 2, 3, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: call(cell, *a, reverse=reverse), args)
    assert torch.autograd.gradgradcheck(lambda *a: call(cell, *a, reverse=reverse), args, atol=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_reference_equals_torch(cell):
    """What the kernels are measured by is itself measured by torch."""
    inputs = weights(cell, 5, 3, 4, 6, torch.float64)
    states = [*inputs[5:], None][:2]
    y, h_n, c_n, _ = reference.recurrence(cell, *inputs[:5], *states)
    expected = torch_layer(cell, *inputs)
    for a, b in zip((y, h_n, c_n), expected, strict=False):
        torch.testing.assert_close(a, b)


def test_gradients_asked_for_one_by_one():
    inputs = weights("lstm", 4, 3, 5, 6)
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
    inputs = weights("lstm", 4, 3, 5, 6)
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    flat(*ours)[2].sum().backward()
    torch_lstm(*theirs)[2].sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def test_backward_twice_gives_the_same():
    inputs = [x.requires_grad_() for x in weights("lstm", 4, 3, 5, 6)]
    y = flat(*inputs)[0].sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    second = torch.autograd.grad(y, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def kernel_options(cell: int, batch: int, w_hh: torch.Tensor, **views: torch.Tensor) -> tuple:
    """csrc's RecurrentOptions without options, but for the views given."""
    names = ("b_hh", "w_hr", "peephole", "norm_hh", "norm_c_weight", "norm_c_bias")
    some = [views.get(name) for name in names]
    return (
        cell, False, batch, w_hh, *some, 1e-5, None, None, None, 0.0, 0.0, None, None, None, None, False,
    )  # fmt: skip


@pytest.mark.cpu_only("threads of the CPU")
@pytest.mark.parametrize("size", [(20, 2, 16, 320), (20, 48, 16, 96)], ids=str)
def test_same_bits_for_any_thread_count(isa, size):
    T, B, _, H = size
    _, _, w_hh, _, _, h0, c0 = weights("lstm", *size)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(T * B, 4 * H, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            gates = inputs.clone()
            y, cells, d_gates = (
                torch.empty(T * B, H),
                torch.empty(T * B, H),
                torch.empty_like(gates),
            )
            h_n, c_n, d_h0, d_c0 = (torch.empty(B, H) for _ in range(4))
            options = kernel_options(0, B, w_hh)
            _C.recurrent_forward(
                options,
                gates,
                h0,
                c0,
                None,
                y,
                h_n,
                c_n,
                cells,
                None,
                None,
                None,
                True,
                None,
                False,
            )
            _C.recurrent_backward(
                options, y, h_n, c_n, None, h0, c0, y, gates, cells, None, None, d_gates, None, None,
                None, None, None, d_h0, d_c0, False, None,
            )  # fmt: skip
            results.append((y, h_n, c_n, gates, cells, d_gates, d_h0, d_c0))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cpu_only
def test_kernels_are_called(monkeypatch):
    called = []
    for name in ("recurrent_forward", "recurrent_backward"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1])
    lmkern.nn.LSTM(5, 7)(torch.randn(4, 2, 5))[0].sum().backward()
    assert called == ["recurrent_forward", "recurrent_backward"]


def test_empty_batch():
    module = lmkern.nn.LSTM(3, 4)
    y, (h, _) = module(torch.randn(5, 0, 3))
    assert y.shape == (5, 0, 4) and h.shape == (1, 0, 4)
    y.sum().backward()
    assert (module.weight_hh_l0.grad == 0).all()


def test_inputs_are_not_written():
    inputs = weights("lstm", 4, 3, 5, 6)
    kept = [x.clone() for x in inputs]
    outputs_and_gradients(flat, inputs)
    flat(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CELLS), st.integers(1, 9), st.integers(1, 40), st.integers(1, 20),
    st.integers(1, 70), st.booleans(), st.booleans(), st.sampled_from(_C.supported_isas()),
)  # fmt: skip
def test_any_size(cell, T, B, I, H, bias, state, isa):
    before = _C.isa()
    _C.set_isa(isa)
    try:
        x, w_ih, w_hh, b_ih, b_hh, *states = weights(cell, T, B, I, H)
        b_ih, b_hh = (b_ih, b_hh) if bias else (None, None)
        states = states if state else [None] * len(states)
        outputs = call(cell, x, w_ih, w_hh, b_ih, b_hh, *states)
        h0, c0 = [*states, None][:2]
        expected = reference.recurrence(cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0)
        for a, b in zip(outputs, expected, strict=False):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    finally:
        _C.set_isa(before)


def test_strided_arguments():
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = weights("lstm", 6, 4, 5, 7)
    expected = flat(x, w_ih, w_hh, b_ih, b_hh, h0, c0)

    def strided(t):
        return t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2, -1)[..., ::2]

    actual = flat(*(strided(t) for t in (x, w_ih, w_hh, b_ih, b_hh, h0, c0)))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- compile, fake, autocast, functorch ---------------------------------------------------------


@pytest.mark.parametrize("cell", range(3))
def test_opcheck(cell):
    x, w_ih, w_hh, b_ih, b_hh, h0, *c0 = weights(CELLS[cell], 3, 2, 4, 5)
    ops = torch.ops.lmkern
    options = (cell, False, 1e-5, 0.0, 0.0, False)
    inputs = (x, w_ih, w_hh, b_ih, b_hh, h0, c0[0] if c0 else None, *(None,) * 11)
    bare = (x, w_ih, w_hh, *(None,) * 13, torch.tensor([3, 1]), None)
    for save in (False, True):
        torch.library.opcheck(
            ops.recurrent_forward.default, (*inputs, *options, save, cell == 0 and save)
        )
    # With lengths, what is saved has rows that nobody writes or reads.
    torch.library.opcheck(ops.recurrent_forward.default, (*bare, *options, False, False))
    y, h, _, _, *kept = ops.recurrent_forward(*inputs, *options, True, False)
    for need in (True, False):
        torch.library.opcheck(
            ops.recurrent_backward.default,
            (*inputs, *options, y, h, None, None, y, *kept, [need] * 7 + [False] * 6),
        )


def test_compile_fullgraph():
    inputs = weights("lstm", 4, 3, 5, 6)
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
    args = weights("lstm", 3, 2, 4, 5, torch.float64)
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
    """torch computes it nowhere, but the message names the reason first."""
    lmkern._warnings._warn_first_time.cache_clear()
    inputs = [x.to(torch.complex64) for x in weights("lstm", 3, 2, 4, 5)]
    with pytest.warns(lmkern.LmkernWarning, match="lstm: no kernel for torch.complex64"):
        flat(*inputs)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"w_hh": torch.zeros(28, 6)}, ValueError, r"lstm: w_hh must be \[4H, H\] = \[24, 6\], got \[28, 6\]"),
        ({"w_ih": torch.zeros(28, 4)}, ValueError, r"lstm: w_ih must be \[4H, I\] = \[28, 5\], got \[28, 4\]"),
        ({"b_ih": torch.zeros(27)}, ValueError, r"b_ih must be \[4H\] = \[28\]"),
        ({"b_ih": None}, ValueError, "b_ih and b_hh must be given together"),
        ({"h0": torch.zeros(2, 7)}, ValueError, r"h0 must be \[B, H\] = \[3, 7\], got \[2, 7\]"),
        ({"w_hh": None}, TypeError, "w_hh must be a Tensor, got NoneType"),
        ({"w_hh": torch.zeros(28)}, ValueError, r"w_hh must be \[4H, H\], got \[28\]"),
        ({"x": torch.zeros(4, 5)}, ValueError, r"input must be \[T, B, I\], got \[4, 5\]"),
        ({"x": torch.zeros(0, 3, 5)}, ValueError, "at least one time step"),
        ({"x": [[1.0]]}, TypeError, "input must be a Tensor, got list"),
        ({"w_hh": torch.zeros(28, 7, dtype=torch.float64)}, TypeError, "w_hh must be float32, got float64"),
        ({"c0": torch.zeros(3, 7, device="meta")}, ValueError, r"c0 must be on \S+ like input, got meta"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(change, error, match):
    names = ["x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0"]
    good = dict(zip(names, weights("lstm", 4, 3, 5, 7), strict=True))
    with pytest.raises(error, match=match) as caught:
        flat(**{**good, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.cpu_only("on the CPU's module; both share the checks")
def test_kernel_checks_before_it_writes():
    """The raw binding: shapes are checked in C++, and nothing has been written when they are wrong."""
    gates, y, h = torch.full((6, 8), 5.0), torch.full((6, 2), 5.0), torch.full((3, 2), 5.0)
    w = torch.zeros(8, 2)

    def run(w_hh=w, y=y, c_n=h, batch=3, cell=0, **views):
        _C.recurrent_forward(
            kernel_options(cell, batch, w_hh, **views), gates, None, None, None, y, h, c_n, None,
            None, None, None, True, None, False,
        )  # fmt: skip

    for change, error, match in (
        ({"c_n": torch.zeros(3, 3)}, ValueError, r"c_n must be \[B, H\] = \[3, 2\], got \[3, 3\]"),
        ({"w_hh": w.double()}, TypeError, "w_hh must be float32, got float64"),
        ({"y": torch.zeros(2, 6).T}, ValueError, "y must be contiguous"),
        ({"batch": 4}, ValueError, "gates must have a multiple of 4 rows"),
        ({"cell": 9}, ValueError, "cell must be 0 to 4, got 9"),
        (
            {"cell": 2, "w_hh": torch.zeros(8, 8), "peephole": torch.zeros(24)},
            ValueError,
            "must be absent",
        ),
        ({"norm_c_weight": torch.zeros(2)}, ValueError, "norm_c_bias must be given together"),
    ):
        with pytest.raises(error, match=match):
            run(**change)
    assert (gates == 5).all() and (y == 5).all() and (h == 5).all()
