"""The recurrent ops under torch.func: batching rules, and the autograd Function for its transforms.

A mapped batch of inputs becomes a wider batch of one call; mapped weights, and gradients for each
element, become one call for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmkern.ops.recurrent_passes import DIFFERENTIABLE, Inputs
from lmkern.ops.transforms import differentiate_gradient, one_by_one

Reference = Callable[..., tuple[Tensor, ...]]


def vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    op = torch.ops.lmkern.recurrent_forward
    i, dims = Inputs(*args[:18]), Inputs(*in_dims[:18])
    save = args[24]
    of_batch = {
        "x": 1,
        "h0": 0,
        "c0": 0,
        "h_mask": 0,
        "zoneout_h": 1,
        "zoneout_c": 1,
        "reset_mask": 1,
    }
    mapped = {name for name, dim in dims._asdict().items() if dim is not None}
    if save or i.lengths is not None or i.batch_sizes is not None or not mapped <= of_batch.keys():
        return one_by_one(op, info, in_dims, args)

    def widen(name: str, tensor: Tensor | None) -> Tensor | None:
        """[.., B, ..] of each element side by side: [.., V * B, ..]."""
        if tensor is None or name not in of_batch:
            return tensor
        dim, at = getattr(dims, name), of_batch[name]
        if dim is None:
            tensor = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
            dim = 0
        return tensor.movedim(dim, at).flatten(at, at + 1)

    wide = [widen(name, tensor) for name, tensor in i._asdict().items()]
    y, h_n, c_n, c, *kept = op(*wide, *args[18:])

    def narrow(tensor: Tensor, at: int) -> Tensor:
        if tensor.numel() == 0:
            return tensor.new_empty(info.batch_size, *tensor.shape)
        return tensor.unflatten(at, (info.batch_size, -1)).movedim(at, 0)

    outputs: tuple[Tensor, ...] = (narrow(y, 1), narrow(h_n, 0), narrow(c_n, 0), narrow(c, 1))
    outputs += tuple(narrow(t, 0) for t in kept)
    return outputs, (0,) * len(outputs)


def vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    # `need` is a list, which in_dims flattens or leaves as one entry; it is never mapped.
    return one_by_one(
        torch.ops.lmkern.recurrent_backward, info, (*in_dims[: len(args) - 1], None), args
    )


class RecurrenceTransform(torch.autograd.Function):
    """RecurrenceFunction for torch.func, whose transforms want setup_context (5 times the overhead).

    (reference, options, want_cells, *Inputs) -> the op's outputs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(reference: Reference, options: Any, want_cells: bool, *inputs: Any):  # type: ignore[override]
        return torch.ops.lmkern.recurrent_forward(*inputs, *options, True, want_cells)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.reference, ctx.options, ctx.want_cells = inputs[:3]
        y, _, _, _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*inputs[3:], y, *kept)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, d_h_n: Tensor, d_c_n: Tensor, d_c: Tensor, *_: Any):  # type: ignore[override]
        saved = ctx.saved_tensors
        lstm = ctx.options[0] == 0
        need = tuple(ctx.needs_input_grad[3 : 3 + DIFFERENTIABLE])
        grads = _Gradient.apply(
            ctx.reference, ctx.options, ctx.want_cells, need, d_y, d_h_n,
            d_c_n if lstm else None, d_c if ctx.want_cells else None, *saved,
        )  # fmt: skip
        return (
            (None,) * 3
            + tuple(g if n else None for g, n in zip(grads, need, strict=True))
            + (None,) * 5
        )


class _Gradient(torch.autograd.Function):
    """The gradient as a function of its own, differentiable through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        reference: Reference, options: Any, want_cells: bool, need: Any, d_y: Any, d_h_n: Any,
        d_c_n: Any, d_c: Any, *saved: Any,
    ):  # type: ignore[override]  # fmt: skip
        return torch.ops.lmkern.recurrent_backward(
            *saved[:18], *options, d_y, d_h_n, d_c_n, d_c, *saved[18:], list(need)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.reference, ctx.options, ctx.want_cells, ctx.need = inputs[:4]
        ctx.save_for_backward(*inputs[4:8], *inputs[8 : 8 + 18])

    @staticmethod
    def backward(ctx: Any, *grads: Any):  # type: ignore[override]
        d_outputs, inputs = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        wanted = [n for n, need in enumerate(ctx.need) if need]
        slots = [0, 1] + [2] * (ctx.options[0] == 0) + [3] * bool(ctx.want_cells)
        d_inputs, found = differentiate_gradient(
            functools.partial(ctx.reference, ctx.options, ctx.want_cells), inputs,
            [d_outputs[slot] for slot in slots], wanted, [grads[n] for n in wanted],
        )  # fmt: skip
        d_cotangents: list[Tensor | None] = [None] * 4
        for slot, value in zip(slots, found, strict=True):
            d_cotangents[slot] = value
        kept = len(ctx.needs_input_grad) - 4 - 4 - 18
        return (None,) * 4 + tuple(d_cotangents) + tuple(d_inputs) + (None,) * kept
