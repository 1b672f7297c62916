"""Which sources are worth having in the time there is: the run is played through on the OOF rows, where its end is known. Knows no clock.

The highest gain per second first is short-sighted: it scores every row in a cheap view and then lacks the time for the full one. So the same
rule is played with different sets of sources allowed, and the set with the best metric at the end is taken (a rollout; Bertsekas et al. 1997).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

from kit.inference.gains import NOTHING, Gains, Pattern

_ROWS = 300  # OOF rows that are played with
_TURNS = 10  # parts in which a source scores the rows
_LEAST_GAIN = 1e-9  # of what the final blend uses
_ROOM = 1.1  # times the seconds that the final blend's sources may cost before others are thought of: forecasts are not exact
_BETTER = 1e-4  # in the metric: less does not decide
_INSURANCE = 0.05  # share of the time


class Step(NamedTuple):
    """What a source costs, in seconds per row of the test set. load: once, spread over the rows. key: of the contexts that `fetch` pays for, once."""

    load: float
    seconds: float
    key: str = ""
    fetch: float = 0.0

    @property
    def whole(self) -> float:
        """All rows."""
        return self.load + self.seconds + self.fetch


def together(steps: Iterable[Step]) -> float:
    """What several sources cost, contexts that they share only once."""
    steps = list(steps)
    return sum(step.load + step.seconds for step in steps) + sum({step.key: step.fetch for step in steps}.values())


class _Turn(NamedTuple):
    rate: float
    name: str
    rows: np.ndarray
    seconds: float


def worth_having(
    gains: Gains, steps: Mapping[str, Step], core: Pattern, effective: Callable[[Pattern], Pattern], seconds: float
) -> frozenset[str]:
    """The sources to score. seconds: per row. core: what the final blend uses. effective: what counts of a pattern."""
    play = cache(lambda allowed: _Play(gains, {name: steps[name] for name in sorted(allowed)}, core, effective).merit(seconds))
    everything, useful = frozenset(steps), frozenset(steps) & core
    best = useful or everything
    if together(steps[name] for name in best) > _ROOM * seconds:
        alone = [frozenset({name}) for name in sorted(steps)]  # from all of them one may have to leave out several before it gets better
        best, improved = max((best, everything, *alone), key=play), True
        while improved:
            improved = False
            for name in sorted(steps):
                changed = best ^ {name}
                if changed and play(changed) > play(best) + _BETTER:
                    best, improved = changed, True
    return best


def insurance(steps: Mapping[str, Step], seconds: float) -> str | None:
    """The cheapest source, where it costs next to nothing of the seconds per row that there are: it is there if all else fails."""
    cheapest = min(steps, key=lambda name: steps[name].whole, default=None)
    return cheapest if cheapest and steps[cheapest].whole <= _INSURANCE * seconds else None


class _Play:
    """A run on a sample of the OOF rows, with some sources: always the one with the highest gain per second is next."""

    def __init__(self, gains: Gains, steps: Mapping[str, Step], core: Pattern, effective: Callable[[Pattern], Pattern]) -> None:
        total = len(gains.merits(NOTHING))
        self._gains, self._steps, self._core, self._effective = gains, steps, core, effective
        self._rows = np.linspace(0, total - 1, min(_ROWS, total)).astype(int)
        self._patterns = np.full(len(self._rows), NOTHING, object)
        self._loaded: set[str] = set()
        self._fetched = {step.key: np.zeros(len(self._rows), bool) for step in steps.values()}
        self._gain = {name: np.zeros(len(self._rows)) for name in steps}
        self._look(np.arange(len(self._rows)))

    def merit(self, seconds: float) -> float:
        """The mean merit when so many seconds per row are spent."""
        left = seconds * len(self._rows)
        while turns := [turn for name in self._steps if (turn := self._turn(name, left))]:
            turn = max(turns, key=lambda turn: turn.rate)
            for row in turn.rows:
                self._patterns[row] = self._effective(self._patterns[row] | {turn.name})
            self._look(turn.rows)
            self._loaded.add(turn.name.partition("@")[0])
            self._fetched[self._steps[turn.name].key][turn.rows] = True
            left -= turn.seconds
        return float(np.mean([self._gains.merits(pattern)[row] for pattern, row in zip(self._patterns, self._rows, strict=True)]))

    def _turn(self, name: str, left: float) -> _Turn | None:
        """A source's next part of the rows; None if it has nothing to add or no time. It is loaded once, for all of its parts."""
        gain, step = self._gain[name], self._steps[name]
        order = np.argsort(-gain, kind="stable")[: np.count_nonzero(gain > 0)]
        load = 0.0 if name.partition("@")[0] in self._loaded else step.load * len(gain)
        ends = load + np.cumsum(step.seconds + step.fetch * ~self._fetched[step.key][order])
        limit = int(np.searchsorted(ends, left, "right"))
        if not limit:
            return None
        rate = float((np.cumsum(gain[order[:limit]]) / np.maximum(ends[:limit], 1e-12)).max())
        count = min(-(-len(gain) // _TURNS), limit)
        return _Turn(rate, name, order[:count], float(ends[count - 1]))

    def _look(self, rows: np.ndarray) -> None:
        """The gains of all sources on rows whose pattern has changed."""
        for before in set(self._patterns[rows]):
            here = rows[self._patterns[rows] == before]
            doubt = self._gains.doubts(before)[self._rows[here]]
            for name, gain in self._gain.items():
                after = self._effective(before | {name})
                least = _LEAST_GAIN if name in self._core else 0.0
                gain[here] = np.maximum(self._gains.curve(before, after)(doubt), least) if after != before else 0.0
