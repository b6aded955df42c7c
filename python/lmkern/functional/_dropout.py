"""Dropout. Math: csrc/ops/dropout.h.

The underscore keeps ``lmkern.functional.dropout`` free for the function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern.ops.check import check_tensors
from lmkern.ops.dropout import DropoutFunction
from lmkern.ops.library import needs_grad, use_kernel


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    r"""Zero elements with probability p and scale the others by 1 / (1 - p), in training.

    :func:`torch.nn.functional.dropout`, without a mask in memory: which elements are dropped is a
    function of their position and of a seed drawn from torch's default generator, so that
    ``torch.manual_seed`` rules and activation checkpoints see the same ones again. They are not those
    that torch drops.

    Args:
        input: any shape, floating.
        p: the probability to be dropped, in [0, 1].
        training: otherwise ``input`` itself is returned.
        inplace: overwrite ``input``.

    Returns:
        The shape and dtype of ``input``. Under ``torch.func`` and forward-mode differentiation torch's
        operator runs, where vmap's ``randomness`` decides whether elements of a batch differ.

    Raises:
        ValueError: p outside [0, 1].

    Source: Srivastava et al. 2014; Salmon et al. 2011 (Philox).
    """
    check_tensors("dropout", input=input)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")
    if not training or p == 0.0:
        return input
    if not use_kernel("dropout", input, kernel="dropout"):
        return F.dropout(input, p, True, inplace)
    if inplace and torch.compiler.is_compiling():  # Dynamo knows no autograd Function that writes
        return input.copy_(dropout(input, p))
    seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")
    if needs_grad(input):
        return DropoutFunction.apply(input, seed, p, inplace)
    if inplace:
        torch.ops.lmkern.dropout_(input, seed, p)
        return input
    return torch.ops.lmkern.dropout(input, seed, p)
