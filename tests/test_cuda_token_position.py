"""The CUDA kernels of token + position + segment, norm and dropout, on the emulator: against float64 and the
CPU's kernels, in every mode and under every schedule. (`--device simt` runs the function's own tests on them.)
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from emulator_helpers import MODULES, SCHEDULES, emulated, use
from lmkern import _C
from lmkern.ops import token_position as ops
from oracle import relative_error

pytestmark = pytest.mark.cpu_only("the emulator has its own modules")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}
V, P, S = 23, 70, 3


@pytest.fixture(params=MODULES)
def kernels(request, monkeypatch):
    yield from emulated(request.param, monkeypatch, ops)


@pytest.fixture
def plain(monkeypatch):
    """Without the search for races, for what is larger."""
    yield from emulated("_C_simt", monkeypatch, ops)


def problem(shape, width, dtype=torch.float32, norm="layer", p=0.3, index=torch.int64, **options):
    """Arguments of both passes for ids of ``shape``; ``options`` replace some."""
    count, length = math.prod(shape), shape[-1]
    generator = torch.Generator().manual_seed(width)

    def table(rows):
        return torch.randn(rows, width, generator=generator).to(dtype)

    def ids(rows, size=count):
        return torch.randint(rows, (size,), generator=generator, dtype=index)

    made = SimpleNamespace(
        input=ids(V), token=table(V), position=table(P), positions=None, offset=1, length=length,
        segment=table(S), segments=ids(S), scale=1.5,
        weight=table(1)[0] if norm else None, bias=table(1)[0] if norm == "layer" else None,
        seed=torch.tensor(1234567890123456789), norm=ops.NORMS.index(norm), eps=1e-2, p=p,
        d_out=table(count), need=(True, True, norm is not None, norm == "layer"),
    )  # fmt: skip
    vars(made).update(options)
    return made


def rows_of(a):
    return (
        a.input, a.token, a.position, a.positions, a.offset, a.length, a.segment, a.segments, a.scale,
    )  # fmt: skip


def run(a):
    """out, statistics and the gradients, as the module in place of the GPU's has them."""
    out, statistics = ops._forward(*rows_of(a), a.weight, a.bias, a.seed, a.norm, a.eps, a.p)
    rows = rows_of(a) if a.norm else (a.input, None, None, None, 0, a.length, None, None, 1.0)
    grads = ops._backward(a.d_out, *rows, statistics, a.weight, a.seed, a.norm, a.p, *a.need)
    return [out, statistics, *(g for g, need in zip(grads, a.need, strict=True) if need)]


def keep_of(a):
    """The CPU's mask."""
    ones = torch.ones_like(a.d_out, dtype=torch.promote_types(a.d_out.dtype, torch.float32))
    return torch.ops.lmkern.dropout(ones, a.seed, a.p) if a.p else ones


def exact(a):
    """The same in float64, by torch."""
    count = a.input.numel()
    places = torch.arange(count) % max(a.length, 1)
    x = a.token.double()[a.input.long()] * a.scale
    if a.position is not None:
        at = places + a.offset if a.positions is None else a.positions.long()[places]
        x = x + a.position.double()[at]
    if a.segment is not None:
        x = x + a.segment.double()[a.segments.long()]
    x.requires_grad_()
    weight, bias = (None if t is None else t.double().requires_grad_() for t in (a.weight, a.bias))
    y, width = x, a.token.shape[1:]
    if a.norm == 2:
        y = F.layer_norm(x, width, weight, bias, a.eps)
        mean = x.mean(1, keepdim=True)
        statistics = [mean[:, 0], ((x - mean).square().mean(1) + a.eps).rsqrt()]
    elif a.norm:
        y = F.rms_norm(x, width, weight, a.eps)
        statistics = [(x.square().mean(1) + a.eps).rsqrt()]
    else:
        statistics = [x.new_empty(0, count)]
    y = y * keep_of(a).double()
    leaves = [t for t in (x, weight, bias) if t is not None]
    d_x, *d_parameters = torch.autograd.grad(y, leaves, a.d_out.double())
    d_position = d_x.new_zeros(a.length, *width).index_add_(0, places, d_x)
    wanted = [g for g, need in zip((d_x, d_position), a.need, strict=False) if need]
    statistics = statistics[0] if not a.norm else torch.stack(statistics)
    return [t.detach() for t in (y, statistics, *wanted, *d_parameters)]


