"""The cases of `make bench-cuda`: recurrent layers against cuDNN and FlashRNN; embeddings, also with
position, norm and dropout, and their optimizers, against torch and Liger-Kernel.

Predicted from FLOPs and bytes: a recurrent layer of T steps is bound by the latency of a step, not by
either rate, except at H = 1024 and B = 64; embeddings go at copy bandwidth.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import lmkern
from bench_embedding import zipf_ids
from bench_recurrent import layer_flops
from bench_token_position import functions, trainer
from harness import Case, Run, assert_close, infer, train
from lmkern.functional import embedding, embedding_bag

# Of recurrent layers; tf32: float32 whose products torch lets cuDNN, and us, round.
PRECISIONS = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32,
}  # fmt: skip
# Of the largest element of each result, against torch in the same dtype.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Setting:
    """Where the cases run, and how large they are; ``tiny``: a dry run."""

    device: str
    ceilings: dict[str, float]
    tiny: bool = False


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def cases(setting: Setting) -> list[tuple[str, Callable[[], Case]]]:
    """Name and maker of each case; what matters most comes first, should the time not suffice."""
    embeddings = [*_embedding_cases(setting), *_position_cases(setting), *_optimizer_cases(setting)]
    return [*embeddings, *_recurrent_cases(setting)]


# ---- recurrent layers ----------------------------------------------------------------------------


def _recurrent_cases(setting: Setting) -> Iterator[tuple[str, Callable[[], Case]]]:
    T = 3 if setting.tiny else 512
    hidden = [16] if setting.tiny else [64, 128, 256, 512, 768, 1024]
    batches = [2] if setting.tiny else [1, 8, 16, 64]
    # A third of the sizes of everything before the second third: a stopped run has seen all kinds.
    sizes = [(H, B) for H in hidden for B in batches]
    for part in range(3):
        for precision in PRECISIONS:
            for training in (True, False):
                for kind in ("LSTM", "GRU"):
                    for H, B in sizes[part::3]:
                        mode = "training" if training else "inference"
                        topic = f"{kind.lower()} {mode} {precision}"
                        yield (
                            f"{topic} T,B,H={(T, B, H)}",
                            lambda a=(setting, kind, training, precision, T, B, H, topic): (
                                _recurrent(*a)
                            ),
                        )


def _recurrent(
    setting: Setting,
    kind: str,
    training: bool,
    precision: str,
    T: int,
    B: int,
    H: int,
    topic: str,
) -> Case:
    torch.manual_seed(0)
    dtype = PRECISIONS[precision]
    made = {"device": setting.device, "dtype": dtype}
    theirs = getattr(torch.nn, kind)(H, H, **made)
    ours = getattr(lmkern.nn, kind)(H, H, **made)
    exact = getattr(torch.nn, kind)(H, H, device=setting.device)
    ours.load_state_dict(theirs.state_dict())
    exact.load_state_dict(theirs.state_dict())
    if not training:  # cuDNN then keeps nothing for a backward
        for module in (ours, theirs, exact):
            module.eval()
    x = torch.randn(T, B, H, **made)
    d_y = torch.randn(T, B, H, **made)

    def stepper(
        call: Callable[..., Any], parameters: list[torch.Tensor], wide: bool = False
    ) -> Run:
        given, d_given = (x.float(), d_y.float()) if wide else (x, d_y)
        if training:
            run: Run = lambda: train(lambda x: [call(x)], [given], [d_given], parameters)  # noqa: E731
        else:
            run = lambda: infer(lambda x: [call(x)], [given])  # noqa: E731
        return with_tf32(precision == "tf32", run)

    def layer(module: torch.nn.Module) -> Run:
        return stepper(lambda x: module(x)[0], list(module.parameters()))

    run = layer(ours)
    peers = {"torch": layer(theirs)}
    truth = stepper(lambda x: exact(x)[0], list(exact.parameters()), wide=True)
    extra: dict[str, Any] = {}
    try:
        if flash := _flashrnn(kind, theirs, dtype):
            peers["flashrnn"] = stepper(*flash)
            peers["flashrnn"]()
    except Exception as error:
        peers.pop("flashrnn", None)
        extra["no_flashrnn"] = f"{type(error).__name__}: {error}"[:200]

    def check() -> None:
        results = run(), layer(theirs)(), with_tf32(False, truth)()
        for i, (a, b, right) in enumerate(zip(*results, strict=True)):
            error, peers_error = (relative_error(t, right) for t in (a, b))
            assert error <= 2 * peers_error + 1e-4, (
                f"wrong result: tensor {i}: error {error:.1e}, torch's {peers_error:.1e}"
            )

    return Case(
        f"{topic} T,B,H={(T, B, H)}",
        ours=run,
        peers=peers,
        check=check,
        flops=layer_flops(kind, T * B, H, H, training),
        ceiling=setting.ceilings[
            "tf32" if precision == "tf32" else str(dtype).removeprefix("torch.")
        ],
        topic=topic,
        extra=extra,
    )


def relative_error(a: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the largest element."""
    largest = exact.double().abs().max().clamp(min=1e-30)
    return float((a.double() - exact.double()).abs().max() / largest)


