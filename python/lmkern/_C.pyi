"""Types of the CPU extension module (csrc/bindings/module_cpu.cpp)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# csrc/ops/recurrent.h's RecurrentOptions, member by member
_RecurrentOptions = tuple[
    int,
    bool,
    int,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    float,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    float,
    float,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    bool,
]

def recurrent_forward(
    options: _RecurrentOptions,
    gates: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    first_hh: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor | None,
    cells: Tensor | None,
    hidden: Tensor | None,
    hh: Tensor | None,
    unprojected: Tensor | None,
    save: bool,
    workspace: Tensor | None,
    packed_ready: bool,
) -> None: ...
def recurrent_backward(
    options: _RecurrentOptions,
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_cells: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor | None,
    hidden: Tensor | None,
    hh: Tensor | None,
    d_gates: Tensor,
    d_hh: Tensor | None,
    d_h: Tensor | None,
    d_normed: Tensor | None,
    d_c_normed: Tensor | None,
    c_now: Tensor | None,
    d_h0: Tensor | None,
    d_c0: Tensor | None,
    recompute: bool,
    workspace: Tensor | None,
) -> None: ...
def recurrent_step(
    cell: int,
    from_x: Tensor | None,
    from_h: Tensor | None,
    x: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    h_next: Tensor,
    y: Tensor | None,
    c_next: Tensor | None,
    gates: Tensor | None,
    cells: Tensor | None,
    hidden: Tensor | None,
) -> None: ...
def recurrent_step_backward(
    cell: int,
    d_h: Tensor | None,
    d_y: Tensor | None,
    d_c: Tensor | None,
    gates: Tensor,
    hidden: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    d_gates: Tensor,
    d_hh: Tensor | None,
    d_h_prev: Tensor | None,
    d_c_prev: Tensor | None,
    d_b_ih: Tensor | None,
    d_b_hh: Tensor | None,
) -> None: ...
def attention_forward(problem: tuple[Any, ...], out: Tensor, lse: Tensor) -> None: ...
def attention_backward(
    problem: tuple[Any, ...],
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_distance: Tensor | None,
    d_mask: Tensor | None,
) -> None: ...
def attention_weights(
    problem: tuple[Any, ...], lse: Tensor, weights: Tensor, only_keep: bool
) -> None: ...
def activation_forward(
    input: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    function: str,
    gated: bool,
    gate_first: bool,
    out: Tensor,
) -> None: ...
def activation_backward(
    d_out: Tensor,
    input: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    function: str,
    gated: bool,
    gate_first: bool,
    d_input: Tensor,
    d_up: Tensor | None,
    d_bias: Tensor | None,
) -> None: ...
def dropout(input: Tensor, out: Tensor, p: float, seed: int) -> None: ...
def embedding_forward(
    weight: Tensor, indices: Tensor, out: Tensor, max_norm: float, norm_type: float
) -> None: ...
def embedding_renorm(weight: Tensor, ids: Tensor, max_norm: float, norm_type: float) -> None: ...
def embedding_buckets(
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    ids: Tensor,
    starts: Tensor,
    order: Tensor,
) -> int: ...
def embedding_backward(
    d_out: Tensor,
    ids: Tensor,
    starts: Tensor,
    order: Tensor,
    stale: Tensor | None,
    d_weight: Tensor,
    sparse: bool,
    scale_grad_by_freq: bool,
    scale: float,
) -> None: ...
def embedding_clear(d_weight: Tensor) -> None: ...
def embedding_is_clear(d_weight: Tensor, written: Tensor | None, samples: int) -> bool: ...
def embedding_bag_forward(
    bags: tuple[Any, ...], weight: Tensor, out: Tensor, winners: Tensor | None
) -> None: ...
def embedding_bag_backward(
    bags: tuple[Any, ...],
    d_out: Tensor,
    winners: Tensor | None,
    ids: Tensor,
    starts: Tensor,
    order: Tensor,
    stale: Tensor | None,
    d_weight: Tensor,
    sparse: bool,
    scale_grad_by_freq: bool,
) -> None: ...
def embedding_bag_weights_backward(
    bags: tuple[Any, ...],
    d_out: Tensor,
    winners: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    d_per_sample_weights: Tensor,
) -> None: ...
def cross_entropy_forward(
    logits: Tensor,
    index: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    first: int,
    classes: int,
    ignore_index: int,
    softcap: float,
    maximum: Tensor,
    sum: Tensor,
    picked: Tensor,
    mass: Tensor | None,
    total: Tensor | None,
) -> None: ...
def cross_entropy_backward(
    logits: Tensor,
    index: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    first: int,
    classes: int,
    ignore_index: int,
    softcap: float,
    maximum: Tensor,
    log_sum: Tensor,
    d_lse: Tensor,
    d_picked: Tensor,
    d_total: Tensor | None,
    d_logits: Tensor,
) -> None: ...
def embedding_sgd(
    weight: Tensor,
    rows: Tensor | None,
    gradient: Tensor | None,
    gradient_scale: float,
    touched: Tensor | None,
    decay: float,
    step_size: float,
) -> None: ...
def embedding_adagrad(
    weight: Tensor,
    rows: Tensor | None,
    gradient: Tensor,
    gradient_scale: float,
    touched: Tensor | None,
    decay: float,
    step_size: float,
    sum: Tensor,
    weight_decay: float,
    eps: float,
) -> None: ...
def embedding_adam(
    weight: Tensor,
    rows: Tensor | None,
    gradient: Tensor,
    gradient_scale: float,
    touched: Tensor | None,
    decay: float,
    step_size: float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None: ...
def norm_forward(
    width: int,
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    sum: Tensor | None,
    out: Tensor,
    statistics: Tensor,
) -> None: ...
def norm_backward(
    width: int,
    d_out: Tensor,
    d_sum: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    dropout_p: float,
    seed: int,
    d_x: Tensor,
    d_input: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_input_bias: Tensor | None,
) -> None: ...
def quantized_embedding(
    table: Tensor, width: int, bits: int, indices: Tensor, out: Tensor
) -> None: ...
def quantized_embedding_bag(
    table: Tensor, width: int, bits: int, bags: tuple[Any, ...], out: Tensor
) -> None: ...
def token_position_forward(
    rows: tuple[Any, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
    statistics: Tensor | None,
) -> None: ...
def token_position_backward(
    rows: tuple[Any, ...],
    d_out: Tensor,
    statistics: Tensor | None,
    weight: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    d_sum: Tensor | None,
    d_position: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    workspace: Tensor | None,
) -> None: ...
def rotary_embedding(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None: ...
def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out: Tensor,
    transpose_a: bool,
    transpose_b: bool,
    accumulate: bool,
) -> bool: ...
def vec_math(function: str, x: Tensor, out: Tensor) -> None: ...
def pool_empty(shape: Sequence[int], strides: Sequence[int], code: int, bits: int) -> Tensor: ...
def pool_clear() -> None: ...
def pool_enable(enabled: bool) -> None: ...
def pool_bytes() -> tuple[int, int, int]: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def max_threads() -> int: ...
def peak_flops(threads: int, iterations: int) -> float: ...
