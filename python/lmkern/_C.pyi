"""Types of the CPU extension module (csrc/bindings/module_cpu.cpp)."""

from torch import Tensor

def lstm_forward(
    gates: Tensor,
    w_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor | None,
    reverse: bool,
) -> None: ...
def lstm_backward(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    w_hh: Tensor,
    c0: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    d_gates: Tensor,
    d_c0: Tensor | None,
    reverse: bool,
) -> None: ...
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
) -> None: ...
def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    scale: float,
    is_causal: bool,
) -> None: ...
def embedding_forward(weight: Tensor, indices: Tensor, out: Tensor) -> None: ...
def embedding_backward(
    d_out: Tensor, indices: Tensor, d_weight: Tensor, padding_idx: int, scale_grad_by_freq: bool
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
def prefer_huge_pages(fresh: Tensor) -> None: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def max_threads() -> int: ...
def peak_flops(threads: int, iterations: int) -> float: ...
