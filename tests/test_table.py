"""scripts/table.py on made-up results: ours beside the published values, and nothing beside what it cannot be compared with."""

import json
import sys
import warnings
from pathlib import Path

import pytest

from recipe import PRESETS
from run.report import SCHEMA
from scripts import table

SCRIPTS = Path(__file__).parents[1] / "scripts"
pytestmark = pytest.mark.slow


def tables(folder, capsys):
    """What table.py prints: {corpus: {row: {column: cell}}}."""
    table.main(table.parser().parse_args([str(folder)]))
    found = {}
    for part in capsys.readouterr().out.split("### ")[1:]:
        corpus, *lines = part.splitlines()
        header, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|"))
        found[corpus] = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    return found


def fails(argv, monkeypatch, capsys):
    """The one line on stderr with which table.py exits."""
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, argv)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # run() changes it
    with pytest.raises(SystemExit) as exit:
        table.parser().run(table.main)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err


# ---------------------------------------------------------------------------
# Perplexity


def test_ours_beside_the_published(results, tmp_path, capsys):
    results("125m/full.json", "facebook/opt-125m", {"wikitext2": 27.6512, "ptb": 32.55, "c4": 24.61})
    results("125m/awrq.json", "/models/opt-125m/", {"wikitext2": 31.0, "ptb": 12345.6}, method="awrq", wbits=4, act_bits=8, smooth=True)
    results("mine/gptq.json", "mine", {"wikitext2": 30}, method="gptq", wbits=3, actorder=True, groupsize=128, alpha=0.7)
    found = tables(tmp_path / "opt", capsys)
    assert list(found) == ["wikitext2", "ptb", "c4"]
    wiki = found["wikitext2"]
    others = ["(22.00)", "(14.63)", "(12.47)", "(10.86)", "(10.13)", "(9.56)", "(9.34)"]
    assert list(wiki["full"].values()) == ["full", "27.65 (27.65)", *others, "–", "GPTQ paper, Table 3"]
    assert list(wiki["full"])[-2:] == ["mine", "published in"]
    assert wiki["awrq W4A8 + smoothing"]["opt-125m"] == "31.00" and wiki["awrq W4A8 + smoothing"]["published in"] == ""
    assert wiki["gptq W3A16, groupsize 128, actorder"]["mine"] == "30.00", "alpha is not used without smoothing"
    assert wiki["rtn W4A16"]["opt-66b"] == "(110)" and wiki["rtn W3A16"]["opt-1.3b"] == "(1.3e4)"
    assert found["ptb"]["full"]["opt-125m"] == "32.55 (32.54)", "the old protocol's, as ptb is"
    assert found["ptb"]["awrq W4A8 + smoothing"]["opt-125m"] == "1.2e+04"
    assert found["c4"]["full"]["opt-350m"] == "–" and "awrq W4A8 + smoothing" not in found["c4"]
    order = ["full", "rtn W4A16", "rtn W3A16", "gptq W4A16", "gptq W3A16", "awrq W4A8 + smoothing", "rptq W4A8"]
    assert [row for row in wiki if row in order] == order


def test_new_protocol_is_another_table(results, tmp_path, capsys):
    results("full.json", "facebook/opt-350m", {"ptb-new": 31.1, "ptb": 36.5})
    table.main(table.parser().parse_args([str(tmp_path / "opt")]))
    assert "- published values: new protocol: test split" in capsys.readouterr().out
    found = tables(tmp_path / "opt", capsys)
    assert found["ptb-new"]["full"]["opt-350m"] == "31.10 (31.08)" and found["ptb"]["full"]["opt-350m"] == "36.50"


def test_published_values_only_beside_windows_of_their_length(results, tmp_path, capsys):
    results("full.json", "facebook/opt-125m", {"wikitext2": 40}, seqlen=512)
    assert tables(tmp_path / "opt", capsys) == {
        "wikitext2": {"full": {"ours (published)": "full", "opt-125m": "40.00", "published in": ""}}
    }


def test_a_part_of_a_corpus_is_not_set_beside_the_published(results, tmp_path, monkeypatch, capsys):
    def part(run):
        run["protocol"]["evaluation"]["wikitext2"]["windows"] = "0 to 3"

    results("full.json", "facebook/opt-125m", {"wikitext2": 27.6}, part)
    error = fails([tmp_path / "opt"], monkeypatch, capsys)
    assert all(text in error for text in ("full.json", "windows 0 to 3 of wikitext2", "--eval_windows"))


