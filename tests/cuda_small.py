"""A little of every CUDA kernel, for compute-sanitizer, under which everything takes a hundred times
as long: nothing is compared here. `python tests/cuda_small.py [cpu|cuda]`."""

from __future__ import annotations

import sys

import torch

import lmkern
from lmkern.functional import embedding, embedding_bag, token_position_embedding
from lmkern.ops.backend import EMULATOR, cuda_kernels, kernels_of


def goldens() -> None:
    module = EMULATOR or cuda_kernels()
    for name in [] if module is None else module.golden_names():
        # What is refused there is an error of the API, which memcheck would count.
        if name != "launch.refusals":
            message = module.golden(name)
            assert not message or message.startswith("skipped: "), f"{name}: {message}"


def recurrent(device: str, path: str) -> None:
    begin_at = getattr(kernels_of(torch.empty(0, device=device)), "recurrent_begin_at", None)
    if begin_at is not None:
        begin_at(path)
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
        position = torch.randn(15, D, device=device, dtype=dtype, requires_grad=True)
        token_position_embedding(
            ids.view(3, 15), weight, position, norm="layer", dropout_p=0.3
        ).sum().backward()


def optimizers(device: str) -> None:
    for name in ("SGD", "Adagrad", "SparseAdam"):
        layer = lmkern.nn.Embedding(30, 20, sparse=True, device=device)
        optimizer = getattr(lmkern.optim, name)(layer.parameters(), lr=0.1)
        layer(torch.randint(30, (40,), device=device)).sum().backward()
        optimizer.step()


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    goldens()
    for path in ("steps", "persistent", "cluster"):
        recurrent(where, path)
    embeddings(where)
    optimizers(where)
    lmkern.synchronize()
    print("ok")
