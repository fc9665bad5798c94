"""Differences of two models on the same items, against slow obvious computations."""

import itertools
import random
import statistics

import pytest

from run.paired import paired, paired_difference


def test_by_hand():
    assert paired_difference([("1100", "1111")]) == (-0.5, pytest.approx((1 / 3 / 4) ** 0.5))  # d is 0 0 -1 -1
    assert paired_difference([("0101", "0101")]) == (0, 0), "models that answer alike are alike, however hard the items"
    assert paired_difference([("1100", "1111"), ("11", "00")]) == (0.25, pytest.approx((1 / 3 / 4) ** 0.5 / 2))
    assert paired_difference([("1", "0")]) == (1, None), "one item has no variance"


def test_the_error_is_the_spread_of_the_difference_over_draws_of_the_items():
    """All draws with replacement of small tasks: their spread, times n / (n - 1) of a sample variance, is what the formula gives."""
    pairs = [("1101", "1010"), ("110", "011")]
    means = []
    for task in pairs:
        items = list(zip(*task, strict=True))
        draws = itertools.product(items, repeat=len(items))
        means.append([statistics.fmean(int(a) - int(b) for a, b in draw) for draw in draws])
    expected = sum(statistics.pvariance(drawn) * len(task[0]) / (len(task[0]) - 1) for drawn, task in zip(means, pairs, strict=True))
    assert paired_difference(pairs)[1] ** 2 == pytest.approx(expected / len(pairs) ** 2)
    whole = [statistics.fmean(draw) for draw in itertools.product(*means)]  # independent tasks
    assert statistics.fmean(whole) == pytest.approx(paired_difference(pairs)[0])


def test_it_is_far_below_what_independent_models_would_have():
    draw = random.Random(0)
    full = [draw.random() < 0.6 for _ in range(1000)]
    ours = [value != (draw.random() < 0.02) for value in full]
    pair = ["".join("01"[value] for value in model) for model in (ours, full)]
    value, error = paired_difference([pair])
    alone = sum(statistics.variance(map(int, model)) / 1000 for model in pair) ** 0.5
    assert abs(value) < 0.02 and error < alone / 4


@pytest.mark.parametrize(
    "base",
    [
        {},
        {"items": {}},
        {"items": {"a": {"acc,none": "01"}}},
        {"items": {"a": {"acc,none": "01"}, "b": {"acc_norm,none": "011"}}},
        {"items": {"a": {"acc,none": "01"}, "b": {"acc,none": "01"}}},
        {"items": {"a": {"acc,none": ""}, "b": {"acc,none": "011"}}},
    ],
)
def test_what_is_not_of_the_same_items_is_not_paired(base):
    found = {"items": {"a": {"acc,none": "11"}, "b": {"acc,none": "111"}}}
    assert paired(found, base, ["a", "b"]) is None and paired(base, found, ["a", "b"]) is None and paired(found, found, []) is None
    assert paired(found, found, ["a", "b"]) == (0, 0)
