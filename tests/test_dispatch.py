"""Which CUDA kernel runs for which shape: default rules, measured cells, tuning."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU

from bench import contenders, shapes, sweep, timing, tune
from kernels import cuda
from recipe import UsageError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("emulator")]  # one process: what they share takes seconds to make


@pytest.mark.parametrize("processors", [46, 108, 132])
@pytest.mark.parametrize("groupsize", [0, 128])
def test_default_rules_know_every_layer(emulated, processors, groupsize):
    """A configuration that takes the shape for every layer and number of tokens; the workspace of decoding stays small."""
    for rows, columns in shapes.LAYERS + shapes.FUSED:
        for tokens in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 1024, 1025, 4096, 65536):
            config, parts = cuda.choose(emulated, "some GPU", processors, tokens, rows, columns, groupsize or columns)
            assert cuda.takes(emulated, config, parts, tokens, rows, columns, groupsize or columns)
            assert (tokens <= 16) == config.startswith("decode")
            n, m = cuda.CONFIGS[config]
            assert parts == 1 or -(-rows // n) * -(-tokens // m) * parts * n * m * 4 <= cuda.SLAB_BYTES


def test_measured_cells_come_first(emulated, monkeypatch):
    table = {"default": cuda.tables()["default"], "GPU": {"cells": {"256x512": [[4, "128x16", 2], [64, "128x64", 1]]}}}
    monkeypatch.setattr(cuda, "tables", lambda: table)
    assert cuda.choose(emulated, "GPU", 108, 4, 256, 512, 512) == ("128x16", 2)
    assert cuda.choose(emulated, "GPU", 108, 5, 256, 512, 512) == ("128x64", 1)
    for other in (("GPU", 108, 65, 256, 512, 512), ("GPU", 108, 4, 256, 512, 128), ("other", 108, 4, 256, 512, 512)):
        assert cuda.choose(emulated, *other) == cuda.choose(emulated, "unknown", *other[1:])


def test_what_has_a_producer_is_quantized_once(emulated, monkeypatch):
    """Not by every block again, though a measured table or a rule says so: the kernel that streams weights then takes the codes."""
    table = {"default": cuda.tables()["default"], "GPU": {"cells": {"256x512": [[4, "decode_fused", 1], [64, "128x64", 1]]}}}
    monkeypatch.setattr(cuda, "tables", lambda: table)
    for gpu in ("GPU", "other"):
        assert cuda.choose(emulated, gpu, 108, 1, 256, 512, 512)[0] == "decode_fused"
        assert cuda.choose(emulated, gpu, 108, 1, 256, 512, 512, produced=True)[0] == "decode"
    assert cuda.choose(emulated, "GPU", 108, 64, 256, 512, 512, produced=True) == ("128x64", 1)
    table["GPU"]["cells"]["256x512"][0] += ["128x16", 3]  # measured too, it comes before the rules
    for produced, wanted in ((False, ("decode_fused", 1)), (True, ("128x16", 3))):
        assert cuda.choose(emulated, "GPU", 108, 4, 256, 512, 512, produced=produced) == wanted


def test_default_rules_keep_all_processors_busy(emulated, monkeypatch):
    """One tile each where there are as many; splits where there are few; small tiles where large ones would leave the last wave empty.

    So it is before compute capability 9.0, where no kernel uses wgmma.
    """
    taken = cuda.takes
    monkeypatch.setattr(cuda, "takes", lambda library, config, *shape: not config.startswith("wgmma") and taken(library, config, *shape))
    for shape, wanted in (
        ((64, 13824, 5120), ("128x64", 1)),  # 108 tiles
        ((64, 5120, 13824), ("128x64", 5)),  # 40
        ((256, 13824, 5120), ("128x128", 1)),  # 216, two on each
        ((512, 5120, 5120), ("128x64", 1)),  # 320 small ones; of 160 large ones some processors would have two
        ((17, 13824, 5120), ("128x32", 1)),
        ((16, 5120, 5120), ("decode", 1)),
    ):
        assert cuda.choose(emulated, "some GPU", 108, *shape, shape[2]) == wanted, shape


def test_default_rules_take_wgmma_where_it_is(emulated):
    """For many tokens, and for whole rows, which is all that it takes."""
    for shape, wanted in (
        ((512, 13824, 5120), ("wgmma256x128", 1)),
        ((2048, 5120, 13824), ("wgmma256x128", 1)),
        ((256, 5120, 13824), ("wgmma256x128", 3)),
        ((64, 13824, 5120), ("128x32", 1)),
        ((16, 13824, 5120), ("decode", 1)),
    ):
        assert cuda.choose(emulated, "some GPU", 132, *shape, shape[2]) == wanted, shape
    assert not cuda.choose(emulated, "some GPU", 132, 512, 13824, 5120, 128)[0].startswith("wgmma")


def test_tuning_table_says_what_was_measured(monkeypatch):
    tables = cuda.tables()
    assert "cells" not in tables["default"] and "Not measured" in tables["default"]["note"]
    timed = tune.kept(None) | {"cells": {"128x64": [[1, "decode", 1]]}}
    older = timed | {"sources": "of another day"}
    monkeypatch.setattr(cuda, "tables", lambda: tables | {"GPU": timed, "Old": older})
    assert cuda.chosen_by("GPU") == {"table": "GPU", "measured": ["128x64"]} and tune.kept(timed) is timed
    assert cuda.chosen_by("Old") == {"table": "Old", "measured": []} and tune.kept(older) == tune.kept(None)
    assert cuda.chosen_by("other") == {"table": "default", "measured": []}
    monkeypatch.undo()
    for name, table in tables.items():
        for most, *found in (entry for entries in table.get("cells", {}).values() for entry in entries):
            assert most > 0 and len(found) in (2, 4), name
            assert all(
                config in cuda.CONFIGS and 1 <= parts <= cuda.MAX_SPLITS for config, parts in zip(found[::2], found[1::2], strict=True)
            )


def test_tuning_leaves_out_what_is_wrong(monkeypatch, capsys):
    weight = tune.random_weight(128, 64)
    right = torch.ones(1, 2, 128)
    monkeypatch.setattr(tune, "run", lambda library, x, weight, config, parts: -right if config == "wrong" else right.clone())
    found = [("128x16", 1), ("wrong", 2), ("128x32", 3)]
    assert list(tune.agreeing(None, torch.zeros(1, 2, 64), weight, found)) == [found[0], found[2]]
    assert capsys.readouterr().out == "wrong / 2 left out: WRONG for (1, 2, 64) x 128 rows; see bench.check\n"
    assert list(tune.agreeing(None, torch.zeros(1, 2, 64), weight, [])) == []


@pytest.fixture
def on_emulator(emulated, monkeypatch):
    """What tune and sweep do to a GPU, done to an emulator: its library."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda, "dispatch", lambda device, *shape: cuda.choose(emulated, "emulator", 4, *shape))
    emulated.emulator_settings(False, False)
    return emulated


