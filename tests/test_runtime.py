"""The machine: device, places with room, seconds, versions and commit, and files that are written whole or not at all."""

import gc
import json
import re
import subprocess
from functools import partial

import pytest
import torch
from conftest import CPU

import runtime
from recipe import UsageError
from runtime import Clock, Place, find_device, find_place, first_lines, write_json


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "", "cuda" if not torch.cuda.is_available() else "cuda:98"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UsageError, match=f"^--device {re.escape(name)}: .*cpu") as caught:
        find_device(name)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_there():
    assert find_device("cpu") == CPU and find_device().type in ("cpu", "cuda")


# ---------------------------------------------------------------------------
# Places


@pytest.mark.slow
@pytest.mark.parametrize("home", ["device", "host", "folder"])
def test_a_place_gives_back_what_it_was_given(home, tmp_path):
    place = Place(CPU, tmp_path if home == "folder" else home)
    tensors = [torch.randn(2, 3), torch.arange(6).view(2, 3).to(torch.bfloat16)]
    kept = [place.put(t) for t in tensors]
    assert all(k.to(CPU).equal(t) and k.to(CPU).dtype == t.dtype for k, t in zip(kept, tensors, strict=True))
    assert len(list(tmp_path.rglob("*.pt"))) == 2 * (home == "folder")
    del kept
    gc.collect()
    assert not list(tmp_path.rglob("*.pt")), "a file goes with the last that refers to it"
    del place
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "home"), [(40, "device"), (51, None), (10**15, None)])
def test_a_place_is_found_where_there_is_room(monkeypatch, tmp_path, size, home):
    """As if 100 bytes of memory were free: half of it may be taken."""
    monkeypatch.setattr(runtime, "free_memory", lambda device: 100)
    if size == 10**15:
        with pytest.raises(UsageError, match=f"no room for the sequences: .*{tmp_path}.*TMPDIR"):
            find_place(size, CPU, tmp_path)
    else:
        assert find_place(size, CPU, tmp_path).home == (home or tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_memory_is_met_where_a_container_or_a_batch_system_sets_it(monkeypatch, tmp_path, version):
    """Of any group above the process's own; the cache of files counts as free."""
    kind, limit, used, cache = (
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("", "memory.max", "memory.current", "inactive_file")
    )
    (tmp_path / "own").write_text(f"9:cpu:/other\n1:{kind}:/job/task\n")
    for name, most in (("job/task", 2**63 - 4096 if version == 1 else "max"), ("job", 5 << 20)):
        group = tmp_path / kind / name
        group.mkdir(parents=True, exist_ok=True)
        for file, text in ((limit, most), (used, 4 << 20), ("memory.stat", f"anon 7\n{cache} {1 << 20}")):
            (group / file).write_text(f"{text}\n")
    monkeypatch.setattr(runtime, "group_memory", partial(runtime.group_memory, tmp_path, tmp_path / "own"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (runtime.host_memory().total, runtime.host_memory().available) == (5 << 20, 2 << 20)
    (tmp_path / "own").unlink()  # as on other systems
    assert runtime.host_memory().total > 5 << 20


def test_a_clock_adds_up():
    clock = Clock("cpu")
    for _ in range(2):
        with clock("work"):
            sum(range(10**5))
    first = clock.seconds["work"]
    with clock("work"):
        sum(range(10**5))
    assert 0 < first < clock.seconds["work"] and set(clock.seconds) == {"work"}


# ---------------------------------------------------------------------------
# Where a number is from


def test_versions():
    found = runtime.versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"python", "torch", "transformers", "datasets", "numpy", "safetensors"} <= set(found)
    assert all(version is None or re.match(r"\d+\.\d+", version) for version in found.values())


def test_a_package_that_is_not_there_has_no_version(monkeypatch):
    monkeypatch.setattr(runtime, "PACKAGES", ("torch", "no-such-package"))
    assert runtime.versions()["no-such-package"] is None


def test_commit(monkeypatch, tmp_path):
    """Of the folder of the code, wherever one stands; changed files are told; None outside a checkout or without git."""

    def git(*args):
        who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, "-C", tmp_path, *args], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    assert runtime.commit() is None
    git("init", "-q")
    assert runtime.commit() is None, "no commit yet"
    (tmp_path / "runtime.py").write_text("one")
    git("add", ".")
    git("commit", "-qm", "one", "--no-verify")
    assert runtime.commit() == git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert runtime.commit() == git("rev-parse", "HEAD")
    (tmp_path / "runtime.py").write_text("two")
    assert runtime.commit() == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setenv("PATH", "")
    assert runtime.commit() is None


# ---------------------------------------------------------------------------
# Files


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"ppl": 1.5, "layers": [1, 2]})
    assert json.loads(path.read_text()) == {"ppl": 1.5, "layers": [1, 2]} and path.read_text().endswith("\n")
    write_json(str(path), {"ppl": 2})
    assert json.loads(path.read_text()) == {"ppl": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
@pytest.mark.parametrize("there", [True, False])
def test_or_not_at_all(tmp_path, there, bad):
    path = tmp_path / "run.json"
    if there:
        path.write_text("the old one")
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"much": list(range(10**5)), "ppl": bad})  # it fails after much has been written
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the old one"] * there


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("the old one")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {})
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the old one"]


def test_the_line_of_an_error():
    assert first_lines(ValueError("wrong:\n  a is 1.\nmore")) == "wrong: a is 1"
    assert first_lines(ConnectionError()) == "ConnectionError", "else the message would say nothing"


@pytest.mark.parametrize(
    ("quick", "dtype", "product"),
    [
        (True, torch.float32, torch.bfloat16),
        (False, torch.float32, torch.float32),
        (True, torch.float16, torch.float16),
    ],
)
def test_products_that_need_not_be_exact(monkeypatch, quick, dtype, product):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": quick})
    x = torch.ones(2, 2, dtype=dtype)
    with runtime.approximate(torch.device("cpu"), dtype):
        assert (x @ x).dtype == product
    assert (x @ x).dtype == dtype
