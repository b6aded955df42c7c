"""The pool that large results of kernels lie in (csrc/core/pool.h)."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import lmkern
from lmkern import _C
from lmkern.ops.memory import fresh

pytestmark = pytest.mark.cpu_only("memory of the CPU")

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _empty_pool():
    gc.collect()
    lmkern.empty_cache()
    keeps = fresh(torch.empty(0), MIB)
    del keeps
    if _C.pool_bytes()[1] == 0:
        pytest.skip("nothing is kept under AddressSanitizer")
    lmkern.empty_cache()
    yield
    lmkern.empty_cache()


def large(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return fresh(torch.empty(0), *shape, dtype=dtype)


def kept() -> int:
    return _C.pool_bytes()[1]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64],
)
def test_a_pool_tensor_is_an_ordinary_tensor(dtype):
    x = large(3, 512, 2048, dtype=dtype)
    y = torch.empty(3, 512, 2048, dtype=dtype)
    assert type(x) is torch.Tensor
    assert (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)
    assert x.data_ptr() % 4096 == 0 and not x.requires_grad and x.is_leaf
    x.copy_(torch.arange(3).view(3, 1, 1).expand(3, 512, 2048))
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.clone().share_memory_()):
        assert torch.equal(other, x)


def test_memory_of_a_freed_tensor_serves_the_next():
    x = large(1024, 1024)
    at = x.data_ptr()
    view = x[5:, 3:].t()
    del x
    assert large(1024, 1024).data_ptr() != at, "a view still needs it"
    lmkern.empty_cache()
    del view
    assert large(1024, 1024).data_ptr() == at
    assert large(1000, 1024).data_ptr() == at, "nearly the same size"


def test_no_two_tensors_share_memory():
    tensors = [large(MIB + 64 * i).fill_(i) for i in range(12)]
    for i in range(0, 12, 2):
        tensors[i] = large(MIB + 64 * i).fill_(100 + i)
    for i, t in enumerate(tensors):
        assert (t == (100 + i if i % 2 == 0 else i)).all()


def test_kept_and_used_are_never_more_than_was_used_at_once():
    generator = torch.Generator().manual_seed(0)
    tensors: list[torch.Tensor] = []
    most = 0
    for _ in range(300):
        if tensors and torch.rand((), generator=generator) < 0.5:
            tensors.pop(int(torch.randint(len(tensors), (), generator=generator)))
        elif len(tensors) < 6:
            tensors.append(large(int(torch.randint(MIB, 4 * MIB, (), generator=generator))))
        used, keeps, most_used = _C.pool_bytes()
        most = max(most, used)
        assert most == most_used and used + keeps <= most
        asked = sum(t.nbytes for t in tensors)
        assert asked <= used <= asked * 9 / 8 + 4096 * len(tensors)
    assert kept() > 0
    lmkern.empty_cache()
    assert kept() == 0


def test_small_tensors_and_tensors_without_memory_are_torch_s():
    small = fresh(torch.empty(3), 5, 7)
    meta = fresh(torch.empty(3, device="meta"), 1024, 1024)
    assert small.shape == (5, 7) and meta.is_meta and _C.pool_bytes()[0] == 0


def test_threads_allocate_and_free_side_by_side():
    errors = []

    def work(number: int) -> None:
        for i in range(50):
            x = large(MIB // 2 + 8192 * (i % 3))
            x[::4096] = number
            if not (x[::4096] == number).all():
                errors.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and _C.pool_bytes()[0] == 0


def test_a_training_step_reuses_what_the_last_one_freed():
    x = torch.randn(1024, 768, requires_grad=True)
    norm = lmkern.nn.LayerNorm(768)

    def step() -> None:
        x.grad = None
        lmkern.functional.gelu(norm(x)).sum().backward()

    step()
    most = _C.pool_bytes()[2]
    for _ in range(3):
        step()
    assert _C.pool_bytes()[2] == most > 0


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


CODE = """
import os, torch, lmkern
from lmkern import _C
from lmkern.ops.memory import fresh
x = fresh(torch.empty(0), 1 << 20)
del x
print(_C.pool_bytes()[1] > 0)
"""


def test_keeping_can_be_turned_off():
    assert run(CODE, **os.environ, LMKERN_KEEP_MEMORY="0") == "False"
    assert run(CODE, **os.environ) == "True"


def test_a_forked_child_allocates():
    code = CODE + (
        "pid = os.fork()\n"
        "y = fresh(torch.empty(0), 1 << 20).fill_(1)\n"
        "if pid == 0: os._exit(int(y[7] != 1))\n"
        "print(os.waitpid(pid, 0)[1])"
    )
    assert run(code, **os.environ).split() == ["True", "0"]


@pytest.mark.parametrize("size", [1 << 60, 1 << 61, 1 << 62])
def test_a_tensor_too_large_for_the_machine_is_an_error(size):
    used = _C.pool_bytes()[0]
    with pytest.raises(RuntimeError, match=r"cannot allocate \d+ bytes|more than 2\^63 bytes"):
        large(size)
    assert _C.pool_bytes()[0] == used
