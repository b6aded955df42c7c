"""The implementation of the recurrent ops, CPU and CUDA, and the shapes-only one: what is allocated, and
the products over all steps around the kernel. Math and layouts: csrc/ops/recurrent.h."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern import _C
from lmkern.ops.backend import kernels_of, takes_cuda
from lmkern.ops.library import accumulate_dtype, matmul, plain_products
from lmkern.ops.memory import fresh
from lmkern.ops.recurrent_rows import Rows, device_rows_of, rows_of

# In the order of csrc/ops/recurrent.h's RecurrentCell.
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_sigmoid")
GATES = (4, 3, 1, 1, 1)

DIFFERENTIABLE = 13  # the first so many of Inputs


class Inputs(NamedTuple):
    """The tensors of :func:`lmkern.ops.recurrent.recurrence`, in the op's order."""

    x: Tensor
    w_ih: Tensor | None
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    w_hr: Tensor | None
    peephole: Tensor | None
    norm_hh: Tensor | None
    norm_cell_weight: Tensor | None
    norm_cell_bias: Tensor | None
    h_mask: Tensor | None
    zoneout_h: Tensor | None
    zoneout_c: Tensor | None
    reset_mask: Tensor | None
    lengths: Tensor | None
    batch_sizes: Tensor | None


class Options(NamedTuple):
    """The numbers, in the op's order."""

    cell: int
    reverse: bool
    eps: float
    zoneout_h_rate: float
    zoneout_c_rate: float
    recompute: bool


class Saved(NamedTuple):
    """What the forward pass leaves to the backward pass; empty where it is not needed."""

    gates: Tensor  # [N, G*H] activations; empty with recompute
    cells: Tensor  # [N, H] c_t, in the accumulate dtype
    hidden: Tensor  # [N, H] the GRU's hh_n
    hh: Tensor  # [N, G*H] h W_hh^T, under norm
    unprojected: Tensor  # [N, H] o * tanh(c), with a projection


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _allows_tf32(x: Tensor) -> bool:
    """Whether torch lets cuDNN's recurrent layers round the operands of float32 products to tf32."""
    if x.dtype != torch.float32 or not takes_cuda(x):
        return False
    cudnn_rnn: Any = torch.backends.cudnn.rnn
    return bool(cudnn_rnn.fp32_precision == "tf32")


def _kernel_options(i: Inputs, o: Options, rows: Rows) -> tuple[Any, ...]:
    """csrc's RecurrentOptions."""
    return (
        o.cell, o.reverse, rows.batch, i.w_hh.contiguous(), _dense(i.b_hh), _dense(i.w_hr),
        _dense(i.peephole), _dense(i.norm_hh), _dense(i.norm_cell_weight), _dense(i.norm_cell_bias),
        o.eps, rows.sort(i.h_mask), rows.pack(i.zoneout_h), rows.pack(i.zoneout_c), o.zoneout_h_rate,
        o.zoneout_c_rate, rows.pack(i.reset_mask), rows.batch_sizes,
        rows.lengths, rows.offsets, _allows_tf32(i.x),
    )  # fmt: skip


def _placed(i: Inputs) -> tuple[Any, bool, Rows]:
    """The kernels for x, whether they are a GPU's, and the rows as those want them."""
    on_gpu = takes_cuda(i.x)
    place = device_rows_of if on_gpu else rows_of
    return kernels_of(i.x), on_gpu, place(i.x, i.lengths, i.batch_sizes, _batch(i))


def _workspace(kernels: Any, options: tuple[Any, ...], x: Tensor, backward: bool) -> Tensor:
    return x.new_empty(kernels.recurrent_workspace(options, backward), dtype=torch.uint8)


def _outputs(i: Inputs, o: Options, save: bool, want_cells: bool) -> tuple[Tensor, ...]:
    """Fresh y, h_n, c_n, cells for the caller, and Saved: shapes that do not depend on data."""
    x, width, wide = i.x, i.w_hh.shape[1], i.w_hh.shape[0]
    hidden = wide // GATES[o.cell]
    lead = x.shape[:-1]
    batch = _batch(i)
    n = lead.numel()
    wider = accumulate_dtype(x.dtype)
    lstm, norm = o.cell == 0, i.norm_hh is not None

    def saved(wanted: bool, columns: int, dtype: torch.dtype) -> Tensor:
        return fresh(x, (n, columns) if save and wanted else (0,), dtype=dtype)

    return (
        fresh(x, (*lead, width)),
        fresh(x, batch, width),
        fresh(x, (batch, hidden) if lstm else (0,)),
        fresh(x, (*lead, hidden) if want_cells else (0,)),
        saved(not o.recompute, wide, x.dtype),
        saved(lstm, hidden, wider),
        saved(o.cell == 1 and not o.recompute, hidden, wider),
        saved(norm and not o.recompute, wide, wider),
        saved(i.w_hr is not None, hidden, x.dtype),
    )


