"""LSTM, GRU and RNN layers: inference and training step against torch's kernels.

Peers: ``native``, torch's own loop; ``onednn``, what nn.LSTM takes by default (GRU and RNN have no
such path); ``compile``. torch.compile leaves recurrent modules alone unless ``allow_rnn`` is set, and
then it unrolls the steps: compilation takes seconds a step, so only short sequences have this peer,
and LSTM inference, which becomes one oneDNN call whatever the length.
"""

from __future__ import annotations

import pytest
import torch

import lmkern
from harness import Case, assert_agree, infer, train

# (T, B, I, H)
SIZES = [
    (1, 1, 256, 256),
    (64, 1, 256, 256),
    (64, 16, 256, 256),
    (35, 20, 650, 650),
    (128, 32, 512, 512),
    (256, 64, 128, 128),
    (512, 8, 64, 64),
    (16, 128, 1024, 1024),
]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
COMPILED_STEPS = 16


def compile_layer(module: torch.nn.Module) -> torch.nn.Module:
    torch._dynamo.config.allow_rnn = True
    return torch.compile(module, dynamic=False, fullgraph=True)


def without_onednn(run):
    """``run`` without oneDNN; torch.backends.mkldnn.flags takes as long as a small step."""

    def native():
        torch._C._set_mkldnn_enabled(False)
        try:
            return run()
        finally:
            torch._C._set_mkldnn_enabled(True)

    return native


def layer_flops(kind: str, rows: int, I: int, H: int, training: bool) -> float:
    """Both products of ``rows`` steps; training adds as many again for d_x and d_h, and for d_W."""
    return 2 * rows * GATES[kind] * H * (I + H) * (3 if training else 1)


@pytest.mark.parametrize("kind", GATES, ids=str.lower)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layers(compare, threads, size, training, kind):
    T, B, I, H = size
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(I, H)
    ours = getattr(lmkern.nn, kind)(I, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I)
    d_y = torch.randn(T, B, H)

    def step(module, parameters):
        def call(x):
            return [module(x)[0]]

        return train(call, [x], [d_y], parameters) if training else infer(call, [x])

    ours_parameters, parameters = list(ours.parameters()), list(theirs.parameters())

    peers = {"native": lambda: step(theirs, parameters)}
    if kind == "LSTM":
        peers["onednn"] = peers["native"]
        peers["native"] = without_onednn(peers["onednn"])
    if T <= COMPILED_STEPS or (kind == "LSTM" and not training):
        compiled = compile_layer(theirs)
        peers["compile"] = lambda: step(compiled, parameters)

    def run():
        return step(ours, ours_parameters)

    topic = f"{kind.lower()} {'training' if training else 'inference'}"
    compare(
        Case(
            f"{topic} T,B,I,H={size}",
            ours=run,
            peers=peers,
            check=lambda: assert_agree(run, peers, 1e-4),
            flops=layer_flops(kind, T * B, I, H, training),
            topic=topic,
        )
    )
