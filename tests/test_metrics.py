"""kit.metrics against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kit.metrics import accuracy, accuracy_at_k, average_precision, bootstrap, map_at_k, mcrmse, rmse


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties and some NaN, and targets."""
    shape = draw(st.tuples(st.integers(1, 8), st.integers(2, 7)))
    values = draw(arrays(np.float32, shape, elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1e-8, math.nan, math.inf, -math.inf])))
    return values, draw(arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))


def ranking(row: np.ndarray) -> list[int]:
    """Options best first: python's stable sort, NaN as the lowest score."""
    return sorted(range(len(row)), key=lambda option: -(row[option] if not math.isnan(row[option]) else -math.inf))


@given(scored(), st.integers(1, 8))
def test_map_at_k_equals_a_plain_loop(case: tuple[np.ndarray, np.ndarray], k: int) -> None:
    prediction, targets = case
    total = 0.0
    for row, target in zip(prediction, targets, strict=True):
        for rank, option in enumerate(ranking(row)[:k], 1):
            if option == target:
                total += 1 / rank
    assert map_at_k(prediction, targets, k) == pytest.approx(total / len(targets))


@given(scored(), st.integers(1, 8))
def test_accuracy_at_k_equals_a_plain_loop(case: tuple[np.ndarray, np.ndarray], k: int) -> None:
    prediction, targets = case
    hits = [target in ranking(row)[:k] for row, target in zip(prediction, targets, strict=True)]
    assert accuracy_at_k(prediction, targets, k) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize(("target", "points"), [(0, 1.0), (1, 1 / 2), (2, 1 / 3), (3, 0.0), (4, 0.0)])
def test_ranks_one_to_three_score_and_later_ones_do_not(target: int, points: float) -> None:
    assert average_precision(np.array([[5, 4, 3, 2, 1]]), np.array([target])).tolist() == [points]


def test_equal_scores_rank_in_option_order() -> None:
    assert average_precision(np.zeros((5, 5)), np.arange(5)).tolist() == [1, 1 / 2, 1 / 3, 0, 0]


def test_a_nan_score_ranks_after_every_number() -> None:
    prediction = np.array([[np.nan, -9.0, -10.0]] * 3)
    assert average_precision(prediction, np.array([0, 1, 2])).tolist() == [1 / 3, 1, 1 / 2]


def test_a_row_that_nobody_scored_counts_in_option_order() -> None:
    assert average_precision(np.full((2, 5), np.nan), np.array([0, 4])).tolist() == [1, 0]


def test_fewer_options_than_k_are_ranked_all() -> None:
    assert map_at_k(np.array([[0.1, 0.9]]), np.array([0])) == 0.5


def test_accuracy_counts_best_options() -> None:
    prediction = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [3.0, 1.0]])
    assert accuracy(prediction, np.array([1, 1, 1, 1])) == 0.5


def test_a_row_without_a_right_option_is_refused() -> None:
    with pytest.raises(AssertionError, match="row 1 has no right option"):
        map_at_k(np.zeros((2, 5)), np.array([0, -1]))


def mean_of(prediction: np.ndarray, targets: np.ndarray) -> float:
    """A metric whose sampling distribution is known."""
    return float(prediction.mean())


def test_the_interval_covers_the_true_mean_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    true_mean = 0.5 * 1.0 + 0.2 * 0.5
    samples = rng.choice([1.0, 0.5, 0.0], size=(300, 120), p=[0.5, 0.2, 0.3])
    estimates = [bootstrap(mean_of, sample, sample, draws=200) for sample in samples]
    covered = np.mean([estimate.low <= true_mean <= estimate.high for estimate in estimates])
    assert 0.91 <= covered <= 0.985  # 95 % ± three standard errors of 300 trials, less the percentile method's small bias


def test_the_standard_error_is_that_of_the_mean_and_the_interval_four_of_them_wide() -> None:
    values = np.random.default_rng(1).random(400)
    estimate = bootstrap(mean_of, values, values, draws=2000)
    known = values.std(ddof=1) / math.sqrt(400)
    assert estimate.value == values.mean()
    assert estimate.se == pytest.approx(known, rel=0.06)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * known, rel=0.08)
    assert estimate.low < estimate.value < estimate.high


def test_predictions_and_targets_are_drawn_together() -> None:
    targets = np.random.default_rng(0).integers(0, 5, 200)
    perfect = np.eye(5)[targets]
    assert bootstrap(map_at_k, perfect, targets, draws=50) == (1.0, 0.0, 1.0, 1.0)


def test_the_estimate_is_repeatable_and_depends_on_the_seed() -> None:
    values = np.random.default_rng(1).random(50)
    assert bootstrap(mean_of, values, values) == bootstrap(mean_of, values, values)
    assert bootstrap(mean_of, values, values).low != bootstrap(mean_of, values, values, seed=1).low


def test_one_row_has_no_spread() -> None:
    assert bootstrap(mean_of, np.array([0.5]), np.array([0])) == (0.5, 0.0, 0.5, 0.5)


_grades = arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.sampled_from([1.0, 1.5, 3.0, 4.5, 5.0]))


@given(_grades, st.integers(0, 99))
def test_mcrmse_equals_a_plain_loop(targets: np.ndarray, seed: int) -> None:
    prediction = np.random.default_rng(seed).uniform(0, 6, targets.shape).astype(np.float32)
    rows, columns = targets.shape
    each = [math.sqrt(math.fsum((float(prediction[n, k]) - float(targets[n, k])) ** 2 for n in range(rows)) / rows) for k in range(columns)]
    assert rmse(prediction, targets).tolist() == pytest.approx(each, abs=1e-12)
    assert mcrmse(prediction, targets) == pytest.approx(math.fsum(each) / columns, abs=1e-12)
    assert mcrmse(targets, targets) == 0.0


def test_mcrmse_of_the_mean_is_the_mean_deviation() -> None:
    targets = np.random.default_rng(0).normal(3, 0.65, (500, 6))
    assert mcrmse(np.broadcast_to(targets.mean(0), targets.shape), targets) == pytest.approx(targets.std(0).mean(), abs=1e-12)
