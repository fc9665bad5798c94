"""Several processes: they find what one finds, whatever their number, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, forked, in_world, messages, quantize, tiny_model, token_ids, toy_tokenizer

import opt
from datautils import load_text
from evaluation.perplexity import perplexity
from evaluation.zeroshot import load_tasks, zero_shot
from formats.checkpoint import Store
from formats.resume import ResumableStore, run_identity
from modelutils import decoder_of
from processes import World, in_turn
from recipe import PRESETS, Recipe, UsageError
from rotate import rotated
from run import launch
from run.checks import check_scratch
from run.launch import Launch
from run.quantize import quantize_blocks
from run.tune import tune

ROOT = Path(__file__).parent.parent
IDS, TEXT = token_ids(9, 16), token_ids(1, 7 * 16 + 3)[0]
WALK = 2  # five batches: some processes have more of them
PLUS = PRESETS["plus"]
LLAMA, OPT = ("llama", "grouped"), ("opt", "pre-norm")


# ---------------------------------------------------------------------------
# Who does what


def test_everything_is_dealt_out_once_and_gathered_in_order():
    for size, n in combinations_with_replacement(range(1, 7), 2):
        items = list(range(n))
        assert in_turn([World(rank, size).own(items) for rank in range(size)]) == items


def test_the_largest_solve_does_not_wait():
    owners = World(0, 3).owners({"down": 100, "qkv": 20, "out": 15, "up": 30})
    assert sorted(owners) == ["down", "out", "qkv", "up"] and [owners[g] for g in owners].count(owners["down"]) == 1
    assert World().owners({"a": 1, "b": 2}) == {"a": 0, "b": 0}


def exchanges(world):
    """What every exchange gives a process."""
    own = torch.arange(3.0) + world.rank
    summed, at_owner, largest = own.clone(), own.clone().double(), own.clone()
    world.add(summed), world.add(at_owner, 1), world.largest(largest, 1)
    return {
        "share": world.share({"a": (1, "x")} if world.first else None),
        "gather": world.gather(world.rank * 10),
        "total": world.total(world.rank),
        "broadcast": world.broadcast({"h": own.half()[::2], "i": torch.arange(4).view(2, 2)} if world.rank == 1 else {"h": None}, 1),
        "sum": summed,
        "at owner": at_owner,
        "largest": largest,
        "collect": world.collect([own + 10 * k for k in range(2 - world.rank % 2)], 1),
    }


def test_exchanges(tmp_path):
    found = in_world(3, exchanges, tmp_path / "world")
    for rank, of in enumerate(found):
        assert of["share"] == {"a": (1, "x")} and of["gather"] == [0, 10, 20] and of["total"] == 3, rank
        assert torch.equal(of["broadcast"]["h"], torch.tensor([1.0, 3]).half()) and of["broadcast"]["i"].tolist() == [[0, 1], [2, 3]]
        assert of["sum"].tolist() == [3, 6, 9]
    assert found[1]["at owner"].tolist() == [3, 6, 9] and found[1]["largest"].tolist() == [2, 3, 4]
    assert [t[0].item() for t in found[1]["collect"]] == [0, 1, 2, 10, 12]  # the first batch of each, then the second where there is one
    assert not found[0]["collect"] and not found[2]["collect"]


# ---------------------------------------------------------------------------
# What they find


def found(model, recipe, world=World()):  # noqa: B008  never changed
    """{"codes", "layers", "ppl", "tuned"} of a run."""
    decoder = decoder_of(tiny_model(*model))
    store = Store(rotated(decoder, recipe.seed) if recipe.rotate else decoder, recipe, world=world)
    _, store, layers = quantize(None, IDS, recipe, WALK, store)
    tuning = tune(store, IDS, CPU) if recipe.tune_steps else []
    packed = {f"{i}.{name}": t for i in range(2) for name, t in store.blocks[i].items()}
    value = perplexity(store.decoder(), TEXT, 16, CPU, WALK, world=world)
    return {"packed": packed, "layers": [layer.error for layer in layers], "evaluated": value, "tuning": tuning, "tuned": store.tuned}


def near(a, b):
    """Whether codes are equal on 99.99 % of the entries, and all other numbers within rounding."""
    assert a["packed"].keys() == b["packed"].keys()
    for name, t in a["packed"].items():
        if t.dtype == torch.uint8:
            assert (t == b["packed"][name]).double().mean() >= 0.9999, name
        else:
            torch.testing.assert_close(t, b["packed"][name], rtol=1e-5, atol=1e-6, msg=name)
    assert a["layers"] == pytest.approx(b["layers"], rel=1e-4)
    assert a["evaluated"] == b["evaluated"] | {"ppl": pytest.approx(b["evaluated"]["ppl"], rel=1e-4)}
    assert a["tuning"] == pytest.approx(b["tuning"], rel=1e-4)
    for name, t in a["tuned"].items():
        torch.testing.assert_close(t, b["tuned"][name], rtol=1e-4, atol=1e-5, msg=name)


A = {"wbits": 4, "act_bits": 8}
CASES = {  # (family and variant, settings of the recipe, processes)
    "act_only": (OPT, {"method": "act_only", "act_bits": 6, "smooth": True}, 2),
    "rtn": (LLAMA, {"method": "rtn"} | A, 3),
    "smoothquant": (LLAMA, {"method": "smoothquant"} | A, 3),
    "gptq": (OPT, {"method": "gptq"} | A, 2),
    "gptq with a stream": (LLAMA, {"method": "gptq", "target": "stream", "wbits": 4, "act_bits": 16}, 2),
    "awrq": (LLAMA, {"method": "awrq"} | A, 2),
    "awrq smoothed": (OPT, {"method": "awrq", "smooth": True} | A, 3),
    "groups": (LLAMA, {"method": "awrq", "groupsize": 16, "wbits": 3, "act_bits": 8}, 2),
    "guided": (OPT, {"method": "awrq", "guided": True} | A, 3),
    "rotated": (OPT, {"method": "awrq", "rotate": True} | A, 2),
    "giving back": (OPT, {"method": "awrq", "target": "residual", "true_sequential": True, "bias_correction": True} | A, 3),
    "plus": (LLAMA, {"method": "awrq"} | A | PLUS, 2),
    "plus of OPT": (OPT, {"method": "awrq"} | A | PLUS, 3),
    "tuned": (LLAMA, {"method": "awrq", "tune_steps": 3} | A, 3),
    "more processes than groups": (LLAMA, {"method": "awrq", "smooth": True, "smooth_search": True} | A, 5),
    "a process without a batch": (LLAMA, {"method": "awrq"} | A | PLUS, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_several_find_what_one_finds(case, tmp_path):
    model, settings, size = CASES[case]
    recipe = Recipe(**settings)
    several = in_world(size, partial(found, model, recipe), tmp_path / "world")
    near(several[0], found(model, recipe))
    for other in several[1:]:  # to the last bit
        assert all(torch.equal(t, other["packed"][name]) for name, t in several[0]["packed"].items())
        assert other["layers"] == several[0]["layers"] and other["evaluated"] == several[0]["evaluated"]
        assert all(torch.equal(t, other["tuned"][name]) for name, t in several[0]["tuned"].items())


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    recipe, whole = Recipe(method="awrq", smooth=True, target="stream", **A), {}

    def resumable(world):
        decoder = decoder_of(tiny_model(*LLAMA))
        return ResumableStore(decoder, recipe, tmp_path / "run", run_identity(decoder, IDS, recipe, CPU, WALK), world)

    def begin(world):
        store = resumable(world)
        next(quantize_blocks(store.original, IDS, recipe, store, walk_batch=WALK))
        return store.finished

    def go_on(world):
        store = resumable(world)
        before = store.finished
        list(quantize_blocks(store.original, IDS, recipe, store, walk_batch=WALK))
        return {"before": before, "codes": {f"{i}.{name}": q for i in range(2) for name, (q, _) in store.codes(i).items()}}

    assert in_world(3, begin, tmp_path / "three") == [1, 1, 1]
    assert json.loads((tmp_path / "run/run.json").read_text())["processes"] == 3
    again = in_world(2, go_on, tmp_path / "two")
    assert json.loads((tmp_path / "run/run.json").read_text())["processes"] == 2
    _, store, _ = quantize(None, IDS, recipe, WALK, Store(decoder_of(tiny_model(*LLAMA)), recipe))
    whole = {f"{i}.{name}": q for i in range(2) for name, (q, _) in store.codes(i).items()}
    for of in again:
        assert of["before"] == 1 and all((q == of["codes"][name]).double().mean() >= 0.9999 for name, q in whole.items())


@pytest.mark.slow
def test_each_machine_has_the_blocks(tmp_path):
    """Two machines, each with a folder of its own: one of one process, and one of two."""

    def made(world):
        (folder := tmp_path / f"machine{min(world.rank, 1)}").mkdir(exist_ok=True)
        store = Store(decoder_of(tiny_model(*LLAMA)), recipe, folder, world, writes=world.rank < 2)
        blocks = quantize_blocks(store.original, IDS, recipe, store, walk_batch=WALK)
        return [sorted(store.read(layers[0].block)) for layers in blocks]

    recipe = Recipe(method="rtn", **A)
    first, *others = in_world(3, made, tmp_path / "world")
    assert first[0] and others == [first] * 2
    assert all(list((tmp_path / f"machine{k}").glob("*.safetensors")) for k in range(2))


def test_no_room_for_the_blocks(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**29))
    check_scratch(2**29)
    with pytest.raises(UsageError, match=r"take about 1.00 GiB, and /.* has 0.50 GiB left; let TMPDIR name a folder"):
        check_scratch(2**30)


@pytest.fixture
def tasks(tmp_path):
    """A task of a number of items in a file of its own: tasks(name, items, its other settings)."""

    def make(name, items, settings):
        rows = [{"text": f"word{i} word{i + 1}", "choices": ["word1", "word2 word3"], "gold": i % 2} for i in range(items)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / name}.jsonl}}}}\ntest_split: test\n"
            f"doc_to_text: '{{{{text}}}}'\n{settings}"
        )
        return str(tmp_path / f"{name}.yaml")

    return make


CHOICES = (
    "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
)
GENERATE = (
    "output_type: generate_until\ndoc_to_target: '{{choices[1]}}'\ngeneration_kwargs: {until: [word7], max_gen_toks: 4, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]\n"
)
ROLLING = "output_type: loglikelihood_rolling\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}]\n"


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 2])
def test_tasks_of_several_are_those_of_one(shots, tasks):
    """Few-shot examples too, and with fewer items than processes; only a sum of log-likelihoods differs, by the rounding of its batch."""
    files = [tasks("choices", 7, CHOICES), tasks("few", 4, CHOICES), tasks("generated", 5, GENERATE)]
    files += [tasks("rolling", 5, ROLLING)] if not shots else []

    def evaluated(world=World()):  # noqa: B008  never changed
        model = decoder_of(tiny_model(*LLAMA)).materialize(CPU)
        found = zero_shot(model, toy_tokenizer(), load_tasks(files), 2, world, num_fewshot=shots, limit=5)
        return json.loads(json.dumps([found["results"], found["n-samples"], found["items"]]), parse_float=lambda text: f"{float(text):.6g}")

    one = evaluated()
    assert len(one[0]) == len(files) and {task: list(items) for task, items in one[2].items() if items} == {
        "choices": ["acc,none", "acc_norm,none"],
        "few": ["acc,none", "acc_norm,none"],
        "generated": ["exact_match,none"],
    }
    for size in (2, 5):
        assert in_world(size, evaluated, Path(files[0]).parent / f"world{size}") == [one] * size


# ---------------------------------------------------------------------------
# Command lines


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture
def line(tiny_opt, corpora):
    """The beginning of a command line: a model and its text."""
    given = "--data_dir", corpora, "--calib_data", "own", "--eval", "own", "--nsamples", 6, "--seqlen", 16, "--walk_batch", 1
    return [str(word) for word in (tiny_opt, *given, "--wbits", 4, "--method", "awrq")]


def scripts(size, argv, folder, watch=lambda pids: None):
    """Run opt.py in `size` forks that meet as torchrun's processes do: [(exit status, stdout, lines of stderr)].

    watch(pids): called while they run.  The library's bars of all processes are left out: a fork does not import tqdm anew.
    """
    folder.mkdir(exist_ok=True)
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}

    def script(rank):
        os.environ.update(there, RANK=str(rank), LOCAL_RANK=str(rank))
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), {"out": 1, "err": 2}[name])
            stream.flush()
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        try:
            opt.main(argv)
        finally:
            sys.stdout.flush()

    def watcher():
        pids = []
        while len(pids) < size:
            pids = [int(file.read_text()) for file in sorted(folder.glob("*.pid")) if file.read_text()]
            time.sleep(0.02)
        watch(pids)

    def announced(rank):
        (folder / f"{rank}.pid").write_text(str(os.getpid()))
        script(rank)

    for file in folder.glob("*.pid"):
        file.unlink()
    statuses = forked([partial(announced, rank) for rank in range(size)] + [watcher])[:size]
    return [(status, (folder / f"{r}.out").read_text(), messages((folder / f"{r}.err").read_text())) for r, status in enumerate(statuses)]


WAYS = {  # where the blocks are while they are evaluated
    "a temporary folder": "",
    "in memory": "--method act_only --act_bits 6 --wbits 16",
    "a folder that gets its name": "--save SAVED --tune_steps 2",
    "a folder for resuming": "--checkpoint_dir RUN --save SAVED --tune_steps 2",
    "of a saved one": "--load",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_process_reads_the_blocks(way, line, tmp_path):
    found = []
    for size in (1, 2):
        output, argv = (
            tmp_path / f"{size}.json",
            [*line, *WAYS[way].replace("SAVED", f"{tmp_path}/s{size}").replace("RUN", f"{tmp_path}/r{size}").split()],
        )
        if way == "of a saved one":
            assert size > 1 or scripts(1, [*line, "--save", f"{tmp_path}/saved"], tmp_path / "saving")[0][0] == 0
            argv = ["--load", f"{tmp_path}/saved", *line[1:3], "--eval", "own"]
        ends = scripts(size, [*argv, "--output_path", str(output)], tmp_path / f"ends{size}")
        assert [status for status, *_ in ends] == [0] * size, ends
        found.append(json.loads(output.read_text())["results"]["perplexity"]["own"])
    assert found[0] == found[1] | {"ppl": pytest.approx(found[1]["ppl"], rel=1e-4)}
    assert not list(tmp_path.glob("*.partial"))


FAULTS = {  # what is wrong, and what the one line says
    "--nsamples 1": "--nsamples 1: fewer sequences than the 2 processes; start no more than that",
    "--benchmark 4": "--benchmark: times one process",
    "--eval_windows 4000": "own test has 37 windows of 16 tokens; give fewer",
    "--method nothing": "invalid choice: 'nothing'",
    "--device cuda:1": "--device cuda:1: torchrun gives each process a GPU of its own",
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", FAULTS)
def test_what_is_wrong_is_said_once(wrong, line, tmp_path):
    ends = scripts(2, [*line, *wrong.split()], tmp_path / "ends")
    assert [os.waitstatus_to_exitcode(status) for status, *_ in ends] == [2, 2]
    said = [text for _, _, lines in ends for text in lines]
    assert len(said) == 1 and said[0].startswith("opt.py: error: ") and FAULTS[wrong] in said[0]


@pytest.mark.slow
def test_processes_with_different_data(line, tmp_path, monkeypatch):
    """As on two machines whose --data_dir is not the same."""

    def load(*args):
        ids, texts, protocol = load_text(*args)
        return ids.flip(0) if os.environ["RANK"] == "1" else ids, texts, protocol

    monkeypatch.setattr("run.pipeline.load_text", load)
    ends = scripts(2, line, tmp_path / "ends")
    assert [os.waitstatus_to_exitcode(status) for status, *_ in ends] == [2, 2]
    said = [text for _, _, lines in ends for text in lines]
    assert len(said) == 1 and "process 1 has other data than process 0: tokens.calibration is" in said[0]


@pytest.fixture
def hurried(monkeypatch):
    """Shorter times after which a process counts as lost."""
    for name, value in {"BEAT": 0.1, "SUSPECTED": 3, "SILENT": 8, "GRACE": 2}.items():
        monkeypatch.setattr(launch, name, value)


def when_finished(file, signal_of, victim):
    """A watcher that sends a process a signal as soon as a file is there."""

    def watch(pids):
        while not file.exists():
            time.sleep(0.01)
        os.kill(pids[victim], signal_of)

    return watch


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_others_end_when_one_is_killed_and_the_run_goes_on(victim, line, tmp_path, hurried, monkeypatch):
    argv = [*line, "--checkpoint_dir", str(tmp_path / "run"), "--save", str(tmp_path / "saved"), "--output_path", str(tmp_path / "r.json")]
    ends = scripts(3, argv, tmp_path / "ends", when_finished(tmp_path / "run/block-00000.json", signal.SIGKILL, victim))
    said = [text for _, _, lines in ends for text in lines if "error" in text]
    assert [os.waitstatus_to_exitcode(status) for status, *_ in ends] == [-9 if rank == victim else 1 for rank in range(3)], ends
    assert set(said) == set(said[:1]) and f"process {victim} of 3" in said[0] and "killed or cannot be reached" in said[0]
    assert not (tmp_path / "saved").exists() and not (tmp_path / "r.json").exists()
    monkeypatch.undo()  # a busy machine may keep a process from its sign of life for seconds
    again = scripts(2, argv, tmp_path / "again")
    assert [status for status, *_ in again] == [0, 0], again
    whole = scripts(1, [*line, "--save", str(tmp_path / "whole"), "--output_path", str(tmp_path / "whole.json")], tmp_path / "one")
    assert whole[0][0] == 0
    results = [json.loads((tmp_path / name).read_text())["results"]["perplexity"]["own"]["ppl"] for name in ("r.json", "whole.json")]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def has_ended(pid):
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or "Z" in state.read_text().split(")")[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_only_stops_is_lost_too(victim, line, tmp_path, hurried):
    """No connection breaks then: an exchange would wait for ever, and so would the store, which process 0 has."""
    other = 1 - victim

    def stop_and_end(pids):
        when_finished(tmp_path / "run/block-00000.json", signal.SIGSTOP, victim)(pids)
        while not has_ended(pids[other]):
            time.sleep(0.05)
        os.kill(pids[victim], signal.SIGKILL)

    ends = scripts(2, [*line, "--checkpoint_dir", str(tmp_path / "run")], tmp_path / "ends", stop_and_end)
    assert os.waitstatus_to_exitcode(ends[other][0]) == 1
    assert any(f"process {victim} of 2" in text for text in ends[other][2])


@pytest.mark.slow
def test_who_waits_for_an_exchange_can_be_told_to_end(line, tmp_path, hurried, monkeypatch):
    """The main thread then sees no signal.  Its temporary folder is removed all the same."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()

    def wait(*args):
        world = args[-1]
        (tmp_path / f"waits{world.rank}").touch()
        while not world.first:
            time.sleep(0.05)
        world.barrier()

    monkeypatch.setattr("run.pipeline.calibration_place", wait)

    def tell(pids):
        when_finished(tmp_path / "waits0", 0, 0)(pids)
        when_finished(tmp_path / "waits1", 0, 1)(pids)
        time.sleep(0.2)
        assert list((tmp_path / "scratch").glob("awrq-*"))
        os.kill(pids[0], signal.SIGTERM)

    ends = scripts(2, line, tmp_path / "ends", tell)
    assert os.waitstatus_to_exitcode(ends[0][0]) == 128 + signal.SIGTERM
    assert not list((tmp_path / "scratch").glob("awrq-*"))


