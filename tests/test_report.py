"""A report is whole, says where it is from, and has no NaN; its tables are Markdown."""

import json
import math

from conftest import recipe_of, tiny_model

import opt
from modelutils import decoder_of
from recipe import Recipe
from run.publish import results_text
from run.quantize import Layer
from run.report import SCHEMA, accuracies, average, describe, table, task_table
from run.report import report as make_report
from runtime import Clock

KEYS = {
    "schema",
    "model",
    "model_type",
    "recipe",
    "protocol",
    "results",
    "full",
    "layers",
    "tuning",
    "failed",
    "seconds",
    "peak_bytes",
    "versions",
    "commit",
    "hardware",
}


def run_report(line="--method awrq --wbits 4 --smooth"):
    clock = Clock("cpu")
    with clock("evaluation"):
        pass
    recipe = recipe_of(opt, line, 64)
    calibration = {"nsamples": 3, "seqlen": 64, "corpus": "c4", "split": "train", "seed": 0, "source": "there", "rule": "random"}
    protocol = {"calibration": calibration if recipe.method != "full" else None, "evaluation": {"ptb": {}}}
    results = {"perplexity": {"ptb": {"ppl": 12.5, "windows": 2, "seqlen": 64, "tokens": 128}}, "tasks": {}}
    found = {"model": "a/model", "protocol": protocol, "walk_batch": 1, "results": results, "full": None}
    found |= {"tuning": [], "failed": {}, "commit": "c0ffee"}
    found["layers"] = [Layer(0, "fc1", 0.25), Layer(1, "fc2", 0.5)]
    return make_report(recipe, decoder_of(tiny_model()), found, clock), recipe


def test_a_report_has_everything_and_goes_through_json():
    run, recipe = run_report()
    assert set(run) == KEYS
    assert json.loads(json.dumps(run, allow_nan=False)) == run
    assert run["schema"] == SCHEMA and run["model"] == "a/model" and run["model_type"] == "opt"
    assert Recipe(**run["recipe"]) == recipe
    assert run["protocol"]["dtype"] == "float32" and {"calibration", "evaluation", "walk_batch"} < set(run["protocol"])
    assert run["results"] == {"perplexity": {"ptb": {"ppl": 12.5, "windows": 2, "seqlen": 64, "tokens": 128}}, "tasks": {}}
    assert run["layers"] == [{"block": 0, "name": "fc1", "error": 0.25}, {"block": 1, "name": "fc2", "error": 0.5}]
    assert set(run["seconds"]) == {"evaluation"}
    assert set(run["peak_bytes"]) == {"host", "device"} and 2**24 < run["peak_bytes"]["host"] < 2**44
    assert run["peak_bytes"]["device"] is None
    assert run["hardware"]["device"] == "cpu" and run["hardware"]["gpu"] is None and run["hardware"]["threads"] > 0


def test_what_is_printed_under_the_table():
    run, _ = run_report()
    text = describe(run)
    for part in ("a/model: awrq, W4A8, group -1, float32", "smooth", "3 x 64 tokens of c4 train, seed 0", "evaluation 0.0", "host"):
        assert part in text, text
    assert "calibrated" not in describe(run_report("--method full")[0])
    assert "calibrated" not in describe(run_report("--method rtn --wbits 4")[0])


def test_table():
    assert table(("corpus", "perplexity"), [("wikitext2", 5.5), ("c4", "10.25")]).split("\n") == [
        "| corpus    | perplexity |",
        "|-----------|-----------:|",
        "| wikitext2 |        5.5 |",
        "| c4        |      10.25 |",
    ]
    assert table(("a", "b"), []).split("\n") == ["| a | b |", "|---|--:|"]


# ---------------------------------------------------------------------------
# Tasks


def made_up(copa, piqa):
    return {
        "results": {
            "copa": {"alias": "copa", "sample_len": 9, "acc,none": copa, "acc_stderr,none": 0.03},
            "piqa": {"alias": "piqa", "acc,none": piqa, "acc_stderr,none": 0.04, "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A"},
        },
        "n-shot": {"copa": 0, "piqa": 0},
    }


