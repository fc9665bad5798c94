"""Text to tokens: equal to the published loaders, on real corpora where ../shared has them, on tiny ones here; and every error path."""

import contextlib
import functools
import gzip
import hashlib
import inspect
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

import datautils
from datautils import CORPORA, Corpus, Documents, Joined
from recipe import Recipe, UsageError

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN_FILE = SHARED / "golden" / "corpora.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text()) if GOLDEN_FILE.exists() else {"calibration": [None], "evaluation": [None]}
needs_shared = pytest.mark.skipif(not GOLDEN_FILE.exists(), reason="no ../shared with the golden values and their corpora")

LINES = [" = Title = \n", " \n", *(f" {i} the {'cat ' * (7 * i % 40)}sat , <unk> é .\n" for i in range(60))]  # of 11 to 180 bytes
CALIBRATED = [name for name, corpus in CORPORA.items() if corpus.calib_splits]
USES = [("calib_splits", name) for name in CALIBRATED] + [("eval_splits", name) for name in CORPORA]
LOAD_DATASET = inspect.signature(datasets.load_dataset)
ANY = "(.txt|.jsonl|.jsonl.gz|.json|.csv|.parquet)"
OTHER = "my-corpus"  # any folder of --data_dir


def toy_tokenizer(text, verbose=True):
    """Bytes after a first special token, as OPT's </s>.  Takes the plain call only, and only a silent one."""
    assert not verbose, "long texts would warn"
    return {"input_ids": [2, *(byte + 3 for byte in text.encode())]}


def ids_of(text):
    return toy_tokenizer(text, verbose=False)["input_ids"]


def write_corpus(root, folder, lines=LINES, splits=("train", "validation", "test")):
    (root / folder).mkdir()
    for i, split in enumerate(splits):
        (root / folder / f"{split}.txt").write_text("".join(lines[i:]))  # splits differ


def run(use, name, data_dir=None, seqlen=16, tokenizer=toy_tokenizer):
    if use == "calib_splits":
        return datautils.calibration(name, tokenizer, 8, seqlen, 0, data_dir)
    return datautils.eval_tokens(name, tokenizer, seqlen, data_dir)


