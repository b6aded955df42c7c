"""Activations as layers."""

from __future__ import annotations

import torch.nn
from torch import Tensor
from torch.nn import Module

from lmkern.functional import geglu, gelu, silu, swiglu


class GELU(torch.nn.GELU):
    """``torch.nn.GELU`` on lmkern's kernels: :func:`lmkern.functional.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.approximate)


class SiLU(torch.nn.SiLU):
    """``torch.nn.SiLU`` on lmkern's kernels: :func:`lmkern.functional.silu`."""

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, self.inplace)


class SwiGLU(Module):
    """SiLU(g) ⊙ v of input [..., 2D] = [g v]: :func:`lmkern.functional.swiglu`. No parameters.

    Args:
        gate_first: False for input [v g].

    Shape: [..., 2D] -> [..., D].

    Source: Shazeer 2020, equation 6.
    """

    def __init__(self, gate_first: bool = True) -> None:
        super().__init__()
        self.gate_first = gate_first

    def forward(self, input: Tensor) -> Tensor:
        return swiglu(input, gate_first=self.gate_first)

    def extra_repr(self) -> str:
        return "" if self.gate_first else "gate_first=False"


class GeGLU(Module):
    """GELU(g) ⊙ v of input [..., 2D] = [g v]: :func:`lmkern.functional.geglu`. No parameters.

    Args:
        approximate: "none" or "tanh". gate_first: False for input [v g].

    Shape: [..., 2D] -> [..., D].

    Source: Shazeer 2020, equation 6.
    """

    def __init__(self, approximate: str = "none", gate_first: bool = True) -> None:
        super().__init__()
        self.approximate, self.gate_first = approximate, gate_first

    def forward(self, input: Tensor) -> Tensor:
        return geglu(input, approximate=self.approximate, gate_first=self.gate_first)

    def extra_repr(self) -> str:
        order = "" if self.gate_first else ", gate_first=False"
        return f"approximate={self.approximate!r}{order}"
