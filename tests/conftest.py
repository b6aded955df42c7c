"""Fixtures that all tests share, and where they run: ``pytest --device cpu|cuda|simt|simt-race``."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# lmkern is imported in pytest_configure and later: the device must be known before.

# The same examples on every run: a change is judged by itself, not by luck.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

_EMULATOR = {"simt": "1", "simt-race": "race"}

# What the tests of ops without CUDA kernels begin with, and the kernel; nothing of ours runs there on a GPU.
_NEED_KERNEL = {
    "test_activation": "activation_forward",
    "test_attention": "attention_forward",
    "test_cross_entropy": "cross_entropy_forward",
    "test_dropout": "dropout",
    "test_linear": "linear_forward",
    "test_multihead_attention": "attention_forward",
    "test_norm": "norm_forward",
    "test_quantized_embedding": "quantized_embedding",
    "test_rotary": "rotary_embedding",
}
# After this nothing works any more on the GPU in this process.
_LOST_CONTEXT = re.compile(
    "CUDA error|unspecified launch failure|illegal memory access|misaligned address|illegal instruction"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        choices=["cpu", "cuda", "simt", "simt-race", "meta"],
        help="where the tests run: cuda: the same tests on a GPU; simt, simt-race: CUDA kernels by the "
        "emulator; meta: for the tests of this option",
    )


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device in _EMULATOR:
        os.environ["LMKERN_SIMT"] = _EMULATOR[device]
    from lmkern.ops.backend import EMULATOR, cuda_problem

    if device in _EMULATOR and EMULATOR is None:
        raise pytest.UsageError(f"--device {device}: lmkern was imported before")
    # Not in pyproject.toml: pytest would import lmkern to find the category.
    config.addinivalue_line("filterwarnings", "error::lmkern.LmkernWarning")
    if device == "cuda":
        problem = cuda_problem(0) if torch.cuda.is_available() else "torch sees no GPU"
        if problem:
            raise pytest.UsageError(f"--device cuda: {problem}")
        config.addinivalue_line(
            "filterwarnings", "ignore:.*no kernel for device 'cuda' yet:lmkern.LmkernWarning"
        )
        # The peer is torch's own code: cuDNN rounds to tf32, has other dropout masks, and no second derivatives.
        torch.backends.cudnn.enabled = False
        torch.backends.cuda.matmul.allow_tf32 = False
    if device != "cpu":
        torch.backends.cudnn.allow_tf32 = False  # which our recurrent products obey
    if device in ("cuda", "meta"):
        from on_device import install

        importlib.import_module("lmkern.models")  # whose layers are to be moved
        install(device)


def pytest_runtest_setup(item: pytest.Item) -> None:
    mark = item.get_closest_marker("cpu_only")
    if mark is not None and item.config.getoption("--device") != "cpu":
        pytest.skip(mark.args[0] if mark.args else "only for the CPU")
    if item.config.getoption("--device") == "cuda":
        from lmkern.ops.library import has_cuda

        for name, kernel in _NEED_KERNEL.items():
            if item.path.stem.startswith(name) and not has_cuda(kernel):
                pytest.skip(f"CUDA has no {kernel} yet")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and _LOST_CONTEXT.search(str(report.longrepr)):
        pytest.exit(f"the GPU's context is lost since {report.nodeid}", 3)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "isa" in metafunc.fixturenames and "isa" not in own:
        from lmkern import _C

        device = metafunc.config.getoption("--device")
        metafunc.parametrize(
            "isa", _C.supported_isas() if device == "cpu" else [device], indirect=True
        )


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine can run, one after the other; elsewhere once."""
    from lmkern import _C

    before = _C.isa()
    if request.param in _C.supported_isas():
        _C.set_isa(request.param)
    yield _C.isa()
    _C.set_isa(before)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The type of the device that tensors of the tests are on."""
    name: str = request.config.getoption("--device")
    return "cpu" if name in _EMULATOR else name


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _synchronized(request: pytest.FixtureRequest) -> Iterator[None]:
    """A bad index on a GPU belongs to the test that had it."""
    yield
    if request.config.getoption("--device") == "cuda":
        import lmkern

        lmkern.synchronize()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fallback_allowed() -> Iterator[None]:
    """For tests of a reference path: its warning is not an error there."""
    import lmkern

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmkern.LmkernWarning)
        yield