@pytest.mark.slow
def test_processes_on_different_devices(line, tmp_path, monkeypatch):
    """As with a machine on which PyTorch finds no GPU: they would never meet."""
    monkeypatch.setattr("run.pipeline.find_device", lambda _: torch.device("cuda" if os.environ["RANK"] == "1" else "cpu"))
    ends = scripts(2, line, tmp_path / "ends")
    assert [os.waitstatus_to_exitcode(status) for status, *_ in ends] == [2, 2]
    said = [text for _, _, lines in ends for text in lines]
    assert len(said) == 1 and "computes on cuda, process 0 on cpu" in said[0]


def test_a_launch_does_not_read_what_the_last_one_left(monkeypatch):
    """As with torchrun --max-restarts, whose store stays."""
    left = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(left, 0, 2)]))
    for rank, restarts, lost in ((0, 0, None), (1, 0, (0, 7)), (1, 1, None)):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "TORCHELASTIC_RESTART_COUNT": restarts}.items():
            monkeypatch.setenv(name, str(value))
        launched = Launch("opt.py")
        assert launched.find_lost() == lost
        if not rank:
            launched.first_failure(7)
    signal.set_wakeup_fd(-1)


def test_where_all_stand_still_none_is_lost(monkeypatch):
    """A machine that sleeps, or a job that its cluster suspends: no process shows that it lives, and none looks."""
    left = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(left, 0, 2)]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    launches = [monkeypatch.setenv("RANK", str(rank)) or Launch("opt.py") for rank in range(2)]
    signal.set_wakeup_fd(-1)
    assert launches[0].find_lost() is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    assert launches[0].find_lost() is None
    for _ in range(launch.SILENT):
        found = launches[0].find_lost()
    assert found == (1, None)