def test_seeds_share_a_cell(results, tmp_path, monkeypatch, capsys):
    for seed, ppl in enumerate((20.0, 21.0, 24.0)):
        results(f"{seed}.json", "mine", {"own": ppl}, method="awrq", wbits=4, act_bits=8, seed=seed)
    table.main(table.parser().parse_args([str(tmp_path / "opt")]))
    text = capsys.readouterr().out
    assert "21.67 ± 2.00 (3)" in text and "- seeds: 0, 1, 2" in text
    results("again.json", "mine", {"own": 20.5}, method="awrq", wbits=4, act_bits=8, seed=1)
    assert "awrq W4A8 of mine again" in fails([tmp_path / "opt"], monkeypatch, capsys)


def test_an_unfinished_run_is_named(results, tmp_path, capsys):
    results("a.json", "mine", {"own": 20.0}, edit=lambda run: run.update(complete=False, failed={"piqa, full": "LookupError: gone"}))
    with pytest.warns(UserWarning, match="a.json: is unfinished .piqa, full: LookupError: gone."):
        table.main(table.parser().parse_args([str(tmp_path / "opt")]))


def test_models_may_have_different_tokenizers(results, tmp_path, capsys):
    results("a.json", "opt-125m", {"c4": 20})
    results("b.json", "mine", {"c4": 21}, edit=lambda run: run["protocol"]["evaluation"]["c4"].update(n_tokens=9999))
    assert tables(tmp_path / "opt", capsys)["c4"]["full"]["mine"] == "21.00"


# ---------------------------------------------------------------------------
# Tasks


@pytest.fixture
def task_results(results):
    """Call it to write a result of tasks: task_results(file, model, {task: (acc, acc_norm)}, recipe settings..., edit=...)."""

    def write(file, model, found, edit=lambda run: None, **settings):
        def with_tasks(run):
            rows = {
                task: {"alias": task, "acc,none": acc, "acc_stderr,none": 0.01}
                | ({"acc_norm,none": norm, "acc_norm_stderr,none": 0.02} if norm else {})
                for task, (acc, norm) in found.items()
            }
            run["results"]["tasks"] = {
                "results": rows,
                "versions": dict.fromkeys(found, 1.0),
                "n-shot": dict.fromkeys(found, 0),
                "config": {"limit": None},
                "lm_eval_version": "0.4.13",
            }
            run["protocol"]["tasks"] = {task: {"split": "validation", "source": "hub"} for task in found}
            run["model_type"] = "llama"
            edit(run)

        results(file, model, {}, with_tasks, **settings)

    return write


def test_tasks_of_a_model_beside_the_published(task_results, tmp_path, capsys):
    task_results("a.json", "huggyllama/llama-7b", {"piqa": (0.7812, 0.774), "copa": (0.84, None)}, method="full")
    task_results("b.json", "huggyllama/llama-7b", {"piqa": (0.77, 0.77)}, method="awrq", wbits=4, act_bits=8)
    task_results("c.json", "meta-llama/Llama-2-7b-hf", {"piqa": (0.77, 0.79)}, method="full")
    found = tables(tmp_path / "opt", capsys)
    assert list(found) == ["llama-7b, acc", "llama-7b, acc_norm", "Llama-2-7b-hf, acc", "Llama-2-7b-hf, acc_norm"]
    acc = found["llama-7b, acc"]
    assert acc["full"]["piqa"] == "78.12 ± 1.00 (78.18)" and acc["full"]["copa"] == "84.00 ± 1.00 (84.00)"
    assert acc["full"]["average"] == "81.06 ± 0.71" and acc["full"]["published in"].startswith("EleutherAI/lm-evaluation-harness")
    assert acc["awrq W4A8"]["piqa"] == "77.00 ± 1.00" and acc["awrq W4A8"]["copa"] == acc["awrq W4A8"]["average"] == "–"
    assert found["llama-7b, acc_norm"]["smoothquant W6A6"]["piqa"] == "(76.75)", "of which we have no run"
    assert found["Llama-2-7b-hf, acc_norm"]["full"]["piqa"] == "79.00 ± 2.00 (79.05)"
    assert found["Llama-2-7b-hf, acc_norm"]["qqq W4A8, groupsize 128"]["piqa"] == "(78.51)"


def items(**digits):
    return lambda run: run["results"]["tasks"].update(items={task: {"acc,none": text} for task, text in digits.items()})


