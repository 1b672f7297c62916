"""Crews that score in a thread of this process, by the code of the real scoring process: that saves the seconds a process takes to start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from kit.inference.crew import Event, Fetch, Order

_END_S = 30.0  # a thread sees at its next beat that it is not wanted any more
_BEAT_S = 10.0  # simulated seconds between two signs of life


class Thread:
    """One slot, on the CPU. Nothing can be killed: for runs in which no worker dies. sent: all orders so far."""

    slots = ("cpu",)

    def __init__(self, run: Path) -> None:
        self.sent: list[Order | Fetch] = []
        self._run = run
        self._desk = ("", "")
        self._pipe: Connection | None = None
        self._thread = threading.Thread()

    def send(self, slot: int, order: Order | Fetch) -> None:
        desk = (type(order).__name__, order.member if isinstance(order, Order) else order.key)
        if desk != self._desk:
            self.dismiss(slot)
            self._desk = desk
            self._start()
        self.sent.append(order)
        assert self._pipe is not None
        self._pipe.send(order)

    def wait(self, seconds: float) -> list[Event]:
        return [self._pipe.recv()] if self._pipe and self._pipe.poll(max(0.0, seconds)) else []

    def dismiss(self, slot: int) -> None:
        if self._pipe:
            self._pipe.close()
            self._thread.join(_END_S)
        self._desk, self._pipe = ("", ""), None

    def close(self) -> None:
        self.dismiss(0)

    def _start(self) -> None:
        from kit.inference.scorer import serve  # imports torch

        self._pipe, theirs = Pipe()
        self._thread = threading.Thread(target=serve, args=(self._run, "cpu", theirs, time.monotonic()), daemon=True)
        self._thread.start()


@dataclass
class Clock:
    """Stands still, unless somebody moves it."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(Thread):
    """Really scores, but in simulated time: loading, a row and a context take so many seconds of a clock each. look: called before every wait."""

    def __init__(
        self, run: Path, clock: Clock, *, load_s: float = 1.0, row_s: float = 1.0, fetch_s: float = 0.1, look: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__(run)
        self._clock, self._load_s, self._row_s, self._fetch_s, self._look = clock, load_s, row_s, fetch_s, look
        self._loaded = ("", "")
        self._held: Event | None = None
        self._due = 0.0

    def wait(self, seconds: float) -> list[Event]:
        self._look()
        self._held = self._held or self._priced(self._answer())
        step = max(0.0, min(self._due, seconds, _BEAT_S))
        self._clock.now += step
        self._due -= step
        if self._due <= 0:
            held, self._held = self._held, None
            return [held]
        return [replace(self._held, kind="beat")] if step == _BEAT_S else []

    def dismiss(self, slot: int) -> None:
        super().dismiss(slot)
        self._loaded, self._held = ("", ""), None

    def _answer(self) -> Event:
        """What the order comes to, however long it really takes."""
        assert self._pipe is not None, "somebody waits for an order that was not given"
        while (event := self._pipe.recv()).kind == "beat":
            pass
        return event

    def _priced(self, event: Event) -> Event:
        order = self.sent[-1]
        if isinstance(order, Fetch):
            self._due = self._fetch_s * len(order.rows)
            return replace(event, seconds=self._due, load_s=0.0)
        load = 0.0 if self._loaded == (order.member, order.fit) else self._load_s
        self._loaded = (order.member, order.fit)
        work = self._row_s * len(order.rows)
        self._due = load + work
        return replace(event, seconds=work, load_s=load)
