"""Gain curves, on a blend whose sources are known."""

from __future__ import annotations

import numpy as np
import pytest

from kit.inference.gains import NOTHING, Gains
from kit.tasks.multiple_choice import MultipleChoice

TASK = MultipleChoice()
ROWS = 400


class TwoSources:
    """The sure half of the rows is right with "weak" already; "strong" is right everywhere."""

    names = ("weak", "strong")

    def __init__(self) -> None:
        self.targets = np.random.default_rng(0).integers(0, 5, ROWS)
        self.asked: list[frozenset[str]] = []
        right = np.eye(5, dtype=np.float32)[self.targets]
        wrong = np.eye(5, dtype=np.float32)[(self.targets + 1) % 5]
        sure = (np.arange(ROWS) % 2 == 0)[:, None]
        self.predictions = {
            frozenset({"weak"}): np.where(sure, 0.9 * right + 0.02, 0.1 * wrong + 0.18).astype(np.float32),
            frozenset({"strong"}): (0.9 * right + 0.02).astype(np.float32),
        }

    def weights(self, pattern: frozenset[str]) -> dict[str, float]:
        return dict.fromkeys(pattern, 1.0)

    def oof(self, pattern: frozenset[str]) -> np.ndarray:
        self.asked.append(pattern)
        return self.predictions[pattern]

    def pool(self, predictions: dict[str, np.ndarray], hints: dict[str, np.ndarray]) -> np.ndarray:
        raise AssertionError("gains are learned on OOF alone")


@pytest.fixture
def blend() -> TwoSources:
    return TwoSources()


def gains_of(blend: TwoSources) -> Gains:
    return Gains(blend, blend.targets, TASK.merit, TASK.doubt)


def test_the_gain_is_where_the_doubt_is(blend: TwoSources) -> None:
    curve = gains_of(blend).curve(frozenset({"weak"}), frozenset({"strong"}))
    doubts = TASK.doubt(blend.predictions[frozenset({"weak"})])
    sure, unsure = curve(doubts[:1])[0], curve(doubts[1:2])[0]
    assert sure < 0.15
    assert unsure > 0.35
    assert curve(np.array([5.0]))[0] == pytest.approx(unsure)  # beyond what was seen: as at the end


def test_the_first_gain_is_the_same_for_all_rows_and_counts_from_a_random_order(blend: TwoSources) -> None:
    curve = gains_of(blend).curve(NOTHING, frozenset({"strong"}))
    uniform = np.full((ROWS, 5), 0.2)
    expected = 1.0 - (1 + 1 / 2 + 1 / 3) / 5  # whichever options are right more often in the training table
    assert curve(TASK.doubt(uniform)) == pytest.approx(expected, rel=1e-3)  # bins are drawn towards the mean of all


def test_curves_average_to_the_gain_of_all_rows(blend: TwoSources) -> None:
    gains = gains_of(blend)
    weak, strong = frozenset({"weak"}), frozenset({"strong"})
    whole = (gains.merits(strong) - gains.merits(weak)).mean()
    assert gains.curve(weak, strong)(gains.doubts(weak)).mean() == pytest.approx(whole, abs=0.01)


def test_a_pattern_is_asked_for_once(blend: TwoSources) -> None:
    gains = gains_of(blend)
    for _ in range(3):
        gains.curve(frozenset({"weak"}), frozenset({"strong"}))
        gains.merits(frozenset({"strong"}))
    assert sorted(blend.asked, key=sorted) == [frozenset({"strong"}), frozenset({"weak"})]


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_few_oof_rows_give_a_curve_without_steps(rows: int, blend: TwoSources) -> None:
    blend.targets = blend.targets[:rows]
    blend.predictions = {pattern: values[:rows] for pattern, values in blend.predictions.items()}
    curve = gains_of(blend).curve(frozenset({"weak"}), frozenset({"strong"}))
    assert len(curve.doubts) == 1
    assert np.isfinite(curve(np.array([0.0, 1.0]))).all()