def _batch(i: Inputs) -> int:
    if i.batch_sizes is None:
        return i.x.shape[1]
    if i.h0 is not None:
        return i.h0.shape[0]
    return int(i.batch_sizes[0]) if i.batch_sizes.numel() else 0


def _project(i: Inputs, flat: Tensor, out: Tensor) -> None:
    """out = x W_ih^T + b_ih: one product for all steps."""
    if i.w_ih is None:
        torch.add(flat, i.b_ih, out=out) if i.b_ih is not None else out.copy_(flat)
    elif i.b_ih is None:
        matmul(flat, i.w_ih, out=out, transpose_b=True)
    else:
        matmul(flat, i.w_ih, i.b_ih, out, transpose_b=True)


def _recurrent_operand(i: Inputs, rows: Rows, y: Tensor, reverse: bool) -> Tensor:
    """[N, P]: what entered W_hh at each row, h_{t-1} after reset and mask; y [N, P] packed."""
    h = rows.previous(y, rows.sort(i.h0), reverse)
    if i.reset_mask is not None:
        h = h.masked_fill(rows.pack(i.reset_mask).unsqueeze(1), 0)
    if i.h_mask is not None:
        h = h * rows.each_step(rows.sort(i.h_mask))
    return h


_CHUNK_BYTES = 1 << 20  # of x' in a chunk: half of a core's cache


def reads_weights_directly(batch: int, dtype: torch.dtype) -> bool:
    """Whether a step of so many rows runs in one kernel on the weights as they lie.

    Beyond, a product library's packing pays (lmkern's tiles, from 96 rows on); for 16-bit weights, whose
    products the library computes in 16 bits, it does so earlier.
    """
    return batch <= (95 if dtype in (torch.float32, torch.float64) else 4)


def forward_pass(*args: Any) -> tuple[Tensor, ...]:
    i, o = Inputs(*args[:18]), Options(*args[18:24])
    save, want_cells = args[24:]
    y, h_n, c_n, cells_out, *kept = _outputs(i, o, save, want_cells)
    saved = Saved(*kept)
    kernels, on_gpu, rows = _placed(i)
    n = rows.count
    wide, hidden = i.w_hh.shape[0], i.w_hh.shape[0] // GATES[o.cell]
    packed_y = rows.fresh(y)
    cells = saved.cells[:n] if saved.cells.numel() else None
    if cells is None and want_cells:
        cells = fresh(i.x, n, hidden, dtype=accumulate_dtype(i.x.dtype))
    packed_h, packed_c = rows.fresh_state(h_n), rows.fresh_state(c_n)
    h0, c0 = rows.sort(i.h0), rows.sort(i.c0)
    options = _kernel_options(i, o, rows)
    chunk = 0 if on_gpu else _steps_of_a_chunk(i, o, rows, save)
    workspace = _workspace(kernels, options, i.x, False) if on_gpu else None
    with plain_products():
        if chunk:
            _forward_in_chunks(
                i, o, options, rows, chunk, h0, c0, packed_y, packed_h, packed_c, cells
            )
        else:
            gates = saved.gates[:n] if saved.gates.numel() else fresh(i.x, n, wide)
            _project(i, rows.pack(i.x), gates)
            first_hh = None
            if h0 is not None and rows.single:  # a single product is not worth packing w_hh for
                operand = _recurrent_operand(i, rows, packed_y, o.reverse)
                first_hh = matmul(operand, i.w_hh, transpose_b=True)
            forward: Any = kernels.recurrent_forward
            forward(
                options, gates, h0, c0, first_hh, packed_y, packed_h,
                packed_c if o.cell == 0 else None, cells, _rows(saved.hidden, n),
                _rows(saved.hh, n), _rows(saved.unprojected, n), saved.gates.numel() > 0,
                workspace, False,
            )  # fmt: skip
    rows.unpack(packed_y, y)
    rows.unsort(packed_h, h_n)
    if o.cell == 0:
        rows.unsort(packed_c, c_n)
    if want_cells and cells is not None:
        rows.unpack(cells, cells_out)
    return y, h_n, c_n, cells_out, *kept


