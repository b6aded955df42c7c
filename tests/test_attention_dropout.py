"""Attention's dropout: which weights fall, by what random numbers, and that all passes agree on it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from attention_helpers import DTYPES, assert_same_bits, compare, heads, threads
from lmkern import reference
from lmkern.functional import scaled_dot_product_attention as attention
from oracle import outputs_and_gradients

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (30, 20), "causal_align": "bottom_right", "softcap": 4.0},
    "key lengths": {"key_lengths": torch.tensor([130, 61]), "scale": 0.2},
    "gqa": {"enable_gqa": True},
}


def seed_after(manual_seed):
    """The seed that a call draws from torch's generator."""
    torch.manual_seed(manual_seed)
    return torch.randint(1 << 62, ())


def keep_mask(seed, p, B=1, H=1, L=8, S=16, dtype=torch.float32):
    """What dropout multiplies the weights with, [B, H, L, S]: 0 or 1 / (1 - p)."""
    q, k = torch.zeros(B, H, L, 1, dtype=dtype), torch.zeros(B, H, S, 1, dtype=dtype)
    seed = torch.as_tensor(seed, dtype=torch.int64)
    lse = torch.zeros(B, H, L, dtype=torch.promote_types(dtype, torch.float32))
    return torch.ops.lmkern.attention_weights(
        q, k, k, None, None, None, None, None, None, seed, 1.0, 0.0, -1, -1, False, p, lse, False,
        True,
    )  # fmt: skip


def philox(counter, key):
    """Philox 4x32-10 of Salmon et al. 2011, section 3.2, in Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k0, high, (low >> 32) ^ c[3] ^ k1, low]
        c = [x & 0xFFFFFFFF for x in c]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def test_philox_against_its_authors():
    """kat_vectors of Random123 1.14."""
    ones, digits = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, expected in (
        ([0] * 4, [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ones, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (digits, [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        assert " ".join(f"{x:08x}" for x in philox(counter, key)) == expected


def test_the_kernels_philox_gives_the_published_answer(isa):
    """Counter 0, key 0: query 0, keys 0 to 7 of the first head. A key is dropped if its 16 bits are
    less than 2^16 p, so two masks tell them exactly."""
    for key, bits in enumerate([0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]):
        assert keep_mask(0, bits / 65536)[0, 0, 0, key] > 0
        assert keep_mask(0, (bits + 1) / 65536)[0, 0, 0, key] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [1, 0x299F31D0A4093822, (1 << 62) - 1, -1])
def test_which_weights_fall(isa, seed, dtype):
    """Bit for bit as in Python: counter (query, key / 8, head, sequence), word n / 2, low half first."""
    B, H, L, S, p = 2, 3, 37, 75, 0.3
    limit = round(p * 65536)
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    expected = torch.zeros(B, H, L, S, dtype=torch.bool)
    for b, h, i, j in itertools.product(range(B), range(H), range(L), range(0, S, 8)):
        words = philox([i, j // 8, h, b], key)
        for n in range(min(8, S - j)):
            expected[b, h, i, j + n] = (words[n // 2] >> (16 * (n % 2))) & 0xFFFF >= limit
    actual = keep_mask(seed, p, B, H, L, S, dtype)
    assert torch.equal(actual > 0, expected)
    factor = torch.tensor(65536 / (65536 - limit)).to(dtype)
    assert (actual[expected] == factor).all()


def test_drop_rate_is_p():
    for p in (0.1, 0.5, 0.9):
        kept = (keep_mask(12, p, 2, 4, 256, 512) > 0).double()
        sigma = math.sqrt(p * (1 - p) / kept.numel())
        assert abs(kept.mean().item() - (1 - p)) < 5 * sigma + 1e-5
        for axis in (2, 3):  # no query and no key of its own rate
            others = [a for a in range(4) if a != axis]
            n = kept.numel() // kept.shape[axis]
            assert ((kept.mean(others) - (1 - p)).abs() < 6 * math.sqrt(p * (1 - p) / n)).all()


def test_neighbours_are_independent():
    keep = torch.stack([keep_mask(s, 0.5, 3, 4, 128, 256) for s in (5, 6, 7, 1 << 33)])
    x = (keep > 0).double() - 0.5
    for axis, name in enumerate(("seed", "batch", "head", "query", "key")):
        for distance in (1, 2, 8, 64):
            if distance >= x.shape[axis]:
                continue
            n = x.shape[axis] - distance
            a, b = x.narrow(axis, 0, n), x.narrow(axis, distance, n)
            r = 4 * (a * b).mean().item()
            assert abs(r) < 5 / math.sqrt(a.numel()), f"{name}s {distance} apart: {r:.1e}"


def test_probabilities_of_zero_and_one():
    inputs = heads(2, 2, 70, 90, 16, 16)
    before = torch.get_rng_state()
    assert_same_bits(
        outputs_and_gradients(lambda *a, p=p: attention(*a, dropout_p=p), inputs)
        for p in ([0.0] * 2)
    )
    attention(*inputs, dropout_p=0.0)
    assert torch.equal(before, torch.get_rng_state())  # which p = 0 leaves alone
    results = outputs_and_gradients(lambda *a: attention(*a, dropout_p=1.0), inputs)
    assert all((x == 0).all() for x in results)
    _, weights = attention(*inputs, dropout_p=1.0, return_weights="heads")
    assert (weights == 0).all()
    assert (keep_mask(3, 1e-6) == 1).all()  # rounded to a multiple of 2^-16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(OPTIONS))
def test_one_mask_explains_results_and_gradients(isa, name, dtype):
    """Forward, backward and the returned weights, against the reference with the dense mask."""
    options, p = OPTIONS[name], 0.35
    H = 4
    inputs = heads(2, H, 97, 130, 24, 20, dtype, 2 if name == "gqa" else H)
    keep = keep_mask(seed_after(8), p, 2, H, 97, 130, torch.float64)

    def ours(*a):
        torch.manual_seed(8)
        return attention(*a, dropout_p=p, return_lse=True, **options)

    def theirs(*a):
        return reference.scaled_dot_product_attention(*a, keep=keep, return_lse=True, **options)

    compare(ours, theirs, inputs)


def test_one_mask_explains_the_gradients_of_all_that_has_one():
    B, H, L, S, p = 2, 2, 70, 90, 0.2
    q, k, v = heads(B, H, L, S, 16, 12)
    keep = keep_mask(seed_after(3), p, B, H, L, S, torch.float64)
    inputs = [q, k, v, torch.randn(H, 1, S), torch.rand(B, H) / 8, torch.randn(H)]

    def ours(q, k, v, mask, slopes, sinks):
        torch.manual_seed(3)
        return attention(q, k, v, mask, p, alibi_slopes=slopes, sinks=sinks)

    def theirs(q, k, v, mask, slopes, sinks):
        return reference.scaled_dot_product_attention(
            q, k, v, mask, alibi_slopes=slopes, sinks=sinks, keep=keep
        )

    compare(ours, theirs, inputs)


def test_packed_sequences_have_masks_of_their_own():
    """The mask of sequence b is that of batch b, whatever its place."""
    lengths, H, D, p = [70, 0, 130, 5], 2, 16, 0.4
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    q, k, v = (x[0] for x in heads(1, H, 205, 205, D, D))
    keep = keep_mask(seed_after(5), p, 4, H, 130, 130, torch.float64)

    def ours(*a):
        torch.manual_seed(5)
        return attention(*a, dropout_p=p, cu_seqlens=cu, is_causal=True)

    def theirs(q, k, v):
        outs = []
        for b, n in enumerate(lengths):
            rows = slice(int(cu[b]), int(cu[b + 1]))
            outs.append(
                reference.scaled_dot_product_attention(
                    q[:, rows], k[:, rows], v[:, rows], is_causal=True, keep=keep[b, :, :n, :n]
                )
            )
        return torch.cat(outs, 1)

    compare(ours, theirs, [q, k, v])


@pytest.mark.parametrize("L", [1, 3, 4, 5])
def test_few_queries(L):
    """Decoding's kernel knows no dropout: it must not be chosen, nor change which weights fall."""
    inputs = heads(2, 2, L, 600, 16, 16)
    keep = keep_mask(seed_after(9), 0.5, 2, 2, L, 600, torch.float64)

    def ours(*a):
        torch.manual_seed(9)
        return attention(*a, dropout_p=0.5)

    compare(ours, lambda *a: reference.scaled_dot_product_attention(*a, keep=keep), inputs)