def test_a_sweep_has_the_times_of_every_kernel(on_emulator, monkeypatch, capsys):
    """All candidates that are right, by layer, what was asked for first before the rest, and all that there is when time is over."""
    launch, clock, saved = cuda.launch, iter(range(9)), []

    def wrong(library, x, y, *rest):
        return launch(library, x, y, *rest).neg_() if rest[3] == "128x32" else launch(library, x, y, *rest)

    monkeypatch.setattr(cuda, "launch", wrong)
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(clock))
    report, todo = {"finished": False, "cells": []}, [(17, 128, 128), (1, 128, 128), (1, 256, 128)]
    sweep.fill(report, todo, on_emulator, CPU, 2.5, ["decode"], lambda: saved.append(len(report["cells"])))
    many, one = report["cells"]
    assert saved == [1, 2] and not report["finished"] and capsys.readouterr().out.endswith("stopped after 2.5 s: 2 of 3 cells\n")
    assert (many["tokens"], many["rows"], many["columns"], many["dispatched"]) == (17, 128, 128, "128x32/1")
    assert set(many["times"]) == {"128x16/1", "128x16/2"} and set(one["times"]) == {"decode_fused/1", "128x16/1", "128x16/2"}
    assert min(one["times"].values()) > 0 and one["float16"] > 0
    sweep.fill(report, todo[:1], on_emulator, CPU, 9, [], lambda: saved.append("done"))
    assert report["finished"] and saved[-1] == "done"


