"""The functional API: drop-in counterparts of :mod:`torch.nn.functional`, on lmkern's kernels.

All functions are differentiable (twice, too), work under ``torch.compile``, autocast and
``torch.func``, and fall back to plain torch operations, with one :class:`lmkern.LmkernWarning`, where
there is no kernel for a device or dtype. Kernels exist on the CPU for float32, float64, bfloat16 and
float16.
Bad arguments raise ``ValueError``, ``TypeError`` or ``IndexError`` naming the argument, what was
expected and what came; nothing has been computed then.
"""

from lmkern.functional._dropout import dropout
from lmkern.functional._embedding import embedding
from lmkern.functional.activation import geglu, gelu, silu, swiglu
from lmkern.functional.attention import scaled_dot_product_attention
from lmkern.functional.position import rotary_embedding
from lmkern.functional.recurrent import gru, lstm, rnn
from lmkern.functional.recurrent_cell import gru_cell, lstm_cell, rnn_cell

__all__ = [
    "dropout",
    "embedding",
    "geglu",
    "gelu",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "silu",
    "swiglu",
]
