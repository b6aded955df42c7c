"""What the benchmarks of attention share: heads, one step of a contender, torch's peers, the row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from harness import Case, assert_agree
from lmkern.functional import scaled_dot_product_attention

Attention = Callable[..., Tensor]
Seen = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # flex's mask_mod: b, h, i, j -> bool

# (B, H, L, D)
SIZES = [(1, 8, 128, 64), (4, 8, 512, 64), (1, 12, 1024, 64), (1, 8, 4096, 64), (1, 16, 1024, 128)]
PASSES = {False: "forward", True: "both"}


def projected(B: int, H: int, L: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as a model has them: views of one projection."""
    return [x.transpose(1, 2) for x in torch.randn(B, L, 3, H, D).to(dtype).unbind(2)]


def gradient(B: int, H: int, L: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of the output, which a model merges into [B, L, H * D]."""
    return torch.randn(B, L, H, D).to(dtype).transpose(1, 2)


def step(attention: Attention, inputs: list[Tensor], d_out: Tensor | None) -> list[Tensor]:
    """The output; with ``d_out`` the gradients as well."""
    if d_out is None:
        with torch.no_grad():
            return [attention(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves)
    out.backward(d_out)
    return [out.detach(), *(x.grad for x in leaves)]


def torch_peers(**options: Any) -> dict[str, Attention]:
    """torch's attention with these options, eager and compiled."""

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    return {"sdpa": sdpa, "compile": torch.compile(sdpa, dynamic=False)}


def masked_peers(mask: Tensor) -> dict[str, Attention]:
    """torch's attention with a bool mask, and with the additive one that torch makes of it."""
    additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return {
        **torch_peers(attn_mask=mask),
        "additive": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, additive),
    }


def flex_peer(seen: Seen | None = None, shape: tuple[int, int, int] = (0, 0, 0)) -> Attention:
    """FlexAttention, compiled, for keys that ``seen`` tells; shape: (B or 1, L, S). Forward only."""
    compiled = torch.compile(flex_attention, dynamic=False)
    if seen is None:
        return compiled

    @functools.cache  # made when it is called: --no-compile leaves it out
    def block_mask():
        B, L, S = shape
        return create_block_mask(seen, B if B > 1 else None, None, L, S, device="cpu")

    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask())


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def compare_attention(
    compare: Callable[[Case], None],
    name: str,
    peers: dict[str, Attention],
    inputs: list[Tensor],
    d_out: Tensor | None,
    *,
    pairs: float = 0.0,
    tolerance: float = 1e-4,
    check: Callable[[], None] | None = None,
    bytes: float = 0.0,
    topic: str = "",
    **options: Any,
) -> None:
    """One row: ours with ``options`` against the peers, all with the same inputs.

    pairs: of queries and keys, over all heads; each takes 2 products forward and 5 backward, where
    our count of 7 has none of what a kernel computes again. check: in place of the comparison.
    """
    products = 2 if d_out is None else 7

    def ours() -> list[Tensor]:
        return step(lambda *a: scaled_dot_product_attention(*a, **options), inputs, d_out)

    runs = {p: lambda f=f: step(f, inputs, d_out) for p, f in peers.items()}
    case = Case(
        name,
        ours=ours,
        peers=runs,
        # Those that the command line leaves out are gone from runs by then.
        check=check or (lambda: assert_agree(ours, runs, tolerance)),
        flops=2 * products * inputs[0].shape[3] * pairs,
        bytes=bytes,
        reads=bytes > 0,
        topic=topic,
    )
    compare(case)
