"""The choice of the module of kernels, and what stands in its way. There is no GPU here: a module made
up in its place, and fake tensors that say they are on one."""

from __future__ import annotations

import importlib
import re
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lmkern
import lmkern.convert
from lmkern import _C, _layer_kinds, _warnings
from lmkern.ops import backend, library
from lmkern.ops.gradient_buffer import buffer_of, lazily_zeroed
from lmkern.ops.memory import fresh
from test_binding import run

pytestmark = pytest.mark.cpu_only
SOURCES = Path(lmkern.__file__).parent


@pytest.fixture
def cuda_module(monkeypatch):
    """Puts a _C_cuda in its place that says what it is told to; without a call, there is none."""
    monkeypatch.setattr(backend, "_cuda", backend._Cuda())
    monkeypatch.setitem(sys.modules, "lmkern._C_cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    _warnings._warn_first_time.cache_clear()

    def install(driver=13000, runtime=13000, gpus=1, architectures=("80-real", "90a-real", "120")):
        module = types.SimpleNamespace(
            driver_version=lambda: driver,
            runtime_version=lambda: runtime,
            device_count=lambda: gpus,
            architectures=lambda: list(architectures),
            errors=[],
        )
        module.take_index_error = lambda: module.errors.pop(0) if module.errors else None
        monkeypatch.setitem(sys.modules, "lmkern._C_cuda", module)
        return module

    yield install
    _warnings._warn_first_time.cache_clear()


@pytest.fixture
def on_gpu():
    with FakeTensorMode():
        yield lambda *shape: torch.empty(*shape, device="cuda")


def test_tensors_of_the_cpu_take_its_kernels(cuda_module):
    assert backend.kernels_of(torch.ones(2)) is _C
    assert not backend.takes_cuda(torch.ones(2))
    assert not backend._cuda.asked


def test_tensors_of_a_gpu_take_its_kernels(cuda_module, on_gpu):
    module = cuda_module()
    assert backend.kernels_of(on_gpu(2)) is module is backend.cuda_kernels()
    assert backend.takes_cuda(on_gpu(2))
    assert backend.cuda_problem() == backend.cuda_problem(0) == ""


def test_no_kernels_for_other_devices(cuda_module):
    cuda_module()
    with pytest.raises(RuntimeError, match="no kernels for device 'meta'"):
        backend.kernels_of(torch.ones(2, device="meta"))


PROBLEMS = {
    "none": (None, "this build of lmkern has no CUDA kernels: install a wheel that has them"),
    "no driver": ({"driver": 0}, "no NVIDIA driver found"),
    "old driver": ({"driver": 12080}, r"knows CUDA 12\.8, lmkern's kernels need 13\.0: update"),
    "no gpu": ({"gpus": 0}, "sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES"),
    "other gpu": ({"architectures": ["80-virtual-only", "120"]}, "LMKERN_CUDA_ARCHITECTURES=90"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_said_once_and_torch_runs(name, cuda_module, on_gpu):
    options, message = PROBLEMS[name]
    if options is not None:
        cuda_module(**options)
    with pytest.warns(lmkern.LmkernWarning, match=message) as caught:
        z = lmkern.functional.embedding(on_gpu(2, 3).long(), on_gpu(9, 4))
        lmkern.functional.gelu(z)
        assert not library.use_kernel("lstm", z, kernel="recurrent_forward")
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert "running plain torch operations" in str(caught[0].message)
    assert (z.device.type, z.shape) == ("cuda", (2, 3, 4))
    if name != "other gpu":  # where other GPUs may do
        with pytest.raises(RuntimeError, match=message):
            backend.kernels_of(on_gpu(2))
    assert lmkern.info()["cuda"].startswith(backend.cuda_problem() or "kernels ready")
    assert lmkern.functional.embedding(
        torch.ones(2, device="meta").long(), torch.ones(2, 2, device="meta")
    ).is_meta


def test_drivers_of_the_same_major_version_do(cuda_module):
    assert cuda_module(driver=13000, runtime=13020) is backend.cuda_kernels()


def test_a_module_that_does_not_load(cuda_module, monkeypatch):
    def fail(name):
        raise ImportError("libsomething.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert backend.cuda_kernels() is None
    assert "can't be loaded, reinstall lmkern: libsomething" in backend.cuda_problem()


@pytest.mark.parametrize(
    "capability, architectures, compiles, problem",
    [
        ((8, 0), ["80-real"], False, ""),
        ((8, 6), ["80-real"], False, ""),  # binaries run on later minor versions
        ((8, 9), ["80"], False, ""),
        ((9, 0), ["80-real", "90a-real"], False, ""),
        ((10, 3), ["100f-real"], False, ""),
        ((9, 1), ["90a-real"], True, "build with LMKERN_CUDA_ARCHITECTURES=91"),
        ((9, 0), ["80-real", "100-real"], True, "built for 80-real, 100-real: build with"),
        ((9, 0), ["80-virtual"], True, ""),
        ((9, 0), ["80"], True, ""),
        ((9, 0), ["80"], False, "too old to compile kernels: update the driver"),
        ((12, 1), ["90a-virtual", "80"], True, ""),
        ((12, 1), ["90a", "100a"], True, "build with LMKERN_CUDA_ARCHITECTURES=121"),
        ((8, 0), ["90"], True, "build with"),
        ((7, 5), ["75"], True, "compute capability 7.5, lmkern's kernels need 8.0 or more"),
    ],
)
def test_which_gpus_do(capability, architectures, compiles, problem):
    found = backend._problem_of_gpu("a GPU", capability, architectures, compiles)
    assert problem in found and bool(found) == bool(problem)


def test_imported_once_by_many_threads(cuda_module, monkeypatch):
    module, imports = cuda_module(), []
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda n: imports.append(n) or real(n))
    start, found = threading.Barrier(8), []

    def ask():
        start.wait()
        found.append(backend.cuda_kernels())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [module] * 8 and imports == ["lmkern._C_cuda"]


def test_the_cpu_never_asks_for_cuda():
    result = run("""
        import sys, torch, lmkern
        sys.modules["lmkern._C_cuda"] = None
        from lmkern.ops import backend
        lmkern.nn.LSTM(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()
        lmkern.nn.Embedding(3, 4)(torch.tensor([1]))
        lmkern.synchronize()
        assert not backend._cuda.asked
    """)
    assert result.returncode == 0, result.stderr


def test_a_bad_index_comes_with_the_next_call_or_on_demand(cuda_module, on_gpu):
    module = cuda_module()
    x = on_gpu(2)
    backend.kernels_of(x)
    module.errors.append("embedding: input[3] = 9 is out of range")
    with pytest.raises(IndexError, match="= 9 is out of range"):
        backend.kernels_of(x)
    assert backend.kernels_of(x) is module
    module.errors.append("again")
    with pytest.raises(IndexError, match="again"):
        lmkern.synchronize()
    lmkern.synchronize()


def test_a_bad_index_comes_at_once_where_nothing_runs_behind(monkeypatch):
    errors = ["out of range"]
    module = types.SimpleNamespace(take_index_error=lambda: errors.pop() if errors else None)
    monkeypatch.setattr(backend, "_ON_CPU", module)
    implementation = library._raising(lambda x, n: x + n)
    with pytest.raises(IndexError, match="out of range"):
        implementation(torch.ones(1), 2)
    assert implementation(torch.ones(1), 2) == 3


def test_only_ops_with_a_cuda_implementation_run_on_a_gpu(cuda_module, on_gpu, monkeypatch):
    cuda_module()
    monkeypatch.setattr(library, "_ON_CUDA", {"some_forward", "other"})
    x = on_gpu(3)
    assert library.use_kernel("some", torch.ones(3))
    assert library.use_kernel("some", x) and library.use_kernel("it", x, kernel="other")
    with pytest.warns(lmkern.LmkernWarning, match="loss: no kernel for device 'cuda' yet"):
        assert not library.use_kernel("loss", x)
    assert not library.use_kernel("loss", x)  # without a second warning
    assert library.missing_kernel("other", x.device) == ""
    assert library.missing_kernel("norm", x.device) == "no kernel for device 'cuda' yet"
    assert library.missing_kernel("norm", torch.device("meta")) == ""
    assert library.missing_kernel("norm", torch.device("xpu")) == "no kernel for device 'xpu' yet"


def _ops() -> set[str]:
    text = "\n".join(p.read_text() for p in (SOURCES / "ops").glob("*.py"))
    return set(re.findall(r'define_op\(\s*f?"(\w+)\(', text))


def test_every_kernel_that_is_asked_for_exists():
    asked = {kind.kernel for kind in _layer_kinds.KINDS.values()}
    for path in (SOURCES / "functional").glob("*.py"):
        asked |= set(re.findall(r'kernel="(\w+)"', path.read_text()))
    assert len(asked) > 9 and asked <= _ops()


def test_cuda_implementations_are_registered_and_complete():
    assert library._ON_CUDA
    for name in library._ON_CUDA & _ops():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lmkern::{name}", "CUDA")
        assert name.replace("forward", "backward") in library._ON_CUDA
    for name in _ops() - library._ON_CUDA:
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"lmkern::{name}", "CUDA")


def test_memory_on_a_gpu(on_gpu):
    like = on_gpu(3)
    assert fresh(like, 1024, 1024).device.type == "cuda"
    weight = torch.nn.Parameter(on_gpu(4096, 64))
    assert buffer_of(weight, True) is None
    assert lazily_zeroed((4096, 64), torch.float32, like.device).device.type == "cuda"


@pytest.fixture
def autocast_of_a_gpu():
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", before)


def test_autocast_of_the_device_at_hand(autocast_of_a_gpu, on_gpu):
    assert library.is_autocast_on("cuda")
    assert not library.is_autocast_on("cpu") and not library.is_autocast_on("meta")
    assert not library.is_plain_eager()
    assert library.autocast("cuda", on_gpu(2))[0].dtype == torch.get_autocast_dtype("cuda")
    with library.plain_products():
        assert torch.mm(on_gpu(2, 2), on_gpu(2, 2)).dtype == torch.float32
    with library.without_autocast("cuda"):
        assert not torch.is_autocast_enabled("cuda")
    with library.without_autocast("cpu"):
        assert torch.is_autocast_enabled("cuda")


def test_products_inside_of_ops_are_not_cast():
    x = torch.randn(3, 3)
    with torch.autocast("cpu"):
        with library.plain_products():
            assert torch.mm(x, x).dtype == torch.float32
        assert torch.mm(x, x).dtype == torch.bfloat16
        with library.without_autocast("cpu"):
            assert torch.mm(x, x).dtype == torch.float32


def test_unknown_emulator_is_refused():
    result = run("import lmkern", LMKERN_SIMT="fast")
    last = result.stderr.strip().splitlines()[-1]
    assert "LMKERN_SIMT must be 1 or race, got 'fast'" in last


@pytest.mark.parametrize("mode, module", [("1", "_C_simt"), ("race", "_C_simt_race")])
def test_an_emulator_that_was_not_built(mode, module):
    code = f"import sys; sys.modules['lmkern.{module}'] = None; import lmkern"
    last = run(code, LMKERN_SIMT=mode).stderr.strip().splitlines()[-1]
    assert f"LMKERN_SIMT={mode} needs lmkern.{module}" in last
    assert "configure with -DLMKERN_SIMT=ON" in last


@pytest.mark.parametrize("mode, module", [("1", "_C_simt"), ("race", "_C_simt_race")])
def test_the_emulator_runs_what_cuda_has_and_only_that(mode, module):
    if importlib.util.find_spec(f"lmkern.{module}") is None:
        pytest.skip("built without LMKERN_SIMT")
    result = run(
        f"""
        import torch, lmkern
        torch.backends.cudnn.allow_tf32 = False
        from lmkern import _C, {module}
        from lmkern.ops.backend import kernels_of, takes_cuda
        x = torch.randn(5, 2, 3)
        assert kernels_of(x) is {module} and takes_cuda(x)
        assert "emulated by lmkern.{module}" in lmkern.info()["cuda"]

        def refuse(*args):
            raise AssertionError("a kernel of the CPU")

        _C.recurrent_forward = _C.recurrent_backward = _C.recurrent_step = refuse
        theirs = torch.nn.LSTM(3, 4)
        ours = lmkern.nn.LSTM(3, 4)
        ours.load_state_dict(theirs.state_dict())
        for steps in (5, 1):
            y = ours(x[:steps])[0]
            torch.testing.assert_close(y, theirs(x[:steps])[0])
            y.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(ours.step(x[0], ours.stream(2)), y[0])
        calls = []
        real, _C.norm_forward = _C.norm_forward, lambda *a: calls.append(a) or real(*a)
        lmkern.functional.layer_norm(x, (3,))
        assert calls
        """,
        LMKERN_SIMT=mode,
    )
    assert result.returncode == 0, result.stderr
