"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn
from torch import Tensor
from torch.nn import Module, Parameter, init

from lmkern.functional import add_norm, layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` on lmkern's kernels, by :func:`lmkern.functional.layer_norm`.

    Constructor, parameters, ``state_dict`` and initialisation are torch's own.

    Shape: input [*, *normalized_shape] -> the same.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.
    """

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` on lmkern's kernels, by :func:`lmkern.functional.rms_norm`.

    Constructor, parameters, ``state_dict`` and initialisation are torch's own.

    Shape: input [*, *normalized_shape] -> the same.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.
    """

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class AddNorm(Module):
    r"""A residual connection and the norm behind it: :func:`lmkern.functional.add_norm`.

    .. math:: s = \text{residual} + \text{dropout}(\text{input}), \qquad y = \text{norm}(s)

    Its parameters are those of the norm, under the same names: a ``state_dict`` of
    ``torch.nn.LayerNorm`` or ``torch.nn.RMSNorm`` fits.

    Args:
        normalized_shape: the dimensions of the norm, an int for the last one.
        eps: default 1e-5, or that of ``torch.nn.RMSNorm``.
        norm: "layer" or "rms".
        dropout: probability of dropping an element of input, while training.
        elementwise_affine: whether there is a weight. bias: whether there is a bias, too; RMS norm has
            none.
        device, dtype: of the parameters, initialised with 1 and 0.

    Shape:
        - input, residual: [*, *normalized_shape].
        - input_bias: normalized_shape, added to input before dropout; for the bias of a linear layer.
        - returns (y, s), both like input.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        *,
        norm: str = "layer",
        dropout: float = 0.0,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.weight: Parameter | None
        self.bias: Parameter | None
        if norm not in ("layer", "rms"):
            raise ValueError(f"AddNorm: norm must be 'layer' or 'rms', got {norm!r}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"AddNorm: dropout must be in [0, 1], got {dropout}")
        if isinstance(normalized_shape, int):
            normalized_shape = (normalized_shape,)
        self.normalized_shape = tuple(normalized_shape)
        self.eps, self.norm, self.dropout = eps, norm, dropout
        self.elementwise_affine = elementwise_affine

        def parameter(wanted: bool) -> Parameter | None:
            empty = torch.empty(self.normalized_shape, device=device, dtype=dtype)
            return Parameter(empty) if wanted else None

        self.register_parameter("weight", parameter(elementwise_affine))
        self.register_parameter("bias", parameter(elementwise_affine and bias and norm == "layer"))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(
        self, input: Tensor, residual: Tensor, input_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return add_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps, norm=self.norm,
            dropout_p=self.dropout, training=self.training, input_bias=input_bias,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, norm={self.norm!r}, dropout={self.dropout}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )
