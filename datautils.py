"""Text to tokens: the corpora, how the published loaders cut them into windows, and where their text is (hub or --data_dir).

A row of CORPORA is a corpus; any other folder of --data_dir is one too, and so is hub:OWNER/NAME[:CONFIG]:SPLIT.  Each number carries its
`protocol`: two of them never compare.
Usage: ids, protocol = datautils.calibration("c4", tokenizer, nsamples=128, seqlen=2048, seed=0)
"""

import codecs
import csv
import functools
import gzip
import hashlib
import io
import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from recipe import Recipe, UsageError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")  # of a split's file: see FILES
HUB = re.compile(r"hub:(?P<path>[^/:]+/[^/:]+)(:(?P<name>[^:\[]+))?:(?P<split>[^:\[]+(\[.*\])?)")  # a data set of the hub, by name


# ---- how rows become tokens ----
@dataclass(frozen=True)
class Joined:
    """Rows joined with `sep` into one text, tokenized in one call: chunks would change the tokens at their seams."""

    sep: str
    n_rows: int | None = None  # evaluation: the first rows only
    n_windows: int | None = None  # evaluation: the first windows only

    def draw(self, rows, encode, n, seqlen, seed, label, further=0):
        """(ids (n + further, seqlen), rule): windows at random offsets of the joined text.  further: those for tuning."""
        ids = self._join(rows, encode, label)
        _require_windows(label, len(ids), len(ids) - seqlen, n, seqlen, further)
        rng = random.Random(seed)
        starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(n + further)]
        return torch.stack([ids[i : i + seqlen] for i in starts]), f"rows joined with {self.sep!r}, windows at random offsets of the text"

    def tokens(self, rows, encode, seqlen, label):
        """(ids (N,), rule): the joined text, or its first n_windows windows of seqlen."""
        ids = self._join(rows[: self.n_rows], encode, label)[: self.n_windows and self.n_windows * seqlen]
        part = [f"first {n}" if n else "all" for n in (self.n_rows, self.n_windows)]
        return ids, f"{part[0]} rows joined with {self.sep!r}, {part[1]} consecutive windows of the text"

    def _join(self, rows, encode, label):
        text = self.sep.join(rows)
        with tqdm(total=len(text), unit="char", unit_scale=True, desc=f"tokenizing {label}") as bar:
            ids = encode(text)
            bar.update(len(text))
        return ids


@dataclass(frozen=True)
class Documents:
    """Rows are documents and a window lies inside one of more than seqlen tokens ("at least", as published, crashes on exactly seqlen)."""

    n_windows: int  # evaluation: random windows, always of seed 0

    def draw(self, rows, encode, n, seqlen, seed, label, further=0):
        """(ids (n + further, seqlen), rule): windows at random offsets of random documents.  further: those for tuning."""
        length = functools.cache(lambda i: len(encode(rows[i])))
        distinct = 0  # counted until it is enough, so that no draw can go on for ever
        for i in tqdm(range(len(rows)), unit="document", desc=f"finding long documents in {label}", leave=False):
            distinct += max(0, length(i) - seqlen)
            if distinct >= n + further:
                break
        else:
            _require_windows(label, max(map(length, range(len(rows)))), distinct, n, seqlen, further)
        rng = random.Random(seed)
        windows = []
        for _ in tqdm(range(n + further), unit="window", desc=f"tokenizing {label}"):
            while length(i := rng.randint(0, len(rows) - 1)) <= seqlen:
                pass
            start = rng.randint(0, length(i) - seqlen - 1)
            windows.append(encode(rows[i])[start : start + seqlen])
        return torch.stack(windows), "random documents of more than seqlen tokens, one window at a random offset of each"

    def tokens(self, rows, encode, seqlen, label):
        """(ids (n_windows * seqlen,), rule): random windows, one after the other."""
        ids, rule = self.draw(rows, encode, self.n_windows, seqlen, 0, label)
        return ids.flatten(), f"{self.n_windows} windows of seed 0: {rule}"


