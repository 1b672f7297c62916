"""Which member scores which rows next: the most expected gain in the metric per second. Knows no process, file or clock; time comes in as numbers.

Three questions, answered anew before every chunk. Which sources are worth having at all in the time there is: found by playing the run through on
the OOF rows (`lookahead`). Which of them next, and on which rows: the highest gain per second, loading included, by the gain curves at the rows'
present doubt. How many rows: what is likely to end in time. What is left over goes into further fits of the members that count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kit.budget import Cost, Interval
from kit.inference.cost import FETCH_S
from kit.inference.gains import NOTHING, Gains, Pattern, Pooling
from kit.inference.lookahead import Step, worth_having

log = logging.getLogger(__name__)

FULL = "full"
_CHUNKS = 50  # a chunk takes at most this part of the time left, …
_CHUNK_S = (2.0, 20.0)  # … and lasts so many seconds at least and at most: long enough to cost nothing extra, short enough to change plans
_LEAST_GAIN = 1e-9  # of a source that the final blend uses: with time to spare, all of it is scored
_REPEAT = 0.005  # gain of a member's second fit, as long as no row was scored by two; the k-th brings 1/k(k-1) of twice that
_REPEAT_ROWS = 50  # rows with two fits that count as much as this guess
_MOVED = 0.2  # how far the forecast of the whole may move before it is decided again what is worth having


class Pass(NamedTuple):
    """One fit of a member in one view: the unit that is loaded and scored."""

    member: str
    fit: str
    view: str = FULL

    @property
    def source(self) -> str:
        """What the blend calls the member in this view."""
        return self.member if self.view == FULL else f"{self.member}@{self.view}"


@dataclass
class Player:
    """A member as the planner sees it.

    sizes: tokens per row (N,) in each view, the full one first. load: seconds to make a fit ready. token: seconds per token. more: views that are
    scored beside the full one; others take its place. key: which contexts it needs.
    """

    name: str
    fits: tuple[str, ...]
    sizes: dict[str, np.ndarray]
    load: Cost
    token: Cost
    more: frozenset[str] = frozenset()
    key: str | None = None


@dataclass(frozen=True)
class Choice:
    """What to do next. rows: to be scored. prepare: rows that need their contexts first. gain: expected sum over `rows`. why: for the log."""

    work: Pass
    rows: np.ndarray
    prepare: np.ndarray
    gain: float
    forecast: Interval
    why: str


class _Candidate(NamedTuple):
    work: Pass
    rows: np.ndarray
    prepare: np.ndarray
    gain: float
    forecast: Interval
    rate: float


@dataclass
class Planner:
    """The state of a run, and the choice of what is next.

    blend: fitted on the members' OOF; targets, merit, doubt, regret: of the OOF rows and the task. rows, width: shape (N, C) of the test predictions.
    hints: (N, C) each, as they come; for blends that use them.
    """

    players: Sequence[Player]
    blend: Pooling
    targets: np.ndarray
    merit: Callable[[np.ndarray, np.ndarray], np.ndarray]
    doubt: Callable[[np.ndarray], np.ndarray]
    regret: Callable[[np.ndarray, np.ndarray], np.ndarray]
    rows: int
    width: int
    on_decision: Callable[[str], None] = log.info
    dropped: dict[str, str] = field(default_factory=dict)
    fetch: dict[str, Cost] = field(default_factory=dict)
    hints: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gains = Gains(self.blend, self.targets, self.merit, self.doubt)
        self._by_name = {player.name: player for player in self.players}
        self._views = {player.name: [view for view in player.sizes if Pass(player.name, "", view).source in self.blend.names] for player in self.players}
        self._sources = [Pass(name, "", view).source for name, views in self._views.items() for view in views]
        self._scores: dict[Pass, np.ndarray] = {}
        self._tried: dict[Pass, np.ndarray] = {}
        self._taken: dict[Pass, np.ndarray] = {}
        self._fetched = {player.key: np.zeros(self.rows, bool) for player in self.players if player.key}
        self._busy_keys: set[str] = set()
        self._has = {source: np.zeros(self.rows, bool) for source in self._sources}
        self._mean = {source: np.full((self.rows, self.width), np.nan, np.float32) for source in self._sources}
        self._prediction = np.full((self.rows, self.width), np.nan, np.float32)
        self._doubt = self.doubt(self._prediction)
        self._patterns: list[Pattern] = [NOTHING]
        self._pattern = np.zeros(self.rows, int)  # index into _patterns
        self._regret_sum = self._regret_rows = 0.0
        self._wanted: frozenset[str] | None = None
        self._wanted_for = 0.0
        for player in self.players:
            if player.key:
                self.fetch.setdefault(player.key, Cost(FETCH_S))
        self._set_core()

    # --- what has happened -------------------------------------------------------------------------------------------------------

    def take(self, work: Pass, rows: np.ndarray) -> None:
        """These rows are being scored."""
        self._mask(self._taken, work)[rows] = True

    def release(self, work: Pass, rows: np.ndarray) -> None:
        """These rows are not being scored any more."""
        self._mask(self._taken, work)[rows] = False

    def record(self, work: Pass, rows: np.ndarray, prediction: np.ndarray) -> None:
        """Predictions (n, C) of these rows have come; a row that is not finite was tried and is left out."""
        self.release(work, rows)
        self._mask(self._tried, work)[rows] = True
        scores = self._scores.setdefault(work, np.full((self.rows, self.width), np.nan, np.float32))
        scores[rows] = np.where(np.isfinite(prediction).all(-1, keepdims=True), prediction, np.nan)
        if work.source in self._has:
            self._average(work, rows)
            self._pool(rows)

    def fetching(self, key: str) -> None:
        """Contexts of this key are being retrieved."""
        self._busy_keys.add(key)

    def fetched(self, key: str, rows: np.ndarray | None = None) -> None:
        """These rows' contexts are there, or (None) no more will come."""
        self._fetched[key][slice(None) if rows is None else rows] = True
        self._busy_keys.discard(key)

    def drop(self, member: str, why: str) -> None:
        """The member scores no more; what it has scored stays."""
        self.dropped[member] = why
        self._set_core()
        self.on_decision(f"{member} is given up: {why}")

    def restrict(self, member: str) -> bool:
        """The member scores only in cheaper views from now on; False if it has none."""
        cheaper = [view for view in self._views[member] if view != FULL and view not in self._by_name[member].more]
        if cheaper:
            self._views[member] = cheaper
            self._set_core()
        return bool(cheaper)

    # --- what there is -----------------------------------------------------------------------------------------------------------

    def prediction(self) -> np.ndarray:
        """The blend (N, C) of all that is scored; NaN where nothing is."""
        return self._prediction

    def of_member(self, member: str) -> np.ndarray:
        """The member's own predictions (N, C), mean over its fits; of a cheaper view where there is no full one."""
        own = np.full((self.rows, self.width), np.nan, np.float32)
        for view in self._by_name[member].sizes:
            source = Pass(member, "", view).source
            if source in self._mean:
                own = np.where(np.isfinite(own), own, self._mean[source])
        return own

    def expected(self) -> float:
        """The metric that OOF lets expect of the present prediction."""
        counts = np.bincount(self._pattern, minlength=len(self._patterns))
        return float(sum(count / self.rows * self.gains.merits(pattern).mean() for pattern, count in zip(self._patterns, counts, strict=True) if count))

    def left(self) -> dict[str, int]:
        """Rows × fits that members of the final blend have not scored, by member."""
        open_rows = {work.member: 0 for work in self._core_passes()}
        for work in self._core_passes():
            open_rows[work.member] += int((~self._mask(self._tried, work)).sum())
        return {member: count for member, count in open_rows.items() if count}

    def player(self, name: str) -> Player:
        """The player of that name."""
        return self._by_name[name]

    @property
    def core(self) -> frozenset[str]:
        """The sources that the final blend uses."""
        return self._core

    # --- what is next ------------------------------------------------------------------------------------------------------------

    def next(self, loaded: Pass | None, remaining: float, slots: int = 1) -> Choice | None:
        """The best use of a free slot that has this pass's fit loaded; None if nothing that would end in time has a positive gain."""
        wanted = self._decide(remaining * slots)
        found = [candidate for work in self._works(wanted) if (candidate := self._candidate(work, loaded, remaining, slots))]
        if not found:
            return None
        best, *others = sorted(found, key=lambda candidate: -candidate.rate)
        return Choice(*best[:5], self._explain(best, next((other for other in others if other.work.source != best.work.source), None)))

    def _works(self, wanted: Collection[str]) -> Iterator[Pass]:
        for player in self.players:
            if player.name in self.dropped or player.key in self._busy_keys:
                continue
            for view in self._views[player.name]:
                for fit in player.fits if view == self._views[player.name][0] else player.fits[:1]:
                    work = Pass(player.name, fit, view)
                    if work.source in wanted:
                        yield work

    def _candidate(self, work: Pass, loaded: Pass | None, remaining: float, slots: int) -> _Candidate | None:
        player = self._by_name[work.member]
        rows, gain = self._open_rows(work)
        if not len(rows):
            return None
        tokens = player.sizes[work.view][rows]
        order = np.argsort(-gain / tokens, kind="stable")
        rows, gain, tokens = rows[order], np.cumsum(gain[order]), np.cumsum(tokens[order])
        missing = ~self._fetched[player.key][rows] if player.key else np.zeros(len(rows), bool)
        ready = loaded is not None and (loaded.member, loaded.fit) == work[:2]
        ends = self._ends(player, 0.0 if ready else 1.0, tokens, np.cumsum(missing))
        limit = next((n for end in reversed(ends) if (n := int(np.searchsorted(end, remaining, "right")))), 0)
        if not limit:
            return None
        rates = gain[:limit] / np.maximum(ends[1][:limit], 1e-12)
        reach = 1 if ready and not missing.any() else int(rates.argmax()) + 1  # what is paid once is worth it for many rows
        seconds = float(np.clip(remaining / _CHUNKS, *_CHUNK_S))
        token = player.token.forecast()
        chunk = int(np.searchsorted(tokens * (token.mid if player.token.measurements else token.high), seconds, "right"))
        chunk = int(np.clip(chunk if slots == 1 else min(chunk, len(rows) // (2 * slots)), 1, limit))
        forecast = Interval(*(float(end[chunk - 1]) for end in ends))
        return _Candidate(work, rows[:chunk], rows[:reach][missing[:reach]], float(gain[chunk - 1]), forecast, float(rates[reach - 1]))

    def _ends(self, player: Player, loads: float, tokens: np.ndarray, missing: np.ndarray) -> list[np.ndarray]:
        """Seconds until each row is done, if all before it are: low, mid, high."""
        load, token = player.load.forecast(loads) if loads else Interval(0, 0, 0), player.token.forecast()
        fetch = self.fetch[player.key].forecast() if player.key else Interval(0, 0, 0)
        return [load[k] + token[k] * tokens + fetch[k] * missing for k in range(3)]

    def _open_rows(self, work: Pass) -> tuple[np.ndarray, np.ndarray]:
        """Rows that this pass could still score, and the gain expected of each; only those with a positive one."""
        can = ~(self._mask(self._tried, work) | self._mask(self._taken, work))
        first = self._views[work.member][0]
        if work.view != first and work.view not in self._by_name[work.member].more:
            can &= ~(self._has[work.source] | self._has[Pass(work.member, "", first).source])
        rows = np.flatnonzero(can)
        gain = self._gain(work, rows)
        return rows[gain > 0], gain[gain > 0]

    def _gain(self, work: Pass, rows: np.ndarray) -> np.ndarray:
        """Expected gain (n,) of scoring these rows."""
        gain = np.zeros(len(rows))
        others = sum(self._mask(self._taken, other)[rows].astype(int) for other in self._fellows(work))
        scored = sum((np.isfinite(self._scores[other][rows, 0]) for other in self._fellows(work) if other in self._scores), np.zeros(len(rows), int))
        count = scored + others
        for number in np.unique(self._pattern[rows[count == 0]]):
            here = (self._pattern[rows] == number) & (count == 0)
            before = self._patterns[number]
            gain[here] = self.gains.curve(before, self._effective(before | {work.source}))(self._doubt[rows[here]])
        again = count > 0
        gain[again] = self._repeat_gain(work, rows[again], count[again])
        return np.maximum(gain, _LEAST_GAIN) if work.source in self._core else gain

    def _repeat_gain(self, work: Pass, rows: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Of one more fit of a source: averaging k predictions takes 1/k of what varies between them away."""
        second = (_REPEAT * _REPEAT_ROWS + self._regret_sum) / (_REPEAT_ROWS + self._regret_rows)
        weights = self.blend.weights(self._core or frozenset(self._sources))
        share = weights.get(work.source, 0.0) / (sum(weights.values()) or 1.0)
        doubt = self._doubt[rows]
        return second * share * 2.0 / (count * (count + 1)) * doubt / max(float(self._doubt.mean()), 1e-6)

    def _explain(self, best: _Candidate, other: _Candidate | None) -> str:
        text = f"{best.work.member} {best.work.fit} {best.work.view} on {len(best.rows)} rows: +{best.gain / self.rows:.5f} in {best.forecast.mid:.1f} s"
        text += f" ({best.forecast.low:.1f} to {best.forecast.high:.1f}), {best.rate / self.rows:.2e} per s"
        return text + (f"; next best {other.work.source} with {other.rate / self.rows:.2e}" if other else "; nothing else to do")

    # --- which sources are worth having ------------------------------------------------------------------------------------------

    def _decide(self, seconds: float) -> frozenset[str]:
        """The sources to score in this many seconds; decided again when the forecast of the whole has moved."""
        spent = sum(self._seconds(work) * float(self._mask(self._tried, work).mean()) for work in self._tried)
        horizon = (seconds + spent) / max(sum(self._seconds(work) for work in self._core_passes()), 1e-9)
        if self._wanted is None or abs(horizon / self._wanted_for - 1) > _MOVED:
            steps = {source: self._step(source) for source in self._sources if source.partition("@")[0] not in self.dropped}
            wanted = worth_having(self.gains, steps, self._core, self._effective, (seconds + spent) / self.rows)
            if wanted != self._wanted:
                left_out = sorted(set(steps) - wanted)
                self.on_decision(f"worth having in {seconds:.0f} s: {', '.join(sorted(wanted))}" + (f"; left out: {', '.join(left_out)}" if left_out else ""))
            self._wanted, self._wanted_for = wanted, horizon
        return self._wanted

    def _step(self, source: str) -> Step:
        """Mean cost of a source, per row of the test set."""
        member, _, view = source.partition("@")
        player = self._by_name[member]
        fetch = self.fetch[player.key].forecast().mid * float((~self._fetched[player.key]).mean()) if player.key else 0.0
        seconds = player.token.forecast().mid * float(player.sizes[view or FULL].mean())
        return Step(player.load.forecast().mid / self.rows, seconds, player.key or "", fetch)

    def _seconds(self, work: Pass) -> float:
        player = self._by_name[work.member]
        return player.token.forecast(float(player.sizes[work.view].sum())).mid

    def _core_passes(self) -> list[Pass]:
        split = [source.partition("@") for source in sorted(self._core)]
        return [Pass(member, fit, view or FULL) for member, _, view in split for fit in self._by_name[member].fits if member not in self.dropped]

    def _set_core(self) -> None:
        """What the final blend uses, if all that is still there is scored."""
        alive = [Pass(name, "", view) for name, views in self._views.items() for view in views[:1] if name not in self.dropped]
        alive += [Pass(p.name, "", view) for p in self.players for view in self._views[p.name] if view in p.more and p.name not in self.dropped]
        names = frozenset(work.source for work in alive)
        weights = self.blend.weights(names) if names else {}
        self._core = frozenset(name for name in names if weights[name] > 0) or names
        self._wanted = None
        self._pool(np.arange(self.rows))

    # --- bookkeeping -------------------------------------------------------------------------------------------------------------

    def _effective(self, pattern: Pattern) -> Pattern:
        """What counts of a pattern: the full view instead of cheaper ones, and nothing but the final blend's sources once all of them are there."""
        if self._core and self._core <= pattern:
            return self._core
        kept = {source for source in pattern if source == (member := source.partition("@")[0]) or member not in pattern or self._is_more(source)}
        return frozenset(kept)

    def _is_more(self, source: str) -> bool:
        member, _, view = source.partition("@")
        return view in self._by_name[member].more

    def _mask(self, masks: dict[Pass, np.ndarray], work: Pass) -> np.ndarray:
        if work not in masks:
            masks[work] = np.zeros(self.rows, bool)
        return masks[work]

    def _fellows(self, work: Pass) -> list[Pass]:
        """The passes of the same source."""
        return [Pass(work.member, fit, work.view) for fit in self._by_name[work.member].fits]

    def _average(self, work: Pass, rows: np.ndarray) -> None:
        """Mean over fits, always summed in the same order; and what the rows tell about the worth of a second fit."""
        scores = np.stack([self._scores[other][rows] for other in self._fellows(work) if other in self._scores])  # (F, n, C)
        good = np.isfinite(scores).all(-1)
        count = good.sum(0)
        total = np.where(good[..., None], scores, 0.0).sum(0, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            self._mean[work.source][rows] = total / count[:, None]
        self._has[work.source][rows] = count > 0
        if (twice := count == 2).any():
            belief = self._mean[work.source][rows][twice]
            each = np.where(good[..., None], scores, np.nan)[:, twice]
            regrets = np.stack([np.where(np.isfinite(one[:, 0]), self.regret(np.nan_to_num(one), belief), np.nan) for one in each])
            self._regret_sum += float(np.nansum(np.nanmean(regrets, 0)))
            self._regret_rows += int(twice.sum())

    def _pool(self, rows: np.ndarray) -> None:
        """Pattern, prediction and doubt of these rows anew."""
        scored = np.stack([self._has[source][rows] for source in self._sources], 1)  # (n, S)
        kinds, which = np.unique(scored, axis=0, return_inverse=True)
        effective = [self._effective(frozenset(name for name, has in zip(self._sources, kind, strict=True) if has)) for kind in kinds]
        for pattern in effective:
            if pattern not in self._patterns:
                self._patterns.append(pattern)
        self._pattern[rows] = np.array([self._patterns.index(pattern) for pattern in effective])[which.reshape(-1)]
        counts = np.array([[source in pattern for source in self._sources] for pattern in effective])[which.reshape(-1)]  # (n, S)
        parts = {source: np.where(counts[:, [k]], self._mean[source][rows], np.nan) for k, source in enumerate(self._sources)}
        self._prediction[rows] = self.blend.pool(parts, {name: values[rows] for name, values in self.hints.items()})
        self._doubt[rows] = self.doubt(self._prediction[rows])
