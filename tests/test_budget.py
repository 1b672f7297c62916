"""kit.budget with a clock that is moved by hand."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import psutil
import pytest

from kit.budget import NINE_HOURS_S, Budget, Cost, seconds_since_process_start
from kit.errors import BudgetError


@dataclass
class Clock:
    """A monotonic clock that stands still until moved."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("total_s", "reserve_s"),
    [(NINE_HOURS_S, 972.0), (2000.0, 60.0), (2001.0, 60.03), (120.0, 60.0), (119.0, 59.5), (1.0, 0.5)],
)
def test_the_reserve_is_three_percent_at_least_a_minute_at_most_half(total_s: float, reserve_s: float) -> None:
    assert Budget(total_s, used_s=0).reserve_s == pytest.approx(reserve_s)


def test_remaining_counts_down_to_the_reserve_and_below_zero() -> None:
    clock = Clock()
    budget = Budget(100, reserve_s=10, used_s=0, clock=clock)
    assert (budget.elapsed(), budget.remaining()) == (0, 90)
    clock.now += 85
    assert (budget.elapsed(), budget.remaining()) == (85, 5)
    clock.now += 10
    assert budget.remaining() == -5


def test_time_used_before_the_budget_was_made_counts() -> None:
    budget = Budget(100, reserve_s=10, used_s=30, clock=Clock())
    assert (budget.elapsed(), budget.remaining()) == (30, 60)


def test_without_used_seconds_the_clock_starts_with_the_process() -> None:
    budget = Budget(NINE_HOURS_S)
    assert budget.elapsed() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.0)
    assert seconds_since_process_start() > 0


def test_it_affords_what_ends_before_the_reserve() -> None:
    clock = Clock()
    budget = Budget(100, reserve_s=10, used_s=0, clock=clock)
    clock.now += 40
    assert budget.affords(50)
    assert not budget.affords(50.001)
    clock.now += 51
    assert not budget.affords(0)


def test_no_reserve_may_be_asked_for() -> None:
    assert Budget(100, reserve_s=0, used_s=0, clock=Clock()).remaining() == 100


@pytest.mark.parametrize("total_s", [0, -1, float("nan")])
def test_a_budget_that_is_not_positive_is_refused(total_s: float) -> None:
    with pytest.raises(BudgetError, match="give a positive number of seconds"):
        Budget(total_s)


@pytest.mark.parametrize("reserve_s", [-1, 100, 200])
def test_a_reserve_that_does_not_fit_is_refused(reserve_s: float) -> None:
    with pytest.raises(BudgetError, match=f"reserve of {reserve_s} s does not fit into a budget of 100 s"):
        Budget(100, reserve_s=reserve_s)


def test_measure_adds_up_by_label() -> None:
    clock = Clock()
    budget = Budget(100, used_s=0, clock=clock)
    for label, seconds in [("load", 3), ("score", 5), ("load", 4)]:
        with budget.measure(label):
            clock.now += seconds
    assert budget.measured == {"load": 7, "score": 5}


def test_measure_counts_work_that_failed() -> None:
    clock = Clock()
    budget = Budget(100, used_s=0, clock=clock)
    with pytest.raises(RuntimeError), budget.measure("score"):
        clock.now += 2
        raise RuntimeError
    assert budget.measured == {"score": 2}


def test_two_budgets_share_no_measurements() -> None:
    first, second = Budget(100, used_s=0), Budget(100, used_s=0)
    with first.measure("load"):
        pass
    assert second.measured == {}


def test_a_guessed_cost_is_right_within_its_spread() -> None:
    forecast = Cost(2.0, spread=3.0).forecast(10)
    assert forecast == pytest.approx((20 / 3, 20, 60))
    assert Cost(2.0).forecast(0) == (0, 0, 0)


def test_the_first_measurement_all_but_replaces_the_guess_and_the_interval_shrinks() -> None:
    cost, widths = Cost(1.0), []
    for _ in range(8):
        forecast = cost.forecast()
        widths.append(forecast.high / forecast.low)
        cost.update(5.0, 10)
    assert cost.measurements == 8
    assert cost.forecast().mid == pytest.approx(0.5, rel=0.01)
    assert widths[0] > widths[1] > widths[-1]
    fresh = Cost(1.0)
    fresh.update(5.0, 10)
    assert fresh.forecast().mid == pytest.approx(0.5, rel=0.1)


def test_ninety_percent_of_what_comes_lies_in_the_interval() -> None:
    rng, cost, inside = np.random.default_rng(0), Cost(1.0), []
    for _ in range(600):
        seconds = float(np.exp(rng.normal(0, 0.3)))
        forecast = cost.forecast()
        inside.append(forecast.low <= seconds <= forecast.high)
        cost.update(seconds, 1)
    assert 0.82 < np.mean(inside) < 0.97
    assert cost.forecast().mid == pytest.approx(1.0, rel=0.35)


@pytest.mark.parametrize("factor", [0.2, 4.0])
def test_a_machine_that_changes_is_followed_at_once(factor: float) -> None:
    cost = Cost(1.0)
    for _ in range(20):
        cost.update(1.0, 1)
    cost.update(factor, 1)
    assert cost.forecast().mid == pytest.approx(factor, rel=0.1)


def test_a_change_is_told_from_noise() -> None:
    rng, cost = np.random.default_rng(0), Cost(1.0)
    for _ in range(60):
        cost.update(float(np.exp(rng.normal(0, 0.25))), 1)
    cost.update(8.0, 1)
    assert cost.forecast().mid == pytest.approx(8.0, rel=0.3)


def test_one_slow_order_does_not_upset_a_known_cost_for_long() -> None:
    cost = Cost(1.0)
    for seconds in [1.0] * 20 + [1.3] + [1.0] * 5:
        cost.update(seconds, 1)
    assert cost.forecast().mid == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("seconds", "units"), [(0, 1), (1, 0), (-1, 1), (1, -1)])
def test_measurements_that_mean_nothing_are_ignored(seconds: float, units: float) -> None:
    cost = Cost(1.0)
    cost.update(seconds, units)
    assert (cost.measurements, cost.forecast().mid) == (0, pytest.approx(1.0))
