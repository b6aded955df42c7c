"""LSTM: inference and training step against torch's native and oneDNN kernels."""

from __future__ import annotations

import pytest
import torch

import lmkern
from harness import Case, assert_close

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


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lstm(compare, threads, size, training):
    T, B, I, H = size
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(I, H)
    ours = lmkern.nn.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I)
    d_y = torch.randn(T, B, H)

    def infer(module):
        with torch.no_grad():
            return module(x)[0]

    def train(module):
        # Weights change at each step, as they do in training: nothing packed survives it.
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.0)
                p.grad = None
        leaf = x.detach().requires_grad_()
        y = module(leaf)[0]
        y.backward(d_y)
        return [y.detach(), leaf.grad, *(p.grad for p in module.parameters())]

    step = train if training else infer

    def without_onednn():
        with torch.backends.mkldnn.flags(enabled=False):
            return step(theirs)

    def check():
        a, b = step(ours), step(theirs)
        assert_close(a if training else [a], b if training else [b], 1e-4)

    forward = 2 * T * B * 4 * H * (I + H)
    compare(
        Case(
            f"lstm {'training' if training else 'inference'} T,B,I,H={size}",
            ours=lambda: step(ours),
            peers={"onednn": lambda: step(theirs), "native": without_onednn},
            check=check,
            flops=forward * (3 if training else 1),
        )
    )
