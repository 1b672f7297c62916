"""The clock of a run: deadline, reserve and measured cost. Knows nothing of what is being run.

The competition machine counts from the start of the notebook's process, installation included, so the default start is
the start of this process (or of its parent notebook kernel, which is the same process).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil

from kit.errors import BudgetError

NINE_HOURS_S = 9 * 3600.0
_NORMAL_95 = 1.645  # standard deviations from the middle to either end of a 90 % interval
_NOISE = 0.2  # how much the logarithm of one measurement varies, until it is known
_DRIFT = 0.1  # how much the logarithm of the true cost moves between two measurements
_SURPRISE = 3.0  # standard deviations beyond which what was known no longer holds: the machine has changed
_MEMORY = 0.8  # share of the noise known so far that a new measurement leaves


def seconds_since_process_start() -> float:
    """Wall seconds since this process was started."""
    return max(0.0, time.time() - psutil.Process().create_time())


@dataclass
class Budget:
    """Time allowed for a run.

    total_s: seconds allowed from the start. reserve_s: seconds kept back at the end for writing and for surprises
    (None: 3 % of the total, at least 60 s, at most half of it). used_s: seconds already gone when the budget was made
    (None: since the process began). clock: a monotonic clock in seconds, injected in tests.
    """

    total_s: float = NINE_HOURS_S
    reserve_s: float | None = None
    used_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    measured: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.total_s > 0:
            raise BudgetError(f"budget of {self.total_s} s: give a positive number of seconds")
        usual = min(max(60.0, 0.03 * self.total_s), self.total_s / 2)
        self.reserve_s = usual if self.reserve_s is None else self.reserve_s
        if not 0 <= self.reserve_s < self.total_s:
            raise BudgetError(f"reserve of {self.reserve_s} s does not fit into a budget of {self.total_s} s: lower the reserve or raise the budget")
        used = seconds_since_process_start() if self.used_s is None else self.used_s
        self._start = self.clock() - used

    def elapsed(self) -> float:
        """Seconds gone since the start."""
        return self.clock() - self._start

    def remaining(self) -> float:
        """Seconds of work left before the reserve begins; negative when it has begun."""
        return self.total_s - (self.reserve_s or 0.0) - self.elapsed()

    def affords(self, seconds: float) -> bool:
        """Whether work of this length would end before the reserve begins."""
        return seconds <= self.remaining()

    @contextmanager
    def measure(self, label: str) -> Iterator[None]:
        """Add the seconds spent inside to `measured[label]`."""
        begun = self.clock()
        try:
            yield
        finally:
            self.measured[label] = self.measured.get(label, 0.0) + self.clock() - begun


class Interval(NamedTuple):
    """Seconds: the middle, and the ends of a 90 % interval."""

    low: float
    mid: float
    high: float


class Cost:
    """Seconds per unit of some work: guessed at first, then measured, and followed when the machine becomes slower or faster.

    A scalar Kalman filter (Kalman 1960) on the logarithm. prior: seconds per unit; spread: the factor within which the guess is right in 90 % of cases.
    """

    def __init__(self, prior: float, spread: float = 3.0) -> None:
        self._log = math.log(max(prior, 1e-12))
        self._first = self._variance = (math.log(spread) / _NORMAL_95) ** 2
        self._noise = _NOISE**2
        self.measurements = 0

    def update(self, seconds: float, units: float) -> None:
        """Learn that so many units took so many seconds."""
        if units <= 0 or seconds <= 0:
            return
        surprise = math.log(seconds / units) - self._log
        self._variance += _DRIFT**2
        if surprise**2 > _SURPRISE**2 * (self._variance + self._noise):
            self._variance = max(self._first, surprise**2)
        elif self.measurements:
            self._noise = max(_MEMORY * self._noise + (1 - _MEMORY) * surprise**2, 1e-4)
        trust = self._variance / (self._variance + self._noise)
        self._log += trust * surprise
        self._variance *= 1 - trust
        self.measurements += 1

    def forecast(self, units: float = 1.0) -> Interval:
        """Seconds that so many units will take."""
        wide = math.exp(_NORMAL_95 * math.sqrt(self._variance + self._noise)) if self.measurements else math.exp(_NORMAL_95 * math.sqrt(self._first))
        mid = units * math.exp(self._log)
        return Interval(mid / wide, mid, mid * wide)