def test_the_benchmark_times_no_wrong_result(on_emulator, monkeypatch):
    x, weight = contenders.random_matrix(17, 128, torch.float16, CPU)[None], tune.random_weight(128, 128)
    contenders.check_result(on_emulator, x, weight)
    monkeypatch.setattr(contenders.kernels, "w4a8_linear", lambda x, weight: x.new_zeros(1, 17, 128))
    with pytest.raises(timing.Missing, match="makes another result than 128x16/1: see bench.check"):
        contenders.check_result(on_emulator, x, weight)


def test_tuning_measures_as_a_sweep_does(on_emulator, monkeypatch):
    monkeypatch.setattr(tune, "EDGES", (1,))
    seen = []

    def rounds_in_turn(runs, device, graph, shortest=0):
        """At first "decode_fused" is the fastest, in longer turns "128x16"."""
        seen.append((set(runs), shortest))
        us = {"128x16": 3 if shortest else 4, "decode": 5, "decode_fused": 4 if shortest else 3}
        return {c: {"median": us[c[0]] + c[1] / 100} for c in runs}

    monkeypatch.setattr(tune, "rounds_in_turn", rounds_in_turn)
    assert tune.tune_layer(on_emulator, CPU, 128, 128, -1) == [[1 << 20, "128x16", 1]]
    (everything, _), (finalists, longer) = seen
    assert finalists == {("decode_fused", 1), ("128x16", 1), ("128x16", 2)} < everything and longer == timing.SHORTEST
    assert tune.tune_layer(on_emulator, CPU, 128, 128, -1, ["128x16"]) == [[1 << 20, "decode_fused", 1, "decode", 1]]


def test_tuning_takes_what_is_best_at_both_ends_of_a_bucket(emulated):
    a, b, c = ("128x16", 1), ("128x32", 1), ("128x64", 1)
    assert tune.best([{a: 10, b: 12}, {a: 30, b: 12}]) == b  # a is best at 17 tokens, and a cliff at 32
    assert (
        tune.best(
            [
                {a: 10, b: 10.1},
                {a: 11, b: 10},
            ]
        )
        == b
    )
    assert tune.best([{a: 1, b: 2}, {b: 2, c: 1}]) == b  # the one that takes both
    with pytest.raises(UsageError, match="--groupsize"):
        tune.best([{a: 1}, {b: 1}])
    for below, edge in zip((0, *tune.EDGES), tune.EDGES, strict=False):
        found = [set(tune.candidates(emulated, tokens, 5120, 5120, 5120)) for tokens in (below + 1, edge)]
        assert found[0] & found[1]


def test_tuning_notes_what_runs_behind_a_norm_or_a_gate():
    """Where the kernel that takes none is best, also the best of the others, if there is one that is right."""
    fused, a, b = ("decode_fused", 1), ("decode", 2), ("128x16", 4)
    assert tune.entry(4, [{fused: 1, a: 3, b: 2}, {fused: 1, a: 2, b: 2}]) == [4, *fused, *b]
    assert tune.entry(4, [{fused: 3, a: 2}]) == [4, *a]
    assert tune.entry(4, [{fused: 1}]) == [4, *fused]


def test_tuning_table_is_written_whole(tmp_path, monkeypatch):
    tables = cuda.tables() | {"GPU": {"measured": True, "cells": {"256x512g128": [[16, "decode", 2], [64, "128x64", 1]]}}}
    monkeypatch.setattr(cuda, "TUNING", tmp_path / "tuning.json")
    tune.write(tables)
    assert json.loads(cuda.TUNING.read_text()) == tables and list(tmp_path.iterdir()) == [cuda.TUNING]
