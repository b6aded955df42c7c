"""Layer and RMS norm, alone and after a residual connection. Math and layouts: csrc/ops/norm.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmkern import reference
from lmkern.ops.check import check_shape, check_tensors
from lmkern.ops.library import accumulate_dtype, needs_grad, use_kernel
from lmkern.ops.norm import AddNormFunction, NormFunction


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise over the last dimensions, ``normalized_shape``.

    .. math::
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \text{eps}}} · \text{weight} + \text{bias}

    Signature and semantics of :func:`torch.nn.functional.layer_norm`.

    Args:
        input: [*, *normalized_shape].
        weight, bias: normalized_shape; their dtype that of input, or float32 for 16-bit inputs.

    Returns:
        A contiguous tensor like input. Statistics, and gradients of weight and bias, are taken in
        float32 (float64 for float64); same bits for any number of threads.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Ba et al. 2016.
    """
    op = "layer_norm"
    shape = check_norm(op, input, normalized_shape, weight, bias)
    if not use_kernel(op, input, kernel="norm_forward"):
        return reference.norm(input, shape, weight, bias, eps, False)
    return _norm(input, weight, bias, len(shape), eps, False)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    r"""Divide by the root mean square over the last dimensions, ``normalized_shape``.

    .. math:: y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \text{eps}}} · \text{weight}

    Signature and semantics of :func:`torch.nn.functional.rms_norm`.

    Args:
        input: [*, *normalized_shape].
        weight: normalized_shape; its dtype that of input, or float32 for 16-bit inputs (others run in
            plain torch operations).
        eps: default ``torch.finfo(dtype).eps`` of the dtype of the arithmetic, float32 (float64 for
            float64).

    Returns:
        A contiguous tensor like input. Statistics, and the gradient of weight, are taken in float32
        (float64 for float64); same bits for any number of threads.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Zhang and Sennrich 2019.
    """
    op = "rms_norm"
    shape = check_norm(op, input, normalized_shape, weight, None)
    mixed = weight is not None and weight.dtype not in (input.dtype, accumulate_dtype(input.dtype))
    if mixed or not use_kernel(op, input, kernel="norm_forward"):
        return reference.norm(input, shape, weight, None, eps, True)
    return _norm(input, weight, None, len(shape), default_eps(eps, input, True), True)


def add_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    norm: str = "layer",
    dropout_p: float = 0.0,
    training: bool = True,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A residual connection and the norm behind it, in one pass.

    .. math::
        s = \text{residual} + \text{dropout}(\text{input} + \text{input\_bias}), \qquad
        y = \text{norm}(s)

    A post-norm Transformer goes on with y alone, a pre-norm one with y into the next sublayer and with
    s as its residual. ``input_bias`` is the bias of the linear layer whose output ``input`` is.

    Args:
        input, residual: [*, *normalized_shape]; of different dtypes, the wider one counts.
        weight, bias, input_bias: normalized_shape; their dtype that of input, or float32 for 16-bit
            inputs. RMS norm has no bias.
        eps: default 1e-5, or that of :func:`rms_norm`.
        norm: "layer" or "rms".
        dropout_p: probability of dropping an element, if ``training``. Which are dropped follows from
            one number of torch's default generator, for any number of threads, and no mask is kept.

    Returns:
        (y, s), contiguous, like input.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Vaswani et al. 2017; pre-norm: Xiong et al. 2020.
    """
    op = "add_norm"
    shape = check_norm(op, input, normalized_shape, weight, bias, input_bias)
    if residual is None:
        raise TypeError(f"{op}: residual must be a Tensor, got NoneType")
    check_tensors(op, input=input, residual=residual)
    check_shape(op, "residual", residual, input.shape, "input's shape")
    rms = check_kind(op, norm, bias)
    p = check_dropout(op, dropout_p) if training else 0.0
    if input.dtype != residual.dtype:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
    if not use_kernel(op, input):
        return reference.add_norm(
            input, residual, shape, weight, bias, eps, rms=rms, dropout_p=p, input_bias=input_bias
        )
    if residual is input:  # torch.compile refuses one tensor in two places of an autograd Function
        residual = residual.view_as(residual)
    args = (
        input, residual, input_bias, weight, bias, dropout_seed(p, input), len(shape),
        default_eps(eps, input, rms), rms, p,
    )  # fmt: skip
    if needs_grad(input, residual, input_bias, weight, bias):
        return AddNormFunction.apply(*args)
    return torch.ops.lmkern.add_norm_forward(*args)[:2]


def _norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float, rms: bool
) -> Tensor:
    if needs_grad(input, weight, bias):
        return NormFunction.apply(input, weight, bias, dims, eps, rms)
    return torch.ops.lmkern.norm_forward(input, weight, bias, dims, eps, rms)[0]


def check_norm(
    op: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    input_bias: Tensor | None = None,
) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple, when all arguments fit it."""
    if not isinstance(input, Tensor):
        check_tensors(op, input=input)
    try:
        shape = tuple(normalized_shape)
    except TypeError:
        raise TypeError(
            f"{op}: normalized_shape must be a sequence of ints, got {type(normalized_shape).__name__}"
        ) from None
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(
            f"{op}: input must be [*, *normalized_shape] with normalized_shape = {list(shape)} of at "
            f"least one dimension, got {list(input.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        if parameter is not None:
            check_tensors(op, input=input, **{name: parameter})
            check_shape(op, name, parameter, shape, "normalized_shape")
    return shape


def check_kind(op: str, norm: str, bias: Tensor | None) -> bool:
    """Whether ``norm`` is "rms"."""
    if norm not in ("layer", "rms"):
        raise ValueError(f"{op}: norm must be 'layer' or 'rms', got {norm!r}")
    if norm == "rms" and bias is not None:
        raise ValueError(f"{op}: bias must be None for norm = 'rms', which has none")
    return norm == "rms"


def check_dropout(op: str, p: float) -> float:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {p}")
    return p


def dropout_seed(p: float, like: Tensor) -> Tensor | None:
    """One number of torch's default generator, so that torch.manual_seed rules.

    On a GPU it lies there: nothing waits for it, and a CUDA graph draws another one in each replay.
    """
    device = like.device if like.is_cuda else "cpu"
    return torch.randint(1 << 62, (), dtype=torch.int64, device=device) if p > 0.0 else None


def default_eps(eps: float | None, input: Tensor, rms: bool) -> float:
    if eps is not None:
        return eps
    return torch.finfo(accumulate_dtype(input.dtype)).eps if rms else 1e-5