def test_torchs_generator_rules():
    inputs = heads(1, 2, 40, 50, 8, 8)

    def run():
        return attention(*inputs, dropout_p=0.5)

    torch.manual_seed(4)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(first, run()) and torch.equal(second, run())
    with torch.random.fork_rng():
        run()
    torch.manual_seed(4)
    run()
    state = torch.get_rng_state()
    third = run()
    torch.set_rng_state(state)
    assert torch.equal(third, run())
    torch.manual_seed(4)
    attention(*inputs, dropout_p=0.5, return_weights="heads", return_lse=True)
    assert torch.equal(second, run())  # one number for each call, whatever it returns


def test_same_mask_for_any_thread_count(isa):
    inputs, results = heads(1, 3, 200, 300, 32, 32), []
    for n in (1, 2, 3):
        with threads(n):
            torch.manual_seed(2)
            results.append(
                outputs_and_gradients(
                    lambda *a: attention(*a, dropout_p=0.3, return_weights="heads")[0], inputs
                )
            )
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_plain_operations_compute_have_the_same_mask(dtype):
    """Asked for a graph of the gradients, plain torch operations replay the kernel's mask."""
    inputs, results = [x.requires_grad_() for x in heads(1, 2, 30, 40, 16, 16, dtype)], []
    for graph in (False, True):
        torch.manual_seed(6)
        out = attention(*inputs, dropout_p=0.1)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out), create_graph=graph)
        results.append(torch.cat([g.detach().double().flatten() for g in grads]))
    kernel, plain = results
    torch.testing.assert_close(
        plain, kernel, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0
    )
    factor = ((plain * kernel).sum() / kernel.square().sum()).item()
    assert abs(factor - 1) < 5e-4  # 1 / (1 - p) is not rounded to bfloat16
