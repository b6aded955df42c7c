"""Fits the polynomial coefficients of vec_math.h (development only: needs mpmath).

Each polynomial interpolates its function at Chebyshev nodes in 50-digit arithmetic, which is within
a small factor of minimax; the error it prints is relative. Run: python csrc/cpu/vec_fit.py
"""

from mpmath import chop, cos, erfc, exp, expm1, log, lu_solve, matrix, mp, mpf, pi, sqrt
from mpmath import erf as mp_erf

mp.dps = 50


def fit(f, low, high, degree):
    low, high, n = mpf(low), mpf(high), degree + 1
    nodes = [
        (low + high) / 2 + (high - low) / 2 * cos((2 * k + 1) * pi / (2 * n)) for k in range(n)
    ]
    vandermonde = matrix(n, n)
    for i, x in enumerate(nodes):
        for j in range(n):
            vandermonde[i, j] = x**j
    solution = lu_solve(vandermonde, matrix([f(x) for x in nodes]))
    return [chop(solution[i]) for i in range(n)]


def report(name, f, low, high, degree, digits):
    coefficients = fit(f, low, high, degree)
    worst = mpf(0)
    for k in range(2001):
        x = mpf(low) + (mpf(high) - low) * k / 2000
        value = sum(c * x**j for j, c in enumerate(coefficients))
        worst = max(worst, abs(value / f(x) - 1))
    print(f"// {name}: relative error {float(worst):.1e}")
    print("{" + ", ".join(mp.nstr(c, digits) for c in coefficients) + "}\n")


def exp_tail(r):  # (e^r - 1 - r) / r^2
    return mpf(1) / 2 + r / 6 if abs(r) < 1e-20 else (expm1(r) - r) / r**2


def erf_head(z):  # erf(x) / x, z = x^2
    return 2 / sqrt(pi) if z == 0 else mp_erf(sqrt(z)) / sqrt(z)


def erf_tail(t):  # erfc(x) e^(x^2) / t, t = 1 / (1 + x/2)
    x = 2 * (1 / t - 1)
    return erfc(x) * exp(x * x) / t


def normal_tail(k):
    def of(t):  # Phi(-x) e^(x^2 / 2) / t, t = 1 / (1 + k x)
        x = (1 / t - 1) / mpf(k)
        return erfc(x / sqrt(2)) / 2 * exp(x * x / 2) / t

    return of


def log_tail(z):  # (log((1 + s) / (1 - s)) / s - 2) / z, z = s^2
    s = sqrt(z)
    return mpf(2) / 3 if z == 0 else (log((1 + s) / (1 - s)) / s - 2) / z


half_ln2 = log(2) / 2 * mpf("1.001")
log_end = ((sqrt(2) - 1) / (sqrt(2) + 1)) ** 2 * mpf("1.001")
report("float exp", exp_tail, -half_ln2, half_ln2, 5, 10)
report("double exp", exp_tail, -half_ln2, half_ln2, 10, 19)
report("float erf |x| <= 1", erf_head, 0, 1, 6, 10)
report("double erf |x| <= 1", erf_head, 0, 1, 12, 19)
report("float erf |x| > 1", erf_tail, 1 / mpf(3), 2 / mpf(3), 6, 10)
report("double erf |x| > 1", erf_tail, 1 / mpf(4), 2 / mpf(3), 17, 19)
# A larger k makes the result less sensitive to t's rounding, but takes a higher degree.
report("float normal_tail", normal_tail("0.3"), mpf("0.2"), 1, 9, 10)
report("double normal_tail", normal_tail("0.2"), 1 / mpf(9), 1, 22, 19)
report("float log", log_tail, 0, log_end, 3, 10)
report("double log", log_tail, 0, log_end, 7, 19)