# ---- the corpora ----
@dataclass(frozen=True)
class Corpus:
    """A row of CORPORA.  The defaults are the rules for any other folder of --data_dir."""

    folder: str  # under --data_dir: folder/SPLIT with one of SUFFIXES
    cut: Joined | Documents = Joined("\n")
    calib_splits: tuple = ("train", "validation")  # the first that --data_dir has; on the hub the first; empty: for evaluation only
    eval_splits: tuple = ("test", "validation")
    row: Callable = lambda line: line.removesuffix("\n")  # a line of a .txt file -> the hub's row
    hub: Callable | None = None  # split -> arguments of datasets.load_dataset (version 5 has no loading scripts)
    field: str | None = None  # the hub's column; None: that of --text_field


PTB = Corpus(
    folder="ptb",
    cut=Joined("\n\n"),
    eval_splits=("validation",),
    row=str.strip,
    hub=lambda split: {
        "path": "ptb-text-only/ptb_text_only",
        "revision": "refs/convert/parquet",
        "data_files": {split: f"penn_treebank/{split}/0000.parquet"},
    },
    field="sentence",
)
C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
C4 = Corpus(
    folder="c4",
    cut=Documents(n_windows=256),
    eval_splits=("validation",),
    hub=lambda split: {"path": "allenai/c4", "data_files": {split: C4_SHARDS[split]}},
    field="text",
)
WIKITEXT2 = Corpus(
    folder="wikitext2",
    cut=Joined("\n\n"),
    eval_splits=("test",),
    row=lambda line: line if line.strip() else "",
    hub=lambda split: {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    field="text",
)
CORPORA = {  # wikitext2, ptb and c4 are the protocols of the paper's tables; -new are GPTQ's later ones, for evaluation only
    "wikitext2": WIKITEXT2,
    "wikitext2-validation": replace(WIKITEXT2, calib_splits=(), eval_splits=("validation",)),  # to choose by
    "ptb": PTB,
    "ptb-new": replace(PTB, cut=Joined(" "), calib_splits=(), eval_splits=("test",)),
    "c4": C4,
    "c4-joined": replace(C4, cut=Joined("\n")),  # all documents, short ones too
    "c4-new": replace(C4, cut=Joined(" ", n_rows=1100, n_windows=256), calib_splits=()),
}


# ---- what the scripts call ----
def calibration(name, tokenizer, nsamples, seqlen, seed=0, data_dir=None, field="text"):
    """Random windows, drawn as the published loaders draw: (ids (nsamples, seqlen) int64, protocol: a dict for the results JSON).

    seqlen is in tokens, the tokenizer's own special ones included.  With data_dir the hub is asked for names that begin with hub: only.
    field: where rows that have fields have their text.
    UsageError: unknown or unsuitable corpus, too little text, a broken file.  OSError: no such file (FileNotFoundError), or the hub failed.
    """
    return calibration_of(Recipe(calib_data=name, nsamples=nsamples, seqlen=seqlen, seed=seed), tokenizer, data_dir, field)


def calibration_of(recipe, tokenizer, data_dir=None, field="text"):
    """`calibration` by a recipe.Recipe, with the windows to tune on after the others: (ids (nsamples + tune_samples, seqlen), protocol).

    One generator draws all in order, so tuning does not change those of the codes.
    """
    name, n, seqlen, seed, further = recipe.calib_data, recipe.nsamples, recipe.seqlen, recipe.seed, recipe.tune_samples
    corpus, split, file = _locate(name, "calib_splits", data_dir)
    rows, source = _read(name, corpus, split, file, field)
    ids, rule = corpus.cut.draw(rows, _encoder(tokenizer), n, seqlen, seed, f"{name} {split}", further)
    used = {"corpus": name, "split": split, "source": source, "rule": rule, "nsamples": n, "seqlen": seqlen, "seed": seed}
    return ids, used | ({"tune_samples": further} if further else {})


def eval_tokens(name, tokenizer, seqlen, data_dir=None, windows=None, field="text"):
    """The evaluation text: (ids (N,) int64, N >= seqlen, protocol: a dict for the results JSON).  The evaluator cuts windows of seqlen.

    windows: (first, end) of those that count; None: all.  Other arguments and errors are those of `calibration`.
    """
    assert seqlen > 0, f"{seqlen=}"
    corpus, split, file = _locate(name, "eval_splits", data_dir)
    rows, source = _read(name, corpus, split, file, field)
    ids, rule = corpus.cut.tokens(rows, _encoder(tokenizer), seqlen, f"{name} {split}")
    if len(ids) < seqlen:
        raise UsageError(f"{name} {split} has {len(ids)} tokens, not one window of seqlen {seqlen}; use a shorter seqlen or more text")
    if windows is not None:
        first, end = windows
        if end > len(ids) // seqlen:
            raise UsageError(
                f"--eval_windows {first}:{end}: {name} {split} has {len(ids) // seqlen} windows of {seqlen} tokens; give fewer"
            )
        ids = ids[first * seqlen : end * seqlen]
    used = {"corpus": name, "split": split, "source": source, "rule": rule, "seqlen": seqlen, "n_tokens": len(ids)}
    return ids, used | ({} if windows is None else {"windows": f"{first} to {end - 1}"})


def load_text(recipe, corpora, tokenizer, texts, clock, calibration_done=None, eval_windows=None):
    """All text of a run: calibration ids (nsamples + tune_samples, seqlen), {corpus: evaluation ids (N,)}, their protocols.

    recipe: a recipe.Recipe; for method full the calibration is None, and so are its ids if it is done already and `calibration_done` its
    protocol.  texts: (data_dir, field); clock: a runtime.Clock; eval_windows: see eval_tokens.  Raises what
    calibration and eval_tokens raise.
    """
    calibrates = recipe.method != "full" and calibration_done is None
    ids, used = None, calibration_done
    if calibrates:
        with clock("calibration"):
            ids, used = calibration_of(recipe, tokenizer, *texts)
    with clock("evaluation"):
        data_dir, field = texts
        found = {name: eval_tokens(name, tokenizer, recipe.seqlen, data_dir, eval_windows, field) for name in corpora}
    protocol = {"calibration": used, "evaluation": {name: how for name, (_, how) in found.items()}}
    sources = [how["source"] for how in [used if calibrates else None, *protocol["evaluation"].values()] if how]
    if field != "text" and sources and not any(repr(field) in source for source in sources):
        raise UsageError(f"--text_field {field}: none of these texts has fields ({', '.join(sources)}); leave it out")
    return ids, {name: tokens for name, (tokens, _) in found.items()}, protocol


def check_corpora(calib_name, eval_names, data_dir=None):
    """Cheap checks before long work: each corpus is known, its file is there, and no text is used twice.  calib_name None: no calibration.

    Raises UsageError or FileNotFoundError.  The text is read later.
    """
    calib = None if calib_name is None else _locate(calib_name, "calib_splits", data_dir)
    for name in eval_names:
        found = _locate(name, "eval_splits", data_dir)
        if calib and _shared(calib, found):
            raise UsageError(f"calibration on {calib_name} and evaluation on {name} would share {found[0].folder}/{found[1]}; change one")


# ---- where the text is ----
def _locate(name, use, data_dir):
    """(corpus, split, file) of a use, "calib_splits" or "eval_splits": the first split that data_dir has; file None: it is on the hub."""
    corpus = _corpus(name, data_dir)
    splits = getattr(corpus, use)
    if not splits:
        known = ", ".join(key for key, row in CORPORA.items() if row.calib_splits)
        raise UsageError(f"{name} is for evaluation only; calibrate on one of {known}")
    if data_dir is None or HUB.fullmatch(name):
        return corpus, splits[0], None
    for split in splits:
        if file := find_file(data_dir, corpus.folder, split):
            return corpus, split, file
    raise FileNotFoundError(f"{name}: --data_dir {data_dir} has no {' or '.join(_file_names(corpus, split) for split in splits)}")


def find_file(data_dir, folder, split, suffixes=SUFFIXES):
    """data_dir/folder/split.SUFFIX, or None if there is none.  Raises UsageError if there are several."""
    files = [file for suffix in suffixes if (file := Path(data_dir, folder, split + suffix)).is_file()]
    if len(files) > 1:
        raise UsageError(f"{folder}: {' and '.join(map(str, files))} are the same split; keep one of them")
    return files[0] if files else None


def _corpus(name, data_dir):
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"--data_dir {data_dir}: no such folder")
    folders = [] if data_dir is None else sorted(path.name for path in Path(data_dir).iterdir() if path.is_dir())
    if name in CORPORA:
        return CORPORA[name]
    if name.startswith("hub:"):
        return _hub_corpus(name)
    if name in folders:  # so that no name leads out of data_dir
        return Corpus(name)
    raise UsageError(f"unknown corpus {name!r}; known: {', '.join(CORPORA)}; folders of --data_dir: {', '.join(folders) or 'none'}")