@contextlib.contextmanager
def fails(exception, *parts):
    """The block raises exactly `exception`, with one line of text that has every part."""
    with pytest.raises(exception) as caught:
        yield
    message = str(caught.value)
    assert caught.type is exception, f"{caught.type} {message!r}"
    assert "\n" not in message, repr(message)
    assert all(str(part) in message for part in parts), message


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """No test reaches the hub.  Value: the list of load_dataset's arguments.  A call gets the rows of `write_corpus`'s split."""
    calls = []

    def load_dataset(**arguments):
        LOAD_DATASET.bind(**arguments)
        calls.append(arguments)
        corpus = next(row for row in CORPORA.values() if row.hub(arguments["split"])["path"] == arguments["path"])
        first = ("train", "validation", "test").index(arguments["split"])
        return datasets.Dataset.from_dict({"other": LINES[first:], corpus.field: [corpus.row(line) for line in LINES[first:]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.fixture
def data_dir(tmp_path):
    for folder in {corpus.folder for corpus in CORPORA.values()} | {OTHER}:
        write_corpus(tmp_path, folder)
    return tmp_path


# ---- the published loaders, on real text ----
@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "data" / "tokenizers" / "gpt2")
    return functools.cache(lambda text, verbose: tokenizer(text, verbose=verbose))  # PTB's 5 MB are tokenized once, not four times


def sha256(ids):
    assert ids.dtype == torch.int64
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


@needs_shared
@pytest.mark.parametrize("entry", GOLDEN["calibration"], ids=lambda e: e and f"{e['corpus']}-{e['seqlen']}-{e['seed']}")
def test_golden_calibration(entry, gpt2):
    ids, _ = datautils.calibration(entry["corpus"], gpt2, entry["nsamples"], entry["seqlen"], entry["seed"], SHARED / "data")
    assert list(ids.shape) == entry["shape"]
    assert ids[:, :8].tolist() == entry["first8"]
    assert sha256(ids) == entry["sha256"]


@needs_shared
@pytest.mark.parametrize("entry", GOLDEN["evaluation"], ids=lambda e: e and e["corpus"])
def test_golden_evaluation(entry, gpt2):
    ids, _ = datautils.eval_tokens(entry["corpus"], gpt2, entry["seqlen"], SHARED / "data")
    assert ids.shape == (entry["n_tokens"],)
    assert ids[:8].tolist() == entry["first8"]
    assert sha256(ids) == entry["sha256"]
    assert len(ids) // entry["seqlen"] == entry["windows"]


# ---- the published loaders, written down the slow way ----
def draw_joined(rows, sep, n, seqlen):
    ids = ids_of(sep.join(rows))
    offsets = [random.randint(0, len(ids) - seqlen - 1) for _ in range(n)]
    return [ids[i : i + seqlen] for i in offsets]


def draw_documents(rows, n, seqlen):
    windows = []
    for _ in range(n):
        while True:
            ids = ids_of(rows[random.randint(0, len(rows) - 1)])
            if len(ids) > seqlen:
                break
        i = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[i : i + seqlen])
    return windows


def reference_draw(cut, rows, n, seqlen, seed):
    random.seed(seed)
    return draw_documents(rows, n, seqlen) if isinstance(cut, Documents) else draw_joined(rows, cut.sep, n, seqlen)


def reference_tokens(cut, rows, seqlen):
    if isinstance(cut, Documents):
        return sum(reference_draw(cut, rows, cut.n_windows, seqlen, 0), [])
    ids = ids_of(cut.sep.join(rows[: cut.n_rows or len(rows)]))
    return ids[: (cut.n_windows or len(ids)) * seqlen]


@pytest.mark.parametrize("name", [*CALIBRATED, OTHER])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("seqlen", [16, 100])
def test_calibration_is_the_slow_obvious_one(name, seed, seqlen, data_dir):
    corpus = CORPORA.get(name, Corpus(name))
    ids, protocol = datautils.calibration(name, toy_tokenizer, 20, seqlen, seed, data_dir)
    assert ids.dtype == torch.int64
    assert ids.shape == (20, seqlen)
    assert ids.tolist() == reference_draw(corpus.cut, [corpus.row(line) for line in LINES], 20, seqlen, seed)
    file = data_dir / corpus.folder / "train.txt"
    source = f"{corpus.folder}/train.txt (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()})"
    assert protocol.pop("rule")
    assert protocol == {"corpus": name, "split": "train", "source": source, "nsamples": 20, "seqlen": seqlen, "seed": seed}


@pytest.mark.parametrize("name", [*CALIBRATED, OTHER])
def test_tuning_has_windows_after_the_others(name, data_dir):
    """Which stay what they are without it."""
    corpus = CORPORA.get(name, Corpus(name))
    ids, protocol = datautils.calibration_of(Recipe(calib_data=name, nsamples=5, seqlen=16, seed=1, tune_steps=6), toy_tokenizer, data_dir)
    plain, same = datautils.calibration(name, toy_tokenizer, 5, 16, 1, data_dir)
    assert ids[:5].equal(plain) and protocol == same | {"tune_samples": 12}
    assert ids.tolist() == reference_draw(corpus.cut, [corpus.row(line) for line in LINES], 5 + 12, 16, 1)


@pytest.mark.parametrize("name", [*CORPORA, OTHER])
@pytest.mark.parametrize("seqlen", [16, 100])
def test_eval_tokens_are_the_slow_obvious_ones(name, seqlen, data_dir):
    corpus = CORPORA.get(name, Corpus(name))
    split = corpus.eval_splits[0]
    ids, protocol = datautils.eval_tokens(name, toy_tokenizer, seqlen, data_dir)
    first = ("train", "validation", "test").index(split)
    assert ids.dtype == torch.int64
    assert ids.tolist() == reference_tokens(corpus.cut, [corpus.row(line) for line in LINES[first:]], seqlen)
    assert protocol.pop("rule")
    assert protocol.pop("source").startswith(f"{corpus.folder}/{split}.txt (sha256 ")
    assert protocol == {"corpus": name, "split": split, "seqlen": seqlen, "n_tokens": len(ids)}


def test_joined_cuts_rows_and_windows():
    rows = ["ab", "cd", "ef"]
    encode = datautils._encoder(toy_tokenizer)
    assert Joined(" ", n_rows=2).tokens(rows, encode, 2, "x")[0].tolist() == ids_of("ab cd")
    assert Joined(" ", n_windows=2).tokens(rows, encode, 2, "x")[0].tolist() == ids_of("ab cd ef")[:4]


def test_the_protocols_of_the_paper_are_the_table():
    cuts = {name: (corpus.folder, corpus.cut, corpus.calib_splits[:1], corpus.eval_splits) for name, corpus in CORPORA.items()}
    assert cuts == {
        "wikitext2": ("wikitext2", Joined("\n\n"), ("train",), ("test",)),
        "wikitext2-validation": ("wikitext2", Joined("\n\n"), (), ("validation",)),
        "ptb": ("ptb", Joined("\n\n"), ("train",), ("validation",)),
        "ptb-new": ("ptb", Joined(" "), (), ("test",)),
        "c4": ("c4", Documents(256), ("train",), ("validation",)),
        "c4-joined": ("c4", Joined("\n"), ("train",), ("validation",)),
        "c4-new": ("c4", Joined(" ", n_rows=1100, n_windows=256), (), ("validation",)),
    }


@pytest.mark.parametrize("name", [*CALIBRATED, OTHER])
def test_draws_leave_the_global_random_state_alone(name, data_dir):
    draws = []
    for global_seed in (1, 2):
        random.seed(global_seed)
        torch.manual_seed(global_seed)
        before = random.getstate(), torch.get_rng_state()
        draws.append(run("calib_splits", name, data_dir)[0])
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(*draws)


@pytest.mark.parametrize(("use", "name"), [*USES, ("calib_splits", OTHER), ("eval_splits", OTHER)])
def test_protocol_is_json_without_paths_and_progress_is_on_stderr(use, name, data_dir, capsys):
    protocol = run(use, name, data_dir)[1]
    assert json.loads(json.dumps(protocol)) == protocol
    assert str(data_dir) not in json.dumps(protocol)
    assert "\n" not in protocol["rule"]
    captured = capsys.readouterr()
    assert f"tokenizing {name} {protocol['split']}" in captured.err
    assert not captured.out


def test_protocols_of_different_cuts_differ(data_dir):
    rules = {name: datautils.eval_tokens(name, toy_tokenizer, 16, data_dir)[1]["rule"] for name in ("ptb", "ptb-new", "c4", "c4-new")}
    assert len(set(rules.values())) == 4, rules


# ---- text from the hub ----
HUB = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "ptb": {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
    "c4": {"path": "allenai/c4"},
}
HUB_FILES = {
    ("ptb", "train"): "penn_treebank/train/0000.parquet",
    ("ptb", "validation"): "penn_treebank/validation/0000.parquet",
    ("ptb", "test"): "penn_treebank/test/0000.parquet",
    ("c4", "train"): "en/c4-train.00000-of-01024.json.gz",
    ("c4", "validation"): "en/c4-validation.00000-of-00008.json.gz",
}


@pytest.mark.parametrize(("use", "name"), USES)
def test_hub_rows_give_the_tokens_of_the_same_local_file(use, name, data_dir, hub):
    local, local_protocol = run(use, name, data_dir)
    assert hub == []  # with data_dir nothing is fetched
    ids, protocol = run(use, name)
    assert torch.equal(ids, local)
    assert protocol["rule"] == local_protocol["rule"]
    folder, split = CORPORA[name].folder, getattr(CORPORA[name], use)[0]
    files = {"data_files": {split: HUB_FILES[folder, split]}} if (folder, split) in HUB_FILES else {}
    assert hub == [HUB.get(folder, CORPORA[name].hub(split)) | files | {"split": split}]  # of corpora that were added, what their row says
    assert protocol["split"] == split
    assert all(repr(value) in protocol["source"] for value in hub[0].values())


@pytest.mark.parametrize(("use", "name"), USES)
@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), ValueError("gone"), KeyError("text"), RuntimeError("scripts")])
def test_a_hub_failure_names_the_way_out(use, name, error, monkeypatch):
    def load_dataset(**arguments):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = CORPORA[name]
    split = getattr(corpus, use)[0]
    tried = ("load_dataset(", corpus.hub(split)["path"], type(error).__name__)
    with fails(OSError, name, *tried, "--data_dir", f"{corpus.folder}/{split}{ANY}"):
        run(use, name)