def test_the_table_of_tasks():
    runs = {"full": made_up(0.75, 0.25), "awrq W4A8": made_up(0.5, 0.25)}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in task_table(runs).splitlines()]
    assert lines[0] == ["task", "shots", "metric", "model", "value", "stderr"]
    assert lines[2] == ["copa", "0", "acc", "full", "0.7500", "0.0300"]
    assert lines[3] == ["copa", "0", "acc", "awrq W4A8", "0.5000", "0.0300"]
    assert ["piqa", "0", "acc_norm", "full", "0.5000", ""] in lines
    assert lines[-2:] == [["average", "", "acc", "full", "0.5000", "0.0250"], ["average", "", "acc", "awrq W4A8", "0.3750", "0.0250"]]


def test_averages_of_other_tasks_are_not_set_beside_each_other():
    whole = made_up(0.5, 0.25)
    lost = whole | {"results": {"copa": whole["results"]["copa"]}}
    assert "average" in task_table({"full": whole}) and "average" not in task_table({"full": whole, "awrq W4A8": lost})


def with_items(found, **items):
    return found | {"items": {task: {"acc,none": digits} for task, digits in items.items()}}


def cells_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_differences_from_the_full_model_are_paired():
    full, ours = with_items(made_up(0.75, 0.25), copa="1110", piqa="0001"), with_items(made_up(0.5, 0.25), copa="1100", piqa="1000")
    error = math.sqrt(0.25 / 4), math.sqrt(2 / 3 / 4)  # d is 0 0 -1 0 and 1 0 0 -1
    rows = cells_of(task_table({"full": full, "awrq W4A8": ours}))
    assert rows[-3:] == [
        ["copa", "0", "acc", "awrq W4A8 - full", "-0.2500", f"{error[0]:.4f}"],
        ["piqa", "0", "acc", "awrq W4A8 - full", "+0.0000", f"{error[1]:.4f}"],
        ["average", "", "acc", "awrq W4A8 - full", "-0.1250", f"{math.hypot(*error) / 2:.4f}"],
    ]
    assert rows[:-3] == cells_of(task_table({"full": made_up(0.75, 0.25), "awrq W4A8": made_up(0.5, 0.25)})), "results without items"
    named = cells_of(task_table({"this model": ours, "unquantized": full}, base="unquantized"))
    assert named[-1] == ["average", "", "acc", "this model - unquantized", *rows[-1][4:]]


def test_a_task_that_failed_for_one_model_is_in_no_difference():
    full, ours = with_items(made_up(0.75, 0.25), copa="1110", piqa="0001"), with_items(made_up(0.5, 0.25), copa="1100")
    del ours["results"]["piqa"]
    assert [row[0] for row in cells_of(task_table({"full": full, "awrq W4A8": ours})) if row[3] == "awrq W4A8 - full"] == ["copa"]


def test_a_model_card_of_tasks_that_all_failed_for_the_unquantized_model():
    report, _ = run_report()
    report["results"] = {"perplexity": {}, "tasks": made_up(0.5, 0.25)}
    report |= {"full": {"perplexity": {}, "tasks": {}}, "versions": {"torch": "2", "transformers": "5"}}
    report["protocol"] |= {"tasks": {}, "arithmetic": "exact"}
    text = results_text(report)
    assert "this model" in text and "unquantized" not in text


def test_a_metric_after_several_filters_is_told_apart():
    found = {"results": {"sums": {"exact_match,strict": 0.25, "exact_match,flexible": 0.5}}, "n-shot": {}}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in task_table({"full": found}).splitlines()[2:]]
    assert [row[2:5] for row in rows] == [["exact_match (strict)", "full", "0.2500"], ["exact_match (flexible)", "full", "0.5000"]]


def test_the_average_leaves_out_groups_and_unknown_errors():
    found = made_up(0.5, 0.25) | {"groups": {"copa": {}}}
    assert accuracies(found) == {"piqa": (0.25, 0.04)} and accuracies(found, "acc_norm") == {"piqa": (0.5, None)}
    assert average([(0.5, 0.1), (1.0, None)]) == (0.75, None)
