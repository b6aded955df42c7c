"""The kernel of lmkern.functional.rotary_embedding; what it means is tested in test_position.py."""

from __future__ import annotations

import pytest
import torch

from lmkern import _C
from lmkern.functional import rotary_embedding
from lmkern.functional.position import _rotate
from oracle import assert_oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tables(length, pairs, batch=None, dtype=torch.float32):
    angle = torch.rand(*(() if batch is None else (batch, 1)), length, pairs, dtype=dtype) * 6
    return angle.cos(), angle.sin()


def plain(q, k, cos, sin, interleaved):
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["llama", "gptj"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "R"), [(64, 64), (128, 32), (59, 58), (111, 40), (2, 2), (3, 0)])
def test_oracle(isa, D, R, dtype, interleaved):
    q, k = torch.randn(2, 6, 7, D).to(dtype), torch.randn(2, 2, 7, D).to(dtype)
    for batch in (None, 2):
        cos, sin = tables(7, R // 2, batch)

        def ours(q, k, cos=cos, sin=sin):
            return rotary_embedding(
                q, k, cos.to(q.dtype).to(_wide(q)), sin.to(_wide(q)), interleaved
            )

        def theirs(q, k, cos=cos, sin=sin):
            return plain(q, k, cos.to(q.dtype).to(_wide(q)), sin.to(_wide(q)), interleaved)

        if dtype in (torch.float32, torch.float64):
            assert_oracle(ours, theirs, [q, k])
        else:
            for a, b in zip(ours(q, k), theirs(q, k), strict=True):
                assert a.dtype == dtype and torch.equal(a, b)


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


@pytest.mark.parametrize("interleaved", [False, True], ids=["llama", "gptj"])
def test_strides(interleaved):
    qkv = torch.randn(2, 7, 3, 4, 16)  # as a projection gives them
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    cos, sin = tables(7, 8)
    for x, y in ((q, k), (q[..., ::2], k[..., ::2]), (q[:, :1].expand(2, 4, 7, 16), k)):
        table = cos[:, : x.shape[-1] // 2], sin[:, : x.shape[-1] // 2]
        for a, b in zip(
            rotary_embedding(x, y, *table, interleaved),
            plain(x, y, *table, interleaved),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert torch.equal(v, qkv[:, :, 2].transpose(1, 2))


@pytest.mark.parametrize("shape", [(7, 16), (3, 7, 16), (0, 3, 7, 16), (2, 3, 0, 16)], ids=str)
def test_fewer_dimensions_and_nothing(shape):
    q = torch.randn(shape, requires_grad=True)
    cos, sin = tables(shape[-2], 8)
    out, none = rotary_embedding(q, None, cos, sin)
    assert none is None
    torch.testing.assert_close(out, _rotate(q, cos, sin, False))
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_derivatives():
    q, k = (torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = tables(3, 2, dtype=torch.float64)
    for interleaved in (False, True):
        f = lambda q, k, i=interleaved: rotary_embedding(q, k, cos, sin, i)  # noqa: E731
        assert torch.autograd.gradcheck(f, [q, k])
        assert torch.autograd.gradgradcheck(f, [q, k])
        assert torch.autograd.gradcheck(lambda q, f=f: f(q, None)[0], [q])
    leaf = cos.clone().requires_grad_()
    (ours,) = torch.autograd.grad(rotary_embedding(q, k, leaf, sin)[0].square().sum(), leaf)
    (theirs,) = torch.autograd.grad(_rotate(q, leaf, sin, False).square().sum(), leaf)
    torch.testing.assert_close(ours, theirs)


def test_transforms_compile_and_opcheck():
    q, k = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 4, 5, 8)
    cos, sin = tables(5, 4)
    mapped = torch.func.vmap(lambda q, k: rotary_embedding(q, k, cos, sin))(q, k)
    for n in range(3):
        for a, b in zip(mapped, rotary_embedding(q[n], k[n], cos, sin), strict=True):
            torch.testing.assert_close(a[n], b)
    leaf = q[0].clone().requires_grad_()
    compiled = torch.compile(
        lambda q: rotary_embedding(q, k[0], cos, sin), fullgraph=True, backend="aot_eager"
    )
    (ours,) = torch.autograd.grad(compiled(leaf)[0].square().sum(), leaf)
    (theirs,) = torch.autograd.grad(_rotate(leaf, cos, sin, False).square().sum(), leaf)
    torch.testing.assert_close(ours, theirs)
    op, tables_3d = torch.ops.lmkern.rotary_embedding.default, (cos[None], sin[None])
    torch.library.opcheck(op, (q[0], k[0], *tables_3d, False, False))
    torch.library.opcheck(op, (q[0], None, *tables_3d, True, True))


def test_kernel_is_called_once_for_both(monkeypatch):
    calls, kernel = [], _C.rotary_embedding
    monkeypatch.setattr(_C, "rotary_embedding", lambda *a: (calls.append(1), kernel(*a))[1])
    rotary_embedding(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), *tables(3, 4))
    assert len(calls) == 1


def test_same_bits_for_any_thread_count():
    q, k, (cos, sin) = torch.randn(2, 8, 200, 64), torch.randn(2, 2, 200, 64), tables(200, 32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(rotary_embedding(q, k, cos, sin))
    finally:
        torch.set_num_threads(before)
    for a, b in results[1:]:
        assert torch.equal(a, results[0][0]) and torch.equal(b, results[0][1])