def _steps_of_a_chunk(i: Inputs, o: Options, rows: Rows, save: bool) -> int:
    """How many steps at a time inference takes; 0 for all.

    x' of a long sequence is too large for the cache, and written and read once. In chunks it never
    leaves it. The state passes from chunk to chunk in the storage type, so narrow ones are not cut.
    """
    plain = i.batch_sizes is None and i.lengths is None and all(t is None for t in i[7:17])
    if save or not plain or o.zoneout_h_rate or o.zoneout_c_rate or i.x.dtype.itemsize < 4:
        return 0
    row_bytes = i.w_hh.shape[0] * i.x.dtype.itemsize
    steps = _CHUNK_BYTES // max(1, rows.batch * row_bytes)
    # Each chunk reads W_ih again, which only many rows make up for.
    return steps if 0 < steps * 2 <= i.x.shape[0] and steps * rows.batch >= 500 else 0


def _forward_in_chunks(
    i: Inputs,
    o: Options,
    options: tuple[Any, ...],
    rows: Rows,
    chunk: int,
    h0: Tensor | None,
    c0: Tensor | None,
    y: Tensor,
    h: Tensor,
    c: Tensor,
    cells: Tensor | None,
) -> None:
    """Inference, a few steps at a time, over one buffer for x' and one packing of W_hh."""
    steps, b = i.x.shape[0], rows.batch
    wide, width = i.w_hh.shape
    x = rows.pack(i.x)
    buffer = fresh(i.x, chunk * b, wide)
    # Room for panels of vectors or of tiles, whose extents are rounded up, with biases.
    room = (width + 40) * (wide + 4 * 64) * 2 * max(1, i.x.element_size() // 4)
    packed = fresh(i.x, room, dtype=torch.float32)
    starts = list(range(0, steps, chunk))
    for at in reversed(starts) if o.reverse else starts:
        part = slice(at * b, min(at + chunk, steps) * b)
        gates = buffer[: part.stop - part.start]
        _project(i, x[part], gates)
        first = at == (starts[-1] if o.reverse else 0)
        forward: Any = _C.recurrent_forward
        forward(
            options, gates, h0 if first else h, (c0 if first else c) if o.cell == 0 else None, None,
            y[part], h, c if o.cell == 0 else None, None if cells is None else cells[part], None, None,
            None, False, packed, not first,
        )  # fmt: skip


def _rows(saved: Tensor, n: int) -> Tensor | None:
    return saved[:n] if saved.dim() == 2 else None


def forward_fake(*args: Any) -> tuple[Tensor, ...]:
    i, o = Inputs(*args[:18]), Options(*args[18:24])
    return _outputs(i, o, *args[24:])


def _gradients(i: Inputs, need: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        fresh(i.x, t.shape if wanted and t is not None else (0,))
        for t, wanted in zip(i[:DIFFERENTIABLE], need, strict=True)
    )


def backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return _gradients(Inputs(*args[:18]), args[-1])


def backward_pass(*args: Any) -> tuple[Tensor, ...]:
    i, o = Inputs(*args[:18]), Options(*args[18:24])
    d_y, d_h_n, d_c_n, d_cells, y = args[24:29]
    kept = args[29:34]
    need = [n and t is not None for n, t in zip(args[34], i[:DIFFERENTIABLE], strict=True)]
    kernels, on_gpu, rows = _placed(i)
    n, wide, width = rows.count, i.w_hh.shape[0], i.w_hh.shape[1]
    hidden = wide // GATES[o.cell]
    gru = o.cell == 1
    norm, normed_c = i.norm_hh is not None, i.norm_cell_weight is not None
    wider = accumulate_dtype(i.x.dtype)
    gates, cells, saved_hidden, hh, unprojected = (_rows(t, n) for t in kept)
    packed_y = rows.pack(y)
    h0, c0 = rows.sort(i.h0), rows.sort(i.c0)
    plain_operand = (
        rows.batch_sizes is None
        and rows.lengths is None
        and i.reset_mask is None
        and i.h_mask is None
    )
    operand = None
    with plain_products():
        if not plain_operand or o.recompute:
            operand = _recurrent_operand(i, rows, packed_y, o.reverse)
        if o.recompute:
            assert operand is not None
            gates = fresh(i.x, n, wide)
            _project(i, rows.pack(i.x), gates)
            if norm or i.b_hh is None:
                hh = matmul(operand, i.w_hh, transpose_b=True).to(wider)
            else:
                hh = matmul(operand, i.w_hh, i.b_hh, transpose_b=True).to(wider)

    new = functools.partial(fresh, i.x)
    d_gates = new(n, wide)
    d_hh = new(n, wide) if gru or norm else None
    d_h = new(n, width) if i.w_hr is not None else None
    d_normed = new(n, wide) if norm and gru else None
    d_c_normed = new(n, hidden) if normed_c else None
    c_now = None
    if (normed_c or i.peephole is not None) and (i.zoneout_c is not None or o.zoneout_c_rate):
        c_now = new(n, hidden, dtype=wider)
    d_h0 = new(rows.batch, width) if need[5] else None
    d_c0 = new(rows.batch, hidden) if need[6] else None
    backward: Any = kernels.recurrent_backward
    options = _kernel_options(i, o, rows)
    workspace = _workspace(kernels, options, i.x, True) if on_gpu else None
    backward(
        options, rows.pack(d_y), rows.sort(d_h_n), rows.sort(d_c_n),
        rows.pack(d_cells), h0, c0, packed_y, gates, cells, saved_hidden, hh, d_gates, d_hh, d_h,
        d_normed, d_c_normed, c_now, d_h0, d_c0, o.recompute, workspace,
    )  # fmt: skip
    if d_hh is None:
        d_hh = d_gates
    if d_normed is None:
        d_normed = d_gates if norm else d_hh
    if c_now is None:
        c_now = cells

    grads = list(_gradients(i, need))  # outputs that nobody asked for are empty

    def put(at: int, value: Tensor) -> None:
        grads[at] = value.to(i.x.dtype)

    with plain_products():
        if need[0]:
            d_x = d_gates if i.w_ih is None else matmul(d_gates, i.w_ih)
            rows.unpack(d_x, grads[0]) if rows.index is not None else put(0, d_x.view(i.x.shape))
        if need[1]:
            put(1, matmul(d_gates, rows.pack_for_sum(i.x), transpose_a=True))
        if need[2]:
            if operand is not None:
                put(2, matmul(d_hh, operand, transpose_a=True))
            else:
                put(2, rows.recurrent_weight_gradient(d_hh, packed_y, h0, o.reverse))
        if need[3] or (need[4] and d_normed is d_gates):
            d_b = d_gates.sum(0, dtype=wider)
            if need[3]:
                put(3, d_b)
            if need[4] and d_normed is d_gates:
                put(4, d_b.clone() if need[3] else d_b)
        if need[4] and d_normed is not d_gates:
            put(4, d_normed.sum(0, dtype=wider))
        if need[5] and d_h0 is not None:
            if rows.single:  # the kernel leaves a single step's product to us
                product = matmul(d_hh, i.w_hh)
                if i.h_mask is not None:
                    product = product * i.h_mask
                if i.reset_mask is not None:
                    product = product.masked_fill(rows.pack(i.reset_mask).unsqueeze(1), 0)
                d_h0 = d_h0 + product
            put(5, rows.unsorted(d_h0))
        if need[6] and d_c0 is not None:
            put(6, rows.unsorted(d_c0))
        if need[7] and d_h is not None and unprojected is not None:
            put(7, matmul(d_h, unprojected, transpose_a=True))
        if need[8] and cells is not None and c_now is not None:
            c_prev = rows.previous(cells, None if c0 is None else c0.to(wider), o.reverse)
            if i.reset_mask is not None:
                c_prev = c_prev.masked_fill(rows.pack(i.reset_mask).unsqueeze(1), 0)
            d_i, d_f, _, d_o = d_gates.to(wider).chunk(4, 1)
            put(8, torch.cat([(d_i * c_prev).sum(0), (d_f * c_prev).sum(0), (d_o * c_now).sum(0)]))
        if need[12] and i.h_mask is not None:
            h = rows.previous(packed_y, h0, o.reverse)
            if i.reset_mask is not None:
                h = h.masked_fill(rows.pack(i.reset_mask).unsqueeze(1), 0)
            put(12, rows.unsorted(rows.sum_steps(matmul(d_hh, i.w_hh) * h)))
        if need[9] and hh is not None:
            put(9, (d_normed.to(wider) * F.layer_norm(hh, (wide,), eps=o.eps)).sum(0))
        if d_c_normed is not None and c_now is not None:
            d = d_c_normed.to(wider)
            if need[10]:
                put(10, (d * F.layer_norm(c_now, (hidden,), eps=o.eps)).sum(0))
            if need[11]:
                put(11, d.sum(0))
    return tuple(grads)
