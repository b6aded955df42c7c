"""One step: the cells against torch's, eager and compiled, and ``step()`` against nn.LSTM with T = 1."""

from __future__ import annotations

from collections import deque

import pytest
import torch

import lmkern
from bench_recurrent import GATES, compile_layer, layer_flops, without_onednn
from harness import Case, assert_agree, infer, train

SIZES = [(1, 64), (1, 128), (16, 256), (64, 512)]  # (B, H), I = H
STEP_SIZES = [(1, 64), (1, 128), (1, 256), (1, 512), (1, 1024)]
TOKENS = 16  # of one run of test_step; the row's time is that of all of them


@pytest.mark.parametrize("kind", GATES, ids=str.lower)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cells(compare, threads, size, training, kind):
    B, H = size
    torch.manual_seed(0)
    theirs = getattr(torch.nn, f"{kind}Cell")(H, H)
    ours = getattr(lmkern.nn, f"{kind}Cell")(H, H)
    ours.load_state_dict(theirs.state_dict())
    states = 2 if kind == "LSTM" else 1
    inputs = list(torch.randn(1 + states, B, H).unbind())
    d_outputs = list(torch.randn(states, B, H).unbind())

    def step(cell, parameters):
        def call(x, *state):
            return cell(x, state) if kind == "LSTM" else [cell(x, *state)]

        return train(call, inputs, d_outputs, parameters) if training else infer(call, inputs)

    ours_parameters, parameters = list(ours.parameters()), list(theirs.parameters())
    compiled = torch.compile(theirs, dynamic=False, fullgraph=True)
    peers = {
        "eager": lambda: step(theirs, parameters),
        "compile": lambda: step(compiled, parameters),
    }

    def run():
        return step(ours, ours_parameters)

    mode = "training" if training else "inference"
    compare(
        Case(
            f"{kind.lower()} cell {mode} B,H={size}",
            ours=run,
            peers=peers,
            check=lambda: assert_agree(run, peers, 1e-5),
            flops=layer_flops(kind, B, H, H, training),
            topic=f"cells {mode}",
        )
    )


@pytest.mark.skipif(not hasattr(lmkern.nn.LSTM, "step"), reason="LSTM.step is not there yet")
@pytest.mark.parametrize("size", STEP_SIZES, ids=str)
def test_step(compare, threads, size):
    B, H = size
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(H, H)
    ours = lmkern.nn.LSTM(H, H)
    ours.load_state_dict(theirs.state_dict())
    tokens = list(torch.randn(TOKENS, B, H).unbind())
    sequences = [x.unsqueeze(0) for x in tokens]
    compiled = compile_layer(theirs)
    zeros = (torch.zeros(1, B, H), torch.zeros(1, B, H))

    def stream(state):
        with torch.no_grad():
            for x in tokens:
                yield ours.step(x, state)

    def decode(module, state):
        with torch.no_grad():
            for x in sequences:
                y, state = module(x, state)
                yield y.squeeze(0)

    def last(outputs):
        return deque(outputs, maxlen=1)[0]

    def onednn():
        return last(decode(theirs, zeros))

    peers = {
        "native": without_onednn(onednn),
        "onednn": onednn,
        "compile": lambda: last(decode(compiled, zeros)),
    }
    kept = ours.stream(batch_size=B)

    def check():
        y = [h.clone() for h in stream(ours.stream(batch_size=B))]  # step may reuse its output
        for name, peer in peers.items():
            assert_agree(lambda: y[-1:], {name: lambda peer=peer: [peer()]}, 1e-5)
        assert_agree(lambda: y, {"onednn": lambda: decode(theirs, zeros)}, 1e-5)

    compare(
        Case(
            f"step x {TOKENS} B,H={size}",
            ours=lambda: last(stream(kept)),
            peers=peers,
            check=check,
            flops=layer_flops("LSTM", TOKENS * B, H, H, False),
            topic="step",
        )
    )
