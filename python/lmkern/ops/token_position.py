"""Token + position + segment, norm and dropout. Math and layouts: csrc/ops/token_position.h."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern import reference
from lmkern.ops.backend import kernels_of, takes_cuda
from lmkern.ops.embedding import (
    contiguous_rows,
    dense_gradient,
    mark_coalesced,
    sparse_gradient,
    weak_leaf,
    workspace,
)
from lmkern.ops.gradient_buffer import buffer_of
from lmkern.ops.library import (
    accumulate_dtype,
    define_op,
    is_plain_backward,
    reference_backward,
)
from lmkern.ops.memory import fresh
from lmkern.ops.norm import as_dtype, dropout_keep

NORMS = (None, "rms", "layer")  # by the number of statistics that each row has

# input [...], token [V, D], position [P, D], positions (L elements), offset, L, segment [S, D],
# segments (as input), scale: lmkern::TokenPosition.
_ROWS = (
    "Tensor input, Tensor? token, Tensor? position, Tensor? positions, SymInt offset, SymInt length, "
    "Tensor? segment, Tensor? segments, float scale"
)


def _contiguous(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    input, token, position, positions, offset, length, segment, segments, scale = rows
    token, position, segment = (
        None if t is None else contiguous_rows(t) for t in (token, position, segment)
    )
    input, positions, segments = (
        None if t is None else t.contiguous() for t in (input, positions, segments)
    )
    return input, token, position, positions, offset, length, segment, segments, scale


def _parameter(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.contiguous()


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    input, token, norm = args[0], args[1], args[-3]
    statistics = token.new_empty((norm, input.numel()), dtype=accumulate_dtype(token.dtype))
    return fresh(token, *input.shape, token.shape[1]), statistics


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *rows, weight, bias, seed, norm, eps, dropout_p = args
    out, statistics = _forward_fake(*args)
    flat = out.view(args[0].numel(), args[1].shape[1])
    kernels_of(args[1]).token_position_forward(
        _contiguous(tuple(rows)), _parameter(weight), _parameter(bias), eps, dropout_p,
        seed, flat, statistics if norm else None,
    )  # fmt: skip
    return out, statistics


def _backward_fake(d_out: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length, (need_sum, need_position, *need) = args[5], args[-4:]
    width, wide = d_out.shape[-1], accumulate_dtype(d_out.dtype)
    d_weight, d_bias = (d_out.new_empty(width if n else 0, dtype=wide) for n in need)
    return (
        fresh(d_out, d_out.shape if need_sum else (0,)),
        fresh(d_out, (length, width) if need_position else (0,)),
        d_weight,
        d_bias,
    )


def _backward(d_out: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rows, statistics, weight, seed, norm, dropout_p = args[:-4]
    grads = _backward_fake(d_out, *args)
    shape = rows[0].numel(), d_out.shape[-1]
    d_sum, *rest = (g if need else None for g, need in zip(grads, args[-4:], strict=True))
    if d_sum is not None:
        d_sum = d_sum.view(shape)
    kernels, space = kernels_of(d_out), None
    if takes_cuda(d_out):
        sums, is_double = sum(g is not None for g in rest), d_out.dtype == torch.float64
        size = kernels.token_position_workspace(shape[0], rows[5], shape[1], sums, is_double)
        space = workspace(d_out, size)
    kernels.token_position_backward(
        _contiguous(tuple(rows)), d_out.reshape(shape).contiguous(), statistics if norm else None,
        _parameter(weight), dropout_p, seed, d_sum, *rest, space,
    )  # fmt: skip
    return grads


define_op(
    f"token_position_forward({_ROWS}, Tensor? weight, Tensor? bias, Tensor? seed, int norm, "
    "float eps, float dropout_p) -> (Tensor out, Tensor statistics)",
    cpu=_forward,
    cuda=_forward,
    fake=_forward_fake,
)
define_op(
    f"token_position_backward(Tensor d_out, {_ROWS}, Tensor statistics, Tensor? weight, "
    "Tensor? seed, int norm, float dropout_p, bool need_sum, bool need_position, bool need_weight, "
    "bool need_bias) -> (Tensor d_sum, Tensor d_position, Tensor d_weight, Tensor d_bias)",
    cpu=_backward,
    cuda=_backward,
    fake=_backward_fake,
)


class TokenPositionFunction(torch.autograd.Function):
    """(token, position, segment, weight, bias, input, positions, segments, seed, offset, length, scale,
    norm, eps, dropout_p, padding_idx or -1, sparse, reuse_grad) -> [*input, D].

    Tensors but for token and input may be None. norm: an index of NORMS.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, token, position, segment, weight, bias, input, positions, segments, seed, offset,
        length, scale, norm, eps, dropout_p, padding_idx, sparse, reuse_grad,
    ):  # fmt: skip
        out, statistics = torch.ops.lmkern.token_position_forward(
            input, token, position, positions, offset, length, segment, segments, scale, weight, bias,
            seed, norm, eps, dropout_p,
        )  # fmt: skip
        # Without a norm all is linear in the tables, and they may change before backward.
        tables = (token, position, segment) if norm else (None, None, None)
        ctx.save_for_backward(*tables, weight, input, positions, segments, seed, statistics)
        ctx.sizes = tuple(0 if t is None else t.shape[0] for t in (token, position, segment))
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.places = offset, length
        ctx.scale, ctx.norm, ctx.eps, ctx.dropout_p = scale, norm, eps, dropout_p
        ctx.padding_idx, ctx.sparse, ctx.leaf, ctx.buffer = padding_idx, sparse, None, None
        if sparse:
            ctx.leaf = weak_leaf(token)
        elif ctx.needs_input_grad[0] and not torch.compiler.is_compiling():
            ctx.buffer = buffer_of(token, reuse_grad)
        return out

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        rest = (None,) * 13
        if torch.is_grad_enabled():
            return (*_differentiable_gradient(ctx, d_out), *rest)
        token, position, segment, weight, input, positions, segments, seed, statistics = (
            ctx.saved_tensors
        )
        need_token, need_position, need_segment, need_weight, need_bias = ctx.needs_input_grad[:5]
        need_sum = need_token or need_segment
        changed = ctx.norm > 0 or ctx.dropout_p > 0  # otherwise d_sum is d_out
        d_sum = d_out
        d_position = d_segment = d_token = d_weight = d_bias = None
        if changed or need_position:
            grads = torch.ops.lmkern.token_position_backward(
                d_out, input, token, position, positions, *ctx.places, segment, segments, ctx.scale,
                statistics, weight, seed, ctx.norm, ctx.dropout_p, need_sum and changed,
                need_position, need_weight, need_bias,
            )  # fmt: skip
            d_sum = grads[0] if changed else d_out
            if need_position:
                d_position = _position_gradient(ctx, grads[1], positions)
            d_weight = as_dtype(grads[2], weight.dtype) if need_weight else None
            d_bias = as_dtype(grads[3], ctx.bias_dtype) if need_bias else None
        if need_token:
            d_token = _token_gradient(ctx, d_sum, input)
        if need_segment:
            d_segment = torch.ops.lmkern.embedding_backward(
                d_sum, segments, ctx.sizes[2], -1, False
            )
        return d_token, d_position, d_segment, d_weight, d_bias, *rest


