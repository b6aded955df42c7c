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
from lmkern.functional._embedding_bag import embedding_bag
from lmkern.functional._linear import linear
from lmkern.functional._quantized_embedding import quantized_embedding
from lmkern.functional._tie import tie
from lmkern.functional.activation import geglu, gelu, silu, swiglu
from lmkern.functional.attention import scaled_dot_product_attention
from lmkern.functional.loss import cross_entropy, linear_cross_entropy
from lmkern.functional.norm import add_norm, layer_norm, rms_norm
from lmkern.functional.position import rotary_embedding
from lmkern.functional.recurrent import gru, lstm, rnn
from lmkern.functional.recurrent_cell import gru_cell, lstm_cell, rnn_cell
from lmkern.functional.token_position import token_position_embedding

__all__ = [
    "add_norm",
    "cross_entropy",
    "dropout",
    "embedding",
    "embedding_bag",
    "geglu",
    "gelu",
    "gru",
    "gru_cell",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "quantized_embedding",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "silu",
    "swiglu",
    "tie",
    "token_position_embedding",
]
