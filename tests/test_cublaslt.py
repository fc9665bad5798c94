"""The search for cuBLASLt's fastest algorithm, on a library that checks what it is given and multiplies on a CPU (tests/cublaslt.c)."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU

from bench import contenders, cublaslt, linears
from bench.timing import Missing

ROOT = Path(__file__).parents[1]
ALGORITHMS = 4  # that the library offers, after which the one that fails is left out


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("cublaslt") / "libcublasLt.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o", found, ROOT / "tests/cublaslt.c"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return found


@pytest.fixture
def library(path):
    return cublaslt.Library(str(path))


def test_structures_have_the_sizes_of_the_header():
    """cublasLt.h: 8 words of an algorithm; with it a size, a status, a float and four ints."""
    assert ctypes.sizeof(cublaslt.Algorithm) == 64 and ctypes.sizeof(cublaslt.Found) == 64 + 8 + 4 + 4 + 16


def test_a_product_is_pytorchs(library):
    """Sizes that differ all three, so that no two can be exchanged; algorithms that cannot run are not offered."""
    x, weight, y = torch.randn(3, 40).half(), torch.randn(5, 40).half(), torch.zeros(3, 5).half()
    product = cublaslt.Product(library, 3, 5, 40)
    found = product.algorithms()
    assert [f.algorithm.data[7] for f in found] == [100, 101, 103, 104] and [f.workspace for f in found] == [0, 0, 1 << 20, 0]
    product.run(found[2].algorithm, x, weight, y, torch.zeros(cublaslt.WORKSPACE, dtype=torch.uint8))
    torch.testing.assert_close(y, (x.float() @ weight.float().T).half(), rtol=2e-3, atol=1e-2)


def test_the_fastest_algorithm_is_timed_as_a_contender(path, library, monkeypatch):
    """Slow ones and one that fails lose; its cell says which it was."""
    monkeypatch.setattr(contenders.cublaslt, "library", lambda device: library)
    fake, ceiling = ctypes.CDLL(str(path)), dict.fromkeys(("bytes", "float16", "int8"), 1e12)
    before = [fake.fake_runs(i) for i in range(5)]
    (cell,) = linears.bench_layer(8, 16, (2,), CPU, ceiling, {"cuBLASLt best": contenders.CONTENDERS["cuBLASLt best"]})
    assert cell["config"] == [f"algorithm 3 of {ALGORITHMS}", 1 << 20] and cell["reason"] is None and cell["eager"]["median"] < 5000
    ran = [fake.fake_runs(i) - n for i, n in enumerate(before)]
    assert ran[3] > ran[0] > 1 == ran[1] and ran[2] == 0


def test_what_the_library_refuses_is_one_line(library):
    product = cublaslt.Product(library, 3, 5, 40)
    with pytest.raises(Missing, match="cublasLtMatmul: cublasStatus_t 7"):  # no workspace
        x = torch.zeros(3, 40).half()
        product.run(product.algorithms()[0].algorithm, x, x, x, torch.zeros(0, dtype=torch.uint8))
    with pytest.raises(Missing, match="cannot be used"):
        cublaslt.Library("libcublasLt.so.none")
    with pytest.raises(Missing, match=r"libc\.so\.6 cannot be used: .*cublasLtCreate"):
        cublaslt.Library("libc.so.6")
    with pytest.raises(Missing, match="needs an NVIDIA GPU"):
        cublaslt.library(CPU)


def test_no_algorithm_that_runs_is_said(library, monkeypatch):
    product = cublaslt.Product(library, 3, 5, 40)
    monkeypatch.setattr(product, "algorithms", lambda real=product.algorithms: real()[1:2])
    x, weight, y = torch.randn(3, 40).half(), torch.randn(5, 40).half(), torch.zeros(3, 5).half()
    with pytest.raises(Missing, match="none of cuBLASLt's 1 algorithms runs"):
        cublaslt.best(product, x, [weight], y, torch.zeros(cublaslt.WORKSPACE, dtype=torch.uint8))


def test_the_trial_finds_a_wrong_algorithm(library, monkeypatch, capsys):
    """And one that fails."""
    monkeypatch.setattr(cublaslt, "loaded", lambda: library)
    offered = cublaslt.Product.algorithms
    for kept, said in (
        (slice(2, 3), None),
        (slice(2, 4), "WRONG: 2x8x16, algorithm 2"),
        (slice(1, 3), "cublasLtMatmul: cublasStatus_t 13"),
    ):
        monkeypatch.setattr(cublaslt, "TRIAL", ((2, 8, 16),))
        monkeypatch.setattr(cublaslt.Product, "algorithms", lambda self, kept=kept: offered(self)[kept])
        assert cublaslt.main(CPU) == said
    assert "1 algorithms of cuBLASLt, 0 wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("raise SystemExit(0)", None),
        ("raise SystemExit('WRONG: 1x2x3')", "a trial of libcublasLt: WRONG: 1x2x3"),
        ("import os; os.kill(os.getpid(), 11)", "a trial of libcublasLt: exit status -11"),
        ("import time; time.sleep(60)", "a trial of libcublasLt did not end in 3 s"),
    ],
)
def test_a_trial_that_crashes_is_one_line(script, why, monkeypatch):
    """Not the end of the benchmark."""
    run = subprocess.run
    monkeypatch.setattr(cublaslt, "TRIAL_SECONDS", 3)
    monkeypatch.setattr(cublaslt.subprocess, "run", lambda command, **how: run([command[0], "-c", script], **how))
    cublaslt.obstacle.cache_clear()
    assert cublaslt.obstacle() == why
    cublaslt.obstacle.cache_clear()


def test_the_trial_without_a_gpu_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "bench.cublaslt"], cwd=ROOT, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert (done.returncode, done.stderr) == (1, "no NVIDIA GPU\n")