def _token_gradient(ctx: Any, d_sum: Tensor, input: Tensor) -> Tensor:
    lookup = d_sum, input, ctx.sizes[0], ctx.padding_idx, False
    if ctx.sparse:
        d_token = sparse_gradient(*lookup, ctx.scale)
        mark_coalesced(ctx.leaf, d_token)
        return d_token
    if ctx.buffer is not None and is_plain_backward(d_sum):
        return dense_gradient(*lookup, ctx.buffer, ctx.scale)
    return torch.ops.lmkern.embedding_backward(*lookup, ctx.scale)


def _position_gradient(ctx: Any, rows: Tensor, positions: Tensor | None) -> Tensor:
    """[P, D] of the sums [L, D] of each position's rows."""
    most, (offset, length) = ctx.sizes[1], ctx.places
    if positions is not None:
        return torch.ops.lmkern.embedding_backward(rows, positions, most, -1, False)
    return rows if length == most else F.pad(rows, (0, 0, offset, most - offset - length))


def _differentiable_gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of tables, weight and bias for the double backward."""
    *tables, weight, input, positions, segments, seed, _ = ctx.saved_tensors
    width, needs = d_out.shape[-1], ctx.needs_input_grad
    for n, size in enumerate(ctx.sizes):
        if size and tables[n] is None:  # the value does not matter
            tables[n] = d_out.new_zeros(size, width, requires_grad=needs[n])
    bias = None
    if needs[4]:
        bias = d_out.new_zeros(width, dtype=ctx.bias_dtype, requires_grad=True)
    keep = None
    if ctx.dropout_p > 0:
        keep = dropout_keep(seed, d_out, ctx.dropout_p).to(d_out.dtype)
    if positions is not None and positions.numel() == input.numel():
        positions = positions.view(input.shape)

    def run(token, position, segment, weight, bias):
        return reference.token_position_embedding(
            input, token, position, segment, weight, bias, ctx.eps, positions=positions,
            offset=ctx.places[0], segments=segments, scale=ctx.scale, norm=NORMS[ctx.norm],
            padding_idx=ctx.padding_idx, keep=keep,
        )  # fmt: skip

    return reference_backward(run, (*tables, weight, bias), (d_out,))
