"""The float32 product on AMX tiles (csrc/cpu/amx.h) against float64, beside torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkern import _C
from lmkern.ops import library
from oracle import EPSILON, relative_error

pytestmark = pytest.mark.cpu_only("CPU kernels")

HAS_AMX = "amx" in _C.supported_isas()
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="this machine cannot run the amx kernels")

SIZES = [
    (1, 1, 1), (7, 16, 17), (16, 16, 32), (17, 33, 97), (33, 7, 650), (97, 650, 33), (650, 97, 1025),
    (1025, 17, 7), (300, 1025, 64), (64, 64, 1500), (513, 80, 512),
]  # fmt: skip


@pytest.fixture
def amx() -> Iterator[None]:
    before = _C.isa()
    _C.set_isa("amx")
    yield
    _C.set_isa(before)


def operand(rows: int, columns: int, transposed: bool, gap: int = 0) -> Tensor:
    """A random matrix, with `gap` foreign elements (NaN) after each row."""
    if transposed:
        rows, columns = columns, rows
    whole = torch.full((rows, columns + gap), float("nan"))
    whole[:, :columns] = torch.randn(rows, columns)
    return whole[:, :columns]


def check(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
    gap: int = 0,
    by: int | None = None,
) -> Tensor:
    """The oracle rule, on the whole matrix or `by` the scale of each row (0) or column (1)."""
    x, y = a.t() if transpose_a else a, b.t() if transpose_b else b
    whole = torch.full((x.shape[0], y.shape[1] + gap), 3.0)
    out = whole[:, : y.shape[1]]
    exact, peer = x.double() @ y.double(), x @ y
    if bias is not None:
        exact, peer = exact + bias.double(), torch.addmm(bias, x, y)
    if accumulate:
        exact, peer = exact + 3, peer + 3
    assert _C.matmul(a, b, bias, out, transpose_a, transpose_b, accumulate)
    assert (whole[:, y.shape[1] :] == 3).all(), "written beyond the row"
    parts = [m.unbind(by) if by is not None else (m,) for m in (out, peer, exact)]
    for actual, theirs, truth in zip(*parts, strict=True):
        limit = 2 * relative_error(theirs, truth) + EPSILON[torch.float32]
        assert relative_error(actual, truth) <= limit
    return out


@needs_amx
@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("transposes", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_oracle(size, transposes):
    M, N, K = size
    ta, tb = map(bool, transposes)
    a, b = operand(M, K, ta), operand(K, N, tb)
    check(a, b, None, ta, tb)
    check(a, b, torch.randn(N), ta, tb)
    check(a, b, torch.randn(N), ta, tb, accumulate=True)
    check(operand(M, K, ta, gap=3), operand(K, N, tb, gap=5), None, ta, tb, gap=7)


@needs_amx
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 150), st.integers(1, 600),
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_any_size(M, N, K, ta, tb, accumulate, gap):
    before = _C.isa()
    _C.set_isa("amx")
    try:
        check(operand(M, K, ta, gap), operand(K, N, tb, gap), None, ta, tb, accumulate, gap)
    finally:
        _C.set_isa(before)


@needs_amx
@pytest.mark.usefixtures("amx")
def test_more_than_one_stage():
    """Wider than the columns, and deeper than the depth, that are packed at a time."""
    check(operand(40, 1100, False), operand(1100, 4200, True), torch.randn(4200), False, True)
    check(operand(70, 9000, True), operand(9000, 600, False), None, True, False)


@needs_amx
@pytest.mark.usefixtures("amx")
def test_long_sums():
    """Rounding errors grow with the depth no faster than torch's."""
    check(operand(64, 40_000, False), operand(40_000, 64, True), None, False, True)
    check(operand(64, 40_000, False).abs(), operand(40_000, 64, False).abs())


