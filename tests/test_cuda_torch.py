"""What torch's users expect of CUDA besides numbers: streams, graphs, devices, autocast, torch.compile, and
that a bad index harms nothing. Only with `--device cuda`."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import lmkern
from lmkern.functional import embedding, embedding_bag, token_position_embedding


@pytest.fixture(autouse=True)
def _on_cuda(device):
    if device != "cuda":
        pytest.skip("only on a GPU")


def lstm(**options):
    module = lmkern.nn.LSTM(24, 40, num_layers=2, **options)
    return lambda x: module(x)[0], list(module.parameters()), torch.randn(7, 5, 24)


def gru_of_packed():
    module = lmkern.nn.GRU(24, 40, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(7, 3, 24), torch.tensor([7, 4, 2]))

    def call(x):
        return module(packed._replace(data=x))[0].data

    return call, list(module.parameters()), packed.data.detach().clone()


def lookups():
    table, position = torch.randn(50, 32).requires_grad_(), torch.randn(9, 32).requires_grad_()
    ids = torch.randint(50, (4, 9))

    def call(x):
        bag = embedding_bag(ids, table, mode="mean")
        both = token_position_embedding(ids, table, position, norm="layer")
        return (embedding(ids, table) + both) * x + bag.unsqueeze(1)

    return call, [table, position], torch.randn(4, 9, 32)


CASES = {"lstm": lstm, "norm": lambda: lstm(layer_norm=True), "packed": gru_of_packed, "lookups": lookups}  # fmt: skip


def step(call, parameters, x):
    """Output and gradients, the latter in the same memory each time."""
    for p in parameters:
        if p.grad is not None:
            p.grad.zero_()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in parameters)]


@pytest.mark.parametrize("case", CASES)
def test_graph(case):
    """Captured once, replayed with other input."""
    call, parameters, x = CASES[case]()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(call, parameters, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(call, parameters, x)
    for _ in range(2):
        x.copy_(torch.randn(*x.shape))
        graph.replay()
        replayed = [t.clone() for t in captured]
        torch.testing.assert_close(replayed, step(call, parameters, x))


def test_each_replay_has_a_mask_of_its_own():
    table, ids = torch.ones(3, 64), torch.zeros(40, dtype=torch.int64)

    def call():
        return token_position_embedding(ids, table, dropout_p=0.5)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out) and set(out.unique().tolist()) == {0.0, 2.0}


def test_an_optimizer_refuses_to_be_captured():
    layer = lmkern.nn.Embedding(5, 4)
    optimizer = lmkern.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.tensor([1])).sum().backward()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"SGD: step\(\) cannot be captured in a CUDA graph"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_stream(case):
    """Kernels run on the current stream, after what it still has to do."""
    call, parameters, x = CASES[case]()
    other = torch.randn(*x.shape)
    expected = [t.clone() for t in step(call, parameters, other)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(other)
        results = step(call, parameters, x)
    side.synchronize()
    torch.testing.assert_close(results, expected)


def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    module = lmkern.nn.LSTM(8, 16, device="cuda:1")
    x = torch.randn(5, 3, 8).to("cuda:1")
    y, _ = module(x)
    y.sum().backward()
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    there = module.to("cuda:0")(x.to("cuda:0"))[0]
    torch.testing.assert_close(y.cpu(), there.cpu())


@pytest.mark.parametrize("case", CASES)
def test_compile(case):
    call, parameters, x = CASES[case]()
    expected = [t.clone() for t in step(call, parameters, x)]
    compiled = torch.compile(call, fullgraph=case != "packed", backend="aot_eager")
    torch.testing.assert_close(step(compiled, parameters, x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    call, parameters, x = lstm()
    with torch.autocast("cuda", dtype):
        y = call(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in parameters)
    torch.testing.assert_close(y.float(), call(x), atol=3e-2, rtol=3e-2)


def test_after_a_bad_index_everything_works():
    table = torch.randn(5, 8)
    embedding(torch.tensor([1, 7]), table)
    with pytest.raises(IndexError, match="index 7 at position \\[1\\] is out of range for V = 5"):
        lmkern.synchronize()
    good = torch.tensor([1, 4])
    assert torch.equal(embedding(good, table), table[good])
    lmkern.synchronize()
