"""Error bounds of csrc/cpu/vec_math.h, as its header states them, over the whole range."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch

from lmkern import _C

pytestmark = pytest.mark.cpu_only("CPU kernels")

# function -> (float, double) in ULP
BOUNDS = {
    "exp": (1.5, 1.5),
    "exp_nonpositive": (1.5, 1.5),
    "exp_normal": (1.5, 1.5),
    "log": (1.5, 1.5),
    "tanh": (3.0, 3.0),
    "sigmoid": (2.5, 2.5),
    "erf": (2.5, 2.5),
    "normal_tail": (6.5, 8.5),  # times 1 + x^2 / 4: the rounding of x^2, in the exponent
}
# |x| up to which a function is defined
DOMAIN = {"exp_normal": (87.0, 708.0), "normal_tail": (12.8, 37.0)}
EXACT = {
    "exp": mpmath.exp,
    "exp_nonpositive": mpmath.exp,
    "exp_normal": mpmath.exp,
    "log": mpmath.log,
    "tanh": mpmath.tanh,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "erf": mpmath.erf,
    "normal_tail": lambda x: mpmath.erfc(x / mpmath.sqrt(2)) / 2,
}


def run(name: str, x: np.ndarray) -> np.ndarray:
    source = torch.from_numpy(x)
    out = torch.full_like(source, 123.0)
    _C.vec_math(name, source, out)
    return out.numpy()


def arguments(name: str, dtype: type, count: int) -> np.ndarray:
    """Bit patterns over the whole range, and a dense set where the function varies."""
    rng = np.random.default_rng(0)
    integer = np.uint32 if dtype is np.float32 else np.uint64
    bits = rng.integers(0, np.iinfo(integer).max, count, dtype=integer, endpoint=True).view(dtype)
    domain = DOMAIN.get(name, (np.inf, np.inf))[0 if dtype is np.float32 else 1]
    limit = {"exp": 800, "exp_nonpositive": 800, "sigmoid": 800, "tanh": 25, "erf": 8}.get(name, 4)
    limit = domain if name in DOMAIN else limit
    dense = rng.uniform(-limit, limit, count).astype(dtype)
    tiny = (rng.uniform(-1, 1, count) * 10.0 ** rng.uniform(-30, 0, count)).astype(dtype)
    x = np.concatenate([bits[np.isfinite(bits)], dense, tiny, dense / 8, dense / 100])
    if name == "exp_nonpositive":
        x = -np.abs(x)
    if name == "normal_tail":
        x = np.abs(x)
    x = x[np.abs(x) <= domain]
    return np.abs(x[x != 0]) if name == "log" else x


def exact(name: str, x: np.ndarray, dtype: type) -> np.ndarray:
    """Correctly rounded to longdouble from 40 digits for float64; float64 math is enough for float32."""
    if dtype is np.float32:
        f = {
            "exp": np.exp, "exp_nonpositive": np.exp, "exp_normal": np.exp, "log": np.log, "tanh": np.tanh,
            "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "erf": np.vectorize(math.erf),
            "normal_tail": np.vectorize(lambda v: math.erfc(v / math.sqrt(2)) / 2),
        }[name]  # fmt: skip
        with np.errstate(over="ignore"):
            return f(x.astype(np.float64)).astype(np.longdouble)
    with mpmath.workdps(40):
        values = [EXACT[name](mpmath.mpf(float(v))) for v in x]
        high = np.array([float(v) for v in values], dtype=np.longdouble)
        low = np.array(
            [float(v - mpmath.mpf(float(h))) if mpmath.isfinite(v) and math.isfinite(float(h)) else 0.0
             for v, h in zip(values, high, strict=True)],
            dtype=np.longdouble,
        )  # fmt: skip
    return high + low


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", BOUNDS)
def test_error_bound(isa: str, name: str, dtype: type) -> None:
    x = arguments(name, dtype, 20_000 if dtype is np.float32 else 600)
    actual, truth = run(name, x), exact(name, x, dtype)
    info = np.finfo(dtype)
    overflow = np.abs(truth) > info.max
    assert np.array_equal(actual[overflow], np.sign(truth[overflow]).astype(dtype) * np.inf)
    # An ULP of the result; below the normals, functions that flush may lose the smallest normal.
    with np.errstate(over="ignore"):
        rounded = np.abs(truth).astype(dtype)
    ulp = np.spacing(np.maximum(rounded, info.smallest_normal)).astype(np.longdouble)
    flush = name in ("exp_nonpositive", "sigmoid")
    if flush:
        normal = np.abs(truth) >= info.smallest_normal * 2
        assert np.all(np.abs(actual[~normal]) <= info.smallest_normal * 4)
    else:
        normal = np.ones_like(overflow)
    good = normal & ~overflow
    error = np.abs(actual[good].astype(np.longdouble) - truth[good]) / ulp[good]
    if name == "normal_tail":
        error /= 1 + x[good].astype(np.longdouble) ** 2 / 4
    worst = int(np.argmax(error))
    bound = BOUNDS[name][0 if dtype is np.float32 else 1]
    assert error[worst] <= bound, f"{error[worst]:.2f} ULP at {x[good][worst]!r}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_special_values(isa: str, dtype: type) -> None:
    inf, nan = np.inf, np.nan
    cases = {
        "exp": ([inf, -inf, nan, 0.0, -0.0], [inf, 0.0, nan, 1.0, 1.0]),
        "exp_nonpositive": ([-inf, nan, 0.0, -1e30], [0.0, nan, 1.0, 0.0]),
        "log": ([inf, 0.0, -0.0, -1.0, -inf, nan, 1.0], [inf, -inf, -inf, nan, nan, nan, 0.0]),
        "tanh": ([inf, -inf, nan, 0.0, -0.0, 1e30], [1.0, -1.0, nan, 0.0, -0.0, 1.0]),
        "sigmoid": ([inf, -inf, nan, 0.0, 1e30, -1e30], [1.0, 0.0, nan, 0.5, 1.0, 0.0]),
        "erf": ([inf, -inf, nan, 0.0, -0.0], [1.0, -1.0, nan, 0.0, -0.0]),
    }
    for name, (x, expected) in cases.items():
        actual = run(name, np.array(x, dtype))
        np.testing.assert_array_equal(actual, np.array(expected, dtype), err_msg=name)
        assert np.array_equal(np.signbit(actual[:1]), np.signbit(np.array(expected, dtype)[:1]))


def test_denormals(isa: str) -> None:
    x = np.array([-88.5, -95.0, -103.0], np.float32)
    np.testing.assert_allclose(run("exp", x), np.exp(x.astype(np.float64)), atol=1.5e-45)
    tiny = np.array([1e-40, 1.4e-45], np.float32)
    np.testing.assert_allclose(run("log", tiny), np.log(tiny.astype(np.float64)), rtol=2e-7)
