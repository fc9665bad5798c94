"""Resuming: a run that SIGKILL ended goes on to the numbers of one in one piece, and only from what is its own."""

import json
import os
import shutil
import signal
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import CPU, in_child, tiny_model, token_ids, toy_tokenizer
from test_checkpoint import TYPES, flip, recipe, saved

import modelutils
from formats import resume, shards
from formats.checkpoint import Store
from formats.resume import ResumableStore, run_identity
from formats.shards import sha256 as tensor_sha256
from formats.whole import load
from modelutils import decoder_of
from recipe import UsageError
from run.checks import resuming_bytes
from run.quantize import BlockQuantizer, quantize_blocks
from run.tune import tune

IDS = token_ids(4, 16)


def run(folder=None, wbits=4, walk_batch=2, kind=TYPES[0], ids=IDS, model=None, **settings):
    """A whole run: every number of its result, as one hash, and how many blocks the folder had."""
    decoder, chosen = decoder_of(model or tiny_model(*kind)), recipe(smooth=True, wbits=wbits, **settings)
    store = Store(decoder, chosen)
    if folder:
        store = ResumableStore(decoder, chosen, folder, run_identity(decoder, ids, chosen, CPU, walk_batch))
    digest, finished = sha256(), store.finished
    for layers in quantize_blocks(decoder, ids, chosen, store, walk_batch=walk_batch):
        digest.update(repr(layers).encode())
    for i in range(len(decoder)):
        for name, t in sorted(store.decoder().block(i).state_dict().items()):
            digest.update(f"{name} {tensor_sha256(t)}".encode())
    return digest.hexdigest(), finished


def killed_runs(folder, n=10):
    """Kill a run at n moments spread over it, in the middle of blocks and of writes, and go on.  Patches modules: for a fork."""
    count, last = 0, None

    def tick(name, path=None):
        nonlocal count
        count += 1
        if count == last:
            if path:
                Path(path).write_bytes(b"half of a file")
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(module, name, writes=False):
        function = getattr(module, name)

        def call(*args, **kwargs):
            tick(name, args[1] if writes else None)
            return function(*args, **kwargs)

        setattr(module, name, call)

    for module, name in (
        (modelutils, "run_block"),
        (BlockQuantizer, "round_group"),
        (os, "replace"),
        (os, "fsync"),
        (Path, "unlink"),
        (Path, "rename"),
        (shutil, "rmtree"),
    ):
        counted(module, name)
    counted(shards, "save_file", writes=True)
    whole, _ = run()
    count = 0
    assert run(f"{folder}/0")[0] == whole
    moments = [1 + i * (count - 1) // (n - 1) for i in range(n)]
    for last in moments:
        count, store = 0, f"{folder}/{last}"
        status = in_child(lambda store=store: run(store))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (last, status)
        count, done = -(10**9), len(list(Path(store).glob("block-*.json")))
        result, finished = run(store)
        assert result == whole and finished == done, (last, finished, done)
        files = {path.name for path in Path(store).iterdir()}
        blocks = {name for i in (0, 1) for name in (f"block-0000{i}.json", f"awrq-0000{i + 1}-of-00003.safetensors")}
        assert files == {"run.json"} | blocks, (last, files)
        yield finished


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    assert in_child(lambda: (tmp_path / "finished").write_text(json.dumps(list(killed_runs(tmp_path / "stores"))))) == 0
    finished = json.loads((tmp_path / "finished").read_text())
    assert len(finished) == 10 and {0, 1} <= set(finished) <= {0, 1, 2}


def test_a_finished_run_is_read_again(tmp_path):
    first = run(tmp_path / "store")
    assert run(tmp_path / "store") == (first[0], 2) and first[1] == 0


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"wbits": 3}, ["recipe.wbits is 4 there, 3 here"]),
        ({"alpha": 0.7, "seed": 5}, ["recipe.alpha", "recipe.seed"]),
        ({"walk_batch": 4}, ["walk_batch is 2 there, 4 here"]),
        ({"kind": ("opt", "gelu")}, ["model.activation_function is relu there, gelu here"]),
        ({"kind": ("llama", "plain")}, ["model.model_type is opt there, llama here"]),
        ({"model": tiny_model(seed=1)}, ["weights outside the blocks"]),
        ({"ids": IDS + 1}, ["calibration"]),
    ],
    ids=str,
)
def test_a_store_of_another_run(tmp_path, settings, parts):
    run(tmp_path / "store")
    with pytest.raises(UsageError, match="another run") as e:
        run(tmp_path / "store", **settings)
    assert all(part in str(e.value) for part in parts), e.value


def test_a_store_of_other_blocks(tmp_path):
    """As of a model that was tuned and has its embeddings still: found by the blocks that are finished."""
    run(tmp_path / "store")
    model = tiny_model()
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] += 1
    with pytest.raises(UsageError, match="another run: the weights of block 0 differ"):
        run(tmp_path / "store", model=model)


def test_a_store_in_a_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="other files"):
        run(tmp_path)


def test_two_runs_do_not_use_one_store(tmp_path):
    decoder = decoder_of(tiny_model())
    identity = run_identity(decoder, IDS, recipe(), CPU, 1)
    store = ResumableStore(decoder, recipe(), tmp_path / "store", identity)
    with pytest.raises(UsageError, match="--checkpoint_dir .*store: another run"):
        ResumableStore(decoder, recipe(), tmp_path / "store", identity)
    del store
    ResumableStore(decoder, recipe(), tmp_path / "store", identity)


def test_what_is_finished_is_saved_from_where_it_is(tmp_path):
    """A store that is saved elsewhere, and the same run saved at once, are one checkpoint."""
    decoder = decoder_of(tiny_model())
    store = ResumableStore(decoder, recipe(), tmp_path / "store", run_identity(decoder, IDS, recipe(), CPU, 1))
    list(quantize_blocks(decoder, IDS, recipe(), store))
    store.save(tmp_path / "saved", toy_tokenizer())
    saved(tmp_path / "at once", tiny_model())
    for path in (tmp_path / "saved").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "at once" / path.name).read_bytes()
    (tmp_path / "store/awrq-00001-of-00003.safetensors").unlink()
    assert load(tmp_path / "saved")


def test_a_damaged_store(tmp_path):
    run(tmp_path / "store")
    flip(tmp_path / "store" / "awrq-00002-of-00003.safetensors", -1)
    with pytest.raises(UsageError, match=r"awrq-00002.*damaged"):
        run(tmp_path / "store")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"target": "stream"}, {"tune_steps": 10, "groupsize": 4}], ids=str)
def test_the_room_that_is_asked_for_is_what_is_taken(tmp_path, settings, monkeypatch):
    """The new inputs of a block, and the new state of tuning, are there before the old ones go."""
    chosen, most = recipe(nsamples=len(IDS), seqlen=IDS.shape[1], **settings), 0
    decoder = decoder_of(tiny_model("llama", "llama3", num_hidden_layers=4))
    store = ResumableStore(decoder, chosen, tmp_path, run_identity(decoder, IDS, chosen, CPU, 1))

    def watched(*args, write=resume.write_json):  # which says that the new ones are complete
        nonlocal most
        files = [path for pattern in ("inputs-*/*", "tuning-*") for path in tmp_path.glob(pattern)]
        most = max(most, sum(path.stat().st_size for path in files))
        write(*args)

    monkeypatch.setattr(resume, "write_json", watched)
    list(quantize_blocks(decoder, IDS, chosen, store))
    if chosen.tune_steps:
        tune(store, IDS, CPU)
    assert 0.7 < most / resuming_bytes(decoder, chosen) < 1.2  # norms are not counted
