"""lmkern.nn.KVCache: attention token by token is attention over the whole sequence."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkern.functional import scaled_dot_product_attention as attention
from lmkern.models import KVCache as exported
from lmkern.nn import KVCache, RotaryPosition

B, H, G, D, DV = 2, 4, 2, 6, 3


def sequence(T, dtype=torch.float64):
    return (
        torch.randn(B, H, T, D, dtype=dtype),
        torch.randn(B, G, T, D, dtype=dtype),
        torch.randn(B, G, T, DV, dtype=dtype),
    )


def attend(cache, q, k, v, layer=0, counts=None, rotary=None):
    if rotary is not None:
        q, k = rotary(q, k, cache.position(layer))
    keys, values, lengths = cache.append(layer, k, v, counts)
    return attention(
        q, keys, values, is_causal=True, causal_align="bottom_right", enable_gqa=True,
        window=(cache.window, None), key_lengths=lengths,
    )  # fmt: skip


def whole(q, k, v, window=None, rotary=None):
    if rotary is not None:
        q, k = rotary(q, k)
    return attention(q, k, v, is_causal=True, enable_gqa=True, window=(window, None))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=12),
    st.sampled_from([None, 0, 1, 2, 3, 5, 30]),
    st.booleans(),
    st.booleans(),
)
def test_any_chunks_are_the_whole(chunks, window, limited, rotated):
    """Any chunks, with and without window: also across the moves of the window's buffer."""
    T = sum(chunks)
    q, k, v = sequence(T)
    rotary = RotaryPosition(D) if rotated else None
    cache = KVCache(
        1, B, G, max(T, 1) if limited or window is None else None, D, value_dim=DV, window=window,
        dtype=torch.float64,
    )  # fmt: skip
    capacity = cache.keys[0].shape[2]
    assert window is None or capacity <= 2 * (window + 1)
    parts, buffers = [], (cache.keys[0].data_ptr(), cache.values[0].data_ptr())
    for q_part, k_part, v_part in zip(*(x.split(chunks, 2) for x in (q, k, v)), strict=True):
        parts.append(attend(cache, q_part, k_part, v_part, rotary=rotary))
    assert cache.length == T and cache.position(0) == T
    assert (cache.keys[0].data_ptr(), cache.values[0].data_ptr()) == buffers
    torch.testing.assert_close(torch.cat(parts, 2), whole(q, k, v, window, rotary))


def test_what_is_returned_is_the_memory_itself():
    cache = KVCache(2, B, G, 10, D)
    _, k, _ = sequence(3, torch.float32)
    keys, values, lengths = cache.append(1, k, 2 * k)
    assert keys.data_ptr() == cache.keys[1].data_ptr() and lengths is None
    assert torch.equal(keys, k) and torch.equal(values, 2 * k)
    keys, _, _ = cache.append(1, k, k)
    assert keys.data_ptr() == cache.keys[1].data_ptr() and keys.shape == (B, G, 6, D)
    assert (cache.keys[0] == 0).all() and cache.position(0) == 0 and cache.position(1) == 6
    half = KVCache(1, B, G, 10, D, dtype=torch.bfloat16)
    keys, _, _ = half.append(0, k, k)
    assert keys.dtype == torch.float32 and torch.equal(keys, k.bfloat16().float())


def test_window_keeps_little_and_returns_what_is_seen():
    cache = KVCache(1, B, G, None, D, window=3)
    _, k, _ = sequence(100, torch.float32)
    assert cache.keys[0].shape[2] == 8
    for t in range(100):
        keys, _, _ = cache.append(0, k[:, :, t : t + 1], k[:, :, t : t + 1])
        assert torch.equal(keys, k[:, :, max(0, t - 3) : t + 1])
    keys, _, _ = cache.append(0, k[:, :, :50], k[:, :, :50])  # more than the buffer holds
    assert torch.equal(keys, torch.cat([k[:, :, 97:], k[:, :, :50]], 2))
    keys, _, _ = cache.append(0, k[:, :, :1], k[:, :, :1])
    assert torch.equal(keys, torch.cat([k[:, :, 47:50], k[:, :, :1]], 2))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_of_their_own_lengths(data):
    """Prompts padded on the left, then tokens, then chunks of which not all count."""
    draw = data.draw
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 4))
        steps.append(
            (n, draw(st.one_of(st.none(), st.lists(st.integers(0, n), min_size=B, max_size=B))))
        )
    totals = [sum(n if c is None else c[b] for n, c in steps) for b in range(B)]
    q, k, v = sequence(max(*totals, 1))
    rotary = RotaryPosition(D)
    expected = whole(q, k, v, rotary=rotary)
    cache = KVCache(1, B, G, max(*totals, 1), D, value_dim=DV, dtype=torch.float64)
    done = [0] * B
    for n, counts in steps:
        parts = [torch.full((B, x.shape[1], n, x.shape[3]), 1e9, dtype=x.dtype) for x in (q, k, v)]
        for b in range(B):
            c = n if counts is None else counts[b]
            for part, x in zip(parts, (q, k, v), strict=True):
                part[b, :, n - c :] = x[b, :, done[b] : done[b] + c]
        c = torch.full((B,), n) if counts is None else torch.tensor(counts)
        q_new, k_new = rotary(*parts[:2], cache.position(0) + c - n)
        out = attend(cache, q_new, k_new, parts[2], counts=None if counts is None else c)
        for b in range(B):
            torch.testing.assert_close(
                out[b, :, n - int(c[b]) :], expected[b, :, done[b] : done[b] + int(c[b])]
            )
            done[b] += int(c[b])
    assert torch.as_tensor(cache.position(0)).expand(B).tolist() == totals
    assert cache.length == max(totals)


