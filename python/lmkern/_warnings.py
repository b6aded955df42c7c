"""The one warning category, and its once-per-reason rule."""

from __future__ import annotations

import functools
import warnings

import torch


class LmkernWarning(UserWarning):
    """Something works, but not on lmkern's kernels."""


def warn_once(message: str) -> None:
    """Issue ``message`` as an :class:`LmkernWarning` the first time it comes up in this process.

    Silent while torch.compile traces, where a warning would break the graph.
    """
    if not torch.compiler.is_compiling():
        _warn_first_time(message)


@functools.cache
def _warn_first_time(message: str) -> None:
    warnings.warn(message, LmkernWarning, stacklevel=5)