def test_a_hub_without_the_column_is_a_hub_failure(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: datasets.Dataset.from_dict({"renamed": ["text"]}))
    with fails(OSError, "c4", "load_dataset(", "text"):
        run("calib_splits", "c4")


# ---- text from files ----
@pytest.mark.parametrize(
    ("name", "rows"),
    [("wikitext2", [" = A = \n", "", " b \n", " c"]), ("ptb", ["= A =", "", "b", "c"]), ("c4", [" = A = ", " ", " b ", " c"])],
)
def test_lines_become_the_hubs_rows(name, rows, tmp_path):
    file = tmp_path / "train.txt"
    for data in (b" = A = \n \n b \n c", b"\xef\xbb\xbf = A = \r\n \r\n b \r\n c"):  # the same text as Windows saves it
        file.write_bytes(data)
        assert datautils._read_file(CORPORA[name], file, "text")[0] == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_rows_are_taken_as_they_are(suffix, tmp_path):
    texts = [" a\u2028b \n", "é\x85", ""]  # no line ends but "\n" divide a file
    data = "".join(json.dumps({"text": text, "url": "x"}, ensure_ascii=False) + "\n" for text in texts).encode()
    (tmp_path / "ptb").mkdir()
    file = tmp_path / "ptb" / f"validation{suffix}"
    file.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    ids, protocol = datautils.eval_tokens("ptb", toy_tokenizer, 4, tmp_path)
    assert ids.tolist() == ids_of("\n\n".join(texts))
    assert protocol["source"] == f"ptb/validation{suffix} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()})"


