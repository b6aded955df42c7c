"""Quantised embedding tables: lookup and bags. Layout: csrc/ops/quantized_embedding.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern import _C
from lmkern.ops.embedding import contiguous_rows
from lmkern.ops.embedding_bag import BAGS, bag_count, contiguous_bags
from lmkern.ops.library import define_op
from lmkern.ops.memory import fresh


def _fake(table: Tensor, width: int, bits: int, input: Tensor, dtype: torch.dtype) -> Tensor:
    return fresh(table, *input.shape, width, dtype=dtype)


def _cpu(table: Tensor, width: int, bits: int, input: Tensor, dtype: torch.dtype) -> Tensor:
    out = _fake(table, width, bits, input, dtype)
    flat = out.view(input.numel(), width)
    _C.quantized_embedding(contiguous_rows(table), width, bits, input.contiguous(), flat)
    return out


def _bag_fake(table: Tensor, width: int, bits: int, dtype: torch.dtype, *bags: Any) -> Tensor:
    return fresh(table, bag_count(bags[0], bags[1], bags[3]), width, dtype=dtype)


def _bag_cpu(table: Tensor, width: int, bits: int, dtype: torch.dtype, *bags: Any) -> Tensor:
    out = _bag_fake(table, width, bits, dtype, *bags)
    _C.quantized_embedding_bag(contiguous_rows(table), width, bits, contiguous_bags(bags), out)
    return out


define_op(
    "quantized_embedding(Tensor table, SymInt width, int bits, Tensor input, ScalarType dtype) "
    "-> Tensor",
    cpu=_cpu,
    fake=_fake,
)
define_op(
    "quantized_embedding_bag(Tensor table, SymInt width, int bits, ScalarType dtype, "
    f"{BAGS}) -> Tensor",
    cpu=_bag_cpu,
    fake=_bag_fake,
)