def _hub_corpus(name):
    """The corpus of a name hub:OWNER/NAME[:CONFIG]:SPLIT."""
    found = HUB.fullmatch(name)
    if found is None:
        raise UsageError(f"{name}: should be hub:OWNER/NAME:SPLIT, or hub:OWNER/NAME:CONFIG:SPLIT")
    arguments = {key: found[key] for key in ("path", "name") if found[key]}
    return Corpus(":".join(arguments.values()), calib_splits=(found["split"],), eval_splits=(found["split"],), hub=lambda split: arguments)


def _file_names(corpus, split):
    return f"{corpus.folder}/{split}({'|'.join(SUFFIXES)})"


def _shared(one, other):
    """Whether two uses, (corpus, split, file) each, have text in common; two different slices of a split are taken to have none."""
    if one[2] or other[2]:
        return bool(one[2] and other[2]) and one[2].resolve() == other[2].resolve()
    (path, name, parts), (other_path, other_name, other_parts) = map(_hub_parts, (one, other))
    same = path == other_path and (name == other_name or None in (name, other_name))
    pairs = ((part, another) for part in parts for another in other_parts)
    return same and any(a == b or a[0] == b[0] and not (a[1] and b[1]) for a, b in pairs)


def _hub_parts(use):
    """(data set, configuration or None, [(split, its slice or "")]) of a text of the hub."""
    corpus, split, _ = use
    arguments = corpus.hub(split)
    return arguments["path"], arguments.get("name"), [part.partition("[")[::2] for part in split.split("+")]