def test_the_average_beside_that_of_full_on_the_same_items(task_results, tmp_path, capsys):
    accuracies = {"piqa": (0.75, 0.7), "copa": (0.5, None)}
    awrq = {"method": "awrq", "wbits": 4, "act_bits": 8}
    task_results("full.json", "mine", accuracies, items(piqa="1110", copa="10"), method="full")
    task_results("a.json", "mine", accuracies, items(piqa="1100", copa="01"), **awrq)
    task_results("b.json", "mine", accuracies, items(piqa="1100", copa="011"), **awrq, groupsize=128)
    task_results("c.json", "mine", accuracies, **awrq, groupsize=64)
    task_results("d.json", "mine", {"piqa": (0.75, 0.7)}, items(piqa="1100"), method="gptq", wbits=4)
    task_results("e.json", "mine", accuracies, items(piqa="1111", copa="10"), method="rtn", wbits=4, act_bits=8)
    found = tables(tmp_path / "opt", capsys)
    cells = {name: row["average - full"] for name, row in found["mine, acc"].items()}
    error = 100 * (0.25 / 4 + 2 / 2) ** 0.5 / 2  # d is 0 0 -1 0 and -1 1
    assert cells.pop("awrq W4A8") == f"-12.50 ± {error:.2f}" and cells.pop("rtn W4A8").startswith("+12.50 ± ")
    assert len(cells) == 4 and set(cells.values()) == {"–"}, "other numbers of items, no items, other tasks, and full itself"
    assert "average - full" not in found["mine, acc_norm"]["full"], "of which there are no items"


# ---------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda run: run["protocol"]["tasks"]["piqa"].update(source="local"), ["piqa source", "local", "hub"]),
        (lambda run: run["results"]["tasks"]["n-shot"].update(piqa=5), ["piqa shots", "5"]),
        (lambda run: run["results"]["tasks"]["versions"].update(piqa=2.0), ["piqa version", "2.0"]),
        (lambda run: run["results"]["tasks"]["config"].update(limit=10), ["limit", "10"]),
        (lambda run: run["results"]["tasks"].update(lm_eval_version="0.5"), ["lm_eval", "0.5"]),
        (lambda run: run["protocol"].update(dtype="float32"), ["dtype", "float32"]),
        (lambda run: run["recipe"].update(method="full", wbits=16, act_bits=16), ["full of llama-7b again"]),
    ],
)
def test_protocols_of_tasks_are_not_mixed(task_results, tmp_path, monkeypatch, capsys, edit, parts):
    task_results("a.json", "llama-7b", {"piqa": (0.7, 0.7)}, method="full")
    task_results("b.json", "llama-7b", {"piqa": (0.6, 0.6)}, edit, method="rtn", wbits=4, act_bits=8)
    err = fails([tmp_path / "opt"], monkeypatch, capsys)
    assert "b.json" in err and all(part in err for part in parts), err


@pytest.mark.parametrize("first", [False, True])
def test_windows_of_one_run_only_are_another_protocol(results, tmp_path, monkeypatch, capsys, first):
    def part(run):
        run["protocol"]["evaluation"]["own"]["windows"] = "0 to 3"

    results("a.json", "mine", {"own": 20.0}, edit=part if first else lambda run: None)
    results("b.json", "mine", {"own": 21.0}, method="rtn", wbits=4, act_bits=8, edit=lambda run: None if first else part(run))
    assert "windows" in fails([tmp_path / "opt"], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(("calibration", key, value) for key, value in (("source", "local"), ("nsamples", 64), ("seqlen", 512), ("corpus", "ptb"))),
        *(("evaluation", key, value) for key, value in (("source", "local"), ("rule", "other"), ("seqlen", 512), ("n_tokens", 8999))),
        ("dtype", "dtype", "float32"),
    ],
)
def test_protocols_are_not_mixed(results, tmp_path, monkeypatch, capsys, part, key, value):
    def edit(run):
        protocol = run["protocol"]
        {"calibration": protocol["calibration"], "evaluation": protocol["evaluation"]["c4"], "dtype": protocol}[part][key] = value

    results("a.json", "opt-125m", {"c4": 20})
    results("b.json", "opt-125m", {"c4": 21}, method="rtn", wbits=4, act_bits=8)
    results("c.json", "opt-125m", {"c4": 22}, method="gptq", wbits=4, edit=edit)
    err = fails([tmp_path / "opt"], monkeypatch, capsys)
    assert "c.json" in err and key in err and f" is {value}, but" in err


