"""What torch's layers do not have, or not fused: lengths, LayerNorm, recurrent dropout, bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lmkern
from bench_recurrent import layer_flops
from harness import Case, assert_agree, infer, train

TRAINING = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
LOOP_SIZES = [(64, 16, 256, 256), (35, 20, 650, 650)]  # (T, B, I, H)
COMPILED_STEPS = {64: 8, 35: 7}  # T -> steps compiled as one block: whole loops take many minutes
RATE = 0.3


@TRAINING
@pytest.mark.parametrize("H", [128, 256, 512])
def test_lengths(compare, threads, H, training):
    """A padded batch, against pack_padded_sequence, nn.LSTM, pad_packed_sequence."""
    T, B = 128, 32
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(H, H)
    ours = lmkern.nn.LSTM(H, H)
    ours.load_state_dict(theirs.state_dict())
    lengths = torch.linspace(1, T, B).round().long()[torch.randperm(B)]
    x, d_y = torch.randn(2, T, B, H)

    def with_lengths(x):
        y, (h, c) = ours(x, lengths=lengths)
        return y, h, c

    def packed(x):
        rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, (h, c) = theirs(rows)
        return pad_packed_sequence(y, total_length=T)[0], h, c

    d_outputs = [d_y, *torch.randn(2, 1, B, H)]

    def step(call, parameters):
        return train(call, [x], d_outputs, parameters) if training else infer(call, [x])

    ours_parameters, parameters = list(ours.parameters()), list(theirs.parameters())
    peers = {"packed": lambda: step(packed, parameters)}

    def run():
        return step(with_lengths, ours_parameters)

    topic = f"lengths {'training' if training else 'inference'}"
    compare(
        Case(
            f"{topic} T,B,H={(T, B, H)}",
            ours=run,
            peers=peers,
            check=lambda: assert_agree(run, peers, 1e-4),
            flops=layer_flops("LSTM", int(lengths.sum()), H, H, training),
            topic=topic,
        )
    )


class CellLoop(torch.nn.Module):
    """Our layer as one writes it in torch: the input's product at once, then a loop over the steps."""

    def __init__(self, layer: lmkern.nn.LSTM, compiled: int = 0) -> None:
        super().__init__()
        for name, weight in layer.state_dict().items():
            parameter = torch.nn.Parameter(weight.clone())
            self.register_parameter(name.removesuffix("_l0"), parameter)
        self.hidden, self.layer_norm, self.compiled = layer.hidden_size, layer.layer_norm, compiled
        block = self.steps
        self.block = torch.compile(block, dynamic=False, fullgraph=True) if compiled else block

    def steps(self, xs, h, c, mask):
        y = []
        for x in xs.unbind(0):
            masked = h if mask is None else h * mask
            if self.layer_norm:
                hh = F.linear(masked, self.weight_hh)
                hh = F.layer_norm(hh, (4 * self.hidden,), self.norm_hh, self.bias_hh)
            else:
                hh = F.linear(masked, self.weight_hh, self.bias_hh)
            i, f, g, o = (x + hh).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            out = c
            if self.layer_norm:
                out = F.layer_norm(c, (self.hidden,), self.norm_cell_weight, self.norm_cell_bias)
            h = o.sigmoid() * out.tanh()
            y.append(h)
        return torch.stack(y), h, c

    def forward(self, x, mask=None):
        if self.layer_norm:
            xs = F.linear(x, self.weight_ih)
            xs = F.layer_norm(xs, (4 * self.hidden,), self.norm_ih, self.bias_ih)
        else:
            xs = F.linear(x, self.weight_ih, self.bias_ih)
        # The first block's states need a gradient as the later ones' do, so that one compilation serves.
        h, c = x.new_zeros(2, x.shape[1], self.hidden).requires_grad_(xs.requires_grad).unbind()
        y = []
        for rows in xs.split(self.compiled or len(xs)):
            out, h, c = self.block(rows, h, c, mask)
            y.append(out)
        return y[0] if len(y) == 1 else torch.cat(y)


def compare_with_loops(compare, topic, size, training, tolerance, **options):
    T, B, I, H = size
    torch.manual_seed(0)
    ours = lmkern.nn.LSTM(I, H, **options)
    with torch.no_grad():  # ones and zeros would hide a gain or bias that is not used
        for name, parameter in ours.named_parameters():
            if name.startswith("norm"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(T, B, I)
    d_y = torch.randn(T, B, H)
    rate = ours.recurrent_dropout

    def step(call, parameters):
        torch.manual_seed(1)  # the same mask for all
        return train(call, [x], [d_y], parameters) if training else infer(call, [x])

    def loop(compiled):
        module = CellLoop(ours, compiled)
        parameters = list(module.parameters())

        def call(x):
            return [module(x, F.dropout(x.new_ones(B, H), rate) if rate else None)]

        return lambda: step(call, parameters)

    peers = {"eager": loop(0), "compile": loop(COMPILED_STEPS[T])}
    parameters = list(ours.parameters())

    def run():
        return step(lambda x: [ours(x)[0]], parameters)

    compare(
        Case(
            f"{topic} T,B,I,H={size}",
            ours=run,
            peers=peers,
            check=lambda: assert_agree(run, peers, tolerance),
            flops=layer_flops("LSTM", T * B, I, H, training),
            topic=topic,
        )
    )


@TRAINING
@pytest.mark.parametrize("size", LOOP_SIZES, ids=str)
def test_layernorm(compare, threads, size, training):
    topic = f"layernorm {'training' if training else 'inference'}"
    # LayerNorm makes differences grow from step to step: after 64 torch's own are 7e-5 from float64.
    compare_with_loops(compare, topic, size, training, 5e-4, layer_norm=True)


@pytest.mark.parametrize("size", LOOP_SIZES, ids=str)
def test_recurrent_dropout(compare, threads, size):
    """Training only: in evaluation there is no dropout."""
    topic = "recurrent dropout training"
    compare_with_loops(compare, topic, size, True, 1e-4, recurrent_dropout=RATE)


@pytest.mark.parametrize("H", [768, 1024, 1536])
def test_bf16(compare, threads, H):
    """bfloat16 storage against our own float32; W_hh, read at every step, does not fit the L2 cache."""
    T, B = 64, 1
    torch.manual_seed(0)
    ours = lmkern.nn.LSTM(H, H).bfloat16()
    exact = lmkern.nn.LSTM(H, H)
    exact.load_state_dict(ours.state_dict())  # the same, rounded weights
    x = torch.randn(T, B, H).bfloat16()
    x32 = x.float()

    def run():
        return infer(lambda x: [ours(x)[0]], [x])

    peers = {"float32": lambda: infer(lambda x: [exact(x)[0]], [x32])}
    compare(
        Case(
            f"bf16 inference T,B,H={(T, B, H)}",
            ours=run,
            peers=peers,
            check=lambda: assert_agree(run, peers, 2e-2),
            flops=layer_flops("LSTM", T * B, H, H, False),
            topic="bf16 inference",
        )
    )
