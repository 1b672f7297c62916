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
_CHANCES = (0.95, 0.5, 0.05, 0.0005)  # that work ends by the high end, the middle, the low end, and half of that way further below
_HIGH, _MID, _LOW = 0, 1, 2
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
    """A possible choice. rows: all that it may come to, the best first; missing: which lack their contexts; rates: gain per second of each alone.

    first: rows of the next chunk. reach: rows until the rate of them all, with what is paid once, is highest. rate: that, by the chance that it works.
    """

    work: Pass
    rows: np.ndarray
    missing: np.ndarray
    rates: np.ndarray
    first: int
    reach: int
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
        self._count = {source: np.zeros(self.rows, int) for source in self._sources}  # fits that have scored a row, or are about to
        self._mean = {source: np.full((self.rows, self.width), np.nan, np.float32) for source in self._sources}
        self._prediction = np.full((self.rows, self.width), np.nan, np.float32)
        self._doubt = self.doubt(self._prediction)
        self._patterns: list[Pattern] = [NOTHING]
        self._pattern = np.zeros(self.rows, int)  # index into _patterns
        self._first = {source: np.zeros(self.rows) for source in self._sources}  # gain of a source's first fit, …
        self._stale = {source: np.ones(self.rows, bool) for source in self._sources}  # … where it is not to be computed anew
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
        self._recount(work.source, rows)

    def release(self, work: Pass, rows: np.ndarray) -> None:
        """These rows are not being scored any more."""
        self._mask(self._taken, work)[rows] = False
        self._recount(work.source, rows)

    def record(self, work: Pass, rows: np.ndarray, prediction: np.ndarray) -> None:
        """Predictions (n, C) of these rows have come; a row that is not finite was tried and is left out."""
        self._mask(self._tried, work)[rows] = True
        scores = self._scores.setdefault(work, np.full((self.rows, self.width), np.nan, np.float32))
        scores[rows] = np.where(np.isfinite(prediction).all(-1, keepdims=True), prediction, np.nan)
        self.release(work, rows)
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
        rows: dict[str, int] = {}
        for work in self._works(self._core):
            if count := int((self._open(work) | self._mask(self._taken, work)).sum()):
                rows[work.member] = rows.get(work.member, 0) + count
        return rows

    def player(self, name: str) -> Player:
        """The player of that name."""
        return self._by_name[name]

    @property
    def core(self) -> frozenset[str]:
        """The sources that the final blend uses."""
        return self._core

    # --- what is next ------------------------------------------------------------------------------------------------------------

    def next(self, loaded: Pass | None, remaining: float, slots: int = 1) -> Choice | None:
        """The best use of a free slot that has this pass's fit loaded; None if nothing that may end in time has a positive gain."""
        if remaining <= 0:
            return None
        wanted = self._decide(remaining * slots)
        found = list(self._candidates(wanted, loaded, remaining, slots))
        found = found or list(self._candidates(frozenset(self._sources) - wanted, loaded, remaining, slots))  # better than to stop early
        if not found:
            return None
        best, *others = sorted(found, key=lambda candidate: -candidate.rate)
        other = next((other for other in others if other.work.source != best.work.source), None)
        reach = max(best.reach, int((best.rates >= other.rate).sum()) if other else len(best.rows))  # one retrieval for all that comes before the other
        prepare = best.rows[:reach][best.missing[:reach]]
        return Choice(best.work, best.rows[: best.first], prepare, best.gain, best.forecast, self._explain(best, len(prepare), other))

    def _works(self, sources: Collection[str]) -> Iterator[Pass]:
        """The passes of these sources that could still score something. A view that stands in for the full one is worth one fit."""
        for player in self.players:
            for view in self._views[player.name] if player.name not in self.dropped else ():
                if Pass(player.name, "", view).source in sources:
                    several = view == self._views[player.name][0] or view in player.more
                    yield from (Pass(player.name, fit, view) for fit in (player.fits if several else player.fits[:1]))

    def _candidates(self, sources: Collection[str], loaded: Pass | None, remaining: float, slots: int) -> Iterator[_Candidate]:
        """What a slot could do next: with rows that are ready, and with rows whose contexts would be retrieved first."""
        untouched: set[str] = set()
        for work in self._works(sources):
            key, ready = self._by_name[work.member].key, loaded is not None and (loaded.member, loaded.fit) == work[:2]
            if not ready and work not in self._tried and work not in self._taken:
                if work.source in untouched:
                    continue  # as good as the fit before
                untouched.add(work.source)
            gain = self._gain(work)
            rows = np.flatnonzero(self._open(work) & (gain > 0))
            missing = ~self._fetched[key][rows] if key else np.zeros(len(rows), bool)
            plans = [] if missing.all() else [(rows[~missing], missing[~missing], not ready)]
            if missing.any() and key not in self._busy_keys:
                plans.append((rows, missing, True))  # retrieval takes the member's place in memory
            for some, first, load in plans:
                if candidate := self._candidate(work, some, gain[some], first, load, remaining, slots):
                    yield candidate

    def _candidate(
        self, work: Pass, rows: np.ndarray, gain: np.ndarray, missing: np.ndarray, load: bool, remaining: float, slots: int
    ) -> _Candidate | None:
        player = self._by_name[work.member]
        loads, token = _levels(player.load.forecast() if load else Interval(0, 0, 0)), _levels(player.token.forecast())
        fetch = _levels(self.fetch[player.key].forecast() if player.key and missing.any() else Interval(0, 0, 0))
        tokens = player.sizes[work.view][rows]
        alone = gain / np.maximum(token[_MID] * tokens + fetch[_MID] * missing, 1e-12)
        order = np.argsort(-alone, kind="stable")
        rows, missing, alone = rows[order], missing[order], alone[order]
        gain, tokens, fetches = np.cumsum(gain[order]), np.cumsum(tokens[order]), np.cumsum(missing)
        ends = [loads[k] + token[k] * tokens + fetch[k] * fetches for k in range(len(_CHANCES))]
        limit, chance = next(((n, p) for end, p in zip(ends, _CHANCES, strict=True) if (n := int(np.searchsorted(end, remaining, "right")))), (0, 0.0))
        if not limit or (load and self._others_finish(work, loads[_MID], token[_MID] * tokens[-1], remaining)):
            return None
        rates = gain[:limit] / np.maximum(ends[_MID][:limit], 1e-12)
        reach = int(rates.argmax()) + 1 if load else 1  # what is paid once is worth it for many rows
        seconds = tokens * (token[_MID] if player.token.measurements else token[_HIGH])
        count = _chunk(seconds, remaining, slots, limit)
        forecast = Interval(*(float(ends[k][count - 1]) for k in (_LOW, _MID, _HIGH)))
        rate = chance * float(rates[reach - 1])
        return _Candidate(work, rows[:limit], missing[:limit], alone[:limit], count, reach, float(gain[count - 1]), forecast, rate)

    def _others_finish(self, work: Pass, load: float, rest: float, remaining: float) -> bool:
        """Whether slots that have scored with this pass, and go on, will be through with the rest before this slot could begin."""
        return rest <= min(load, remaining) and bool(self._mask(self._taken, work).any()) and bool(self._mask(self._tried, work).any())

    def _open(self, work: Pass) -> np.ndarray:
        """Rows (N,) that this pass could still score: bool."""
        can = ~(self._mask(self._tried, work) | self._mask(self._taken, work))
        full = Pass(work.member, "", FULL).source
        if work.source != full and not self._is_more(work.source):
            can &= self._count[full] == 0 if full in self._count else True
            if work.view != self._views[work.member][0]:
                can &= self._count[work.source] == 0
        return can

    def _gain(self, work: Pass) -> np.ndarray:
        """Expected gain (N,) of scoring each row."""
        source, count = work.source, self._count[work.source]
        gain = self._first_gain(source)
        if count.any():
            gain = np.where(count > 0, self._repeat_gain(source, count), gain)
        return np.maximum(gain, _LEAST_GAIN) if source in self._core else gain

    def _first_gain(self, source: str) -> np.ndarray:
        """Of the source's first fit (N,)."""
        gain, rows = self._first[source], np.flatnonzero(self._stale[source])
        for number in np.unique(self._pattern[rows]).tolist():
            before = self._patterns[number]
            after = self._effective(before | {source})
            here = rows[self._pattern[rows] == number]
            gain[here] = self.gains.curve(before, after)(self._doubt[here]) if after != before else 0.0
        self._stale[source][rows] = False
        return gain

    def _repeat_gain(self, source: str, count: np.ndarray) -> np.ndarray:
        """Of one more fit of a source (N,): averaging k predictions takes 1/k of what varies between them away."""
        second = (_REPEAT * _REPEAT_ROWS + self._regret_sum) / (_REPEAT_ROWS + self._regret_rows)
        weights = self.blend.weights(self._core or frozenset(self._sources))
        share = weights.get(source, 0.0) / (sum(weights.values()) or 1.0)
        count = np.maximum(count, 1)
        return second * share * 2.0 / (count * (count + 1)) * self._doubt / max(float(self._doubt.mean()), 1e-6)

    def _explain(self, best: _Candidate, contexts: int, other: _Candidate | None) -> str:
        text = f"contexts of {contexts} rows for " if contexts else ""
        text += f"{best.work.member} {best.work.fit} {best.work.view} on {best.first} rows: +{best.gain / self.rows:.5f} in {best.forecast.mid:.1f} s"
        text += f" ({best.forecast.low:.1f} to {best.forecast.high:.1f}), {best.rate / self.rows:.2e} per s"
        return text + (f"; next best {other.work.source} with {other.rate / self.rows:.2e}" if other else "; nothing else to do")

    # --- which sources are worth having ------------------------------------------------------------------------------------------

    def _decide(self, seconds: float) -> frozenset[str]:
        """The sources to score in this many seconds; decided again when the forecast of the whole has moved."""
        steps = {work.source: self._step(work) for work in self._works(self._sources)}
        whole = seconds / self.rows + sum(self._spent(source, step) for source, step in steps.items())
        horizon = whole / max(sum(step.whole for source, step in steps.items() if source in self._core), 1e-12)
        if self._wanted is None or abs(horizon / self._wanted_for - 1) > _MOVED:
            wanted = worth_having(self.gains, steps, self._core, self._effective, whole)
            if wanted != self._wanted:
                left_out = sorted(set(steps) - wanted)
                self.on_decision(f"worth having in {seconds:.0f} s: {', '.join(sorted(wanted))}" + (f"; left out: {', '.join(left_out)}" if left_out else ""))
            self._wanted, self._wanted_for = wanted, horizon
        return self._wanted

    def _step(self, work: Pass) -> Step:
        """Mean cost of a source, per row of the test set."""
        player = self._by_name[work.member]
        fetch = self.fetch[player.key].forecast().mid * float((~self._fetched[player.key]).mean()) if player.key else 0.0
        seconds = player.token.forecast(float(player.sizes[work.view].mean())).mid
        return Step(player.load.forecast().mid / self.rows, seconds, player.key or "", fetch)

    def _spent(self, source: str, step: Step) -> float:
        """What of a step has been paid for."""
        share = float(self._has[source].mean())
        return step.load + share * step.seconds if share else 0.0

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
        """What counts of a pattern: the full view instead of cheaper ones; once all sources of the final blend are there, nothing else.

        What members scored that were given up later still counts: the blend that was planned for had a place for it.
        """
        kept = frozenset(source for source in pattern if source == (member := source.partition("@")[0]) or member not in pattern or self._is_more(source))
        if self._core and self._core <= kept:
            return self._core | {source for source in kept if source.partition("@")[0] in self.dropped}
        return kept

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

    def _recount(self, source: str, rows: np.ndarray) -> None:
        """How many fits of a source have scored each of these rows, or are about to."""
        if source in self._count:
            member, _, view = source.partition("@")
            count = np.zeros(len(rows), int)
            for fit in self._by_name[member].fits:
                work = Pass(member, fit, view or FULL)
                if work in self._taken:
                    count += self._taken[work][rows]
                if work in self._scores:
                    count += np.isfinite(self._scores[work][rows, 0])
            self._count[source][rows] = count

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
        for stale in self._stale.values():
            stale[rows] = True


def _levels(forecast: Interval) -> tuple[float, ...]:
    """The forecast that holds with each of _CHANCES; the last as far below the low end as that is below the middle, and as far again."""
    return forecast.high, forecast.mid, forecast.low, forecast.low**2 / forecast.mid if forecast.mid else 0.0


def _chunk(seconds: np.ndarray, remaining: float, slots: int, limit: int) -> int:
    """How many rows make a chunk. seconds: (n,) until each is done. Towards the end of a pass, smaller ones let several slots end together."""
    least, most = _CHUNK_S
    count = int(np.searchsorted(seconds, np.clip(remaining / _CHUNKS, least, most), "right"))
    if slots > 1:
        count = min(count, max(len(seconds) // (2 * slots), int(np.searchsorted(seconds, least, "right"))))
    return int(np.clip(count, 1, limit))
