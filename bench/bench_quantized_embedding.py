"""Lookup and sums of bags in tables of 8 and 4 bits, against torch's of the same, and in float32.

Predicted from bytes: a lookup writes 4 bytes an element and reads 1 or 1/2 instead of 4: at most
twice as fast as float32. Bags write little: up to four and eight times, as far as memory is the limit.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness import Case, assert_close, infer
from lmkern.functional import embedding, embedding_bag
from lmkern.nn import quantize_embedding

# (V, D, N)
SIZES = [(50257, 768, 8192), (1000000, 64, 65536)]
BAG = 64


def torch_table(weight: torch.Tensor, bits: int):
    """torch's own quantised table, packed; its 4 bits have no plain lookup."""
    low, high = weight.aminmax(dim=1)
    scale = (high - low) / (2**bits - 1)
    dtype = torch.quint8 if bits == 8 else torch.quint4x2
    quantised = torch.quantize_per_channel(weight, scale, -low / scale, 0, dtype)
    return torch.ops.quantized.embedding_bag_prepack(quantised)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", [None, "sum"])
def test_quantized_embedding(compare, threads, mode, size, bits):
    V, D, N = size
    weight = torch.randn(V, D)
    layer, packed = quantize_embedding(weight, bits), torch_table(weight, bits)
    ids = torch.randint(V, (N,))
    bags, offsets = ids.view(-1, BAG), torch.arange(0, N, BAG)
    kind = "byte" if bits == 8 else "4bit"
    if mode is None:
        lookup = getattr(torch.ops.quantized, f"embedding_{kind}")
        ours = lambda: [layer(ids)]  # noqa: E731
        peers = {
            "quantized": lambda: [lookup(packed, ids)],
            "float32": lambda: infer(lambda: [F.embedding(ids, weight)], []),
            "lmkern float32": lambda: infer(lambda: [embedding(ids, weight)], []),
        }
    else:
        layer.mode = mode
        bag = getattr(torch.ops.quantized, f"embedding_bag_{kind}")
        ours = lambda: [layer(bags)]  # noqa: E731
        peers = {
            "quantized": lambda: [bag(packed, ids, offsets, False, 0)],
            "float32": lambda: infer(lambda: [F.embedding_bag(bags, weight, mode=mode)], []),
            "lmkern float32": lambda: infer(lambda: [embedding_bag(bags, weight, mode=mode)], []),
        }

    def check():
        assert_close(ours(), peers["quantized"](), 2e-2 if bits == 8 else 0.2, "quantized")

    written = N * D if mode is None else N // BAG * D
    compare(
        Case(
            f"quantized embedding {bits} bits {mode or 'rows'} V,D,N={size}",
            ours=ours,
            peers=peers,
            check=check,
            bytes=N * (D * bits // 8 + 8) + 4 * written,
            reads=mode is not None,
        )
    )