def test_reorder():
    q, k, v = sequence(6)
    cache = KVCache(2, B, G, 6, D, value_dim=DV, dtype=torch.float64)
    for layer in range(2):
        attend(cache, q[:, :, :4], k[:, :, :4], v[:, :, :4], layer)
    cache.reorder(torch.tensor([1, 1]))
    out = attend(cache, q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], 1)
    mixed = [torch.cat([x[[1, 1], :, :4], x[:, :, 4:]], 2) for x in (q, k, v)]
    torch.testing.assert_close(out, whole(*mixed)[:, :, 4:])
    rows = KVCache(1, B, G, 6, D, value_dim=DV, dtype=torch.float64)
    rows.append(0, k[:, :, :4], v[:, :, :4], torch.tensor([1, 4]))
    rows.reorder(torch.tensor([1, 0]))
    assert rows.position(0).tolist() == [4, 1]
    assert torch.equal(rows.keys[0][0, :, :4], k[1, :, :4])


@pytest.mark.parametrize("window", [None, 2])
def test_truncate_and_reset(window):
    q, k, v = sequence(8)
    cache = KVCache(1, B, G, 8, D, value_dim=DV, dtype=torch.float64, window=window)
    for t in range(5):
        attend(cache, *(x[:, :, t : t + 1] for x in (q, k, v)))
    attend(cache, *(torch.full_like(x[:, :, :1], 9.0) for x in (q, k, v)))  # a draft that was wrong
    cache.truncate(9)  # nothing to forget
    cache.truncate(5)
    assert cache.length == 5
    out = attend(cache, *(x[:, :, 5:] for x in (q, k, v)))
    torch.testing.assert_close(out, whole(q, k, v, window)[:, :, 5:])
    if window is not None:
        with pytest.raises(ValueError, match="length must be at least 0 and inside of the window"):
            cache.truncate(4)
        assert cache.length == 8
    cache.reset()
    assert cache.length == 0
    torch.testing.assert_close(attend(cache, q, k, v), whole(q, k, v, window))


def test_truncate_rows():
    _, k, v = sequence(4)
    cache = KVCache(1, B, G, 8, D, value_dim=DV, dtype=torch.float64)
    cache.append(0, k, v, torch.tensor([1, 4]))
    cache.truncate(2)
    assert cache.position(0).tolist() == [1, 2] and cache.length == 2


def test_copies_are_independent_and_models_export_it():
    assert exported is KVCache
    _, k, v = sequence(3)
    cache = KVCache(1, B, G, 8, D, value_dim=DV, dtype=torch.float64)
    other = copy.deepcopy(cache)
    cache.append(0, k, v)
    assert cache.length == 3 and other.length == 0 and (other.keys[0] == 0).all()


def _cache(**change):
    return KVCache(
        **{
            **{"num_layers": 1, "batch_size": B, "num_heads": G, "max_length": 4, "head_dim": D},
            **change,
        }
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_length": None}, "max_length must be an int without window, got None"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"window": -1}, "window must be at least 0, got -1"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ],
)
def test_bad_sizes(arguments, match):
    with pytest.raises(ValueError, match=f"KVCache: {match}"):
        _cache(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"key": torch.zeros(B, H, 2, D)}, r"key must be \[B, H_kv, n, D\] = \[2, 2, 2, 6\], got \[2, 4, 2, 6\]"),
        ({"key": torch.zeros(G, 2, D)}, r"key must be \[B, H_kv, n, D\] = \[2, 2, n, 6\], got \[2, 2, 6\]"),
        ({"value": torch.zeros(B, G, 1, D)}, r"value must be \[B, H_kv, n, Dv\] = \[2, 2, 2, 6\], got \[2, 2, 1, 6\]"),
        ({"counts": torch.tensor([1, 3])}, "counts must be between 0 and n = 2, got 1 to 3"),
        ({"counts": torch.tensor([1])}, r"counts must be int64 \[B\] = \[2\], got torch.int64 \[1\]"),
    ],
)  # fmt: skip
def test_bad_tokens(change, match):
    arguments = {"key": torch.zeros(B, G, 2, D), "value": torch.zeros(B, G, 2, D), **change}
    cache = _cache()
    with pytest.raises(ValueError, match=f"KVCache: {match}"):
        cache.append(0, **arguments)
    assert cache.length == 0


def test_too_many_tokens():
    cache, x = _cache(), torch.ones(B, G, 3, D)
    cache.append(0, x, x)
    with pytest.raises(ValueError, match="tokens must be at most max_length = 4, got 6"):
        cache.append(0, x, x)
    with pytest.raises(ValueError, match="tokens must be at most max_length = 4, got 5"):
        cache.append(0, x, x, torch.tensor([2, 1]))
    assert cache.length == 3 and (cache.keys[0][:, :, 3:] == 0).all()
    with pytest.raises(ValueError, match="counts must be None with window"):
        _cache(window=2).append(0, x, x, torch.tensor([2, 1]))
    with pytest.raises(ValueError, match=r"indices must be \[B\] = \[2\], got \[3\]"):
        cache.reorder(torch.tensor([0, 1, 0]))
