"""`make test-cuda` and `make bench-cuda`, as far as they can be tried without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_cuda

pytestmark = pytest.mark.cpu_only("runs on the CPU")

ROOT = Path(__file__).parents[1]
NO_SOURCES = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="no bench/ here")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "run_cuda.py"), *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@NO_SOURCES
def test_the_benchmark_checks_and_measures_every_case(tmp_path):
    done = bench("--dry-run", "--out", str(tmp_path / "t.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "t.json").read_text())
    assert table["wrong"] == table["not_measured"] == []
    topics = {row["topic"] for row in table["rows"]}
    for kind in ("lstm training", "lstm inference", "gru training", "gru inference"):
        assert {f"{kind} {dtype}" for dtype in ("bf16", "fp16", "fp32")} <= topics
    assert {
        "embedding forward bf16",
        "embedding training fp32",
        "embedding_bag training fp16",
    } <= topics
    for row in table["rows"]:
        assert row["rate"] > 0 and row["fraction"] == pytest.approx(
            row["rate"] / row["ceiling"], rel=1e-2
        )
        assert row["case"] in done.stdout
    assert {"copy", "bfloat16", "tf32", "float32"} <= set(table["ceilings"])
    assert table["lmkern"]["torch"] and "cuda" in table


@NO_SOURCES
def test_a_benchmark_that_is_out_of_time_says_what_is_missing(tmp_path):
    done = bench("--dry-run", "--seconds", "0", "-k", "gru bf16", "--out", str(tmp_path / "t.json"))
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "t.json").read_text())
    assert table["rows"] == []
    assert [n.split(" T,")[0] for n in table["not_measured"]] == [
        "gru training bf16",
        "gru inference bf16",
    ]
    assert "2 not measured" in done.stdout


@NO_SOURCES
def test_the_benchmark_needs_a_gpu():
    done = bench()
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "bench-cuda: torch sees no GPU (--dry-run tries the cases on the CPU)"
    ]


def test_files_whose_packages_are_missing_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(run_cuda, "TESTS", tmp_path)
    (tmp_path / "helper.py").write_text("import no_such_package\n")
    path = tmp_path / "test_a.py"
    path.write_text(
        "import os\nfrom helper import x\nimport another_one.part\n\ndef f():\n    import later\n"
    )
    assert run_cuda.missing_packages(path) == ["no_such_package", "another_one"]


def test_every_file_is_dealt_out_once(tmp_path):
    files = [tmp_path / f"test_{n}.py" for n in range(7)]
    for n, path in enumerate(files):
        path.write_text("#" * 100 * (n + 1))
    hands = run_cuda.shards(files, 3)
    assert sorted(p for hand in hands for p in hand) == files
    sizes = [sum(p.stat().st_size for p in hand) for hand in hands]
    assert max(sizes) - min(sizes) <= 300
    assert run_cuda.shards(files[:1], 3) == [[files[0]]]


def test_a_job_ends_in_time_and_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_cuda, "LOGS", tmp_path)
    monkeypatch.setattr(run_cuda, "ROOT", tmp_path)
    jobs = [
        run_cuda.Job("good", [sys.executable, "-c", "print('3 passed')"]),
        run_cuda.Job(
            "bad", [sys.executable, "-c", "print('FAILED tests/a.py'); raise SystemExit(1)"]
        ),
        run_cuda.Job("none", [sys.executable, "-c", "raise SystemExit(5)"]),
        run_cuda.Job("slow", [sys.executable, "-c", "import time; time.sleep(100)"]),
    ]
    begin = time.monotonic()
    run_cuda.run(jobs, begin + 5)
    assert time.monotonic() - begin < 30
    assert [job.state for job in jobs] == ["ok", "failed (1)", "no tests", "out of time"]
    assert not run_cuda.conclude(jobs)
    out = capsys.readouterr().out
    assert "3 passed" in out and "FAILED tests/a.py" in out
    assert run_cuda.conclude([jobs[0], jobs[2]])


def test_after_a_lost_context_the_other_files_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_cuda, "LOGS", tmp_path)
    monkeypatch.setattr(run_cuda, "ROOT", tmp_path)
    code = (
        "import sys\n"
        "if sys.argv[1] == 'tests/a.py':\n"
        "    print('Exit: the GPU\\'s context is lost since tests/b.py::test_x[1]')\n"
        "    sys.exit(3)\n"
        "print(len(sys.argv) - 1, 'passed')"
    )
    files = [f"tests/{n}.py" for n in "abcd"]
    jobs = [run_cuda.Job("suite", [sys.executable, "-c", code], files=files)]
    run_cuda.run(jobs, time.monotonic() + 60)
    assert [job.files for job in jobs] == [files, ["tests/c.py", "tests/d.py"]]
    assert [run_cuda.summary(job) for job in jobs][1] == "2 passed" and jobs[1].state == "ok"
    assert not run_cuda.conclude(jobs)
