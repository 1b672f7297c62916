"""The clock of a run: deadline, reserve and measured cost. Knows nothing of what is being run.

The competition machine counts from the start of the notebook's process, installation included, so the default start is
the start of this process (or of its parent notebook kernel, which is the same process).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from kit.errors import BudgetError

NINE_HOURS_S = 9 * 3600.0


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