def check(ours, theirs, dtype, factor=1.0):
    for i, (a, e) in enumerate(zip(ours, theirs, strict=True)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        limit = factor * TOLERANCE[dtype if a.dtype == dtype else wide]
        assert relative_error(a, e.double()) <= limit, i


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ops.NORMS)
@pytest.mark.parametrize("width", [1, 7, 59, 64, 136])
def test_against_float64(kernels, norm, width, dtype):
    if width == 1:
        norm = None  # of one element a norm leaves nothing but rounding errors
    a = problem((3, 7), width, dtype, norm)
    check(run(a), exact(a), dtype)


@pytest.mark.parametrize("norm", ops.NORMS)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (5, 1), (41, 1), (37, 3), (16, 2), (17, 2), (2, 33), (1, 64), (0, 7), (2, 0)],
    ids=str,
)
def test_rows_and_positions(kernels, norm, shape):
    """Blocks of whole positions, and positions of several blocks."""
    a = problem(shape, 12, norm=norm)
    check(run(a), exact(a), torch.float32)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("norm", ops.NORMS)
def test_options(kernels, norm, index):
    positions = torch.randint(P, (5,), dtype=index)
    for options in (
        {"positions": positions, "offset": 0},
        {"positions": torch.randint(P, (20,), dtype=index), "offset": 0, "length": 20},
        {"position": None, "segment": None, "segments": None, "length": 20, "p": 0.0},
        {"position": None, "offset": 0, "scale": -2.0, "p": 1.0},
        {"segment": None, "segments": None, "need": (False, True, False, False)},
        {"weight": None, "bias": None, "need": (True, False, False, False)},
        {"need": (False, True, False, False), "p": 0.0},
    ):
        a = problem((4, 5), 24, norm=norm, index=index, **options)
        ours, theirs = run(a), exact(a)
        check(ours, theirs[: len(ours)], torch.float32)


@pytest.mark.parametrize("wide", [False, True])
def test_parameters_in_float32(kernels, wide):
    for dtype in (torch.bfloat16, torch.float16):
        a = problem((3, 4), 16 if wide else 15, dtype)
        a.weight, a.bias = a.weight.float() / 3, a.bias.float() / 3
        check(run(a), exact(a), dtype)


# A row by a warp or a block, kept or added up again; in backward one piece a thread or several.
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(259, torch.float16), (515, torch.float32), (1032, torch.float32), (2049, torch.bfloat16),
     (2052, torch.float32), (4104, torch.bfloat16), (1026, torch.float64), (8200, torch.float32)],
    ids=str,
)  # fmt: skip
def test_wide_rows(plain, width, dtype):
    for norm in ops.NORMS:
        a = problem((2, 2), width, dtype, norm)
        check(run(a), exact(a), dtype)
    a = problem((18, 1), width, dtype)  # two blocks for one position
    a.input, a.segments, a.d_out, a.length = a.input[:18], a.segments[:18], a.d_out[:18], 1
    check(run(a), exact(a), dtype)


def test_wide_rows_do_not_race(kernels):
    a = problem((3, 2), 516)
    check(run(a), exact(a), torch.float32)
    a = problem((18, 1), 515)
    check(run(a), exact(a), torch.float32)


def test_many_partial_sums(plain):
    a = problem((2240, 1), 3, norm="rms", length=2240, position=None, offset=0)
    check(run(a), exact(a), torch.float32)
    d_out = torch.randint(-4, 5, (20000, 3)).float()  # 20 rows a block, all sums exact
    d_position = torch.empty(4, 3)
    space = ops.workspace(d_out, plain.token_position_workspace(20000, 4, 3, 1, False))
    rows = (None, None, None, None, 0, 4, None, None, 1.0)
    plain.token_position_backward(
        rows, d_out, None, None, 0.0, None, None, d_position, None, None, space
    )
    assert torch.equal(d_position, d_out.view(5000, 4, 3).sum(0))


