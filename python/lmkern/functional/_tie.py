"""One weight as embedding table and as head.

The underscore keeps ``lmkern.functional.tie`` free for the function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.ops.check import check_tensors
from lmkern.ops.library import is_plain_eager, needs_grad


def tie(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two names of one weight: ``table`` for a sparse lookup, ``head`` for the logits.

    ::

        table, head = tie(embedding.weight)
        x = embedding(ids, table, sparse=True)
        loss = linear_cross_entropy(model(x), head, targets)

    The gradient of ``weight`` is dense, as of any weight that is used twice, but the lookup's part of
    it never is: its rows are added into the gradient of the head, in place where nothing else holds
    that. This saves the memory of a second [V, D] gradient and three passes over it.

    Args:
        weight: [V, D], of any dtype.

    Returns:
        table, head: both are ``weight``; under torch.compile, torch.func or without gradients literally.

    Raises:
        TypeError: weight is not a Tensor.
    """
    check_tensors("tie", weight=weight)
    if not is_plain_eager() or not needs_grad(weight):
        return weight, weight
    return _Tie.apply(weight)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, d_table, d_head):  # type: ignore[override]
        if d_table is None or d_head is None:
            return d_head if d_table is None else d_table.to_dense()
        if not d_table.is_sparse or torch.is_grad_enabled():
            return d_head + d_table.to_dense()
        return d_head.add_(d_table) if _is_owned(d_head) else d_head + d_table


def _is_owned(gradient: Tensor) -> bool:
    """Whether no other tensor shares this memory: its storage is held by it and by us, here."""
    storage = gradient.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count <= 2 and gradient.is_contiguous()