# ---- reading it ----
def _read(name, corpus, split, file, field):
    """(rows: a sequence of str, source: where they come from, without local paths)."""
    rows, source = _read_file(corpus, file, field) if file else _read_hub(name, corpus, split, field)
    if not any(row.strip() for row in rows):
        raise UsageError(f"{name}: its {split} split is empty ({file or source}); use another corpus")
    return rows, source


def _read_hub(name, corpus, split, field):
    arguments = corpus.hub(split) | {"split": split}
    call = f"load_dataset({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    try:
        import datasets  # here: slow to import, and --data_dir does without

        table = datasets.load_dataset(**arguments)
        if corpus.field:
            return table[corpus.field], call
    except Exception as error:  # whatever the network, the hub or the cache raise, the way out is the same
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        way_out = f"without the hub use --data_dir DIR with {_file_names(corpus, split)} in DIR"
        if name.startswith("hub:"):
            way_out = "name a data set, configuration and split that are there, or use --data_dir"
        raise OSError(f"{name}: no {split} split from the hub; tried {call}; {reason}; {way_out}") from error
    rows = table[field] if field in table.column_names else ()
    return _texts(rows, table.column_names, field, name), f"{call}, column {field!r}"


def _texts(rows, columns, field, name):
    """The rows.  Raises UsageError if their column is not there, or, naming the row, for what is no text; name: where they are from."""
    if field not in columns:
        raise UsageError(f"{name}: no column {field!r}; its columns are {', '.join(map(str, columns))}; choose one with --text_field")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, str):
            raise UsageError(
                f"{name}, row {number}: no text in {field!r} but {row!r:.40}; take it out, or choose another with --text_field"
            )
    return rows


def _read_file(corpus, file, field):
    rows = FILES[file.suffix](file, corpus.row, field)
    return rows, file_source(file) + (f", field {field!r}" if field != "text" and file.suffix != ".txt" else "")


