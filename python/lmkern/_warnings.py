"""The one warning category, and its once-per-reason rule."""

from __future__ import annotations

import functools
import warnings


class LmkernWarning(UserWarning):
    """Something works, but not on lmkern's kernels."""


@functools.cache
def warn_once(message: str) -> None:
    """Issue ``message`` as an :class:`LmkernWarning` the first time it comes up in this process."""
    warnings.warn(message, LmkernWarning, stacklevel=4)