@needs_amx
@pytest.mark.usefixtures("amx")
def test_every_part_of_the_split_counts():
    """One product an element, so that nothing averages out: a missing one of the six is 2^-18."""
    a, b = torch.randn(500, 1), torch.randn(1, 400)
    out = torch.empty(500, 400)
    assert _C.matmul(a, b, None, out, False, False, False)
    exact = a.double() @ b.double()
    assert ((out.double() - exact) / exact).abs().max().item() <= 2.0**-22


@needs_amx
@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("scales", [(1e-30, 1), (1e30, 1), (1e-30, 1e30), (1e-15, 1e-10), (1e15, 1e17)], ids=str)  # fmt: skip
def test_magnitudes(scales):
    a, b = torch.randn(65, 300) * scales[0], torch.randn(300, 70) * scales[1]
    check(a, b, by=0)


@needs_amx
@pytest.mark.usefixtures("amx")
def test_wildly_different_magnitudes():
    """Each row and column keeps its own accuracy, not just that of the largest."""
    rows = 10.0 ** torch.linspace(-28, 15, 90)[:, None]
    columns = 10.0 ** torch.linspace(-28, 15, 90)
    a, b = torch.randn(90, 400), torch.randn(400, 110)
    check(a * rows, b, by=0)
    check((a * rows).t().contiguous(), b, transpose_a=True, by=0)
    check(b.t().contiguous(), (a.t() * columns).contiguous(), by=1)
    check(b.t().contiguous(), (a.t() * columns).t().contiguous(), transpose_b=True, by=1)
    # The same along the depth, where large and small meet in one sum.
    depth = 10.0 ** torch.linspace(-14, 14, 400)
    check(torch.randn(90, 400) * depth, b / depth[:, None], by=0)


@needs_amx
@pytest.mark.usefixtures("amx")
def test_tiny_elements_beside_large_ones():
    """Their residuals are denormal, with bits below a bfloat16's: these must not reach a neighbour."""
    tiny = 2.0 ** -torch.rand(64, 64).mul(30).add(110) * torch.randn(64, 64).sign()
    a, b = torch.randn(64, 64), torch.where(torch.rand(64, 64) < 0.5, tiny, torch.randn(64, 64))
    for x, y in ((a, b), (b, a)):
        out = torch.empty(64, 64)
        assert _C.matmul(x, y, None, out, False, False, False)
        torch.testing.assert_close(out, x @ y, rtol=1e-5, atol=1e-5)


@needs_amx
@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize(
    "value", [float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1e37]
)
@pytest.mark.parametrize("where", ["a", "b"])
def test_not_representable(where, value):
    """An element that the split cannot hold, or a product that might overflow, anywhere."""
    for row, column in ((0, 0), (32, 96), (39, 39), (16, 50)):
        a, b = torch.randn(40, 97), torch.randn(97, 45) * 100
        (a if where == "a" else b.t())[row, column] = value
        out, total = torch.empty(40, 45), torch.full((40, 45), 5.0)
        assert not _C.matmul(a, b, None, out, False, False, False)
        assert not _C.matmul(a, b, None, total, False, False, True)
        assert (total == 5).all(), "accumulated before everything was checked"


@needs_amx
@pytest.mark.usefixtures("amx")
def test_underflow_is_left_to_float32():
    tiny = torch.full((64, 64), 1e-36)
    out = torch.empty(64, 64)
    assert not _C.matmul(tiny, torch.ones(64, 64), None, out, False, False, False)
    assert not _C.matmul(torch.ones(64, 64), tiny, None, out, False, False, False)
    small = torch.full((64, 64), 1e-20)
    assert not _C.matmul(small, small, None, out, False, False, False)
    zeros = torch.zeros(64, 64)
    assert _C.matmul(zeros, small, None, out, False, False, False) and (out == 0).all()


