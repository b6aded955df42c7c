"""The CUDA kernels of the recurrent layers, on the emulator: against float64, in every mode and under
every schedule. (`--device simt` runs the layers' own tests on them.)"""

from __future__ import annotations

import pytest
import torch

from emulator_helpers import MODULES, SCHEDULES, emulated
from lmkern import _C, reference
from lmkern.ops import recurrent_passes
from lmkern.ops.recurrent import recurrence

pytestmark = pytest.mark.cpu_only("the emulator has its own modules")

# of ||ours - float64|| / ||float64||, the recurrence in between included
TOLERANCE = {
    torch.float32: 2e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 5e-2,
    torch.float16: 6e-3,
}


@pytest.fixture(params=MODULES)
def kernels(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    yield from emulated(request.param, monkeypatch, recurrent_passes)


class Problem:
    """A layer's inputs from a seed, its gradients on the kernels and on the reference."""

    def __init__(self, cell, dtype, size, options=(), reverse=False):
        T, B, I, H = size
        generator = torch.Generator().manual_seed(len(options) + 10 * T + B)
        gates = {"lstm": 4, "gru": 3}.get(cell, 1)
        lstm = cell == "lstm"

        def new(*shape):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) / 2
            return values.to(dtype).requires_grad_()

        def some(*shape):
            return torch.rand(*shape, generator=generator) < 0.3

        P = max(1, H // 2) if "projection" in options else H
        self.cell, self.reverse, self.recompute = cell, reverse, "recompute" in options
        initial = "initial" in options
        self.inputs = {
            "x": new(T, B, I), "w_ih": new(gates * H, I), "w_hh": new(gates * H, P),
            "b_ih": new(gates * H), "b_hh": new(gates * H),
            "h0": new(B, P) if initial else None, "c0": new(B, H) if initial and lstm else None,
        }  # fmt: skip
        extra = {
            "projection": lambda: {"w_hr": new(P, H)},
            "peephole": lambda: {"peephole": new(3 * H)},
            "norm": lambda: {"norm_hh": new(gates * H)},
            "norm_cell": lambda: {"norm_cell_weight": new(H), "norm_cell_bias": new(H)},
            "mask": lambda: {"h_mask": new(B, P)},
            "zoneout": lambda: {"zoneout_h": some(T, B, P)} | ({"zoneout_c": some(T, B, H)} if lstm else {}),
            "rate": lambda: {"zoneout_h_rate": 0.2},
            "reset": lambda: {"reset_mask": some(T, B)},
            "lengths": lambda: {"lengths": torch.randint(0, T + 1, (B,), generator=generator)},
        }  # fmt: skip
        self.extra = {}
        for option in options:
            self.extra |= extra.get(option, dict)()
        self.generator = generator

    def run(self, function, convert=lambda t: t, **more):
        values = {k: convert(v) for k, v in (self.inputs | self.extra).items()}
        leaves = [v for v in values.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        positional = [values.pop(name) for name in self.inputs]
        outputs = function(
            self.cell, *positional, reverse=self.reverse, return_cells=self.cell == "lstm", **values, **more
        )  # fmt: skip
        outputs = [o for o in outputs if o is not None]
        weights = torch.Generator().manual_seed(7)
        loss = sum(
            (o.double() * torch.randn(o.shape, generator=weights, dtype=torch.float64)).sum()
            for o in outputs
        )
        return [o.detach() for o in outputs], torch.autograd.grad(loss, leaves)

    def ours(self):
        return self.run(recurrence, recompute=self.recompute)

    def exact(self):
        def wide(t):
            if not isinstance(t, torch.Tensor) or not t.is_floating_point():
                return t
            return t.detach().double().requires_grad_()

        return self.run(reference.recurrence, wide)


def check(problem, dtype):
    for ours, exact in zip(problem.ours(), problem.exact(), strict=True):
        for a, b in zip(ours, exact, strict=True):
            # Against the larger of the value itself and 1e-2 of a typical one: a single gradient may
            # be the small difference of large terms.
            scale = b.norm() + 1e-2 * b.numel() ** 0.5
            assert (a.double() - b).norm() <= TOLERANCE[dtype] * scale


OPTIONS = {
    "lstm": [
        (),
        ("initial", "mask", "reset", "lengths"),
        ("initial", "zoneout", "peephole"),
        ("initial", "norm", "norm_cell", "peephole", "lengths", "reset"),
        ("initial", "projection", "lengths", "zoneout", "mask"),
        ("initial", "projection", "norm"),
        ("recompute", "initial"),
        ("recompute", "norm"),
    ],
    "gru": [(), ("initial", "mask", "reset", "lengths"), ("initial", "norm", "rate"), ("recompute",)],
    "rnn_tanh": [(), ("initial", "lengths", "zoneout"), ("norm", "reset")],
    "rnn_relu": [("initial",)],
    "rnn_sigmoid": [("initial", "recompute")],
}  # fmt: skip
CASES = [(cell, options) for cell, all_of_it in OPTIONS.items() for options in all_of_it]


@pytest.mark.parametrize("path", ["cluster", "persistent", "steps"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join((c[0], *c[1])))
def test_options_against_float64(kernels, case, reverse, path):
    kernels.recurrent_begin_at(path)
    check(Problem(case[0], torch.float32, (5, 3, 4, 7), case[1], reverse), torch.float32)


@pytest.mark.parametrize("path", ["cluster", "persistent", "steps"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("size", [(3, 9, 5, 41), (1, 1, 1, 1), (2, 70, 3, 9), (4, 2, 3, 16)], ids=str)  # fmt: skip
def test_sizes_and_dtypes(kernels, size, cell, dtype, path):
    if kernels.race_mode() and max(size) > 50:
        pytest.skip("slow where each access is checked")
    kernels.recurrent_begin_at(path)
    check(Problem(cell, dtype, size, ("initial",)), dtype)


@pytest.mark.parametrize("path", ["cluster", "persistent", "steps"])
def test_same_bits_under_every_schedule(kernels, path):
    kernels.recurrent_begin_at(path)
    results = []
    for schedule in SCHEDULES:
        kernels.set_schedule(*schedule)
        outputs, gradients = Problem(
            "lstm", torch.bfloat16, (3, 10, 4, 20), ("initial", "lengths")
        ).ours()
        results.append([*outputs, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_packed_sequences(kernels):
    lengths = torch.tensor([5, 3, 3, 1])
    sizes = torch.tensor([4, 3, 3, 1, 1])
    for reverse in (False, True):
        for cell in ("lstm", "gru"):
            problem = Problem(cell, torch.float32, (5, 4, 3, 9), ("initial", "mask"), reverse)
            taking_part = torch.arange(5).unsqueeze(1) < lengths
            x = problem.inputs["x"].detach()[taking_part].requires_grad_()
            problem.inputs["x"], problem.extra["batch_sizes"] = x, sizes
            check(problem, torch.float32)


# Multiprocessors, blocks of a cluster and bytes of shared memory: as a GPU of compute capability 8.0, one of 12.0
# and one that is full with a single block.
@pytest.mark.parametrize(
    "device", [(60, 1, 163 << 10), (60, 8, 99 << 10), (1, 1, 99 << 10)], ids=["8.0", "12.0", "small"]
)  # fmt: skip
@pytest.mark.parametrize("path", ["cluster", "persistent", "steps"])
def test_other_devices(kernels, device, path):
    kernels.recurrent_begin_at(path)
    kernels.set_device(*device)
    for dtype in TOLERANCE:
        for cell, options in (("lstm", ()), ("gru", ("norm",)), ("lstm", ("projection",))):
            check(Problem(cell, dtype, (2, 9, 3, 24), ("initial", *options)), dtype)
    if not kernels.race_mode():
        check(Problem("lstm", torch.bfloat16, (2, 20, 3, 200), ("initial",)), torch.bfloat16)


def test_packed_sequences_whose_sizes_change(kernels):
    """What was made of batch_sizes for a GPU is made anew when they were written to."""
    sizes = torch.tensor([4, 3, 3, 1, 1])
    for lengths in ([5, 3, 3, 1], [5, 2, 2, 2], [3, 3, 3, 3]):
        taking_part = torch.arange(5).unsqueeze(1) < torch.tensor(lengths)
        sizes.resize_(max(lengths)).copy_(taking_part.sum(1)[: max(lengths)])
        problem = Problem("lstm", torch.float32, (5, 4, 3, 9), ("initial", "mask"))
        x = problem.inputs["x"].detach()[taking_part].requires_grad_()
        problem.inputs["x"], problem.extra["batch_sizes"] = x, sizes
        check(problem, torch.float32)


def test_an_operand_that_comes_in_many_chunks(kernels):
    """13 of 64 values in backward: shared memory is left for four at a time."""
    kernels.recurrent_begin_at("persistent")
    kernels.set_device(60, 1, 72 << 10)
    check(Problem("lstm", torch.float32, (2, 3, 3, 200), ("initial",)), torch.float32)


@pytest.mark.parametrize("path", ["cluster", "persistent", "steps"])
@pytest.mark.parametrize("batch", [3, 14, 27, 50])
def test_tf32(kernels, path, batch, monkeypatch):
    """Rounded operands where torch allows it, in float32 only."""
    if kernels.race_mode() and batch > 20:
        pytest.skip("slow where each access is checked")
    kernels.recurrent_begin_at(path)
    kernels.set_device(2, 16, 227 << 10)
    problem = Problem("lstm", torch.float32, (3, batch, 4, 24), ("initial",))
    (exact, *_), gradients = problem.ours()
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    (rounded, *_), rounded_gradients = problem.ours()
    assert 1e-5 < (exact - rounded).abs().max() < 1e-2
    for a, b in zip(gradients, rounded_gradients, strict=True):
        assert (a - b).norm() <= 2e-3 * b.norm()
    double = Problem("lstm", torch.float64, (3, batch, 4, 24), ("initial",))
    check(double, torch.float64)


def test_a_layer_beyond_one_multiprocessor_group(kernels):
    """More units than the resident blocks hold takes the per-step path."""
    if kernels.race_mode():
        pytest.skip("slow where each access is checked")
    check(Problem("gru", torch.float32, (2, 3, 3, 300), ("initial",)), torch.float32)


def test_workspace_is_checked(kernels):
    w_hh, gates, y = torch.zeros(8, 2), torch.zeros(6, 8), torch.zeros(6, 2)
    state = torch.zeros(3, 2)
    options = (
        0, False, 3, w_hh, *(None,) * 6, 1e-5, None, None, None, 0.0, 0.0, None, None, None, None, False,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"workspace must be \[recurrent_workspace\] = \[\d+\], got \[5\]"
    ):
        kernels.recurrent_forward(
            options, gates, None, None, None, y, state, state, None, None, None, None, True,
            torch.zeros(5, dtype=torch.uint8), False,
        )  # fmt: skip
    lengths = torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="lengths and offsets must be absent on the CPU"):
        _C.recurrent_forward(
            (*options[:18], lengths, None, False), gates, None, None, None, y, state, state, None, None, None,
            None, True, None, False,
        )  # fmt: skip
