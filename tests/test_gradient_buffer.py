"""The kept memory of dense embedding gradients: the same numbers as torch's, whatever happens to them."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

import lmkern
from lmkern import _C
from lmkern.functional import embedding, embedding_bag
from lmkern.ops import gradient_buffer
from lmkern.ops.gradient_buffer import lazily_zeroed

pytestmark = pytest.mark.cpu_only("memory of the CPU")

V, D = 700, 101  # large enough to have a buffer


def a_weight(dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.randn(V, D).to(dtype))


def some_ids(seed: int, count: int = 40) -> torch.Tensor:
    return torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(seed))


def d_out(seed: int) -> torch.Tensor:
    return torch.randn(40, D, generator=torch.Generator().manual_seed(seed))


def memory(weight: torch.Tensor) -> gradient_buffer._Memory:
    found = gradient_buffer._buffers[weight]._memory
    assert found is not None
    return found


def expected(*seeds: int) -> torch.Tensor:
    """The sum of the gradients of these lookups, by torch."""
    leaf = torch.zeros(V, D, requires_grad=True)
    for seed in seeds:
        F.embedding(some_ids(seed), leaf).backward(d_out(seed))
    assert leaf.grad is not None
    return leaf.grad


def look_up(weight: torch.Tensor, seed: int) -> None:
    embedding(some_ids(seed), weight).backward(d_out(seed))


def test_steps_write_to_the_same_memory(isa):
    weight = a_weight()
    pointers = set()
    for seed in range(4):
        weight.grad = None
        look_up(weight, seed)
        torch.testing.assert_close(weight.grad, expected(seed))
        pointers.add(weight.grad.data_ptr())
        assert weight.grad.data_ptr() == memory(weight).probe.data_ptr()  # taken over, not copied
        assert not weight.grad._is_view() and weight.grad.is_contiguous()
    assert len(pointers) == 1


def test_only_touched_rows_are_cleared(monkeypatch):
    weight, stale = a_weight(), []
    kernel = _C.embedding_backward
    monkeypatch.setattr(_C, "embedding_backward", lambda *a: (stale.append(a[4]), kernel(*a)))
    monkeypatch.setattr(_C, "embedding_clear", lambda *a: pytest.fail("everything was cleared"))
    for seed in range(3):
        weight.grad = None
        look_up(weight, seed)
    assert stale[0] is None
    assert torch.equal(stale[1], some_ids(0).unique())
    assert torch.equal(stale[2], some_ids(1).unique())


def test_every_dtype_bags_and_padding():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        weight, plain = a_weight(dtype), torch.zeros(V, D, dtype=dtype, requires_grad=True)
        for seed in range(3):
            weight.grad = plain.grad = None
            ids = some_ids(seed).view(8, 5)
            embedding_bag(ids, weight, mode="max", padding_idx=3).sum().backward()
            embedding_bag(ids, plain + weight.detach(), mode="max", padding_idx=3).sum().backward()
            assert torch.equal(weight.grad, plain.grad)
            weight.grad = plain.grad = None
            embedding(ids, weight, int(ids[0, 0])).sum().backward()
            F.embedding(ids, plain, int(ids[0, 0])).sum().backward()
            assert torch.equal(weight.grad, plain.grad)


def test_accumulation_over_micro_batches():
    weight = a_weight()
    for step in range(3):
        weight.grad = None
        for micro in range(3):
            look_up(weight, 10 * step + micro)
        torch.testing.assert_close(weight.grad, expected(*(10 * step + m for m in range(3))))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    weight = a_weight()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for seed in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        look_up(weight, seed)
        torch.testing.assert_close(weight.grad, expected(seed))
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    weight.grad = None
    look_up(weight, 9)
    torch.testing.assert_close(weight.grad, expected(9))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: torch.nn.utils.clip_grad_norm_([w], 1e-3),
        lambda w: torch.nn.utils.clip_grad_value_([w], 1e-3),
        lambda w: w.grad.add_(w.detach()),
        lambda w: w.grad[5:9].fill_(1.0),
        lambda w: w.grad.view(-1)[1:2].copy_(torch.ones(1)),
        lambda w: w.grad.detach().fill_(2.0),
        lambda w: w.grad.sparse_mask,
        lambda w: w.grad.data.add_(w.data),  # no version tells of it, but it hits all rows
    ],
    ids=["norm", "value", "add", "rows", "element", "detached", "nothing", "data"],
)
def test_gradients_that_were_written_to(write):
    weight = a_weight()
    for seed in range(3):
        weight.grad = None
        look_up(weight, seed)
        torch.testing.assert_close(weight.grad, expected(seed))
        with torch.no_grad():
            write(weight)


def test_writes_in_inference_mode():
    weight = a_weight()
    look_up(weight, 0)
    with torch.inference_mode():
        weight.grad.fill_(3.0)
    weight.grad = None
    look_up(weight, 1)
    torch.testing.assert_close(weight.grad, expected(1))


@pytest.mark.parametrize(
    "hold",
    [
        lambda w: w.grad,
        lambda w: w.grad.detach(),
        lambda w: w.grad[3:],
        lambda w: w.grad.numpy(),
        lambda w: w.grad.untyped_storage(),
        lambda w: [w.grad.untyped_storage() for _ in range(2)],
        lambda w: torch.utils.dlpack.to_dlpack(w.grad),
    ],
    ids=["grad", "alias", "view", "numpy", "storage", "storages", "dlpack"],
)
def test_a_gradient_that_is_kept_stays_what_it_is(hold):
    weight = a_weight()
    look_up(weight, 0)
    kept, pointer, copied = hold(weight), weight.grad.data_ptr(), weight.grad.clone()
    weight.grad = None
    look_up(weight, 1)
    assert weight.grad.data_ptr() != pointer
    torch.testing.assert_close(weight.grad, expected(1))
    if isinstance(kept, torch.Tensor):
        assert torch.equal(kept, copied[-len(kept) :])
    del kept
    weight.grad = None
    look_up(weight, 2)
    torch.testing.assert_close(weight.grad, expected(2))


def test_two_lookups_and_a_tied_head_in_one_graph():
    ours = a_weight(torch.float64)
    theirs = Parameter(ours.detach().clone())
    for seed in range(3):
        ids, other = some_ids(seed), some_ids(seed + 50)
        for f, weight in ((embedding, ours), (F.embedding, theirs)):
            weight.grad = None
            x = f(ids, weight) + f(other, weight)
            F.linear(x, weight).logsumexp(1).sum().backward()
            (f(ids, weight) * f(other, weight)).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_autograd_grad_and_retained_graphs():
    weight = a_weight()
    out = embedding(some_ids(0), weight)
    first = torch.autograd.grad(out, weight, d_out(0), retain_graph=True)[0]
    second = torch.autograd.grad(out, weight, d_out(0), retain_graph=True)[0]
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    out.backward(d_out(0), retain_graph=True)
    out.backward(d_out(0))
    torch.testing.assert_close(weight.grad, expected(0, 0))
    torch.testing.assert_close(first, expected(0))
    assert weight.grad.data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_hooks():
    weight, seen = a_weight(), []

    def double(leaf):
        leaf.grad.mul_(2.0)

    keep = weight.register_hook(lambda g: seen.append(g))
    weight.register_post_accumulate_grad_hook(double)
    for seed in range(3):
        weight.grad = None
        look_up(weight, seed)
        torch.testing.assert_close(weight.grad, 2 * expected(seed))
    keep.remove()
    weight.register_hook(lambda g: g * 3)
    weight.grad = None
    look_up(weight, 4)
    torch.testing.assert_close(weight.grad, 6 * expected(4))
    for seed in range(3):
        torch.testing.assert_close(seen[seed], expected(seed))


def test_copies_have_memory_of_their_own():
    layer = lmkern.nn.Embedding(V, D)
    look_up(layer.weight, 0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.weight.grad = None
        look_up(other.weight, 1)
        torch.testing.assert_close(other.weight.grad, expected(1))
    torch.testing.assert_close(layer.weight.grad, expected(0))
    shared = copy.copy(layer)
    shared.weight.grad = None
    look_up(shared.weight, 2)
    torch.testing.assert_close(layer.weight.grad, expected(2))


def test_a_weight_that_changes_its_dtype_or_size():
    weight = a_weight()
    look_up(weight, 0)
    for data in (weight.data.double(), weight.data[: V - 1].clone()):
        weight.grad = None
        weight.data = data
        ids = some_ids(1).clamp(max=V - 2)
        embedding(ids, weight).sum().backward()
        assert weight.grad.shape == data.shape and weight.grad.dtype == data.dtype
        assert torch.equal(weight.grad.sum(1).nonzero()[:, 0], ids.unique())


def test_threads():
    weight, wrong = a_weight(), []

    def work(base: int) -> None:
        for seed in range(base, base + 20):
            out = embedding(some_ids(seed), weight)
            (grad,) = torch.autograd.grad(out, weight, d_out(seed))
            if not torch.allclose(grad, expected(seed), atol=1e-6):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_interrupted_backward_leaves_no_trace(monkeypatch):
    weight, kernel = a_weight(), _C.embedding_backward

    def interrupted(*arguments):
        kernel(*arguments)
        raise KeyboardInterrupt

    # Samples of the rows may find out, too; this is about what is known without them.
    monkeypatch.setattr(_C, "embedding_is_clear", lambda *a: True)
    look_up(weight, 0)
    pointer = weight.grad.data_ptr()
    weight.grad = None
    with monkeypatch.context() as patch:
        patch.setattr(_C, "embedding_backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            look_up(weight, 1)
    gc.collect()  # the traceback holds the half-made gradient
    look_up(weight, 2)
    assert weight.grad.data_ptr() == pointer
    torch.testing.assert_close(weight.grad, expected(2))


def test_memory_lives_as_long_as_the_weight_and_can_be_given_back():
    weight = a_weight()
    look_up(weight, 0)
    probe = weakref.ref(memory(weight).probe)
    weight.grad = None
    assert probe() is not None
    embedding(some_ids(1), weight, reuse_grad=False).sum().backward()
    assert probe() is None and weight not in gradient_buffer._buffers
    weight.grad = None
    look_up(weight, 0)
    probe = weakref.ref(memory(weight).probe)
    del weight
    gc.collect()
    assert probe() is None
    layer = lmkern.nn.Embedding(V, D, reuse_grad=False)
    layer(some_ids(0)).sum().backward()
    assert layer.weight not in gradient_buffer._buffers


def test_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for as_view in (False, True):
            layer = lmkern.nn.Embedding(V, D)
            model = torch.nn.parallel.DistributedDataParallel(
                layer, gradient_as_bucket_view=as_view
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for seed in range(4):
                optimizer.zero_grad()
                model(some_ids(seed)).backward(d_out(seed))
                torch.testing.assert_close(layer.weight.grad, expected(seed))
                optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def resident() -> int:
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * 4096


def test_rows_that_no_step_touches_take_no_memory():
    weight = Parameter(lazily_zeroed((300_000, 128), torch.float32))
    ids = torch.arange(0, 300_000, 3000)
    before = resident()
    for _ in range(2):
        weight.grad = None
        embedding(ids, weight).sum().backward()
    assert resident() - before < 30_000_000 < weight.nbytes
    assert weight.grad[ids].eq(1).all() and weight.grad[ids + 1].eq(0).all()


@pytest.mark.skipif(sys.maxsize < 2**40, reason="needs 64-bit addresses")
def test_more_elements_than_32_bits_count():
    rows, width = 2_200_000, 1000
    weight = Parameter(lazily_zeroed((rows, width), torch.bfloat16))
    assert weight.numel() > 2**31
    ids = torch.tensor([rows - 1, 0, rows - 1, rows // 2])
    with torch.no_grad():
        weight[ids] = ids.remainder(7)[:, None].bfloat16()
    out = embedding(ids, weight)
    assert torch.equal(out[:, 0], ids.remainder(7).bfloat16()) and out.std(1).eq(0).all()
    for _ in range(2):
        weight.grad = None
        embedding(ids, weight).sum().backward()
        assert weight.grad[[rows - 1, rows - 2, 0, rows // 2], 3].tolist() == [2, 0, 1, 1]
    (sparse,) = torch.autograd.grad(embedding(ids, weight, sparse=True).sum(), weight)
    assert sparse.indices().tolist() == [[0, rows // 2, rows - 1]]
    assert embedding_bag(ids[None], weight, mode="sum")[0, 0] == ids.remainder(7).sum()
