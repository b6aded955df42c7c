"""Attention's kernels give the same bits again: another time, and on any number of threads."""

from __future__ import annotations

import pytest
import torch

from attention_helpers import assert_same_bits, heads, threads
from lmkern.functional import scaled_dot_product_attention as attention
from oracle import outputs_and_gradients

B, H, L, S = 2, 4, 200, 330  # large enough for every pass to fork
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_align": "bottom_right", "softcap": 5.0},
    "window": {"window": (100, 50), "causal_align": "bottom_right"},
    "key lengths": {"key_lengths": torch.tensor([330, 65])},
    "bool mask": {"attn_mask": torch.rand(H, 1, S, generator=torch.Generator()) > 0.3},
    "dropout": {"dropout_p": 0.1, "is_causal": True},
    "gqa": {"enable_gqa": True},
    "extras": {},  # float mask, slopes and sinks, with gradients
    "packed": {"cu_seqlens": torch.tensor([0, 1, 1, 130, 200])},
}


def arguments(name, dtype=torch.float32, batch=B):
    """(f, inputs) of one case: f seeds the generator first."""
    options = CASES[name]
    inputs = heads(batch, H, L, S, 40, 24, dtype, 2 if name == "gqa" else H)
    if "key_lengths" in options:
        options = {"key_lengths": options["key_lengths"][:batch]}
    if name == "packed":
        inputs = [x[0] for x in heads(1, H, L, L, 40, 24, dtype)]
    if name == "extras":
        inputs += [torch.randn(batch, 1, 1, S, dtype=torch.float32).to(dtype), torch.rand(H) / 8]
        inputs += [torch.randn(H)]

    def f(q, k, v, *extras):
        torch.manual_seed(7)
        more = dict(zip(("attn_mask", "alibi_slopes", "sinks"), extras, strict=False))
        return attention(q, k, v, **options, **more, return_lse=True)

    return f, inputs


@pytest.mark.parametrize("name", list(CASES))
def test_any_thread_count(isa, name):
    """Also with so few heads that queries and keys are divided among threads, in place of heads."""
    for batch in (B, 1):
        f, inputs = arguments(name, batch=batch)
        results = []
        for n in (1, 2, 3):
            with threads(n):
                results.append(outputs_and_gradients(f, inputs))
        assert_same_bits(results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "dropout", "extras"])
def test_any_thread_count_in_other_dtypes(name, dtype):
    f, inputs = arguments(name, dtype, batch=1)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(outputs_and_gradients(f, inputs))
    assert_same_bits(results)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_thread_count_in_decoding(isa, dtype, queries):
    q, k, v = heads(2, 8, queries, 2600, 64, 64, dtype, 2)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(attention(q, k, v, enable_gqa=True, return_lse=True))
    assert_same_bits(results)


@pytest.mark.parametrize("name", ["causal", "dropout", "extras", "gqa"])
def test_a_hundred_times(name):
    f, inputs = arguments(name)
    with threads(2):
        first = outputs_and_gradients(f, inputs)
        for _ in range(99):
            assert_same_bits([first, outputs_and_gradients(f, inputs)])


def test_decoding_and_weights_a_hundred_times():
    q, k, v = heads(2, 8, 1, 1300, 64, 64, key_heads=2)
    long_q = torch.randn(2, 8, 70, 64)
    with threads(2):
        first = attention(q, k, v, enable_gqa=True)
        weights = attention(long_q, k, v, enable_gqa=True, return_weights="mean")
        for _ in range(99):
            assert_same_bits([[first], [attention(q, k, v, enable_gqa=True)]])
            again = attention(long_q, k, v, enable_gqa=True, return_weights="mean")
            assert_same_bits([weights, again])


@pytest.mark.long
@pytest.mark.parametrize("name", list(CASES))
def test_every_option_a_hundred_times(isa, name):
    for batch in (B, 1):
        f, inputs = arguments(name, batch=batch)
        with threads(3):
            first = outputs_and_gradients(f, inputs)
            for _ in range(99):
                assert_same_bits([first, outputs_and_gradients(f, inputs)])
