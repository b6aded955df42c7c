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

from lmkern.ops.recurrent_cpu import DIFFERENTIABLE, Inputs

Reference = Callable[..., tuple[Tensor, ...]]


def _slices(info: Any, in_dims: Any, args: Any) -> list[list[Any]]:
    """The arguments of each element of the mapped batch."""

    def at(element: int, arg: Any, dim: Any) -> Any:
        return arg.select(dim, element) if isinstance(dim, int) else arg

    return [
        [at(n, a, d) for a, d in zip(args, in_dims, strict=True)] for n in range(info.batch_size)
    ]


def _one_by_one(op: Any, info: Any, in_dims: Any, args: Any) -> tuple[Any, Any]:
    results = [op(*each) for each in _slices(info, in_dims, args)]
    outputs = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


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
        return _one_by_one(op, info, in_dims, args)

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
    return _one_by_one(
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
        run = functools.partial(ctx.reference, ctx.options, ctx.want_cells)
        wanted = [n for n, need in enumerate(ctx.need) if need]
        cotangents = [n for n, d in enumerate(d_outputs) if d is not None]

        def gradient(*leaves: Tensor) -> tuple[Tensor, ...]:
            def outputs(*some: Tensor) -> tuple[Tensor, ...]:
                full = list(inputs)
                for n, value in zip(wanted, some, strict=True):
                    full[n] = value
                return run(*full)

            pulled: Any = torch.func.vjp(outputs, *leaves[: len(wanted)])
            values, pull_back = pulled
            given = dict(zip(cotangents, leaves[len(wanted) :], strict=True))
            slots = [0, 1] + [2] * (ctx.options[0] == 0) + [3] * bool(ctx.want_cells)
            return pull_back(
                tuple(
                    given.get(slot, torch.zeros_like(v))
                    for slot, v in zip(slots, values, strict=True)
                )
            )

        leaves = [inputs[n] for n in wanted] + [d_outputs[n] for n in cotangents]
        pulled: Any = torch.func.vjp(gradient, *leaves)
        _, pull_back = pulled
        result = pull_back(tuple(grads[n] for n in wanted))
        d_inputs: list[Tensor | None] = [None] * 18
        d_cotangents: list[Tensor | None] = [None] * 4
        for n, value in zip(wanted, result[: len(wanted)], strict=True):
            d_inputs[n] = value
        for n, value in zip(cotangents, result[len(wanted) :], strict=True):
            d_cotangents[n] = value
        kept = len(ctx.needs_input_grad) - 4 - 4 - 18
        return (None,) * 4 + tuple(d_cotangents) + tuple(d_inputs) + (None,) * kept
