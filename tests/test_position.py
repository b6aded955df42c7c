"""Positions: against their formulas, one element at a time."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from lmkern.functional import rotary_embedding
from lmkern.functional import scaled_dot_product_attention as attention
from lmkern.nn import LearnedPosition, RotaryPosition, SinusoidalPosition, alibi_slopes


def turned(x, positions, R, interleaved, base=10000.0):
    """x [H, L, D], pair by pair."""
    out = x.clone()
    for i, p in enumerate(positions):
        for r in range(R // 2):
            a, b = (2 * r, 2 * r + 1) if interleaved else (r, r + R // 2)
            angle = p * base ** (-2 * r / R)
            c, s = math.cos(angle), math.sin(angle)
            out[:, i, a] = x[:, i, a] * c - x[:, i, b] * s
            out[:, i, b] = x[:, i, b] * c + x[:, i, a] * s
    return out


@pytest.mark.parametrize("interleaved", [False, True], ids=["llama", "gptj"])
@pytest.mark.parametrize(("D", "R"), [(8, None), (8, 4), (7, 6), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rotary(interleaved, D, R, dtype):
    rotary = RotaryPosition(D, rotary_dim=R, interleaved=interleaved) if R else None
    rotary = rotary or RotaryPosition(D, interleaved=interleaved)
    q, k = torch.randn(2, 4, 5, D, dtype=dtype), torch.randn(2, 2, 5, D, dtype=dtype)
    for offset in (0, 3, torch.tensor([2, 700])):
        out = rotary(q, k, offset)
        for x, y in zip((q, k), out, strict=True):
            assert y.dtype == dtype
            for b in range(2):
                start = offset if isinstance(offset, int) else int(offset[b])
                expected = turned(x[b].double(), range(start, start + 5), R or D, interleaved)
                torch.testing.assert_close(y[b].double(), expected, atol=1e-5, rtol=1e-5)
    assert rotary(q)[1] is None
    torch.testing.assert_close(rotary(q[0], k[0], 3)[1], rotary(q, k, 3)[1][0])


def test_rows_before_the_first_position_are_padding():
    rotary, q = RotaryPosition(8), torch.randn(2, 3, 4, 8)
    out, _ = rotary(q, None, torch.tensor([-100, -2]))
    assert out.isfinite().all()
    torch.testing.assert_close(out[1, :, 2:], rotary(q[1, :, 2:])[0])


def test_rotary_scores_depend_on_distances_only():
    rotary = RotaryPosition(16)
    q, k, v = (torch.randn(1, 2, 6, 16, dtype=torch.float64) for _ in range(3))
    first = attention(*rotary(q, k), v, is_causal=True)
    torch.testing.assert_close(first, attention(*rotary(q, k, 1000), v, is_causal=True))
    assert not torch.allclose(first, attention(q, k, v, is_causal=True))


def test_rotary_far_away_is_as_exact_as_near():
    """In float32 p / 10000^(2r/R) alone would be off by 0.004 at p = 100,000."""
    q = torch.randn(1, 1, 1, 8)
    out, _ = RotaryPosition(8)(q, None, 100_000)
    torch.testing.assert_close(
        out[0].double(), turned(q[0].double(), [100_000], 8, False), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotary_rounds_once(dtype):
    rotary, q = RotaryPosition(8), torch.randn(1, 2, 40, 8).to(dtype)
    assert torch.equal(rotary(q)[0], rotary(q.float())[0].to(dtype))


def test_rotary_gradcheck_and_compile():
    rotary = RotaryPosition(4, rotary_dim=2)
    q, k = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in "qk")
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, 2), (q, k))
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    for offset in (2, torch.tensor([3])):
        for a, b in zip(compiled(q, k, offset), rotary(q, k, offset), strict=True):
            torch.testing.assert_close(a, b)


def test_tables_are_made_once_and_stay_out_of_checkpoints():
    rotary = RotaryPosition(8)
    q = torch.randn(1, 1, 5, 8)
    rotary(q)
    (first,) = rotary._table.kept.values()
    rotary(q, None, 3)
    (second,) = rotary._table.kept.values()
    assert second is first and first[0].shape == (8, 4)
    rotary(q, None, 4)
    (third,) = rotary._table.kept.values()
    assert third[0].shape == (16, 4)
    assert not rotary.state_dict()
    for other in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert not other._table.kept
        assert torch.equal(other(q, None, 4)[0], rotary(q, None, 4)[0])


@pytest.mark.parametrize("E", [6, 7])
@pytest.mark.parametrize("batch_first", [False, True], ids=["LBE", "BLE"])
def test_sinusoidal(E, batch_first):
    position = SinusoidalPosition(E, batch_first=batch_first)
    expected = torch.tensor(
        [
            [(math.cos if i % 2 else math.sin)(p / 10000 ** ((i - i % 2) / E)) for i in range(E)]
            for p in range(20)
        ]
    )
    x = torch.randn(2, 4, E)

    def run(x, offset=0):
        return (
            position(x, offset)
            if batch_first
            else position(x.transpose(0, 1), offset).transpose(0, 1)
        )

    torch.testing.assert_close(run(x), x + expected[:4])
    torch.testing.assert_close(run(x, 5), x + expected[5:9])
    torch.testing.assert_close(position(x[0], 5), x[0] + expected[5:9])
    torch.testing.assert_close(
        run(x, torch.tensor([0, 9])), x + torch.stack([expected[:4], expected[9:13]])
    )
    assert not list(position.parameters()) and not position.state_dict()
    assert position(x.bfloat16()).dtype == torch.bfloat16
    assert position(torch.zeros(0, 3, E)).shape == (0, 3, E)


@pytest.mark.parametrize("batch_first", [False, True], ids=["LBE", "BLE"])
def test_learned(batch_first):
    position = LearnedPosition(9, 6, batch_first=batch_first)
    assert list(position.state_dict()) == ["weight"] and position.weight.shape == (9, 6)
    assert 0.01 < position.weight.std() < 0.03
    x = torch.randn(2, 4, 6)

    def run(x, offset=0):
        return (
            position(x, offset)
            if batch_first
            else position(x.transpose(0, 1), offset).transpose(0, 1)
        )

    torch.testing.assert_close(run(x, 5), x + position.weight[5:9])
    torch.testing.assert_close(
        run(x, torch.tensor([5, 1])), x + torch.stack([position.weight[5:9], position.weight[1:5]])
    )
    run(x, 2).sum().backward()
    expected = torch.zeros(9, 6)
    expected[2:6] = 2
    assert torch.equal(position.weight.grad, expected)
    with pytest.raises(IndexError, match="positions must be below max_length = 9, got 6 to 9"):
        run(x, 6)
    with pytest.raises(IndexError):
        run(x, torch.tensor([0, 6]))


def test_alibi_slopes_are_the_papers():
    assert alibi_slopes(8).tolist() == [2**-i for i in range(1, 9)]
    torch.testing.assert_close(
        alibi_slopes(16, dtype=torch.float64), 2 ** (-0.5 * torch.arange(1, 17).double())
    )
    # Press et al.'s code: those of the power below, then every second of the power above.
    expected = torch.cat([alibi_slopes(8), alibi_slopes(16)[0::2][:4]])
    assert torch.equal(alibi_slopes(12), expected)
    assert torch.equal(alibi_slopes(3), torch.cat([alibi_slopes(2), alibi_slopes(4)[:1]]))
    assert alibi_slopes(1).tolist() == [2**-8]
    assert alibi_slopes(5, dtype=torch.float64).dtype == torch.float64


Q = torch.zeros(2, 3, 5, 8)
ANGLE = torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: RotaryPosition(8, rotary_dim=3), ValueError, "rotary_dim must be even and at most head_dim = 8, got 3"),
        (lambda: RotaryPosition(7), ValueError, "rotary_dim must be even and at most head_dim = 7, got 7"),
        (lambda: RotaryPosition(4)(Q), ValueError, r"query must be \[..., L, D\] with D = 4, got \[2, 3, 5, 8\]"),
        (lambda: RotaryPosition(8)(Q, None, -1), ValueError, "offset must be at least 0, got -1"),
        (lambda: RotaryPosition(8)(Q, None, torch.ones(3).long()), ValueError, r"offset must be an int or \[B\] = \[2\], got \[3\]"),
        (lambda: RotaryPosition(8)(Q, None, torch.ones(2)), TypeError, "offset must be int32 or int64, got torch.float32"),
        (lambda: RotaryPosition(8)(Q, None, "1"), TypeError, "offset must be an int or a Tensor, got str"),
        (lambda: rotary_embedding(Q, Q[:, :, :4], ANGLE, ANGLE), ValueError, r"cos must be \[..., L, R/2\] with L = 4 and R <= 8 like key, got \[5, 4\]"),
        (lambda: rotary_embedding(Q, None, ANGLE, ANGLE[:, :2]), ValueError, r"sin must be like cos \[5, 4\], got \[5, 2\]"),
        (lambda: rotary_embedding(Q[..., :6], None, ANGLE, ANGLE), ValueError, "cos must be"),
        (lambda: rotary_embedding(Q.long(), None, ANGLE, ANGLE), ValueError, "query must be floating"),
        (lambda: SinusoidalPosition(0), ValueError, "embed_dim must be at least 1, got 0"),
        (lambda: SinusoidalPosition(7)(Q[0]), ValueError, r"input must be \[L, B, E\] or \[L, E\] with E = 7, got \[3, 5, 8\]"),
        (lambda: SinusoidalPosition(8)(Q[0], torch.tensor([1, 2])), ValueError, r"offset must be an int or \[B\] = \[5\], got \[2\]"),
        (lambda: LearnedPosition(0, 8), ValueError, "max_length must be at least 1, got 0"),
        (lambda: alibi_slopes(0), ValueError, "num_heads must be at least 1, got 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