@pytest.mark.parametrize("name", [*CALIBRATED, OTHER])
def test_calibration_falls_back_to_validation_and_says_so(name, tmp_path):
    write_corpus(tmp_path, CORPORA[name].folder if name in CORPORA else name, splits=("validation", "test"))
    assert run("calib_splits", name, tmp_path)[1]["split"] == "validation"


def test_another_folder_is_evaluated_on_test_else_on_validation(tmp_path):
    write_corpus(tmp_path, OTHER)
    assert run("eval_splits", OTHER, tmp_path)[1]["split"] == "test"
    (tmp_path / OTHER / "test.txt").unlink()
    assert run("eval_splits", OTHER, tmp_path)[1]["split"] == "validation"


# ---- errors: one line that names the value and the way out ----
@pytest.mark.parametrize("use", ["calib_splits", "eval_splits"])
def test_unknown_corpus_lists_the_known(use, data_dir):
    with fails(UsageError, "'wikitext'", *CORPORA, "none"):
        run(use, "wikitext")
    for name in ("wikitext", "../" + data_dir.name, f"../{data_dir.name}/c4", f"./{OTHER}", ".", "..", "", str(data_dir / OTHER)):
        with fails(UsageError, repr(name), *CORPORA, OTHER):
            run(use, name, data_dir)


