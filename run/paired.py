"""Two models on the same items of tasks: the difference of their accuracies, and how sure it is."""

import math
import statistics


def paired(found, base, tasks, key="acc,none"):
    """The paired_difference of two models in a metric, as a mean over tasks; None where they do not both have the same number of items.

    found, base: what zero_shot returned of each, under one protocol; key: "metric,filter", as lm-eval names it.
    """
    pairs = [tuple(model.get("items", {}).get(task, {}).get(key, "") for model in (found, base)) for task in tasks]
    return paired_difference(pairs) if pairs and all(len(a) == len(b) > 0 for a, b in pairs) else None


def paired_difference(pairs):
    """(difference, its standard error or None) of the mean over tasks of the accuracies of two models that answered the same items.

    pairs: [(digits, digits)] of each task, "0110...": which items the one model and the other got right.

    With d_i the difference of an item, -1, 0 or 1, the standard error is sqrt(sum over tasks of var(d_i) / n_i) / number of tasks: that of
    a mean of n_i independent items, by their sample variance, and of the mean of independent tasks.  The two models' own errors do not give
    it: these are mostly of which items were drawn, and those are the same for both.  A task of one item has no variance: None.

    Source: E. Miller, Adding Error Bars to Evals, arXiv 2411.00640, on paired differences.
    """
    differences = [[int(a) - int(b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    value = statistics.fmean(map(statistics.fmean, differences))
    if min(map(len, differences)) < 2:
        return value, None
    return value, math.sqrt(sum(statistics.variance(d) / len(d) for d in differences)) / len(differences)
