"""Bootstrap means and differences against what must hold for any bootstrap."""

import time

import numpy as np
import pytest

from loragen_agents.bench.statistics import means, paired_differences, timing


def test_mean_and_interval_agree_with_the_normal_approximation() -> None:
    values = np.random.default_rng(0).random(400).tolist()
    mean = means({"x": values})["x"]
    half = 1.96 * np.std(values) / np.sqrt(400)
    assert mean.value == pytest.approx(np.mean(values))
    assert mean.low == pytest.approx(mean.value - half, abs=0.005)
    assert mean.high == pytest.approx(mean.value + half, abs=0.005)
    assert mean.n == 400


def test_same_values_same_interval() -> None:
    assert means({"x": [0.0, 1.0, 1.0]}) == means({"x": [0.0, 1.0, 1.0]})


def test_equal_values_have_no_spread_and_none_have_no_mean() -> None:
    mean = means({"x": [0.25] * 7})["x"]
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.25, 0.25, 0.25))
    empty = means({"x": []})["x"]
    assert empty.n == 0 and np.isnan(empty.value)


def test_pairing_finds_a_difference_that_the_intervals_hide() -> None:
    base = np.random.default_rng(1).random(200)
    a, b = base.tolist(), (base + 0.02).tolist()
    alone = means({"a": a, "b": b})
    assert alone["a"].high > alone["b"].low
    difference = paired_differences({"x": a}, {"x": b})["x"]
    assert difference.value == pytest.approx(0.02) and difference.low > 0 and difference.p == 0


def test_equal_columns_differ_by_nothing() -> None:
    difference = paired_differences({"x": [1.0, 0.0, 1.0]}, {"x": [1.0, 0.0, 1.0], "y": [1.0]})
    assert list(difference) == ["x"]
    assert difference["x"].value == 0 and difference["x"].p == 1


def test_unpaired_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values on one side and 1 on the other"):
        paired_differences({"x": [1.0, 0.0]}, {"x": [1.0]})


def test_timing() -> None:
    result = timing([float(n) for n in range(1, 102)])
    assert result is not None and (result.median, result.p95, result.n) == (51, 96, 101)
    assert timing([]) is None


def test_bootstrap_of_a_whole_test_set_is_quick() -> None:
    columns = {str(n): np.random.default_rng(n).random(652).tolist() for n in range(6)}
    start = time.perf_counter()
    means(columns)
    assert time.perf_counter() - start < 2
