"""The products around a recurrent layer, against torch.mm: projection, d_x and d_W."""

from __future__ import annotations

import pytest
import torch

from harness import Case, assert_close
from lmkern.ops.library import matmul

# M rows of x (steps x batch), N outputs, K inputs
SIZES = [
    (2048, 1024, 256),
    (4096, 2048, 512),
    (16384, 512, 128),
    (700, 2600, 650),
    (2048, 4096, 1024),
]


@pytest.mark.parametrize("form", ["x W^T", "d W", "d^T x"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matmul(compare, threads, size, form):
    M, N, K = size
    torch.manual_seed(0)
    x, d, weight = torch.randn(M, K), torch.randn(M, N), torch.randn(N, K)
    a, b = {"x W^T": (x, weight.t()), "d W": (d, weight), "d^T x": (d.t(), x)}[form]
    ours, theirs = torch.empty(2, a.shape[0], b.shape[1])
    compare(
        Case(
            f"matmul {form} M,N,K={size}",
            ours=lambda: matmul(a, b, out=ours),
            peers={"torch": lambda: torch.mm(a, b, out=theirs)},
            check=lambda: assert_close([matmul(a, b)], [a @ b], 1e-5),
            flops=2 * M * N * K,
        )
    )
