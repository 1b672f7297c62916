"""What scoring one more source is worth on a row, learned on OOF. Knows no model, clock or test set.

A pattern is the set of sources that have scored a row. For a step from one pattern to another, the gain in the metric is learned as a function of
how unsure the blend of the first pattern is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

Pattern = frozenset[str]
NOTHING: Pattern = frozenset()
_ROWS_PER_BIN = 25
_MOST_BINS = 12
_PRIOR_ROWS = 10  # a bin's mean gain counts as much as that of all rows at this many rows of its own


class Pooling(Protocol):
    """What is needed of a blend."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sources."""
        ...

    def weights(self, pattern: Pattern) -> dict[str, float]:
        """Of each source in a pattern."""
        ...

    def oof(self, pattern: Pattern) -> np.ndarray:
        """OOF predictions (n, C) of a pattern."""
        ...

    def pool(self, predictions: dict[str, np.ndarray], hints: dict[str, np.ndarray]) -> np.ndarray:
        """Predictions (N, C) of rows, each by its own pattern."""
        ...


class Curve(NamedTuple):
    """Expected gain in the metric as a function of doubt, piecewise linear."""

    doubts: np.ndarray
    gains: np.ndarray

    def __call__(self, doubt: np.ndarray) -> np.ndarray:
        """Gain (N,) for doubts (N,)."""
        return np.interp(doubt, self.doubts, self.gains)


class Gains:
    """Gain curves between patterns, each learned when first asked for.

    blend: fitted on OOF. targets: (n, …) of the OOF rows. merit, doubt: as in kit.tasks.Task.
    """

    def __init__(
        self, blend: Pooling, targets: np.ndarray, merit: Callable[[np.ndarray, np.ndarray], np.ndarray], doubt: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self._blend, self._targets, self._merit, self._doubt = blend, targets, merit, doubt
        self._known: dict[Pattern, tuple[np.ndarray, np.ndarray]] = {}
        self._curves: dict[tuple[Pattern, Pattern], Curve] = {}

    def merits(self, pattern: Pattern) -> np.ndarray:
        """Merit (n,) of every OOF row, scored by these sources."""
        return self._of(pattern)[0]

    def doubts(self, pattern: Pattern) -> np.ndarray:
        """Doubt (n,) of every OOF row, scored by these sources."""
        return self._of(pattern)[1]

    def curve(self, before: Pattern, after: Pattern) -> Curve:
        """The gain of going from one pattern to another."""
        if (before, after) not in self._curves:
            self._curves[before, after] = _learn(self.doubts(before), self.merits(after) - self.merits(before))
        return self._curves[before, after]

    def _of(self, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
        if pattern not in self._known:
            prediction = self._blend.oof(pattern or frozenset(self._blend.names[:1]))
            if pattern:
                self._known[pattern] = self._merit(prediction, self._targets), self._doubt(prediction)
            else:
                self._known[pattern] = self._merit_of_nothing(prediction.shape), self._doubt(np.full_like(prediction, np.nan))
        return self._known[pattern]

    def _merit_of_nothing(self, shape: tuple[int, ...]) -> np.ndarray:
        """Merit (n,) of an order by chance: mean over all rotations of the columns, since in training tables some may be right more often."""
        falling = np.tile(np.arange(shape[1], 0, -1, dtype=np.float32), (shape[0], 1))
        return np.mean([self._merit(np.roll(falling, turn, 1), self._targets) for turn in range(shape[1])], 0)


def _learn(doubt: np.ndarray, gain: np.ndarray) -> Curve:
    """Mean gain in bins of equally many rows, drawn towards the mean of all."""
    order = np.argsort(doubt, kind="stable")
    bins = np.array_split(order, int(np.clip(len(order) // _ROWS_PER_BIN, 1, _MOST_BINS)))
    sizes = np.array([len(rows) for rows in bins])
    means = np.array([(gain[rows].sum() + _PRIOR_ROWS * gain.mean()) / (len(rows) + _PRIOR_ROWS) for rows in bins])
    centres, same = np.unique([doubt[rows].mean().round(9) for rows in bins], return_inverse=True)  # np.interp wants doubts that differ
    return Curve(centres, np.bincount(same, sizes * means) / np.bincount(same, sizes))