@pytest.mark.parametrize(("use", "name"), [*USES, ("calib_splits", OTHER), ("eval_splits", OTHER)])
def test_missing_files_are_named(use, name, tmp_path, hub):
    corpus = CORPORA.get(name, Corpus(name))
    (tmp_path / corpus.folder).mkdir()
    expected = [f"{corpus.folder}/{split}{ANY}" for split in getattr(corpus, use)]
    with fails(FileNotFoundError, name, tmp_path, *expected):
        run(use, name, tmp_path)
    with fails(FileNotFoundError, "--data_dir", tmp_path / "nowhere"):
        run(use, name, tmp_path / "nowhere")
    assert hub == []


@pytest.mark.parametrize("name", [name for name in CORPORA if name not in CALIBRATED])
def test_evaluation_protocols_do_not_calibrate(name, data_dir):
    with fails(UsageError, name, "evaluation only", *CALIBRATED):
        run("calib_splits", name, data_dir)


def test_two_files_of_one_split_are_refused(data_dir):
    (data_dir / "c4" / "train.jsonl").write_text('{"text": "a"}\n')
    with fails(UsageError, "train.txt", "train.jsonl"):
        run("calib_splits", "c4", data_dir)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'text': 1}", "not JSON"),
        ('{"text": "a \\ud83d b"}', r"\ud83d, half of a character"),
        ("", "not JSON"),
        ('{"body": "a"}', "'text'"),
        ('{"text": 1}', "'text'"),
        ('["text"]', "'text'"),
    ],
)
def test_a_bad_json_line_is_named(line, reason, tmp_path):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_text(f'{{"text": "good"}}\n{line}\n{{"text": "good"}}\n')
    with fails(UsageError, "train.jsonl, line 2", reason):
        run("calib_splits", "c4", tmp_path)


