"""The binding, threads and process-wide behaviour."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import lmkern
from lmkern import _C

pytestmark = pytest.mark.cpu_only("the binding of the CPU's module")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_one_libgomp_and_no_libtorch_link():
    """torch's own libgomp is the only OpenMP run-time in a process that has run our kernels."""
    result = run("""
        import torch, lmkern
        lmkern.nn.LSTM(256, 256)(torch.randn(8, 16, 256))
        maps = open("/proc/self/maps").read().split()
        print("\\n".join(sorted({p for p in maps if "gomp" in p or "libomp" in p or "iomp" in p})))
    """)
    libraries = result.stdout.split()
    assert result.returncode == 0 and len(libraries) == 1, result.stdout + result.stderr
    assert os.path.dirname(torch.__file__) in libraries[0]
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True).stdout
    assert "libtorch" not in needed and "libc10" not in needed


def test_obeys_set_num_threads():
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert _C.max_threads() == n
    finally:
        torch.set_num_threads(before)


def test_obeys_set_num_threads_in_a_new_python_thread():
    """OpenMP's setting belongs to a thread; torch's to the process."""
    result = run(
        """
        import threading, torch, lmkern
        torch.set_num_threads(1)
        q = torch.randn(4, 8, 256, 64)
        def call():
            lmkern.functional.scaled_dot_product_attention(q, q, q)
            print(lmkern._C.max_threads())
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        """,
        OMP_NUM_THREADS="2",
    )
    assert result.stdout.split() == ["1"], result.stdout + result.stderr


def test_kernels_start_no_more_threads_than_allowed():
    """Counted as the operating system sees them, after a kernel that would like many."""
    result = run(
        """
        import os, torch
        torch.set_num_threads(1)
        import lmkern
        q = torch.randn(4, 8, 256, 64)
        before = len(os.listdir("/proc/self/task"))
        lmkern.functional.scaled_dot_product_attention(q, q, q)
        print(len(os.listdir("/proc/self/task")) - before)
        torch.set_num_threads(3)
        lmkern.functional.scaled_dot_product_attention(q, q, q)
        print(len(os.listdir("/proc/self/task")) - before)
        """
    )
    assert result.stdout.split() == ["0", "2"], result.stdout + result.stderr


def test_forked_child_runs_serially():
    """A child has a pool without threads; waiting for them would hang for ever."""
    result = run("""
        import os, torch, lmkern
        torch.set_num_threads(2)
        q = torch.randn(4, 8, 128, 64)
        expected = lmkern.functional.scaled_dot_product_attention(q, q, q)
        child = os.fork()
        if child == 0:  # nothing of torch's that is parallel: it would hang for its own reasons
            out = lmkern.functional.scaled_dot_product_attention(q, q, q)
            same = out[3, 7, 127].tolist() == expected[3, 7, 127].tolist()
            os._exit(0 if same and lmkern._C.max_threads() == 1 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert result.stdout.split() == ["0"], result.stdout + result.stderr


def test_python_threads_call_kernels_at_once():
    from concurrent.futures import ThreadPoolExecutor

    module = lmkern.nn.LSTM(32, 200)
    inputs = [torch.randn(20, 8, 32) for _ in range(8)]
    with torch.no_grad():
        expected = [module(x)[0] for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(lambda x: module(x)[0], inputs * 4))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected * 4, strict=True))


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_isa_environment_variable(isa):
    result = run("import lmkern; print(lmkern.info()['isa'])", LMKERN_ISA=isa)
    assert result.stdout.strip() == isa


def test_unknown_isa_is_refused():
    result = run("import lmkern; lmkern.info()", LMKERN_ISA="sse9")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "LMKERN_ISA must be one of" in last and "got 'sse9'" in last
    with pytest.raises(ValueError, match="LMKERN_ISA must be one of"):
        _C.set_isa("sse9")


def test_info():
    info = lmkern.info()
    assert info["lmkern"] == lmkern.__version__ and info["torch"] == torch.__version__
    assert info["isa"] in info["isa_supported"] and info["threads"] >= 1
    assert all(isinstance(value, (str, int, list)) for value in info.values())


def test_import_needs_a_new_enough_torch():
    result = run("""
        import torch
        torch.__version__ = "2.9.1"
        import lmkern
    """)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: lmkern") and "needs torch >= 2.10" in last


def test_views_reject_what_they_cannot_describe():
    ok = torch.zeros(4)
    with pytest.raises(TypeError, match="unsupported dtype"):
        _C.vec_math("exp", torch.zeros(4, dtype=torch.complex64), ok)
    with pytest.raises(TypeError):
        _C.vec_math("exp", [1.0], ok)
    with pytest.raises(TypeError, match="out must be float32, got float64"):
        _C.vec_math("exp", ok, ok.double())
    with pytest.raises(ValueError, match="at most 8 dimensions"):
        _C.vec_math("exp", torch.zeros((1,) * 9), ok)
    with pytest.raises(ValueError, match="x must be contiguous"):
        _C.vec_math("exp", torch.zeros(8)[::2], ok)
    with pytest.raises((ValueError, RuntimeError, BufferError)):
        _C.vec_math("exp", torch.zeros(4, device="meta"), ok)


def test_parameter_is_a_tensor_too():
    out = torch.empty(4)
    _C.vec_math("exp", torch.nn.Parameter(torch.zeros(4)).detach(), out)
    assert (out == 1).all()
