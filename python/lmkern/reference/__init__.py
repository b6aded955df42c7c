"""Every op in a few plain torch operations.

They state what the kernels compute, serve as the tests' oracle (in float64), differentiate twice, and
run wherever a kernel does not. They are not fast.
"""

from .activation import ACTIVATIONS, activation
from .attention import scaled_dot_product_attention
from .cross_entropy import cross_entropy_terms, linear_cross_entropy_terms
from .embedding import clip_norm, embedding, embedding_bag
from .embedding_optimizer import embedding_adagrad, embedding_adam, embedding_sgd
from .norm import add_norm, norm
from .quantized_embedding import dequantize_rows, quantize_rows, row_affine
from .recurrent import GATES, recurrence
from .token_position import token_position_embedding

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "activation",
    "add_norm",
    "clip_norm",
    "cross_entropy_terms",
    "dequantize_rows",
    "embedding",
    "embedding_adagrad",
    "embedding_adam",
    "embedding_bag",
    "embedding_sgd",
    "linear_cross_entropy_terms",
    "norm",
    "quantize_rows",
    "recurrence",
    "row_affine",
    "scaled_dot_product_attention",
    "token_position_embedding",
]
