"""What a run measured, as Markdown for the model cards of the folders that it wrote."""

from run.report import table, task_table

EXPORTED = "Computed by AWRQ before the export; what reads this format, as llama.cpp, may compute other numbers.\n\n"


def results_text(report):
    """The perplexities and tasks of a report with their protocol; "" if it has none."""
    runs = {"this model": report["results"]} | ({"unquantized": report["full"]} if report["full"] else {})
    protocol, parts = report["protocol"], []
    if report["results"]["perplexity"]:
        rows = [
            (corpus, label, f"{run['perplexity'][corpus]['ppl']:.4f}")
            for corpus in report["results"]["perplexity"]
            for label, run in runs.items()
        ]
        parts.append(table(("corpus", "model", "perplexity"), rows))
        parts += [f"- {perplexity_protocol(used, report['results']['perplexity'][name])}" for name, used in protocol["evaluation"].items()]
    if report["results"]["tasks"]:
        parts.append(task_table({label: run["tasks"] for label, run in runs.items() if run["tasks"]}, base="unquantized"))
        parts += [f"- {name}: {used['split']} of {used['source']}" for name, used in protocol["tasks"].items()]
    if not parts:
        return ""
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("torch", "transformers"))
    parts.append(f"Computed in {protocol['dtype']}; {protocol['arithmetic']}; {versions}.")
    return "\n\n".join(parts).replace("\n\n- ", "\n- ").replace("|\n- ", "|\n\n- ")


def perplexity_protocol(used, found):
    """On what a perplexity was measured, in a line.  used: its protocol; found: see evaluation.perplexity."""
    return f"{used['corpus']}: {used['split']}, {used['rule']}; {found['windows']} windows of {found['seqlen']} tokens; {used['source']}"
