"""Scaled dot-product attention on [B, H, L, D]. Math and layouts: csrc/ops/attention.h."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.attention_transforms import AttentionTransform, vmap_backward, vmap_forward
from lmkern.ops.library import (
    KERNEL_DTYPES,
    accumulate_dtype,
    define_op,
    is_plain_backward,
    is_plain_eager,
    needs_grad,
    reference_backward,
    register_vmap,
)
from lmkern.ops.memory import fresh, fresh_heads

_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? key_lengths, Tensor? cu_q, Tensor? cu_k, Tensor? seed, float scale, float softcap, "
    "int window_left, int window_right, bool bottom_right, float dropout_p"
)
DIFFERENTIABLE = 6  # the first members have gradients
FARTHEST = 1 << 30  # beyond any length: a window of it is as good as unbounded
_SIZE = 16


class Problem(NamedTuple):
    """The arguments of one call, as csrc's AttentionProblem has them.

    mask: [1 or B, 1 or H, 1 or L, 1 or S]. seed: int64 [], for dropout. window_left, window_right: -1
    is unbounded; causal is window_right = 0. softcap: 0 is none. cu_k: None if it is cu_q.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    key_lengths: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seed: Tensor | None
    scale: float
    softcap: float
    window_left: int
    window_right: int
    bottom_right: bool
    dropout_p: float

    def for_kernel(self) -> tuple[Any, ...]:
        """Expanded by stride, and with what the kernels ask for: contiguous last dimensions."""
        q, k, v = (_rows(x) for x in self[:3])
        batch, heads, queries, _ = q.shape
        mask = self.mask
        if mask is not None:
            mask = mask.expand(batch, heads, queries, k.shape[2])
        key_lengths, cu_q, cu_k = (
            None if x is None else x.to(torch.int64).contiguous() for x in self[6:9]
        )
        cu_k = cu_q if cu_k is None else cu_k
        slopes, sinks = (None if x is None else x.contiguous() for x in self[4:6])
        return (
            q, k, v, mask, slopes, sinks, key_lengths, cu_q, cu_k, self.scale, self.softcap,
            min(self.window_left, FARTHEST), min(self.window_right, FARTHEST), self.bottom_right,
            self.dropout_p, 0 if self.seed is None else int(self.seed),
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """``x`` with a contiguous last dimension, which is all the kernels ask for."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _heads_like(x: Tensor, width: int) -> Tensor:
    # [B, N, H, D] in memory: heads are views of one projection more often than not, and models merge
    # them next, without a copy. Not a view: what a Function returns may be written to in place.
    batch, heads, length, _ = x.shape
    return fresh_heads(x, batch, heads, length, width)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, _, v = args[:3]
    return _heads_like(q, v.shape[3]), fresh(q, q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _forward_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(*args)
    _C.attention_forward(Problem(*args).for_kernel(), out, lse)
    return out, lse


def _backward_fake(
    d_out: Tensor, d_lse: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p, need_mask = Problem(*args[:_SIZE]), args[-1]
    wide = accumulate_dtype(p.q.dtype)
    distances = p.q.shape[:3] if p.alibi_slopes is not None else (0,)
    mask = p.mask.shape if need_mask and p.mask is not None else (0,)
    grads = (_heads_like(x, x.shape[3]) for x in p[:3])
    return (  # type: ignore[return-value]
        *grads, fresh(p.q, distances, dtype=wide), fresh(p.q, mask, dtype=wide)
    )  # fmt: skip


def _backward_cpu(
    d_out: Tensor, d_lse: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p, (out, lse) = Problem(*args[:_SIZE]), args[_SIZE : _SIZE + 2]
    grads = _backward_fake(d_out, d_lse, *args)
    d_q, d_k, d_v, d_distance, d_mask = grads
    _C.attention_backward(
        p.for_kernel(), _rows(d_out), None if d_lse is None else d_lse.contiguous(), _rows(out),
        lse.contiguous(), d_q, d_k, d_v, None if p.alibi_slopes is None else d_distance,
        d_mask if args[-1] and p.mask is not None else None,
    )  # fmt: skip
    return grads


def _weights_fake(*args: Any) -> Tensor:
    p, mean = Problem(*args[:_SIZE]), args[-2]
    batch, heads, queries, _ = p.q.shape
    return fresh(p.q, batch, 1 if mean else heads, queries, p.k.shape[2])


def _weights_cpu(*args: Any) -> Tensor:
    weights = _weights_fake(*args)
    _C.attention_weights(
        Problem(*args[:_SIZE]).for_kernel(), args[_SIZE].contiguous(), weights, args[-1]
    )
    return weights


define_op(
    f"attention_forward({_PROBLEM}) -> (Tensor out, Tensor lse)",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
define_op(
    f"attention_backward(Tensor d_out, Tensor? d_lse, {_PROBLEM}, Tensor out, Tensor lse, "
    "bool need_mask) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_distance, Tensor d_mask)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)
define_op(
    f"attention_weights({_PROBLEM}, Tensor lse, bool mean, bool only_keep) -> Tensor",
    cpu=_weights_cpu,
    fake=_weights_fake,
)


def _run_reference(p: Problem, weights: str | None, keep: Tensor | None, *inputs: Any) -> Any:
    """(out, lse[, weights]) of the reference for the problem with these differentiable members."""
    q, k, v, mask, alibi_slopes, sinks = inputs
    return reference.scaled_dot_product_attention(
        q, k, v, mask, scale=p.scale, enable_gqa=q.shape[1] != k.shape[1],
        window=(p.window_left, p.window_right), softcap=p.softcap or None, alibi_slopes=alibi_slopes,
        sinks=sinks, key_lengths=p.key_lengths,
        cu_seqlens=None if p.cu_q is None else (p.cu_q, p.cu_q if p.cu_k is None else p.cu_k),
        causal_align="bottom_right" if p.bottom_right else "top_left", return_lse=True,
        return_weights=weights, keep=keep,
    )  # fmt: skip


_PLAIN = (Tensor, torch.nn.Parameter)


def plain_attention(q: Any, k: Any, v: Any, scale: float | None, causal: bool) -> Tensor | None:
    """out for [B, H, N, D] without options; None where the usual way must be taken.

    The short way to the kernel: a step of one query takes tens of microseconds, and the usual way
    (checks in Python, dispatcher) twenty forward and as many backward. What does not fit goes there,
    which also words the errors.
    """
    if (
        q.__class__ not in _PLAIN
        or k.__class__ not in _PLAIN
        or v.__class__ not in _PLAIN
        or q.dim() != 4
        or q.dtype not in KERNEL_DTYPES
        or not (q.is_cpu and k.is_cpu and v.is_cpu)
        or not is_plain_eager()
        or q.is_neg()
        or k.is_neg()
        or v.is_neg()
    ):
        return None
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    try:
        if needs_grad(q, k, v):
            return PlainAttentionFunction.apply(q, k, v, scale, causal)
        return _plain_forward(q, k, v, scale, causal)[0]
    except (ValueError, TypeError):
        return None


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    out = _heads_like(q, v.shape[-1])
    lse = q.new_empty(batch, heads, queries, dtype=accumulate_dtype(q.dtype))
    problem = (
        _rows(q), _rows(k), _rows(v), None, None, None, None, None, None, scale, 0.0, -1,
        0 if causal else -1, False, 0.0, 0,
    )  # fmt: skip
    _C.attention_forward(problem, out, lse)
    return out, lse


class PlainAttentionFunction(torch.autograd.Function):
    """(q, k, v, scale, causal) -> out: the short way, with gradients."""

    @staticmethod
    def forward(ctx: Any, q, k, v, scale, causal):  # type: ignore[override]
        out, lse = _plain_forward(q, k, v, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        p = Problem(
            q, k, v, None, None, None, None, None, None, None, ctx.scale, 0.0, -1,
            0 if ctx.causal else -1, False, 0.0,
        )  # fmt: skip
        grads: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():
            grads = reference_backward(
                lambda *inputs: _run_reference(p, None, None, *inputs, None, None, None)[0],
                (q, k, v),
                (d_out,),
            )
        elif is_plain_backward(d_out):
            grads = _backward_cpu(d_out, None, *p, out, lse, False)[:3]
        else:
            need = (*ctx.needs_input_grad[:3], False, False, False)
            grads = attention_gradient(p, d_out, None, out, lse, need)[:3]
        return *grads, None, None


class AttentionFunction(torch.autograd.Function):
    """(*Problem, weights) -> out, lse[, weights], with gradients for q, k, v, mask, slopes, sinks.

    weights: None, "heads" [B, H, L, S] or "mean" [B, L, S].
    """

    @staticmethod
    def forward(ctx: Any, *args: Any):  # type: ignore[override]
        *problem, weights = args
        out, lse = torch.ops.lmkern.attention_forward(*problem)
        ctx.save_for_backward(*problem[:10], out, lse)
        ctx.options, ctx.weights = problem[10:], weights
        ctx.set_materialize_grads(False)
        if weights is None:
            return out, lse
        return out, lse, attention_weights(Problem(*problem), lse, weights)

    @staticmethod
    def backward(ctx: Any, d_out, d_lse, d_weights=None):  # type: ignore[override]
        *tensors, out, lse = ctx.saved_tensors
        p = Problem(*tensors, *ctx.options)
        rest = (None,) * (_SIZE + 1 - DIFFERENTIABLE)
        if torch.is_grad_enabled() or d_weights is not None:
            keep = None
            if p.dropout_p > 0:
                keep = _exact_keep(p, torch.ops.lmkern.attention_weights(*p, lse, False, True))
            grad_outputs = [d_out, d_lse]
            if ctx.weights is not None:
                grad_outputs.append(d_weights)
            grads = reference_backward(
                lambda *inputs: _run_reference(p, ctx.weights, keep, *inputs),
                (p.q, p.k, p.v, p.mask, p.alibi_slopes, p.sinks),
                grad_outputs,
            )
            return (*grads, *rest)
        need = ctx.needs_input_grad[:DIFFERENTIABLE]
        return (*attention_gradient(p, d_out, d_lse, out, lse, need), *rest)


def attention_gradient(
    problem: Any, d_out: Tensor | None, d_lse: Tensor | None, out: Tensor, lse: Tensor, need: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of the differentiable members, None where ``need`` says that none is wanted."""
    p = Problem(*problem)
    if d_out is None:
        d_out = torch.zeros_like(out)
    d_q, d_k, d_v, d_distance, d_mask = torch.ops.lmkern.attention_backward(
        d_out, d_lse, *p, out, lse, need[3]
    )
    d_slopes = d_sinks = None
    if need[4]:
        d_slopes = _sum_queries(p, d_distance).neg()
    if need[5] and p.sinks is not None:
        delta = (d_out * out).sum(-1, dtype=lse.dtype)
        delta = delta if d_lse is None else delta - d_lse
        none = p.sinks[:, None] == -math.inf
        share = torch.where(none, -math.inf, p.sinks[:, None] - lse).exp()
        d_sinks = (share * delta).sum((0, 2)).neg()
    return (
        d_q, d_k, d_v, d_mask.to(p.mask.dtype) if need[3] and p.mask is not None else None,
        d_slopes, d_sinks,
    )  # fmt: skip


def _exact_keep(p: Problem, keep: Tensor) -> Tensor:
    """What dropout multiplies the weights with, not rounded to the dtype of the heads."""
    dropped = int(p.dropout_p * 65536 + 0.5)
    factor = 65536 / (65536 - dropped) if dropped < 65536 else 0.0
    return (keep > 0).to(accumulate_dtype(p.q.dtype)) * factor


def _sum_queries(p: Problem, x: Tensor) -> Tensor:
    """[B, H, L] summed over the queries of each sequence: [B, H], packed [n, H]."""
    if p.cu_q is None:
        return x.sum(2)
    sequence = torch.repeat_interleave(p.cu_q.diff().to(torch.int64))
    return x.new_zeros(p.cu_q.shape[0] - 1, x.shape[1]).index_add_(0, sequence, x[0].t())


def transformed_attention(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) inside of a torch.func transform."""
    if torch.is_grad_enabled():  # a wrapped tensor does not say whether it needs a gradient
        return AttentionTransform.apply(_reference_of, attention_gradient, *p)
    return torch.ops.lmkern.attention_forward(*p)


def _reference_of(problem: Any) -> Any:
    return functools.partial(_run_reference, Problem(*problem), None, None)


register_vmap("attention_forward", vmap_forward)
register_vmap("attention_backward", vmap_backward)


def attention_weights(p: Problem, lse: Tensor, weights: str) -> Tensor:
    """The weights of a problem: "heads" [B, H, L, S], or their "mean" [B, L, S]."""
    w = torch.ops.lmkern.attention_weights(*p, lse, weights == "mean", False)
    return w[:, 0] if weights == "mean" else w
