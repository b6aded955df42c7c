"""Attention under torch.func: batching rules, and the autograd Function for its transforms.

A mapped batch becomes a wider batch of one call, except with mapped sinks, packed sequences or dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmkern.ops.transforms import differentiate_gradient, one_by_one

_BATCHED = 7  # q, k, v, mask, alibi_slopes, sinks, key_lengths; only sinks have no batch
_SINKS = 5


def _fold(tensor: Any, dim: Any, size: int, whole: bool) -> Any:
    """[V, B, ...] as [V * B, ...]; what is not mapped and broadcast along B stays, unless `whole`."""
    if tensor is None:
        return None
    if dim is None:
        if tensor.shape[0] == 1 and not whole:
            return tensor
        return tensor.unsqueeze(0).expand(size, *tensor.shape).flatten(0, 1)
    return tensor.movedim(dim, 0).flatten(0, 1)


def _folds(in_dims: Any, args: Any) -> bool:
    """Whether one wide call computes what a call for each element would."""
    packed, dropout_p = args[7] is not None, args[15]
    return not packed and dropout_p == 0.0 and in_dims[_SINKS] is None


def _fold_problem(info: Any, in_dims: Any, args: Any, whole_mask: bool) -> list[Any]:
    size, q, q_dim = info.batch_size, args[0], in_dims[0]
    batch = q.shape[0] if q_dim is None else q.movedim(q_dim, 0).shape[1]
    wide = list(args)
    for n in range(_BATCHED):
        if n == _SINKS or args[n] is None:
            continue
        tensor, dim = args[n], in_dims[n]
        if n == 3:  # a mask may be broadcast along B, also where it is mapped
            rows = tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]
            if rows != batch and (dim is not None or whole_mask):
                tensor = tensor if dim is None else tensor.movedim(dim, 0)
                shape = (size, batch, *tensor.shape[-3:])
                tensor = tensor.unsqueeze(0) if dim is None else tensor
                wide[n] = tensor.expand(shape).flatten(0, 1)
                continue
        wide[n] = _fold(tensor, dim, size, n != 3 or whole_mask)
    return wide


def vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    op = torch.ops.lmkern.attention_forward
    if not _folds(in_dims, args):
        return one_by_one(op, info, in_dims, args)
    outputs = op(*_fold_problem(info, in_dims, args, False))
    return tuple(t.unflatten(0, (info.batch_size, -1)) for t in outputs), (0, 0)


def vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    op = torch.ops.lmkern.attention_backward
    d_dims, p_dims, kept_dims = in_dims[:2], in_dims[2:18], in_dims[18:20]
    d_outputs, problem, kept, need_mask = args[:2], args[2:18], args[18:20], args[20]
    if not _folds(p_dims, problem):
        return one_by_one(op, info, in_dims, args)
    size = info.batch_size
    wide = [
        _fold(t, d, size, True)
        for t, d in zip((*d_outputs, *kept), (*d_dims, *kept_dims), strict=True)
    ]
    d_q, d_k, d_v, d_distance, d_mask = op(
        *wide[:2], *_fold_problem(info, p_dims, problem, need_mask), *wide[2:], need_mask
    )
    heads = [t.unflatten(0, (size, -1)) for t in (d_q, d_k, d_v)]

    def narrow(tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor.new_empty(size, *tensor.shape)
        return tensor.unflatten(0, (size, -1))

    d_mask = narrow(d_mask)
    if need_mask and problem[3] is not None:
        mask = problem[3] if p_dims[3] is None else problem[3].movedim(p_dims[3], 0)[0]
        if mask.shape[0] != d_mask.shape[1]:  # it was broadcast along B
            d_mask = d_mask.sum(1, keepdim=True)
    outputs = (*heads, narrow(d_distance), d_mask)
    return outputs, (0,) * len(outputs)


class AttentionTransform(torch.autograd.Function):
    """AttentionFunction for torch.func, whose transforms want setup_context: (reference, gradient,
    *Problem) -> out, lse.

    reference(options)(*the six differentiable members) -> out, lse; gradient computes theirs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(reference: Callable[..., Any], gradient: Callable[..., Any], *problem: Any):  # type: ignore[override]
        return torch.ops.lmkern.attention_forward(*problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.functions, ctx.options = inputs[:2], inputs[12:]
        ctx.save_for_backward(*inputs[2:12], *output)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor):  # type: ignore[override]
        need = tuple(ctx.needs_input_grad[2:8])
        found = iter(
            _Gradient.apply(ctx.functions, ctx.options, need, d_out, d_lse, *ctx.saved_tensors)
        )
        return (None, None, *(next(found) if n else None for n in need), *(None,) * 10)


class _Gradient(torch.autograd.Function):
    """The gradient as a function of its own, differentiable through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(functions: Any, options: Any, need: Any, d_out: Any, d_lse: Any, *saved: Any):  # type: ignore[override]
        grads = functions[1]((*saved[:10], *options), d_out, d_lse, *saved[10:], need)
        return tuple(g for g, n in zip(grads, need, strict=True) if n)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.functions, ctx.options, ctx.need = inputs[:3]
        ctx.save_for_backward(*inputs[3:15])

    @staticmethod
    def backward(ctx: Any, *grads: Any):  # type: ignore[override]
        d_out, d_lse, *problem = ctx.saved_tensors
        run = ctx.functions[0]((*problem, *ctx.options))
        wanted = [n for n, need in enumerate(ctx.need) if need]
        d_inputs, d_outputs = differentiate_gradient(
            run, problem[:6], (d_out, d_lse), wanted, grads
        )
        return (None, None, None, *d_outputs, *d_inputs, *(None,) * 6)