def test_as_many_steps_of_tuning_had_as_many_windows(results, tmp_path, monkeypatch, capsys):
    """Other numbers of steps may have others; earlier versions tuned on the windows of the codes."""

    def tuned(samples):
        return lambda run: run["protocol"]["calibration"].update(tune_samples=samples)

    awrq = {"method": "awrq", "wbits": 4, "act_bits": 8}
    results("a.json", "opt-125m", {"c4": 20}, **awrq)
    results("b.json", "opt-125m", {"c4": 21}, tune_steps=4, edit=tuned(8), **awrq)
    results("c.json", "opt-125m", {"c4": 22}, tune_steps=8, edit=tuned(16), **awrq)
    rows = tables(tmp_path / "opt", capsys)["c4"]
    assert [rows[f"awrq W4A8{name}"]["opt-125m"] for name in ("", ", tune_steps 4", ", tune_steps 8")] == ["20.00", "21.00", "22.00"]
    results("d.json", "opt-125m", {"c4": 23}, tune_steps=8, seed=1, **awrq)
    err = fails([tmp_path / "opt"], monkeypatch, capsys)
    assert "d.json" in err and "tune_samples of 8 steps is those of the codes, but 16" in err


def test_bad_input_is_one_line(results, tmp_path, monkeypatch, capsys):
    assert "no *.json there" in fails([tmp_path / "nowhere"], monkeypatch, capsys)
    results("a.json", "opt-125m", {"c4": 20})
    results("b/a.json", "facebook/opt-125m", {"c4": 20})
    err = fails([tmp_path / "opt"], monkeypatch, capsys)
    assert "a.json" in err and "b/a.json" in err and "full of opt-125m again" in err
    for content, expected in (
        ("{", "not JSON"),
        ("\ufeff", "not JSON"),
        ("[]", "schema is None"),
        (json.dumps({"schema": SCHEMA + 1}), f"schema is {SCHEMA + 1}"),
    ):
        (tmp_path / "opt/b/a.json").write_text(content)
        err = fails([tmp_path / "opt"], monkeypatch, capsys)
        assert "b/a.json" in err and expected in err


# ---------------------------------------------------------------------------
# The ablation, and what is committed


def test_the_table_of_the_ablation(results, tmp_path, capsys):
    plus = {"method": "awrq", "wbits": 3, "act_bits": 8, **PRESETS["plus"]}

    def took(seconds, mebibytes):
        def edit(run):
            run["seconds"], run["peak_bytes"] = {"solving": seconds, "evaluation": 7}, {"host": 1, "device": mebibytes * 2**20}

        return edit

    for seed, published, ours in ((0, 8.0, 6.0), (1, 8.2, 6.4)):
        paper = {"method": "awrq", "wbits": 3, "act_bits": 8}
        results(f"m/w3a8-paper-{seed}.json", "/a/m", {"report": published}, took(2, 100), seed=seed, **paper)
        results(f"m/w3a8-plus-{seed}.json", "/a/m", {"report": ours}, took(3 + seed, 100 + 20 * seed), seed=seed, **plus)
    results("m/full.json", "/a/m", {"report": 5.0}, method="full")
    file = tmp_path / "compact.json"
    first = table.ablation([tmp_path / "opt"], file)
    times = [["", "median", "from, to", "pairs"], ["awrq, plus", "1.8", "1.5 to 2.0", "2"]]
    assert table.ablation([file]) == first and "/a/m" not in file.read_text()
    assert "the GPU's peak memory is at most 20 MiB larger with plus" in first
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines() if line.startswith("| ")]
    assert rows == [["", "W3A8"], ["awrq", "8.100 ± 0.100 (2)"], ["awrq, plus", "6.200 ± 0.200 (2)"], *times]
    assert "- the full model: 5.000" in first and "- W3A8: awrq, plus closes 61 % of 3.100 that awrq loses" in first


def test_the_committed_table_is_of_the_committed_numbers():
    results = SCRIPTS.parent / "results"
    assert table.ablation([results / "ablation.json"]) in (results / "ablation.md").read_text(encoding="utf-8")


def test_published_values_have_sources():
    for family in json.loads((SCRIPTS / "published.json").read_text()).values():
        for corpus in family.get("perplexity", {}).values():
            assert corpus["evaluation"]
            for row in corpus["rows"]:
                assert row["source"] and row["recipe"].keys() <= table.DEFAULTS.keys() and len(row["ppl"]) == len(family["models"])
                assert all(value is None or value > 9 for value in row["ppl"])
        for tasks in family.get("tasks", []):
            assert tasks["evaluation"]
            for row in tasks["rows"]:
                assert row["source"] and row["model"] and row["recipe"].keys() <= table.DEFAULTS.keys()
                assert all(20 < value < 100 for metric in table.METRICS for value in row.get(metric, {}).values())