@pytest.mark.slow
def test_our_own_bug_is_one_traceback(line, tmp_path, monkeypatch):
    monkeypatch.setattr("run.pipeline.check_vocabulary", lambda *_: 1 / 0)
    ends = scripts(2, line, tmp_path / "ends")
    assert [os.waitstatus_to_exitcode(status) for status, *_ in ends] == [1, 1]
    assert sum("ZeroDivisionError" in text for _, _, lines in ends for text in lines) == 1


def test_devices(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Launch.device(None, None) == Launch.device(None, "cuda") == "cuda:1" and Launch.device(None, "cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes, 1 GPUs on this machine"):
        Launch.device(None, None)


@pytest.mark.slow
def test_torchrun(line, tasks, tmp_path):
    """The real thing: what is printed is what one process prints, once; the folder is the same to the last bit."""
    task = tasks("mine", 7, CHOICES)
    outputs = {}
    for name, starter in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()])):
        wanted = ["--tasks", task, "--preset", "plus", "--save", str(tmp_path / name), "--output_path", str(tmp_path / f"{name}.json")]
        command = [sys.executable, *starter, str(ROOT / "opt.py"), *line, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        outputs[name] = [
            t for t in done.stdout.replace(str(tmp_path / name), "DIR").splitlines() if not t.startswith(("seconds", "tasks:", "peak"))
        ]
    assert outputs["one"] == outputs["two"]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["hardware"]["processes"] == 2
    assert one["results"]["perplexity"]["own"]["ppl"] == pytest.approx(two["results"]["perplexity"]["own"]["ppl"], rel=1e-6)
    assert (
        one["results"]["tasks"]["results"] == two["results"]["tasks"]["results"]
        and one["results"]["tasks"]["results"]["mine"]["sample_len"] == 7
    )
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