@pytest.mark.parametrize(
    ("file", "data", "reason"),
    [
        ("train.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
        ("train.jsonl.gz", gzip.compress(b'{"text": "caf\xe9"}', mtime=0), "not UTF-8"),
        ("train.jsonl.gz", b'{"text": "plain"}', "broken gzip"),
        ("train.jsonl.gz", gzip.compress(b'{"text": "good"}\n' * 9, mtime=0)[:-9], "broken gzip"),
        ("train.txt", b"", "empty"),
        ("train.txt", b" \n\n", "empty"),
        ("train.jsonl", b'{"text": ""}\n', "empty"),
    ],
)
@pytest.mark.parametrize("name", ["c4", "wikitext2", OTHER])
def test_a_broken_or_empty_file_is_named(name, file, data, reason, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_bytes(data)
    with fails(UsageError, tmp_path / name / file, reason):
        run("calib_splits", name, tmp_path)


@pytest.mark.parametrize("name", [*CALIBRATED, OTHER])
def test_too_short_a_corpus_says_how_long_it_is(name, tmp_path):
    corpus = CORPORA.get(name, Corpus(name))
    write_corpus(tmp_path, corpus.folder, lines=["abc\n", "defgh\n"], splits=("train",))
    rows = [corpus.row("abc\n"), corpus.row("defgh\n")]
    longest = max(map(len, map(ids_of, rows))) if isinstance(corpus.cut, Documents) else len(ids_of(corpus.cut.sep.join(rows)))
    with fails(UsageError, name, f"{longest} tokens", f"seqlen {longest}"):  # exactly seqlen is too short as well
        datautils.calibration(name, toy_tokenizer, 1, longest, data_dir=tmp_path)
    ids, _ = datautils.calibration(name, toy_tokenizer, 1, longest - 1, data_dir=tmp_path)  # one more is enough
    assert ids.shape == (1, longest - 1)


@pytest.mark.parametrize("name", [*CALIBRATED, OTHER])
def test_too_few_distinct_windows(name, tmp_path):
    corpus = CORPORA.get(name, Corpus(name))
    lines = ["0123456789\n", "0123456789\n", "7 bytes\n", "short\n"]  # as documents, 7 bytes are exactly seqlen tokens and have no window
    write_corpus(tmp_path, corpus.folder, lines, splits=("train",))
    rows = [corpus.row(line) for line in lines]
    texts = rows if isinstance(corpus.cut, Documents) else [corpus.cut.sep.join(rows)]
    distinct = sum(max(0, len(ids_of(text)) - 8) for text in texts)
    assert len(datautils.calibration(name, toy_tokenizer, distinct, 8, data_dir=tmp_path)[0]) == distinct
    with fails(UsageError, name, f"{distinct} distinct", f"{distinct + 1} needed"):
        datautils.calibration(name, toy_tokenizer, distinct + 1, 8, data_dir=tmp_path)
    recipe = Recipe(calib_data=name, nsamples=distinct - 4, seqlen=8, tune_steps=2)
    assert len(datautils.calibration_of(recipe, toy_tokenizer, tmp_path)[0]) == distinct
    with fails(UsageError, name, f"{distinct} distinct", f"{distinct - 4} needed and 6 more for --tune_steps"):
        datautils.calibration_of(replace(recipe, tune_steps=3), toy_tokenizer, tmp_path)


@pytest.mark.parametrize("name", [*CORPORA, OTHER])
def test_an_evaluation_needs_one_window(name, tmp_path):
    corpus = CORPORA.get(name, Corpus(name))
    write_corpus(tmp_path, corpus.folder, lines=["abc\n"] * 4)
    with fails(UsageError, name, "tokens", "seqlen 500"):
        datautils.eval_tokens(name, toy_tokenizer, 500, tmp_path)


# ---- checks before long work ----
@pytest.mark.parametrize("calib", [None, *CALIBRATED])
def test_the_papers_runs_pass_the_check(calib, data_dir, hub):
    datautils.check_corpora(calib, list(CORPORA))
    datautils.check_corpora(calib, [*CORPORA, OTHER], data_dir)
    assert hub == []


@pytest.mark.parametrize("name", [*CORPORA, OTHER])
def test_text_used_twice_is_an_error(name, tmp_path):
    corpus = CORPORA.get(name, Corpus(name))
    calib = corpus.folder
    write_corpus(tmp_path, corpus.folder, splits=("validation",))
    if "validation" in corpus.eval_splits:
        with fails(UsageError, f"calibration on {calib}", f"evaluation on {name}", f"{corpus.folder}/validation"):
            datautils.check_corpora(calib, [name], tmp_path)
    for split in ("train", "test"):  # the way out
        shutil.copy(tmp_path / corpus.folder / "validation.txt", tmp_path / corpus.folder / f"{split}.txt")
    datautils.check_corpora(calib, [name], tmp_path)


def test_a_linked_folder_is_the_same_text(tmp_path):
    write_corpus(tmp_path, OTHER, splits=("validation",))
    (tmp_path / "alias").symlink_to(tmp_path / OTHER, target_is_directory=True)
    with fails(UsageError, "alias", OTHER):
        datautils.check_corpora("alias", [OTHER], tmp_path)


def test_the_hubs_text_used_twice_is_an_error(monkeypatch):
    monkeypatch.setitem(CORPORA, "c4", replace(CORPORA["c4"], calib_splits=("validation",)))
    with fails(UsageError, "calibration on c4", "evaluation on c4-new"):
        datautils.check_corpora("c4", ["wikitext2", "c4-new"])


def test_the_check_fails_as_the_work_would(data_dir):
    with fails(UsageError, "'wikitext'"):
        datautils.check_corpora(None, ["wikitext2", "wikitext"])
    with fails(UsageError, "ptb-new", "evaluation only"):
        datautils.check_corpora("ptb-new", ["wikitext2"])
    (data_dir / "ptb" / "test.txt").unlink()
    datautils.check_corpora("ptb", ["ptb"], data_dir)
    with fails(FileNotFoundError, "ptb-new", "ptb/test(.txt|"):
        datautils.check_corpora("ptb", ["ptb", "ptb-new"], data_dir)
