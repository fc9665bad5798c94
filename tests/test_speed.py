"""Decoding and reading prompts: the logits are those of model(ids), whatever cache and way; bench.timing on a CPU."""

import gc
import time
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, token_ids
from conftest import tiny_model as unplaced

import runtime
from bench import timing
from evaluation import speed
from evaluation.speed import decode, prefill
from modelutils import decoder_of

TEXT = token_ids(1, 12)[0]


def tiny_model(*kind):
    return decoder_of(unplaced(*kind)).materialize(CPU)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [("opt", "pre-norm"), ("opt", "post-norm"), ("llama", "grouped"), ("llama", "llama3"), ("qwen3", "wide")], ids="-".join
)
def test_decode(kind):
    model = tiny_model(*kind)
    found = decode(model, TEXT, check=True)
    wanted = torch.nn.functional.cross_entropy(logits_of(model, TEXT)[:-1], TEXT[1:]).exp().item()
    assert found["ppl"] == pytest.approx(wanted, rel=1e-4)
    assert found["tokens"] == 12 and found["ms_per_token"] > 0 and found["how"] == "call by call, a fixed cache"
    assert "ppl" not in decode(model, TEXT)
    with pytest.raises(ValueError, match="--benchmark"):
        decode(model, TEXT[:1])


@pytest.mark.parametrize("kind", [("opt", "pre-norm"), ("llama", "grouped")], ids="-".join)
def test_a_step_captured_is_the_step(kind, monkeypatch):
    """A stand-in for the graph, which runs the call before, as capturing does: what that left in cache and position must be gone."""
    model = tiny_model(*kind)
    device = type("GPU", (), {"type": "cuda"})()

    def captured(call, on):
        call()
        call()
        return call

    monkeypatch.setattr(speed, "captured", captured)
    monkeypatch.setattr(speed.torch, "zeros", lambda *size, dtype, device, zeros=torch.zeros: zeros(*size, dtype=dtype))
    monkeypatch.setattr(speed.torch, "arange", lambda n, device, arange=torch.arange: arange(n))
    step, how = speed.decoding_step(model, len(TEXT), device)
    assert how.startswith("a CUDA graph")
    with torch.no_grad():
        logits = torch.cat([step(token).clone() for token in TEXT], 1)[0]
    torch.testing.assert_close(logits, logits_of(model, TEXT), rtol=1e-4, atol=1e-4)


def test_a_sliding_window_or_other_attention_has_a_cache_that_grows():
    model = tiny_model("mistral", "sliding")
    found = decode(model, TEXT, check=True)
    wanted = torch.nn.functional.cross_entropy(logits_of(model, TEXT)[:-1], TEXT[1:]).exp().item()
    assert found["ppl"] == pytest.approx(wanted, rel=1e-4) and found["how"] == "call by call, a growing cache"
    model = tiny_model("llama", "plain")
    model.config._attn_implementation = "eager"  # adds its mask, and would add a mask of truth values
    assert decode(model, TEXT)["how"] == "call by call, a growing cache"


def test_prefill():
    model = tiny_model()
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.logits))
    found = prefill(model, TEXT)
    assert found["tokens"] == 12 and found["tokens_per_second"] == pytest.approx(12000 / found["ms"])
    assert len(seen) == speed.READS + 1 and seen[0].shape[1] == 1
    torch.testing.assert_close(seen[-1][0, 0], logits_of(model, TEXT)[-1])


# ---------------------------------------------------------------------------
# Timing


def test_times_are_per_call():
    calls = []
    found = timing.timed([lambda: calls.append(1), lambda: calls.append(2)], CPU, graph=False, rounds=4)
    assert calls == [1, 2] * 5 and found["p20"] <= found["median"] <= found["p80"]


def test_contenders_take_turns_and_one_that_fails_stops_none():
    seen = []

    def fails():
        seen.append("c")
        if len(seen) > 8:
            raise RuntimeError("illegal access\nand more")

    contenders = {"a": ([lambda: seen.append("a")], True), "b": ([lambda: seen.append("b")], False), "c": ([fails], True)}
    found = timing.both_ways_in_turn(contenders, CPU)
    assert "".join(seen) == "abc" + "abc" * 2 + "ab" * 5
    assert found["c"] == {"graph": None, "eager": None, "reason": "eager: RuntimeError: illegal access"}
    assert all(set(found[name]["eager"]) == {"median", "p20", "p80"} and found[name]["reason"] is None for name in "ab")


def test_clocks_are_read_while_it_runs(tmp_path, monkeypatch):
    """By a stand-in for nvidia-smi, which prints a line, another one, part of one, and waits."""
    program = tmp_path / "nvidia-smi"
    lines = ["echo 1980 MHz, 2619 MHz, 410.5 W, 51", "echo 1755 MHz, 2619 MHz, [N/A], 53", "printf '1755 M'", "exec sleep 60"]
    program.write_text("\n".join(["#!/bin/sh", *lines]))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0"))
    with timing.watched(torch.device("cuda", 0)) as clocks:
        time.sleep(0.3)
    memory = {"clocks.mem MHz": [2619, 2619, 2619], "power.draw W": [410.5] * 3, "temperature.gpu": [51, 52, 53]}
    assert clocks == memory | {"clocks.sm MHz": [1755, 1867.5, 1980]}
    with timing.watched(CPU) as clocks:
        pass
    assert clocks == {}


def test_ceilings_are_of_this_machine():
    found = timing.ceilings(CPU)
    assert set(found) == {"bytes", "float16", "bfloat16", "int8"} and all(rate > 1e6 for rate in found.values())


def test_the_ceiling_of_8_bits_is_the_better_of_numbers_and_floats(monkeypatch):
    monkeypatch.setattr(timing, "has_fp8", lambda device: True)
    for float_us, best in ((5, 5), (20, 10)):
        us = {torch.int8: 10, torch.float8_e4m3fn: float_us}

        def timed(calls, us=us, **how):
            of = getattr(calls[0], "args", None)  # of a product, its matrices
            return {"median": us.get(of[0].dtype, 1) if of else 1}

        monkeypatch.setattr(timing, "timed", timed)
        assert timing.ceilings(CPU)["int8"] == pytest.approx(2 * 64**3 / best * 1e6)


def test_a_graph_keeps_alive_what_it_reads(monkeypatch):
    """On stand-ins for CUDA's graphs: the call runs three times, and what only it knows lives as long as the replay."""

    class Stand(nullcontext):
        replays = 0

        def wait_stream(self, other):
            pass

        def replay(self):
            Stand.replays += 1

    for name in ("device", "Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Stand)
    memory, calls = torch.ones(3), []
    seen = weakref.ref(memory)

    def call(memory=memory):
        calls.append(memory.sum())
        return calls[-1]

    replay = runtime.captured(call, CPU)
    del memory, call
    gc.collect()
    assert len(calls) == 3 and replay() is calls[2] and replay() is calls[2] and Stand.replays == 2 and seen() is not None