def file_source(file):
    """How a protocol names a file of --data_dir: folder, name and checksum, no path of this machine."""
    return f"{file.parent.name}/{file.name} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()})"


def read_rows(file, parse, whole=False):
    """[parse(line)] of a text file, which may be gzipped; whole: its one line is all of it.

    Raises UsageError, naming file and line, if it is broken or parse refuses a line.
    """
    rows = []
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig", newline="" if whole else None) as lines:
            for line in [lines.read()] if whole else lines:
                rows.append(parse(line))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{file}: broken gzip ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 ({error.reason}); convert it") from error
    except UsageError as error:
        raise UsageError(f"{file}{'' if whole else f', line {len(rows) + 1}'}: {error}") from error
    return rows


def parse_json(line):
    """What a line of a .jsonl file holds.  UsageError if it is not JSON, or not text."""
    try:
        found = json.loads(line)
        if "\\ud" in line.lower():  # an escape of JSON's can be half a character, which no tokenizer takes
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UsageError(f"not JSON ({error.msg} at {f'line {error.lineno}, ' * (error.lineno > 1)}column {error.colno})") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise UsageError(f"has {half}, half of a character (a lone surrogate); take it out") from error
    return found


def _text_of(field):
    """line -> the text in a field of the JSON object that it holds."""

    def parse(line):
        record = parse_json(line)
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise UsageError(f"no string field {field!r}" + (f"; its fields are {', '.join(record)}" if isinstance(record, dict) else ""))
        return record[field]

    return parse


def _read_json(file, _row, field):
    """An array of objects or of texts; or JSON lines, which many call .json too."""
    if not file.read_bytes().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return read_rows(file, _text_of(field))
    (records,) = read_rows(file, parse_json, whole=True)
    columns = (
        {field}
        if all(isinstance(record, str) for record in records)
        else dict.fromkeys(key for r in records if isinstance(r, dict) for key in r)
    )
    return _texts([record.get(field) if isinstance(record, dict) else record for record in records], columns, field, file)


def _read_csv(file, _row, field):
    """A table whose first line has the names of its columns."""
    csv.field_size_limit(2**31 - 1)  # the module's own is 128 KiB, and a document may be longer
    (text,) = read_rows(file, str, whole=True)
    table, rows = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        for row in table:
            if None in row:
                raise UsageError(f"{file}, line {table.line_num}: more cells than columns; put text with commas in quotes")
            rows.append(row.get(field))
    except csv.Error as error:
        raise UsageError(f"{file}, line {table.line_num}: not CSV ({error})") from error
    return _texts(rows, table.fieldnames or (), field, file)


def _read_parquet(file, _row, field):
    import pyarrow
    from pyarrow import parquet  # here: slow to import

    try:
        columns = parquet.read_schema(file).names
        rows = parquet.read_table(file, columns=[field])[field].to_pylist() if field in columns else ()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{file}: not a Parquet file that can be read ({' '.join(str(error).split())}); write it again") from error
    return _texts(rows, columns, field, file)


FILES = {  # suffix: (file, a corpus' function of a line of text, field) -> rows
    ".txt": lambda file, row, _field: read_rows(file, row),
    ".jsonl": lambda file, _row, field: read_rows(file, _text_of(field)),
    ".gz": lambda file, _row, field: read_rows(file, _text_of(field)),
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# ---- tokens ----
def _encoder(tokenizer):
    """text -> ids (n,).  Called plainly, as published; not verbose, since a text longer than the model's context is meant."""
    return lambda text: torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _require_windows(label, longest, distinct, n, seqlen, further):
    if longest <= seqlen:
        raise UsageError(f"{label}: its longest text has {longest} tokens, seqlen {seqlen} needs more; use a shorter seqlen or more text")
    if distinct < n + further:
        needed = f"{n} needed" + (f" and {further} more for --tune_steps" if further else "")
        raise UsageError(f"{label}: {distinct} distinct windows of {seqlen} tokens, {needed}; use a shorter seqlen, fewer or more text")