@pytest.mark.parametrize("width", [5, 12])
def test_same_bits_under_every_schedule(kernels, width):
    for shape in ((19, 2), (3, 9)):
        results = []
        for schedule in SCHEDULES:
            kernels.set_schedule(*schedule)
            results.append(run(problem(shape, width)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 16])
def test_the_masks_of_the_cpu(kernels, width, dtype):
    a = problem((3, 7), width, dtype, None, token=torch.ones(V, width, dtype=dtype), scale=1.0)
    a.position = a.segment = a.segments = None
    a.d_out = torch.ones_like(a.d_out)
    for a.p in (0.3, 0.5, 1.0):
        out, _, d_sum, _ = run(a)
        assert torch.equal(out, keep_of(a).to(dtype)) and torch.equal(d_sum, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ops.NORMS)
def test_against_the_cpu(kernels, monkeypatch, norm, dtype):
    for width in (11, 40):
        a = problem((4, 6), width, dtype, norm)
        ours = run(a)
        use(_C, monkeypatch, ops)
        check(ours, run(a), dtype, factor=2)
        use(kernels, monkeypatch, ops)


def test_a_large_mean_costs_no_digits(kernels):
    a = problem((2, 5), 60, p=0.0, scale=1.0, eps=1e-5, position=None, offset=0, segment=None)
    a.token = a.token + 1e4
    check(run(a)[:1], exact(a)[:1], torch.float32, factor=2)


def test_rows_that_begin_anywhere(kernels):
    a = problem((3, 5), 16)
    expected = run(a)
    for name in ("token", "position", "segment"):
        table = getattr(a, name)
        base = torch.full((table.shape[0] * 19 + 1,), math.nan)
        view = base[1:].view(-1, 19)[:, :16]
        setattr(a, name, view.copy_(table))
    check(run(a), [t.double() for t in expected], torch.float32)


@pytest.mark.parametrize(
    ("argument", "index", "message"),
    [
        ("input", 23, r"index 23 at position [2] is out of range for V = 23"),
        ("input", -1, r"index -1 at position [2] is out of range for V = 23"),
        ("positions", 70, r"positions: index 70 at position [2] is out of range for P = 70"),
        ("segments", 3, r"segments: index 3 at position [2] is out of range for S = 3"),
    ],
)
def test_a_bad_index_is_named_and_replaced(kernels, argument, index, message):
    a = problem((2, 5), 9, positions=torch.arange(5), offset=0)
    getattr(a, argument)[2] = index
    rows = (a.weight, a.bias, a.seed, a.norm, a.eps, a.p)
    out, statistics = ops._forward(*rows_of(a), *rows)
    assert kernels.take_index_error() == f"token_position_embedding: {message}"
    ops._backward(
        a.d_out, *rows_of(a), statistics, a.weight, a.seed, a.norm, a.p, True, True, True, True
    )
    assert kernels.take_index_error() == f"token_position_backward: {message}"
    getattr(a, argument)[2] = max(index - 1, 0)  # the nearest there is
    assert torch.equal(out, ops._forward(*rows_of(a), *rows)[0])


def test_arguments_are_checked(kernels):
    a = problem((2, 5), 8)
    a.input = a.input.float()
    with pytest.raises(TypeError, match="input must be int32 or int64"):
        run(a)
    a = problem((2, 5), 8, offset=P)
    with pytest.raises(IndexError, match="positions 70 to 74 are out of range for P = 70"):
        run(a)
    with pytest.raises(IndexError, match="input must be empty for V = 0"):
        run(problem((2, 5), 8, token=torch.empty(0, 8)))
    with pytest.raises(ValueError, match=r"seed must be \[\]"):
        run(problem((2, 5), 8, seed=torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(
        ValueError, match=r"workspace must be \[token_position_workspace\] = \[32\]"
    ):
        kernels.token_position_backward(
            (None, None, None, None, 0, 2, None, None, 1.0), torch.ones(2, 8), None, None, 0.0, None,
            None, torch.empty(2, 8), None, None, torch.empty(0, dtype=torch.uint8),
        )  # fmt: skip
