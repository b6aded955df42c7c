"""What the tests of lmkern.convert share."""

from __future__ import annotations

from torch import nn

import lmkern
from lmkern._layer_kinds import KINDS

T, B, I, H = 5, 3, 7, 9


def all_types(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def is_ours(module: nn.Module) -> bool:
    return isinstance(module, tuple(getattr(lmkern.nn, k) for k in KINDS if hasattr(lmkern.nn, k)))
