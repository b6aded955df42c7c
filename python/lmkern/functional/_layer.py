"""What all recurrent functions share: the checks, and the choice between kernel and reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern import reference
from lmkern.ops.check import check_tensor
from lmkern.ops.library import autocast, is_autocast_on, use_kernel, without_autocast
from lmkern.ops.recurrent import recurrence

# How messages call the shapes of w_ih, w_hh, w_hh with a projection, and a vector of all gates.
_SYMBOLS = {
    4: ("[4H, I]", "[4H, H]", "[4H, P]", "[4H]"),
    3: ("[3H, I]", "[3H, H]", "[3H, P]", "[3H]"),
    1: ("[H, I]", "[H, H]", "[H, P]", "[H]"),
}
_RNN_CELLS = {"tanh": "rnn_tanh", "relu": "rnn_relu", "sigmoid": "rnn_sigmoid"}


def rnn_cell_name(op: str, activation: str) -> str:
    """The name under which :func:`lmkern.reference.recurrence` knows an Elman cell."""
    try:
        return _RNN_CELLS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            f"{op}: activation must be one of {list(_RNN_CELLS)}, got {activation!r}"
        ) from None


def run_layer(
    op: str,
    cell: str,
    gates: int,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    reverse: bool = False,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    eps: float = 1e-5,
    h_mask: Tensor | None = None,
    zoneout_h: float | Tensor = 0.0,
    reset_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    w_hr: Tensor | None = None,
    peephole: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    zoneout_c: float | Tensor = 0.0,
    return_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check the arguments, choose between kernel and reference, run. Called at every step by cells."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a Tensor, got {type(input).__name__}")
    if not isinstance(w_hh, Tensor):
        raise TypeError(f"{op}: w_hh must be a Tensor, got {type(w_hh).__name__}")
    device = input.device
    casting = is_autocast_on(device.type)
    if casting:
        (input, w_ih, w_hh, b_ih, b_hh, h0, c0, norm_ih, norm_hh, h_mask, w_hr, peephole,
         norm_cell_weight, norm_cell_bias) = autocast(
            device.type, input, w_ih, w_hh, b_ih, b_hh, h0, c0, norm_ih, norm_hh, h_mask, w_hr,
            peephole, norm_cell_weight, norm_cell_bias,
        )  # fmt: skip
    dtype = input.dtype

    if batch_sizes is None:
        if input.dim() != 3:
            raise ValueError(f"{op}: input must be [T, B, I], got {list(input.shape)}")
        steps, batch, width = input.shape
        if steps == 0:
            raise ValueError(
                f"{op}: input must have at least one time step, got {list(input.shape)}"
            )
    else:
        batch, width = _check_packed(op, input, batch_sizes, lengths)
    if w_hh.dim() != 2:
        raise ValueError(f"{op}: w_hh must be {_SYMBOLS[gates][1]}, got {list(w_hh.shape)}")
    hidden = features = w_hh.shape[1]
    s_ih, s_hh, s_projected, s_gates = _SYMBOLS[gates]
    if w_hr is not None:
        if not isinstance(w_hr, Tensor) or w_hr.dim() != 2:
            raise ValueError(f"{op}: w_hr must be a Tensor [P, H], got {_what(w_hr)}")
        features, hidden = w_hr.shape
        s_hh = s_projected
        check_tensor(op, "w_hr", w_hr, (features, hidden), "[P, H]", dtype, device)
    wide = gates * hidden
    check_tensor(op, "w_hh", w_hh, (wide, features), s_hh, dtype, device)
    check_tensor(op, "w_ih", w_ih, (wide, width), s_ih, dtype, device)
    if b_ih is not None and b_hh is not None:
        check_tensor(op, "b_ih", b_ih, (wide,), s_gates, dtype, device)
        check_tensor(op, "b_hh", b_hh, (wide,), s_gates, dtype, device)
    elif b_ih is not b_hh:
        raise ValueError(f"{op}: b_ih and b_hh must be given together")
    if h0 is not None:
        state = "[B, H]" if w_hr is None else "[B, P]"
        check_tensor(op, "h0", h0, (batch, features), state, dtype, device)
    if c0 is not None:
        check_tensor(op, "c0", c0, (batch, hidden), "[B, H]", dtype, device)
    # A hidden size of 0 is allowed in torch's cells.
    kernel = use_kernel(op, input, kernel="recurrent_forward", transforms=True) and hidden > 0
    run = recurrence if kernel else reference.recurrence

    if (
        zoneout_h.__class__ is float and zoneout_h == 0.0 and zoneout_c.__class__ is float
        and zoneout_c == 0.0 and h_mask is None and reset_mask is None and lengths is None
        and norm_ih is None and norm_hh is None and norm_cell_weight is None
        and norm_cell_bias is None and peephole is None
    ):  # fmt: skip
        return run(
            cell, input, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr=w_hr, batch_sizes=batch_sizes,
            reverse=reverse, recompute=recompute, return_cells=return_cells,
        )  # fmt: skip

    rows = tuple(input.shape[:-1])
    s_rows = "T, B" if batch_sizes is None else "N"
    for name, tensor, shape, symbolic in (
        ("norm_ih", norm_ih, (wide,), s_gates),
        ("norm_hh", norm_hh, (wide,), s_gates),
        ("norm_cell_weight", norm_cell_weight, (hidden,), "[H]"),
        ("norm_cell_bias", norm_cell_bias, (hidden,), "[H]"),
        ("peephole", peephole, (3 * hidden,), "[3H]"),
        ("h_mask", h_mask, (batch, features), "[B, P]"),
    ):
        if tensor is not None:
            check_tensor(op, name, tensor, shape, symbolic, dtype, device)
    if (norm_cell_weight is None) != (norm_cell_bias is None):
        raise ValueError(f"{op}: norm_cell_weight and norm_cell_bias must be given together")
    if norm_cell_weight is not None and norm_hh is None:
        raise ValueError(f"{op}: norm_hh must be given with norm_cell_weight")
    if reset_mask is not None:
        check_tensor(op, "reset_mask", reset_mask, rows, f"[{s_rows}]", torch.bool, device)
    if lengths is not None:
        check_tensor(op, "lengths", lengths, (batch,), "[B]", torch.int64, device)
        check_lengths(op, lengths, rows[0])
    mask_h, rate_h = _zoneout(op, "zoneout_h", zoneout_h, (*rows, features), s_rows + ", P", device)
    mask_c, rate_c = _zoneout(op, "zoneout_c", zoneout_c, (*rows, hidden), s_rows + ", H", device)
    weight: Tensor | None = w_ih
    if norm_ih is not None:
        if lengths is not None:  # nothing that stands in the padding may reach a gradient
            padded = torch.arange(rows[0], device=device).unsqueeze(1) >= lengths
            input = input.masked_fill(padded.unsqueeze(2), 0.0)
        with without_autocast(device.type):
            input = F.layer_norm(F.linear(input, w_ih), (wide,), norm_ih, b_ih, eps)
        weight = b_ih = None
    return run(
        cell, input, weight, w_hh, b_ih, b_hh, h0, c0, w_hr=w_hr, peephole=peephole,
        norm_hh=norm_hh, norm_cell_weight=norm_cell_weight, norm_cell_bias=norm_cell_bias, eps=eps,
        h_mask=h_mask, zoneout_h=mask_h, zoneout_c=mask_c, zoneout_h_rate=rate_h,
        zoneout_c_rate=rate_c, reset_mask=reset_mask, lengths=lengths, batch_sizes=batch_sizes,
        reverse=reverse, recompute=recompute, return_cells=return_cells,
    )  # fmt: skip


def _zoneout(
    op: str,
    name: str,
    value: float | Tensor,
    shape: tuple[int, ...],
    symbolic: str,
    device: torch.device,
) -> tuple[Tensor | None, float]:
    """(mask, rate): one of them as given, the other without effect."""
    if isinstance(value, Tensor):
        check_tensor(op, name, value, shape, f"[{symbolic}]", torch.bool, device)
        return value, 0.0
    if not isinstance(value, (float, int)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must be a bool mask or a rate in [0, 1], got {value!r}")
    return None, float(value)


def check_lengths(op: str, lengths: Tensor, steps: int) -> None:
    """Raise if lengths that lie on the CPU are beyond 0 to ``steps``."""
    # Only a plain tensor has values to look at: not a fake one, nor one inside a functorch transform.
    if (
        not torch.compiler.is_compiling()
        and type(lengths) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(lengths)
        and lengths.device.type == "cpu"
        and lengths.numel() > 0
    ):
        values = lengths.tolist()
        if min(values) < 0 or max(values) > steps:
            raise ValueError(
                f"{op}: lengths must be between 0 and T = {steps}, got {min(values)} to {max(values)}"
            )


def _check_packed(
    op: str, input: Tensor, batch_sizes: Tensor, lengths: Tensor | None
) -> tuple[int, int]:
    """Batch and width of packed rows."""
    if lengths is not None:
        raise ValueError(f"{op}: lengths must be None when batch_sizes is given")
    if input.dim() != 2:
        raise ValueError(f"{op}: input must be [N, I] with batch_sizes, got {list(input.shape)}")
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"{op}: batch_sizes must be a Tensor, got {type(batch_sizes).__name__}")
    if batch_sizes.dim() != 1 or batch_sizes.shape[0] == 0:
        raise ValueError(f"{op}: batch_sizes must be [T], not empty, got {list(batch_sizes.shape)}")
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise TypeError(
            f"{op}: batch_sizes must be int64 on the cpu, "
            f"got {batch_sizes.dtype} on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    if sizes[-1] < 1 or sum(sizes) != input.shape[0] or sizes != sorted(sizes, reverse=True):
        raise ValueError(
            f"{op}: batch_sizes must not increase and sum to N = {input.shape[0]}, got {sizes[:9]}"
        )
    return sizes[0], input.shape[1]


def _what(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
