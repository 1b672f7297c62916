"""The loop of a run: free slots get the planner's choice, results go where they are wanted, until nothing is left to do or the time is up.

The same for real processes and for simulated ones: it knows a crew, a planner and a budget, and no model, file or metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kit.budget import Budget, Interval
from kit.inference.crew import Crew, Event, Fetch, Order
from kit.inference.planner import Choice, Pass, Planner, Player

PATIENCE_S = 60.0
_SLACK = 3.0  # times the upper end of a forecast without a sign of life, beyond patience: a hang
_FEWER_TOKENS = 4  # a batch's tokens are divided by this when memory ran out
_FETCH_ROWS = 256  # rows of the first request for contexts
_FETCH_S = 10.0  # seconds that a later one should take, …
_MOST_FETCH_ROWS = 2048  # … of so many rows at most
OPENING = 5  # times the patience with what comes first: imports, opening an index


@dataclass(frozen=True)
class Settings:
    """How a member is scored. batch_tokens: of one forward pass. precision: as in kit.runtime.PRECISIONS."""

    batch_tokens: int
    precision: str = "auto"


class Listener(Protocol):
    """Who hears what happens."""

    def scored(self, work: Pass, rows: np.ndarray, prediction: np.ndarray) -> None:
        """Predictions (n, C) of these rows have come, and the planner knows them."""
        ...

    def fetched(self, key: str, rows: np.ndarray, hints: Mapping[str, np.ndarray], chars: np.ndarray) -> None:
        """Contexts of these rows are there: hints (n, C) and characters (n,)."""
        ...

    def decided(self, text: str) -> None:
        """One line for the log."""
        ...


@dataclass
class Span:
    """A slot's work on one order. Times are seconds since the budget began. state: "done", "failed", "cut" (by the deadline) or "busy".

    sign: time of the last sign of life. step: how often its member or retriever had been made smaller when it began.
    """

    slot: int
    name: str
    fit: str
    view: str
    rows: np.ndarray
    gain: float
    forecast: Interval
    start: float
    sign: float
    key: str = ""
    step: int = 0
    serial: int = 0
    end: float = 0.0
    load_s: float = 0.0
    tokens: int = 0
    state: str = "busy"

    @property
    def work(self) -> Pass:
        """What is being scored."""
        return Pass(self.name, self.fit, self.view)

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "slot": self.slot, "member": self.name, "fit": self.fit, "view": self.view, "rows": len(self.rows), "start": self.start, "end": self.end,
            "load_s": self.load_s, "forecast_s": list(self.forecast), "tokens": self.tokens, "gain": self.gain, "state": self.state,
        }  # fmt: skip


@dataclass
class Dispatch:
    """A run of a planner's choices by a crew, inside a budget. settings: by member. patience_s: without a sign of life, a worker hangs.

    no_contexts: key → why there are none.
    """

    planner: Planner
    crew: Crew
    budget: Budget
    settings: Mapping[str, Settings]
    listener: Listener
    patience_s: float = PATIENCE_S
    spans: list[Span] = field(default_factory=list)
    no_contexts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._settings = dict(self.settings)
        self._busy: dict[int, Span] = {}
        self._loaded: dict[int, Pass | None] = dict.fromkeys(range(len(self.crew.slots)))
        self._to_fetch: dict[int, tuple[Pass, np.ndarray]] = {}
        self._steps: dict[str, int] = {}
        self._serial = 0

    def run(self) -> None:
        """Until nothing with a positive gain is left that may end in time, or the reserve begins."""
        changed = True
        while (remaining := self.budget.remaining()) > 0:
            for slot in range(len(self.crew.slots)) if changed else ():
                if slot not in self._busy:
                    self._fill(slot)
            if not self._busy:
                return
            patience = min(span.sign + self._patience(span) for span in self._busy.values()) - self.budget.elapsed()
            events = self.crew.wait(max(0.0, min(remaining, patience)))
            for event in events:
                self._handle(event)
            changed = any(event.kind != "beat" for event in events) | self._give_up_hangs()
        for span in list(self._busy.values()):
            self._end(span, "cut")
            self.crew.dismiss(span.slot)
        self.listener.decided("the time is up")

    def _give_up_hangs(self) -> bool:
        """Whether there were any."""
        hangs = [span for span in self._busy.values() if self.budget.elapsed() - span.sign >= self._patience(span)]
        for span in hangs:
            self._fail(span, f"no sign of life for {self._patience(span):.0f} s", memory=False)
        return bool(hangs)

    def _patience(self, span: Span) -> float:
        opens = span.key and not self.planner.fetch[span.key].measurements
        return max(self.patience_s * (OPENING if opens else 1), _SLACK * span.forecast.high)

    # --- giving out work ---------------------------------------------------------------------------------------------------------

    def _fill(self, slot: int) -> None:
        choice = self.planner.next(self._loaded[slot], self.budget.remaining(), len(self.crew.slots))
        if choice is None:
            return
        self.listener.decided(choice.why)
        if len(choice.prepare):
            self._to_fetch[slot] = choice.work, choice.prepare
            self._fetch(slot)
        else:
            self._score(slot, choice)

    def _score(self, slot: int, choice: Choice) -> None:
        work, settings = choice.work, self._settings[choice.work.member]
        self.planner.take(work, choice.rows)
        self._begin(Span(slot, *work, choice.rows, choice.gain / self.planner.rows, choice.forecast, self.budget.elapsed(), self.budget.elapsed()))
        self.crew.send(slot, Order(self._serial, *work, tuple(choice.rows.tolist()), settings.batch_tokens, settings.precision, choice.trial))

    def _fetch(self, slot: int) -> None:
        """Ask for the next contexts of those this slot is to fetch."""
        work, rest = self._to_fetch[slot]
        key = self.planner.player(work.member).key or ""
        cost = self.planner.fetch[key]
        count = min(max(1, int(_FETCH_S / cost.forecast().mid)), _MOST_FETCH_ROWS) if cost.measurements else _FETCH_ROWS
        rows, self._to_fetch[slot] = rest[:count], (work, rest[count:])
        self.planner.fetching(key)
        now = self.budget.elapsed()
        self._begin(Span(slot, "contexts", "", "", rows, 0.0, cost.forecast(len(rows)), now, now, key))
        self.crew.send(slot, Fetch(self._serial, key, tuple(rows.tolist())))

    def _begin(self, span: Span) -> None:
        self._serial += 1
        span.serial, span.step = self._serial, self._steps.get(span.key or span.name, 0)
        self._busy[span.slot] = span
        self.spans.append(span)

    def _end(self, span: Span, state: str) -> None:
        span.state, span.end = state, self.budget.elapsed()
        del self._busy[span.slot]
        if state != "done":
            self._loaded[span.slot] = None
            if not span.key:
                self.planner.release(span.work, span.rows)

    # --- hearing of it -----------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        span = self._busy.get(event.slot)
        if span is None or span.serial != event.serial:
            return  # of an order that was given up
        span.sign = self.budget.elapsed()
        if event.kind == "failed":
            self._fail(span, event.why, event.memory)
        elif event.kind in ("scored", "fetched"):
            span.load_s, span.tokens = event.load_s, event.tokens
            self._end(span, "done")
            if event.kind == "scored":
                self._scored(span, event)
            else:
                self._fetched(span, event)

    def _scored(self, span: Span, event: Event) -> None:
        assert event.prediction is not None, "a scored order has predictions"
        player, rows = self.planner.player(span.name), np.array(event.rows, np.int64)
        self._measured(player, event, float(player.sizes[span.view][span.rows].sum()))
        if event.load_s:
            player.load.update(max(span.end - span.start - event.seconds, event.load_s), 1)
        self._loaded[span.slot] = span.work
        self.planner.release(span.work, span.rows)
        self.planner.record(span.work, rows, event.prediction)
        if lost := int((~np.isfinite(event.prediction).all(-1)).sum()):
            self.listener.decided(f"{span.name} {span.fit}: {lost} rows are left out, their scores are not finite even in float32")
        self.listener.scored(span.work, rows, event.prediction)

    @staticmethod
    def _measured(player: Player, event: Event, size: float) -> None:
        """What an order tells of its member's costs; from one without a pace it is known that the member does not stream."""
        if event.pace is None:
            player.read = None
            player.token.update(event.seconds, size)
        elif player.read is not None:
            compute, read = event.pace
            player.token.update(compute, size)
            player.read.update(read, 1)

    def _fetched(self, span: Span, event: Event) -> None:
        rows = np.array(event.rows, np.int64)
        cost = self.planner.fetch[span.key]
        cost.update(event.seconds, len(rows))
        self._loaded[span.slot] = None
        self.planner.fetched(span.key, rows)
        if event.hints is not None and event.chars is not None:
            self.listener.fetched(span.key, rows, event.hints, event.chars)
        work, rest = self._to_fetch[span.slot]
        self._to_fetch[span.slot] = work, rest[: self._scorable(work)]
        if len(self._to_fetch[span.slot][1]):
            self._fetch(span.slot)

    def _scorable(self, work: Pass) -> int:
        """How many rows can be fetched and scored in the time left: contexts of more would be for nothing."""
        player = self.planner.player(work.member)
        row = self.planner.fetch[player.key or ""].forecast().mid + player.token.forecast(float(player.sizes[work.view].mean())).mid
        return max(0, int((self.budget.remaining() - player.load.forecast().mid) / max(row, 1e-9)))

    def _fail(self, span: Span, why: str, memory: bool) -> None:
        """Give the rows back and the memory, and try the member in a smaller way, or not again."""
        self._end(span, "failed")
        self.crew.dismiss(span.slot)
        name = f"contexts {span.key}" if span.key else span.name
        smaller = memory and self._back_off(span, self.crew.slots[span.slot])
        if smaller:
            self.listener.decided(f"{name}: {why}: {smaller}")
        elif span.key:
            self.no_contexts[span.key] = why
            self.planner.fetched(span.key)
            self.listener.decided(f"{name}: {why}: what reads them is scored without")
        elif span.name not in self.planner.dropped:
            self.planner.drop(span.name, why)
        if span.key and smaller:
            self.planner.fetched(span.key, np.empty(0, np.int64))

    def _back_off(self, span: Span, device: str) -> str:
        """The next smaller way to do it, in words; empty if there is none left."""
        name = span.key or span.name
        if self._steps.get(name, 0) > span.step:
            return "it began before the last step back, once more"
        step = self._steps[name] = span.step + 1
        if span.key:
            return "once more" if step == 1 else ""
        now = self._settings[span.name]
        if step == 1:
            self._settings[span.name] = Settings(max(1, now.batch_tokens // _FEWER_TOKENS), now.precision)
            return f"batches of {self._settings[span.name].batch_tokens} tokens"
        if step == 2 and self.planner.restrict(span.name):
            return "shorter sequences only"
        on_cpu = device.startswith("cpu")
        if step <= 3 and now.precision in (("auto", "fp32") if on_cpu else ("fp32",)):
            self._steps[name] = 3
            self._settings[span.name] = Settings(now.batch_tokens, "bf16" if on_cpu else "fp16")
            return f"in {self._settings[span.name].precision}"
        return ""
