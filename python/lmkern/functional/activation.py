"""Activations with the bias of the layer before them, and gated ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern import reference
from lmkern.ops.activation import ActivationFunction
from lmkern.ops.check import check_shape, check_tensors
from lmkern.ops.library import is_autocast_on, needs_grad, use_kernel

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    r"""The Gaussian error linear unit of ``input + bias``, in one pass over memory.

    .. math:: \text{GELU}(x) = x Φ(x), \qquad
        \text{tanh: } x / 2 · (1 + \tanh(\sqrt{2/π} (x + 0.044715 x^3)))

    :func:`torch.nn.functional.gelu`, with a bias.

    Args:
        input: [..., D], floating.
        approximate: "none", by the normal distribution function Φ, or "tanh".
        bias: [D], of the dtype of ``input``, or cast to it under autocast: the bias of a linear layer,
            left out there. Its gradient is computed in the same pass as the input's.

    Returns:
        The shape and dtype of ``input``; computed in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Hendrycks and Gimpel 2016.
    """
    return _run("gelu", input, None, bias, _gelu_name("gelu", approximate), False)


def silu(input: Tensor, inplace: bool = False, *, bias: Tensor | None = None) -> Tensor:
    r"""The sigmoid linear unit, or swish, of ``input + bias``, in one pass over memory.

    .. math:: \text{SiLU}(x) = x σ(x) = x / (1 + e^{-x})

    :func:`torch.nn.functional.silu`, with a bias.

    Args:
        input: [..., D], floating.
        inplace: overwrite ``input``, by torch's own operators.
        bias: as for :func:`gelu`.

    Returns, raises: as :func:`gelu`.

    Source: Hendrycks and Gimpel 2016; Elfwing et al. 2017.
    """
    if inplace:
        return F.silu(input if bias is None else input.add_(bias), inplace=True)
    return _run("silu", input, None, bias, "silu", False)


def swiglu(
    input: Tensor, up: Tensor | None = None, *, bias: Tensor | None = None, gate_first: bool = True
) -> Tensor:
    r"""The SiLU of one half of the features times the other half: SwiGLU, of ``input + bias``.

    .. math:: \text{SiLU}(g) ⊙ v, \qquad [g \; v] = \text{input} + \text{bias}

    Args:
        input: [..., 2D], the gate g and then the value v, as in Phi-3's "gate_up" projection; or the
            gate alone, [..., D], with ``up``, as in Llama.
        up: [..., D], the value v as a tensor of its own.
        bias: [2D], as for :func:`gelu`; not together with ``up``.
        gate_first: False for the other order, [v g], of :func:`torch.nn.functional.glu`, diffusers and
            FlashAttention. Mind it where weights come from elsewhere: their shapes fit both.

    Returns:
        [..., D] in the dtype of ``input``; computed in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Shazeer 2020 (GLU Variants Improve Transformer), equation 6.
    """
    return _run("swiglu", input, up, bias, "silu", True, gate_first)


def geglu(
    input: Tensor,
    up: Tensor | None = None,
    *,
    approximate: str = "none",
    bias: Tensor | None = None,
    gate_first: bool = True,
) -> Tensor:
    r"""The GELU of one half of the features times the other half: GEGLU, of ``input + bias``.

    .. math:: \text{GELU}(g) ⊙ v, \qquad [g \; v] = \text{input} + \text{bias}

    Args:
        approximate: as for :func:`gelu`; Gemma has "tanh".
        input, up, bias, gate_first: as for :func:`swiglu`.

    Returns, raises: as :func:`swiglu`.

    Source: Shazeer 2020 (GLU Variants Improve Transformer), equation 6.
    """
    return _run("geglu", input, up, bias, _gelu_name("geglu", approximate), True, gate_first)


def _gelu_name(op: str, approximate: str) -> str:
    if approximate not in _GELU:
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _GELU[approximate]


def _run(
    op: str,
    input: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    function: str,
    gated: bool,
    gate_first: bool = True,
) -> Tensor:
    check_tensors(op, input=input, up=up, bias=bias)
    if up is not None:
        check_shape(op, "up", up, input.shape, "like the gate")
        if bias is not None:
            raise ValueError(f"{op}: bias is for input [..., 2D], not for gate and up")
        if up is input:  # torch.compile refuses one tensor in two places of an autograd Function
            up = up.view_as(up)
    elif gated and (input.dim() == 0 or input.shape[-1] % 2):
        raise ValueError(f"{op}: input must be [..., 2D], two halves, got {list(input.shape)}")
    if bias is not None and bias.dtype != input.dtype and is_autocast_on(input.device.type):
        bias = bias.to(input.dtype)
    if not use_kernel(op, input, kernel="activation_forward"):
        return reference.activation(input, up, bias, function, gated, gate_first)
    if needs_grad(input, up, bias):
        return ActivationFunction.apply(input, up, bias, function, gated, gate_first)
    return torch.ops.lmkern.activation_forward(input, up, bias, function, gated, gate_first)
