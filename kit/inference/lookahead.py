"""Which sources are worth having in the time there is: the run is played through on the OOF rows, where its end is known. Knows no clock.

The highest gain per second first is short-sighted: it scores every row in a cheap view and then lacks the time for the full one. So the same
rule is played with different sets of sources allowed, and the set with the best metric at the end is taken (a rollout; Bertsekas et al. 1997).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

from kit.inference.gains import NOTHING, Gains, Pattern

_ROWS = 300  # OOF rows that are played with
_TURNS = 10  # parts in which a source scores the rows
_BETTER = 1e-4  # in the metric: less does not decide
_INSURANCE = 0.05  # share of the time for which the cheapest source is taken in any case, so that there is something if all else fails


class Step(NamedTuple):
    """What a source costs, in seconds per row of the test set. load: once, spread over the rows. key: of the contexts that `fetch` pays for."""

    load: float
    seconds: float
    key: str = ""
    fetch: float = 0.0

    @property
    def whole(self) -> float:
        """All rows."""
        return self.load + self.seconds + self.fetch


def worth_having(
    gains: Gains, steps: Mapping[str, Step], core: Pattern, effective: Callable[[Pattern], Pattern], seconds: float
) -> frozenset[str]:
    """The sources to score. seconds: per row. core: what the final blend uses. effective: what counts of a pattern."""
    play = cache(lambda allowed: _play(gains, {name: steps[name] for name in sorted(allowed)}, core, effective, seconds))
    everything, useful = frozenset(steps), frozenset(steps) & core
    best = useful or everything
    if sum(steps[name].whole for name in best) > seconds:
        best = max((best, everything), key=play)
        improved = True
        while improved:
            improved = False
            for name in sorted(steps):
                changed = best ^ {name}
                if changed and play(changed) > play(best) + _BETTER:
                    best, improved = changed, True
    cheapest = min(steps, key=lambda name: steps[name].whole, default=None)
    return best | {cheapest} if cheapest and steps[cheapest].whole <= _INSURANCE * seconds else best


def _play(gains: Gains, steps: Mapping[str, Step], core: Pattern, effective: Callable[[Pattern], Pattern], seconds: float) -> float:
    """The mean merit at the end, if always the source with the highest gain per second is next."""
    total = len(gains.merits(NOTHING))
    rows = np.linspace(0, total - 1, min(_ROWS, total)).astype(int)
    patterns, at = [NOTHING], np.zeros(len(rows), int)
    left, loaded = seconds * len(rows), ""
    chunk = -(-len(rows) // _TURNS)
    while True:
        doubt = np.select([at == k for k in range(len(patterns))], [gains.doubts(pattern)[rows] for pattern in patterns])
        best_rate, best = 0.0, None
        for name, step in steps.items():
            gain, after = _gains(gains, name, patterns, at, doubt, core, effective)
            order = np.argsort(-gain, kind="stable")
            order = order[gain[order] > 0]
            ends = (name != loaded) * step.load * len(rows) + (step.seconds + step.fetch) * np.arange(1, len(order) + 1)
            limit = int(np.searchsorted(ends, left, "right"))
            if limit and (rate := float((np.cumsum(gain[order[:limit]]) / np.maximum(ends[:limit], 1e-12)).max())) > best_rate:
                count = min(chunk, limit)
                best_rate, best = rate, (name, order[:count], float(ends[count - 1]), after)
        if best is None:
            return float(np.mean([gains.merits(patterns[k])[row] for k, row in zip(at, rows, strict=True)]))
        loaded, chosen, spent, after = best
        for pattern in after.values():
            if pattern not in patterns:
                patterns.append(pattern)
        at[chosen] = [patterns.index(after[k]) for k in at[chosen]]
        left -= spent


def _gains(
    gains: Gains, name: str, patterns: list[Pattern], at: np.ndarray, doubt: np.ndarray, core: Pattern, effective: Callable[[Pattern], Pattern]
) -> tuple[np.ndarray, dict[int, Pattern]]:
    """The expected gain of every row, 0 where the source adds nothing, and the pattern that each pattern becomes."""
    gain, after = np.zeros(len(at)), {}
    for k in np.unique(at).tolist():
        before = patterns[k]
        after[k] = effective(before | {name})
        if after[k] != before:
            here = at == k
            gain[here] = np.maximum(gains.curve(before, after[k])(doubt[here]), 1e-9 if name in core else 0.0)
    return gain, after
