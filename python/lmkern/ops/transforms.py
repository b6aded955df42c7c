"""What the ops share under torch.func: calls for each element of a mapped batch, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def one_by_one(op: Any, info: Any, in_dims: Any, args: Any) -> tuple[Any, Any]:
    """A batching rule for anything: one call for each element of the mapped batch."""

    def at(element: int, arg: Any, dim: Any) -> Any:
        return arg.select(dim, element) if isinstance(dim, int) else arg

    results = [
        op(*(at(n, a, d) for a, d in zip(args, in_dims, strict=True)))
        for n in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def differentiate_gradient(
    run: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[int],
    grads: Sequence[Tensor],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The backward pass of a gradient, through ``run``, the reference.

    Args:
        run: inputs -> outputs, differentiable twice. cotangents: of its outputs, None for zeros.
        wanted: the inputs of which a gradient was taken. grads: what comes back for each of those.

    Returns:
        What goes on to the inputs and to the cotangents.
    """
    given = [n for n, d in enumerate(cotangents) if d is not None]

    def gradient(*leaves: Tensor) -> tuple[Tensor, ...]:
        def outputs(*some: Tensor) -> tuple[Tensor, ...]:
            full = list(inputs)
            for n, value in zip(wanted, some, strict=True):
                full[n] = value
            return run(*full)

        pulled: Any = torch.func.vjp(outputs, *leaves[: len(wanted)])
        values, pull_back = pulled
        known = dict(zip(given, leaves[len(wanted) :], strict=True))
        return pull_back(tuple(known.get(n, torch.zeros_like(v)) for n, v in enumerate(values)))

    leaves: list[Any] = [inputs[n] for n in wanted] + [cotangents[n] for n in given]
    pulled: Any = torch.func.vjp(gradient, *leaves)
    _, pull_back = pulled
    result = pull_back(tuple(grads))
    d_inputs: list[Tensor | None] = [None] * len(inputs)
    d_cotangents: list[Tensor | None] = [None] * len(cotangents)
    for n, value in zip(wanted, result[: len(wanted)], strict=True):
        d_inputs[n] = value
    for n, value in zip(given, result[len(wanted) :], strict=True):
        d_cotangents[n] = value
    return d_inputs, d_cotangents
