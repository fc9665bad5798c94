"""Text as people have it: every kind of file, a field of another name, and data sets of the hub by name."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from test_datautils import fails, ids_of, toy_tokenizer

import datautils
import opt
from recipe import Recipe, UsageError
from runtime import Clock

TEXTS = [" a\u2028b \n", 'é, "quoted"', "", "three\r\nlines\n", "x" * 200_000]  # the last is longer than the csv module takes by itself


def write(file, texts, field):
    """A file of any suffix with texts in a field, and another field before it."""
    rows = [{"url": f"u{i}", field: text} for i, text in enumerate(texts)]
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as f:
            table = csv.DictWriter(f, ["url", field])
            table.writeheader()
            table.writerows(rows)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        data = (json.dumps(rows, indent=1) if file.suffix == ".json" else lines).encode()
        file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", [suffix for suffix in datautils.SUFFIXES if suffix != ".txt"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_every_kind_of_file_gives_the_same_tokens(suffix, field, tmp_path):
    file = tmp_path / "mine" / f"test{suffix}"
    write(file, TEXTS, field)
    ids, protocol = datautils.eval_tokens("mine", toy_tokenizer, 4, tmp_path, field=field)
    assert ids.tolist() == ids_of("\n".join(TEXTS))
    assert protocol["source"].startswith(f"mine/test{suffix} (sha256 ") and ("'content'" in protocol["source"]) == (field == "content")
    with fails(UsageError, f"test{suffix}", "'other'", "url", field):
        datautils.eval_tokens("mine", toy_tokenizer, 4, tmp_path, field="other")


def test_json_may_be_an_array_of_texts_or_json_lines(tmp_path):
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine/test.json"
    for data in (json.dumps(TEXTS), "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)):
        file.write_text(data)
        assert datautils.eval_tokens("mine", toy_tokenizer, 4, tmp_path)[0].tolist() == ids_of("\n".join(TEXTS))


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("test.json", b'[{"text": "a"}, {"text": 1}]', ["row 2", "no text in 'text' but 1"]),
        ("test.json", b'["a", {"text": "b"}, 3]', ["row 3", "but 3"]),
        ("test.json", b'[{"text": "a"}', ["test.json: not JSON"]),
        ("test.json", b'["a \\ud83d"]', ["half of a character"]),
        ("test.json", b"[]", ["is empty"]),
        ("test.csv", b"text,url\r\nfirst,u\r\n", []),
        ("test.csv", b"url,text\nu\n", ["row 1", "None"]),
        ("test.csv", b"", ["no column 'text'"]),
        ("test.csv", "text\ncafé".encode("latin-1"), ["not UTF-8"]),
        ("test.csv", b'text\n"a, b"\nunquoted, here is lost\n', ["line 3", "more cells than columns"]),
        ("test.csv", b'text\n"an open quote\nswallows\nthe rest\n', ["not CSV"]),
        ("test.json", b'[\n"a",\n', ["not JSON", "line 3"]),
        ("test.parquet", b"PAR1 no more", ["not a Parquet file"]),
    ],
)
def test_a_broken_file_is_named(name, data, parts, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(data)
    if not parts:
        assert datautils.eval_tokens("mine", toy_tokenizer, 4, tmp_path)[0].tolist() == ids_of("first")
        return
    with fails(UsageError, name, *parts):
        datautils.eval_tokens("mine", toy_tokenizer, 4, tmp_path)


def test_a_missing_text_is_named_by_its_row(tmp_path):
    (tmp_path / "mine").mkdir()
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "mine/test.parquet")
    with fails(UsageError, "test.parquet, row 2", "None", "--text_field"):
        datautils.eval_tokens("mine", toy_tokenizer, 4, tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """The hub's answers, made up: every data set has the column `body`.  The calls made."""
    calls = []

    def load_dataset(**arguments):
        calls.append(arguments)
        return datasets.Dataset.from_dict({"body": ["one two three", "four"], "n": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("hub:me/data:train", {"path": "me/data", "split": "train"}),
        ("hub:me/data:en:train", {"path": "me/data", "name": "en", "split": "train"}),
        ("hub:me/data:train[:10%]", {"path": "me/data", "split": "train[:10%]"}),
        ("hub:me/data:en:train[10:20]", {"path": "me/data", "name": "en", "split": "train[10:20]"}),
    ],
)
def test_a_data_set_of_the_hub_by_name(name, arguments, beside, hub, tmp_path):
    data_dir = tmp_path if beside else None
    datautils.check_corpora(name, ["hub:me/data:test"], data_dir)
    ids, protocol = datautils.calibration(name, toy_tokenizer, 3, 4, 0, data_dir, "body")
    assert ids.shape == (3, 4) and hub == [arguments]
    assert protocol["corpus"] == name and "column 'body'" in protocol["source"]
    assert datautils.eval_tokens(name, toy_tokenizer, 4, data_dir, field="body")[0].tolist() == ids_of("one two three\nfour")
    with fails(UsageError, name, "no column 'text'", "body, n", "--text_field"):
        datautils.eval_tokens(name, toy_tokenizer, 4, data_dir)
    with fails(UsageError, name, "row 1", "'n'", "--text_field"):
        datautils.eval_tokens(name, toy_tokenizer, 4, data_dir, field="n")


def test_a_split_of_the_hub_is_not_both(hub):
    with fails(UsageError, "hub:me/data:train", "share"):
        datautils.check_corpora("hub:me/data:train", ["hub:me/data:train"])
    datautils.check_corpora("hub:me/data:en:train", ["hub:me/data:de:train"])
    datautils.check_corpora("hub:me/data:train[:80%]", ["hub:me/data:train[80%:]"])
    for one, other in (
        ("hub:me/data:train[:10%]", "hub:me/data:train"),
        ("hub:me/data:train+test", "hub:me/data:test"),
        ("hub:Salesforce/wikitext:wikitext-2-raw-v1:test", "wikitext2"),
        ("hub:allenai/c4:en:validation", "c4"),
    ):
        with fails(UsageError, one, other, "share"):
            datautils.check_corpora(one, [other])


@pytest.mark.parametrize("name", ["hub:", "hub:data:train", "hub:me/data", "hub:me/data:a:b:c", "hub:me/data:"])
def test_a_name_that_is_none(name):
    with fails(UsageError, name, "hub:OWNER/NAME:SPLIT"):
        datautils.check_corpora(name, [])


def test_what_the_hub_does_not_have(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: (_ for _ in ()).throw(ValueError("Unknown split")))
    with fails(OSError, "hub:me/data:trian", "Unknown split", "name a data set, configuration and split that are there"):
        datautils.calibration("hub:me/data:trian", toy_tokenizer, 1, 4)


def test_a_bare_demo_command_hints_at_the_demos_text(run_script, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: pytest.fail("the hub is asked"))
    status, out, err = run_script(opt, Path(opt.__file__).parent / "demo/opt")
    assert status == 2 and len(err) == 1 and "--data_dir" in err[0] and "--calib_data world --eval world" in err[0], err


def test_a_field_that_no_text_has_is_an_error(tmp_path):
    write(tmp_path / "mine/test.json", TEXTS, "body")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/test.txt").write_text("a b c d e f")
    recipe, clock = Recipe(seqlen=4), Clock("cpu")
    assert datautils.load_text(recipe, ("mine", "plain"), toy_tokenizer, (tmp_path, "body"), clock)[0] is None
    with fails(UsageError, "--text_field body", "plain/test.txt", "leave it out"):
        datautils.load_text(recipe, ("plain",), toy_tokenizer, (tmp_path, "body"), clock)