def with_tf32(allowed: bool, run: Run) -> Run:
    """``run`` with float32 products in tf32, as cuDNN has them by default, or not; all of a layer's."""

    def chosen() -> Any:
        both = torch.backends.cudnn, torch.backends.cuda.matmul
        before = [b.allow_tf32 for b in both]
        for b in both:
            b.allow_tf32 = allowed
        try:
            return run()
        finally:
            for b, value in zip(both, before, strict=True):
                b.allow_tf32 = value

    return chosen


def _flashrnn(
    kind: str, layer: torch.nn.Module, dtype: torch.dtype
) -> tuple[Callable[..., Any], list[torch.Tensor]] | None:
    """FlashRNN's layer of the same size, input product included, and its parameters. Its gates have an
    order of their own: its time is compared, not its result."""
    try:
        flashrnn = importlib.import_module("flashrnn.flashrnn").flashrnn
    except ImportError:
        return None
    w_ih, w_hh = layer.weight_ih_l0, layer.weight_hh_l0
    H = w_hh.shape[1]
    gates = w_hh.shape[0] // H
    w = w_ih.detach().clone().requires_grad_()
    r = w_hh.detach().reshape(gates, 1, H, H).clone().requires_grad_()
    b = torch.zeros(gates, 1, H, device=r.device, dtype=dtype, requires_grad=True)
    name = str(dtype).removeprefix("torch.")

    def call(x: torch.Tensor) -> torch.Tensor:
        T, B = x.shape[:2]
        wx = F.linear(x.transpose(0, 1), w).reshape(B, T, gates, 1, H)
        states, _ = flashrnn(wx, r, b, function=kind.lower(), backend="cuda_fused", dtype=name)
        return states[0].reshape(B, T, H).transpose(0, 1)

    return call, [w, r, b]


# ---- embeddings ----------------------------------------------------------------------------------