@needs_amx
@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("transposes", [(0, 0), (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("size", [(97, 650, 1025), (33, 400, 700), (700, 17, 700), (600, 300, 1100)], ids=str)  # fmt: skip
def test_same_bits_for_any_thread_count(size, transposes):
    M, N, K = size
    ta, tb = map(bool, transposes)
    a, b = operand(M, K, ta), operand(K, N, tb)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 6):
            torch.set_num_threads(threads)
            results.append(check(a, b, None, ta, tb))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_amx
@pytest.mark.usefixtures("amx")
def test_an_element_depends_on_its_row_and_column_only():
    a, b = torch.randn(90, 700), torch.randn(700, 100)
    whole, part = check(a, b), check(a[37:53], b[:, 11:70])
    assert torch.equal(whole[37:53, 11:70], part)


def test_without_a_kernel_nothing_is_done():
    before = _C.isa()
    try:
        _C.set_isa(next(isa for isa in _C.supported_isas() if isa != "amx"))
        out = torch.full((64, 64), 3.0)
        x = torch.randn(64, 64)
        assert not _C.matmul(x, x, None, out, False, False, False) and (out == 3).all()
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(5, 7, 3), (200, 300, 150), (0, 4, 3), (3, 4, 0)], ids=str)
def test_helper(isa, size, dtype):
    M, N, K = size
    a, b, bias = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.randn(N).to(dtype)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {}
    for ta in (False, True):
        for tb in (False, True):
            for x in (a, a.t().contiguous().t()):  # both memory orders
                x, y = x.t() if ta else x, b.t() if tb else b
                flags = {"transpose_a": ta, "transpose_b": tb}
                torch.testing.assert_close(library.matmul(x, y, **flags), a @ b, **tolerance)
                torch.testing.assert_close(
                    library.matmul(x, y, bias, **flags), torch.addmm(bias, a, b), **tolerance
                )
                total = torch.ones(M, N, dtype=dtype)
                assert library.matmul(x, y, out=total, accumulate=True, **flags) is total
                torch.testing.assert_close(
                    total, torch.ones(M, N, dtype=dtype).addmm_(a, b), **tolerance
                )


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
def test_helper_gives_what_float32_gives(isa, value):
    a, b = torch.rand(200, 300), torch.rand(300, 150)
    a[17, 33] = value
    out = torch.ones(200, 150)
    library.matmul(a, b, out=out, accumulate=True)
    for actual in (library.matmul(a, b), out - 1):
        torch.testing.assert_close(actual, a @ b, equal_nan=True)


@needs_amx
@pytest.mark.usefixtures("amx")
def test_helper_calls_the_kernel(monkeypatch):
    done = []
    kernel = _C.matmul
    monkeypatch.setattr(_C, "matmul", lambda *args: done.append(kernel(*args)) or done[-1])
    library.matmul(torch.randn(300, 200), torch.randn(500, 200).t())
    assert done == [True]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"a": torch.zeros(4, 3)}, ValueError, r"matmul: b must be \[K, N\] = \[3, 6\], got \[5, 6\]"),
        ({"out": torch.zeros(4, 7)}, ValueError, r"out must be \[M, N\] = \[4, 6\]"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[N\] = \[6\]"),
        ({"a": torch.zeros(4, 5, dtype=torch.float64)}, TypeError, "a must be float32, got float64"),
        ({"a": torch.zeros(5, 4).t()}, ValueError, "a must be contiguous in its last dimension"),
        ({"a": torch.zeros(4)}, ValueError, r"a must be \[M, K\], got \[4\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(change, error, match):
    args = {"a": torch.zeros(4, 5), "b": torch.zeros(5, 6), "bias": None, "out": torch.zeros(4, 6)}
    flags = {"transpose_a": False, "transpose_b": False, "accumulate": False}
    with pytest.raises(error, match=match) as caught:
        _C.matmul(*{**args, **flags, **change}.values())
    assert "\n" not in str(caught.value)


def test_a_nan_beside_an_inf_is_seen_by_any_number_of_threads():
    a, b = torch.rand(256, 64), torch.rand(64, 64)
    a[0, 0], a[1, 0] = torch.nan, torch.inf
    assert (library.matmul(a, b)[1] == torch.inf).all()
