"""Metrics of the competitions: numpy in, float out. Knows no model, task or file.

Of options: `prediction` (N, C) holds one score per option; `targets` (N,) the right option. Ties go to the earlier option, as in the
submission. Of values: both (N, K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def average_precision(prediction: np.ndarray, targets: np.ndarray, k: int = 3) -> np.ndarray:
    """Average precision at k of each row, (N,) float64: 1/rank of the right option, 0 below rank k (there is one right option)."""
    rank = _rank_of_target(prediction, targets)
    return np.where(rank < k, 1.0 / (rank + 1.0), 0.0)


def map_at_k(prediction: np.ndarray, targets: np.ndarray, k: int = 3) -> float:
    """Mean average precision at k."""
    return float(average_precision(prediction, targets, k).mean())


def accuracy(prediction: np.ndarray, targets: np.ndarray) -> float:
    """Share of rows whose best option is the right one."""
    return accuracy_at_k(prediction, targets, 1)


def accuracy_at_k(prediction: np.ndarray, targets: np.ndarray, k: int = 3) -> float:
    """Share of rows whose right option is among the best k."""
    return float((_rank_of_target(prediction, targets) < k).mean())


def mcrmse(prediction: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the K columns of the root mean squared error, of predictions and targets (N, K): smaller is better."""
    return float(rmse(prediction, targets).mean())


def rmse(prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Root mean squared error of each column, (K,) float64."""
    return np.sqrt(np.square(prediction.astype(np.float64) - targets).mean(0))


class Estimate(NamedTuple):
    """A metric's value, its standard error, and the 95 % interval, by bootstrap over rows."""

    value: float
    se: float
    low: float
    high: float


def bootstrap(metric: Callable[..., float], prediction: np.ndarray, targets: np.ndarray, *, draws: int = 500, seed: int = 0) -> Estimate:
    """The metric on all rows, and how much it would vary over other samples of rows (percentile bootstrap, Efron 1979)."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(targets), (draws, len(targets)))
    values = np.array([metric(prediction[sample], targets[sample]) for sample in rows])
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(metric(prediction, targets), float(values.std(ddof=1)), float(low), float(high))


def _rank_of_target(prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """0-based rank of the right option, (N,); a NaN score ranks last."""
    assert (targets >= 0).all(), f"row {int(targets.argmin())} has no right option (target {targets.min()}): score labelled rows only"
    value = np.where(np.isnan(prediction), -np.inf, prediction)
    own = np.take_along_axis(value, targets[:, None], 1)
    earlier = np.arange(value.shape[1])[None, :] < targets[:, None]
    return ((value > own) | ((value == own) & earlier)).sum(1)