def _embedding_cases(setting: Setting) -> Iterator[tuple[str, Callable[[], Case]]]:
    # (V, D, N); the last with uniform ids, so that what is read comes from memory and not from L2.
    sizes = [(50257, 768, 8192), (128256, 4096, 8192), (10000, 256, 65536), (128256, 768, 1 << 18)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for training in (False, True):
            for size in [(50, 16, 20)] if setting.tiny else sizes:
                for bag in (1, 16):
                    name = "embedding" if bag == 1 else "embedding_bag"
                    topic = f"{name} {'training' if training else 'forward'} {short(dtype)}"
                    yield (
                        f"{topic} V,D,N={size}",
                        lambda a=(setting, training, dtype, size, bag, topic): _embedding(*a),
                    )


def _embedding(
    setting: Setting,
    training: bool,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    bag: int,
    topic: str,
) -> Case:
    torch.manual_seed(0)
    V, D, N = size
    ids = torch.randint(V, (N,)) if N == 1 << 18 else zipf_ids(V, N)
    ids = ids.to(setting.device)
    table = torch.randn(V, D, device=setting.device, dtype=dtype)
    rows = N // bag
    d_out = torch.randn(rows, D, device=setting.device, dtype=dtype)
    offsets = torch.arange(0, rows * bag, bag, device=setting.device)
    ids = ids[: rows * bag]

    def stepper(lookup: Callable[..., torch.Tensor]) -> Run:
        weight = torch.nn.Parameter(table.clone())

        def step() -> list[torch.Tensor]:
            if not training:
                with torch.no_grad():
                    return [lookup(weight)]
            weight.grad = None
            out = lookup(weight)
            out.backward(d_out)
            return [out.detach(), weight.grad]

        return step

    extra: dict[str, Any] = {}
    if bag > 1:
        run = stepper(lambda w: embedding_bag(ids, w, offsets, mode="sum"))
        peers = {"torch": stepper(lambda w: F.embedding_bag(ids, w, offsets, mode="sum"))}
    else:
        run = stepper(lambda w: embedding(ids, w))
        peers = {"torch": stepper(lambda w: F.embedding(ids, w))}
        try:
            liger = importlib.import_module(
                "liger_kernel.ops.experimental.embedding"
            ).LigerEmbeddingFunction
            peers["liger"] = stepper(lambda w: liger.apply(w, ids))
            peers["liger"]()
        except ImportError:
            pass
        except Exception as error:
            peers.pop("liger", None)
            extra["no_liger"] = f"{type(error).__name__}: {error}"[:200]
    torch_step = peers["torch"]
    # A dense gradient is V rows, whoever makes it: zeros, and those that are looked up once more.
    moved = ids.numel() + rows + training * (rows + V + ids.unique().numel())
    return Case(
        f"{topic} V,D,N={size}",
        ours=run,
        peers=peers,
        check=lambda: assert_close(run(), torch_step(), TOLERANCE[dtype], "torch"),
        bytes=moved * D * table.element_size(),
        ceiling=setting.ceilings["copy"],
        topic=topic,
        extra=extra,
    )


def _position_cases(setting: Setting) -> Iterator[tuple[str, Callable[[], Case]]]:
    # (V, D, B, L)
    size = (50, 16, 2, 10) if setting.tiny else (50257, 768, 8, 1024)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for training in (False, True):
            topic = (
                f"token + position + norm {'training' if training else 'forward'} {short(dtype)}"
            )
            yield (
                f"{topic} V,D,B,L={size}",
                lambda a=(setting, training, dtype, size, topic): _position(*a),
            )


def _position(
    setting: Setting,
    training: bool,
    dtype: torch.dtype,
    size: tuple[int, int, int, int],
    topic: str,
) -> Case:
    """With dropout in training, as a model has it."""
    torch.manual_seed(0)
    V, D, B, L = size
    ids = zipf_ids(V, B * L).view(B, L).to(setting.device)
    made = {"device": setting.device, "dtype": dtype}
    start = [torch.randn(V, D, **made), torch.randn(L, D, **made)]
    start += [torch.randn(D, **made), torch.randn(D, **made)]
    d_out = torch.randn(B, L, D, **made)

    fused, plain = functions(ids)

    def stepper(f: Callable[..., Any], p: float) -> Run:
        if training:
            return trainer(f, p, start, d_out)
        return lambda: infer(lambda *parameters: [f(0.0, *parameters)], start)

    extra: dict[str, Any] = {}
    peers = {"torch": stepper(plain, 0.1)}
    if not setting.tiny:
        try:
            peers["compile"] = stepper(torch.compile(plain, dynamic=False), 0.1)
            peers["compile"]()
        except Exception as error:
            peers.pop("compile")
            extra["no_compile"] = f"{type(error).__name__}: {error}"[:200]

    def check() -> None:  # masks differ: what is computed is compared without dropout
        assert_close(stepper(fused, 0.0)(), stepper(plain, 0.0)(), TOLERANCE[dtype], "torch")

    distinct = ids.unique().numel()
    # In training also the dense gradient of the tokens: zeros, and the rows that were looked up.
    moved = (4 * B * L + 2 * distinct + V if training else 2 * B * L) * D
    return Case(
        f"{topic} V,D,B,L={size}",
        ours=stepper(fused, 0.1),
        peers=peers,
        check=check,
        bytes=moved * d_out.element_size(),
        ceiling=setting.ceilings["copy"],
        topic=topic,
        extra=extra,
    )


# ---- optimizers of embedding tables --------------------------------------------------------------


def _optimizer_cases(setting: Setting) -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, moved in (("SGD", 2), ("Adagrad", 4), ("SparseAdam", 6)):
        topic = f"{name} step fp32"
        yield topic, lambda a=(setting, name, moved, topic): _optimizer(*a)


def _optimizer(setting: Setting, name: str, moved: int, topic: str) -> Case:
    """A step on the coalesced gradient of a lookup. Its number of rows is a shape: no graphs."""
    torch.manual_seed(0)
    V, D, N = (50, 16, 20) if setting.tiny else (50257, 768, 8192)
    rows = zipf_ids(V, N).unique().to(setting.device)
    values = torch.randn(rows.numel(), D, device=setting.device)
    start = torch.randn(V, D, device=setting.device)

    def stepper(optimizer: Callable[..., torch.optim.Optimizer]) -> Run:
        weight = torch.nn.Parameter(start.clone())
        weight.grad = torch.sparse_coo_tensor(
            rows[None], values, (V, D), is_coalesced=True, check_invariants=False
        )
        instance = optimizer([weight], lr=1e-3)

        def step() -> list[torch.Tensor]:
            instance.step()
            return [weight.detach()]

        return step

    ours, theirs = getattr(lmkern.optim, name), getattr(torch.optim, name)

    def check() -> None:
        assert_close(stepper(ours)(), stepper(theirs)(), 1e-5, "torch")

    return Case(
        f"{topic} V,D,N={(V, D, N)}",
        ours=stepper(ours),
        peers={"torch": stepper(theirs)},
        check=check,
        bytes=(moved + 1) * values.numel() * 4,
        ceiling=setting.ceilings["copy"],
        topic=topic,
        extra={},
    )
