"""A little of every CUDA kernel, for compute-sanitizer, under which everything takes a hundred times
as long: nothing is compared here. `python tests/cuda_small.py [cpu|cuda]`."""

from __future__ import annotations

import sys

import torch

import lmkern
from lmkern.functional import embedding, embedding_bag
from lmkern.ops.backend import EMULATOR, cuda_kernels


def goldens() -> None:
    module = EMULATOR or cuda_kernels()
    for name in [] if module is None else module.golden_names():
        # What is refused there is an error of the API, which memcheck would count.
        if name != "launch.refusals":
            message = module.golden(name)
            assert not message or message.startswith("skipped: "), f"{name}: {message}"


def recurrent(device: str) -> None:
    for kind in ("LSTM", "GRU", "RNN"):
        for dtype, T, B, H in (
            (torch.float32, 3, 5, 41), (torch.bfloat16, 4, 9, 64), (torch.float16, 3, 1, 128),
        ):  # fmt: skip
            layer = getattr(lmkern.nn, kind)(H, H, device=device, dtype=dtype)
            x = torch.randn(T, B, H, device=device, dtype=dtype, requires_grad=True)
            layer(x)[0].sum().backward()


def embeddings(device: str) -> None:
    for dtype, V, D in ((torch.float32, 11, 7), (torch.bfloat16, 60, 64)):
        weight = torch.randn(V, D, device=device, dtype=dtype, requires_grad=True)
        ids = torch.randint(V, (45,), device=device)
        offsets = torch.tensor([0, 0, 7, 30], device=device)
        embedding(ids, weight).sum().backward()
        embedding_bag(ids, weight, offsets, mode="sum").sum().backward()


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    goldens()
    recurrent(where)
    embeddings(where)
    lmkern.synchronize()
    print("ok")
