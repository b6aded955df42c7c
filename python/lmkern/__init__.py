"""Hand-written C++ kernels for language models, as drop-in PyTorch layers.

``lmkern.nn``          layers with torch's names, arguments, parameters and initialisation
``lmkern.functional``  the functions under them
``lmkern.optim``       optimizers that touch only the rows of an embedding table that a step used
``lmkern.convert()``   swaps the layers of an existing model; ``lmkern.revert()`` undoes it
``lmkern.register_transformers()``  attn_implementation="lmkern" for Hugging Face models
``lmkern.models``      whole language models; ``lmkern.train``, ``lmkern.data``, ``lmkern.generate``
``lmkern.empty_cache()``  gives back the memory that is kept for the next large tensors
``lmkern.synchronize()``  waits for a GPU and raises the IndexError of a bad index there
``lmkern.info()``      versions, instruction set, threads, GPU
"""

from __future__ import annotations

# torch comes first: it brings the libgomp that our kernels share with it (csrc/core/parallel.h).
import torch

from lmkern._version import __version__

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise ImportError(
        f"lmkern {__version__} needs torch >= 2.10 (for its DLPack C exchange API), "
        f"found torch {torch.__version__}"
    )

from lmkern import functional, nn, optim
from lmkern._info import info
from lmkern._warnings import LmkernWarning
from lmkern.convert import ConversionReport, ConvertedLayer, convert, revert
from lmkern.integrations import register_transformers
from lmkern.ops.backend import synchronize
from lmkern.ops.memory import empty_cache

__all__ = [
    "ConversionReport",
    "ConvertedLayer",
    "LmkernWarning",
    "__version__",
    "convert",
    "empty_cache",
    "functional",
    "info",
    "nn",
    "optim",
    "register_transformers",
    "revert",
    "synchronize",
]
