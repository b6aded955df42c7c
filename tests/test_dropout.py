"""lmkern.functional.dropout and lmkern.nn.Dropout."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import _C
from lmkern.functional import dropout

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def philox(counter, key):
    """Philox 4x32-10 after Salmon et al. 2011, one counter of four words."""
    c, k, mask = list(counter), [key & 0xFFFFFFFF, key >> 32], 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def test_the_reference_generator_has_its_published_values():
    ones = 0xFFFFFFFF
    assert philox([0] * 4, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([ones] * 4, (ones << 32) | ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 41, 64, 131, 1000])
def test_mask_is_the_documented_function_of_seed_and_index(isa, n, dtype):
    seed, p = 0x1234_5678_9ABC_DEF0, 0.3
    out = torch.empty(n, dtype=dtype)
    _C.dropout(torch.ones(n, dtype=dtype), out, p, seed)
    words = [w for quad in range((n + 3) // 4) for w in philox([quad, 0, 0, 0], seed)][:n]
    keep = torch.tensor([w >= round(p * 2**32) for w in words])
    expected = torch.where(keep, torch.tensor(1 / (1 - p), dtype=torch.float64), 0.0)
    assert torch.equal(out, expected.to(dtype))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.floats(0.01, 0.99),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_values_and_gradient_use_one_mask(shape, p, dtype, transposed):
    x = torch.randn(shape).abs().add(0.1).to(dtype)
    if transposed and len(shape) > 1:
        x = x.transpose(0, -1)
    x.requires_grad_()
    y = dropout(x, p)
    kept = y != 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(1 / (1 - p), dtype=wide)
    exact = torch.where(kept, x.detach().to(wide) * scale, 0.0).to(dtype)
    torch.testing.assert_close(y, exact, rtol=1e-6 if wide == dtype else 1e-2, atol=0)
    (d_x,) = torch.autograd.grad(y, x, torch.ones((), dtype=dtype).expand_as(y))
    torch.testing.assert_close(d_x, torch.where(kept, scale, 0.0).to(dtype))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_frequency_and_independence(p):
    n = 1 << 20
    kept = (dropout(torch.ones(n), p) != 0).double() - (1 - p)
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(kept.mean()) < 4 * deviation
    for distance in (1, 2, 4, 64, 1024):  # words of one counter, neighbours, lanes, rows
        correlation = (kept[:-distance] * kept[distance:]).mean() / (p * (1 - p))
        assert abs(correlation) < 4 / n**0.5


def test_seed_comes_from_torchs_generator():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)


def test_checkpoint_sees_the_same_mask():
    x = torch.randn(300, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda v: dropout(v).exp(), x, use_reentrant=False)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    kept = y != 1
    torch.testing.assert_close(d_x, torch.where(kept, 2 * y, 0.0).detach())


def test_same_bits_for_any_thread_count():
    x, results, before = torch.randn(333, 131), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            results.append(dropout(x, 0.3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_same_bits_on_any_instruction_set():
    x, out, before = torch.randn(1003), [], _C.isa()
    for name in _C.supported_isas():
        _C.set_isa(name)
        out.append(torch.empty_like(x))
        _C.dropout(x, out[-1], 0.3, 7)
    _C.set_isa(before)
    assert all(torch.equal(out[0], other) for other in out[1:])


def test_limits():
    x = torch.randn(5, 7, requires_grad=True)
    assert dropout(x, 0.0) is x and dropout(x, 0.5, training=False) is x
    y = dropout(x, 1.0)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and not d_x.any()
    assert dropout(torch.zeros(0, 3)).shape == (0, 3)
    assert dropout(torch.ones((1,) * 9 + (2,))).dim() == 10
    tiny = dropout(torch.ones(100_000), 1e-12)
    assert (tiny == 1).all()


@pytest.mark.parametrize("strided", [False, True])
def test_inplace(strided):
    leaf = torch.randn(40, 30, requires_grad=True)
    x = leaf * 1
    x = x.t() if strided else x
    version = x._version
    y = dropout(x, 0.5, True, True)
    assert y is x and x._version > version
    (d_leaf,) = torch.autograd.grad(y.sum(), leaf)
    kept = y.detach() != 0
    assert 300 < kept.sum() < 900
    torch.testing.assert_close(d_leaf, (kept.t() if strided else kept) * 2.0)
    with torch.no_grad():
        z = torch.ones(50)
        assert dropout(z, 0.5, True, True) is z and set(z.tolist()) == {0.0, 2.0}
    assert dropout(z, 0.5, False, True) is z and dropout(z, 0.0, True, True) is z


def test_inplace_is_guarded_as_torchs():
    leaf = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        dropout(leaf, 0.5, True, True)
    x = leaf * 1
    y = x.exp()
    dropout(y, 0.5, True, True)  # exp's gradient needs what was overwritten
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradcheck():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def fixed(x):
        torch.manual_seed(0)
        return dropout(x, 0.4)

    assert torch.autograd.gradcheck(fixed, [x])
    assert torch.autograd.gradgradcheck(lambda x: fixed(x).square(), [x])


def test_opcheck():
    x, seed = torch.randn(3, 5), torch.tensor(9)
    torch.library.opcheck(torch.ops.lmkern.dropout.default, (x, seed, 0.3))
    torch.library.opcheck(torch.ops.lmkern.dropout.default, (x.t(), seed, 0.3))
    torch.library.opcheck(torch.ops.lmkern.dropout_.default, (x, seed, 0.3))


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_fullgraph(inplace):
    def run(x):
        return dropout(x * 1, 0.5, True, inplace)

    x = torch.ones(200, requires_grad=True)
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(d_x, y) and 50 < (y != 0).sum() < 150


def test_functorch_follows_torchs_randomness():
    x = torch.ones(3, 100)
    same = torch.func.vmap(dropout, randomness="same")(x)
    different = torch.func.vmap(dropout, randomness="different")(x)
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(dropout)(x)
    out, tangent = torch.func.jvp(dropout, (x,), (x,))
    assert torch.equal(out, tangent)


def test_kernel_is_called_both_ways(monkeypatch):
    called, kernel = [], _C.dropout
    monkeypatch.setattr(_C, "dropout", lambda *a: (called.append(1), kernel(*a))[1])
    lmkern.nn.Dropout()(torch.ones(3, requires_grad=True)).sum().backward()
    assert len(called) == 2


@pytest.mark.usefixtures("fallback_allowed")
def test_what_has_no_kernel_runs_torchs_operator():
    assert dropout(torch.ones(3, device="meta")).shape == (3,)
    with pytest.raises(NotImplementedError):  # as in torch
        dropout(torch.ones(3, dtype=torch.complex64))


def test_layer_is_torchs_but_for_the_kernel():
    ours, theirs = lmkern.nn.Dropout, torch.nn.Dropout
    assert inspect.signature(ours) == inspect.signature(theirs) and issubclass(ours, theirs)
    layer, x = ours(0.3, inplace=True), torch.ones(100)
    assert repr(layer) == repr(theirs(0.3, inplace=True)) and layer(x) is x and not x.all()
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_bad_probability(p):
    with pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\], got") as caught:
        dropout(torch.ones(2), p)
    assert "\n" not in str(caught.value)


def test_bad_input():
    with pytest.raises(TypeError, match="dropout: input must be a Tensor, got list"):
        dropout([1.0])
