"""The oracle rule: our error against float64 is at most twice the error of torch's own operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EPSILON = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}  # about one ULP for bfloat16 and float16

ZERO = (
    1e-12  # where the truth is less than that, and a float64's rounding error, errors are absolute
)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def outputs_and_gradients(f: Function, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """f's outputs, and the gradients of a fixed random combination of them, for all float inputs."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = f(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(
        outputs, wanted, [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]
    )
    return [o.detach() for o in outputs] + list(grads)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape, f"{list(actual.shape)} instead of {list(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    scale = exact.abs().max()
    if scale < ZERO:
        scale = torch.ones(())
    error = ((actual.double() - exact).abs().max() / scale).item()
    assert error == error, "NaN"
    return error


def bias(actual: Tensor, exact: Tensor) -> float:
    """How far the factor is from 1 by which ``exact`` was scaled, as a projection tells it."""
    return abs(((actual.double() * exact).sum() / exact.square().sum()).item() - 1)


def assert_oracle(ours: Function, theirs: Function, inputs: Sequence[Tensor]) -> None:
    """Outputs and all gradients obey the oracle rule; ``theirs`` also states the truth in float64."""
    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    exact = outputs_and_gradients(
        theirs, [x.double() if x.is_floating_point() else x for x in inputs]
    )
    actual = outputs_and_gradients(ours, inputs)
    peer = outputs_and_gradients(theirs, inputs)
    for i, (a, p, e) in enumerate(zip(actual, peer, exact, strict=True)):
        assert a.dtype == p.dtype
        limit = 2 * relative_error(p, e) + EPSILON[dtype]
        error = relative_error(a, e)
        assert error <= limit, f"output {i}: error {error:.2e}, allowed {limit:.2e}"
        # The largest error of bfloat16 hides a constant factor; the projection on the truth does not.
        if a.numel() >= 1000 and e.abs().max() >= ZERO:
            limit = 2 * bias(p, e) + 2e-3
            assert bias(a, e) <= limit, (
                f"output {i}: scaled by 1 ± {bias(a, e):.1e}, not {limit:.1e}"
            )
