"""Which member scores which rows next: the most expected gain in the metric per second. Knows no process, file or clock; time comes in as numbers.

Three questions, answered anew before every chunk. Which sources are worth having at all in the time there is: found by playing the run through on
the OOF rows (`lookahead`). What is a second worth: the gain per second of the last row that there is time for, when all that there is to do is taken
in order of it (the multiplier of a knapsack). A slot stays with what it has loaded as long as rows are worth that, so that nothing is loaded twice
for a few rows; then it takes the pass with the highest gain per second, loading included. How many rows: what is likely to end in time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from kit.budget import Cost, Interval
from kit.inference.cost import FETCH_S
from kit.inference.gains import NOTHING, Gains, Pattern, Pooling
from kit.inference.lookahead import Step, insurance, together, worth_having
from kit.tasks import mean_of_fits

log = logging.getLogger(__name__)

FULL = "full"
_CHUNKS = 50  # a chunk takes at most this part of the time left, …
_CHUNK_S = (2.0, 20.0)  # … and lasts so many seconds at least and at most: long enough to cost nothing extra, short enough to change plans
_CHANCES = (0.95, 0.5, 0.05, 0.0005)  # that work ends by the high end, the middle, the low end, and half of that way further below
_HIGH, _MID, _LOW = 0, 1, 2
_HALVINGS = 16  # steps of the search for what a second is worth
_LEAST_GAIN = 1e-9  # of a source that the final blend uses: with time to spare, all of it is scored
_REPEAT = 0.005  # gain of a member's second fit, as long as no row was scored by two; the k-th brings 1/k(k-1) of twice that
_REPEAT_ROWS = 50  # rows with two fits that count as much as this guess
_TRIAL_ROWS = 16  # enough to see what a token costs
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
    scored beside the full one; others take its place. key: which contexts it needs. read: seconds to read all layers, for a member that streams
    them: every order takes that long at least, so it gets all of its rows in one.
    """

    name: str
    fits: tuple[str, ...]
    sizes: dict[str, np.ndarray]
    load: Cost
    token: Cost
    more: frozenset[str] = frozenset()
    key: str | None = None
    read: Cost | None = None


@dataclass(frozen=True)
class Choice:
    """What to do next. rows: to be scored. prepare: rows that need their contexts first. gain: expected sum over `rows`. why: for the log.

    trial: with these rows it is to be seen whether the member streams its layers, and what that costs.
    """

    work: Pass
    rows: np.ndarray
    prepare: np.ndarray
    gain: float
    forecast: Interval
    why: str
    trial: bool = False


class _Patch(NamedTuple):
    """Rows that a pass could score, in falling order of their gain per second.

    missing: which lack their contexts. alone: gain per second of each. gains: summed up to each. ends: seconds until each is done, for each of
    _CHANCES; loading included where the fit is not loaded. later: fits of the same source that would come first.
    """

    work: Pass
    loaded: bool
    rows: np.ndarray
    missing: np.ndarray
    alone: np.ndarray
    gains: np.ndarray
    ends: list[np.ndarray]
    later: int

    def reach(self, worth: float) -> int:
        """How many rows are worth their seconds, if a second is worth so much."""
        return int(np.searchsorted(-self.alone, -worth, "right"))


class _Candidate(NamedTuple):
    """A patch of which `limit` rows may end in time; rate: the highest gain per second over its first rows, times the chance that it comes to that."""

    patch: _Patch
    limit: int
    best: int
    rate: float


@dataclass
class Planner:
    """The state of a run, and the choice of what is next.

    blend: fitted on the members' OOF; targets, merit, doubt, regret, average: of the OOF rows and the task. rows, width: shape (N, C) of the test predictions.
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
    average: Callable[[np.ndarray], np.ndarray] = mean_of_fits
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
        self._insurance: str | None = None
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
        if work.source in self._has and len(rows):
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

    def lost(self) -> dict[str, int]:
        """Rows × fits whose scores did not come out finite, by member."""
        rows: dict[str, int] = {}
        for work, scores in self._scores.items():
            if count := int((self._tried[work] & ~np.isfinite(scores).all(-1)).sum()):
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
        if self._insurance and (self._pattern == 0).any():
            wanted |= {self._insurance}
        rest = frozenset(self._sources) - wanted
        for sources in (wanted, rest):  # better to score the rest than to stop early
            patches = list(self._patches(sources, loaded))
            found = [found for patch in patches if (found := self._candidate(patch, remaining))]
            if found:
                return self._choose(found, _worth(patches, remaining * slots), remaining, slots)
        return None

    def _choose(self, found: list[_Candidate], worth: float, remaining: float, slots: int) -> Choice:
        """Stay with what is loaded as long as it is worth the time, otherwise the highest rate."""
        stay = [candidate for candidate in found if candidate.patch.loaded and candidate.patch.alone[0] >= worth]
        best = max(stay or found, key=lambda candidate: candidate.rate)
        patch, player = best.patch, self._by_name[best.patch.work.member]
        reach = patch.reach(worth) or best.limit if patch.loaded else max(best.best, patch.reach(worth))
        token = player.token.forecast().mid if player.token.measurements else player.token.forecast().high
        seconds = token * np.cumsum(player.sizes[patch.work.view][patch.rows])
        trial = player.read is not None and not player.read.measurements
        size = _TRIAL_ROWS if trial else reach if player.read else _chunk(seconds, reach, remaining, slots)
        first = min(size, best.limit)
        forecast = Interval(*(float(patch.ends[k][first - 1]) for k in (_LOW, _MID, _HIGH)))
        others = [candidate for candidate in found if candidate.patch.work.source != patch.work.source]
        prepare = patch.rows[:reach][patch.missing[:reach]]
        choice = Choice(patch.work, patch.rows[:first], prepare, float(patch.gains[first - 1]), forecast, "", trial)
        return replace(choice, why=self._explain(choice, best, worth, max(others, key=lambda candidate: candidate.rate, default=None)))

    def _works(self, sources: Collection[str]) -> Iterator[Pass]:
        """The passes of these sources that could still score something. A view that stands in for the full one is worth one fit."""
        for player in self.players:
            for view in self._views[player.name] if player.name not in self.dropped else ():
                if Pass(player.name, "", view).source in sources:
                    several = view == self._views[player.name][0] or view in player.more
                    yield from (Pass(player.name, fit, view) for fit in (player.fits if several else player.fits[:1]))

    def _patches(self, sources: Collection[str], loaded: Pass | None) -> Iterator[_Patch]:
        """What a slot could do: with rows that are ready, and with all, where contexts would be retrieved first."""
        before: dict[str, int] = {}
        for work in self._works(sources):
            key, ready = self._by_name[work.member].key, loaded is not None and (loaded.member, loaded.fit) == work[:2]
            later = before.get(work.source, 0) if not ready and work not in self._tried and work not in self._taken else 0
            gain = self._gain(work, later)
            rows = np.flatnonzero(self._open(work) & (gain > 0))
            if not len(rows):
                continue
            before[work.source] = before.get(work.source, 0) + 1
            missing = ~self._fetched[key][rows] if key else np.zeros(len(rows), bool)
            if missing.any() and key not in self._busy_keys:
                yield self._patch(work, rows, gain[rows], missing, False, later)  # retrieval takes the member's place in memory
            if not missing.all():
                yield self._patch(work, rows[~missing], gain[rows[~missing]], missing[~missing], ready, later)

    def _patch(self, work: Pass, rows: np.ndarray, gain: np.ndarray, missing: np.ndarray, loaded: bool, later: int) -> _Patch:
        player = self._by_name[work.member]
        load, token = _levels(player.load.forecast()) if not loaded else (0.0,) * len(_CHANCES), _levels(player.token.forecast())
        fetch = _levels(self.fetch[player.key].forecast()) if player.key and missing.any() else (0.0,) * len(_CHANCES)
        tokens = player.sizes[work.view][rows]
        alone = gain / np.maximum(token[_MID] * tokens + fetch[_MID] * missing, 1e-12)
        order = np.argsort(-alone, kind="stable")
        done, fetches = np.cumsum(tokens[order]), np.cumsum(missing[order])
        read = _levels(player.read.forecast()) if player.read else (0.0,) * len(_CHANCES)
        ends = [load[k] + np.maximum(read[k], token[k] * done) + fetch[k] * fetches for k in range(len(_CHANCES))]
        return _Patch(work, loaded, rows[order], missing[order], alone[order], np.cumsum(gain[order]), ends, later)

    def _candidate(self, patch: _Patch, remaining: float) -> _Candidate | None:
        """None if it would not end in time, or is left to others, or comes later."""
        if patch.later or (not patch.loaded and self._others_finish(patch, remaining)):
            return None
        read = self._by_name[patch.work.member].read
        several = len(_CHANCES) if read is None else 1 if read.measurements else 2  # a pass over all layers that ends too late is lost whole
        for end, chance in zip(patch.ends[:several], _CHANCES, strict=False):
            if limit := int(np.searchsorted(end, remaining, "right")):
                rates = patch.gains[:limit] / np.maximum(patch.ends[_MID][:limit], 1e-12)
                best = int(rates.argmax())
                return _Candidate(patch, limit, best + 1, chance * float(rates[best]))
        return None

    def _others_finish(self, patch: _Patch, remaining: float) -> bool:
        """Whether slots that have scored with this pass, and go on, will be through with the rest before this slot could begin."""
        load = self._by_name[patch.work.member].load.forecast().mid
        going_on = bool(self._mask(self._taken, patch.work).any()) and bool(self._mask(self._tried, patch.work).any())
        return going_on and patch.ends[_MID][-1] - load <= min(load, remaining)

    def _open(self, work: Pass) -> np.ndarray:
        """Rows (N,) that this pass could still score: bool."""
        can = ~(self._mask(self._tried, work) | self._mask(self._taken, work))
        full = Pass(work.member, "", FULL).source
        if work.source != full and not self._is_more(work.source):
            can &= self._count[full] == 0 if full in self._count else True
            if work.view != self._views[work.member][0]:
                can &= self._count[work.source] == 0
        return can

    def _gain(self, work: Pass, later: int = 0) -> np.ndarray:
        """Expected gain (N,) of scoring each row, once `later` more fits of the source have scored it."""
        source, count = work.source, self._count[work.source] + later
        gain = self._first_gain(source)
        if source == self._insurance and source not in (self._wanted or ()):
            return np.where((self._pattern == 0) & (count == 0), gain, 0.0)
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
        share = abs(weights.get(source, 0.0)) / (sum(map(abs, weights.values())) or 1.0)
        count = np.maximum(count, 1)
        return second * share * 2.0 / (count * (count + 1)) * self._doubt / max(float(self._doubt.mean()), 1e-6)

    def _explain(self, choice: Choice, best: _Candidate, worth: float, other: _Candidate | None) -> str:
        text = f"contexts of {len(choice.prepare)} rows for " if len(choice.prepare) else ""
        text += "a trial of " if choice.trial else ""
        text += f"{' '.join(choice.work)} on {len(choice.rows)} rows: +{choice.gain / self.rows:.5f} in {choice.forecast.mid:.1f} s"
        text += f" ({choice.forecast.low:.1f} to {choice.forecast.high:.1f}), {best.rate / self.rows:.2e} per s where a second is worth {worth / self.rows:.2e}"
        return text + (f"; next best {other.patch.work.source} with {other.rate / self.rows:.2e}" if other else "; nothing else to do")

    # --- which sources are worth having ------------------------------------------------------------------------------------------

    def _decide(self, seconds: float) -> frozenset[str]:
        """The sources to score in this many seconds; decided again when the forecast of the whole has moved."""
        steps = {work.source: self._step(work) for work in self._works(self._sources)}
        whole = seconds / self.rows + sum(self._spent(source, step) for source, step in steps.items())
        horizon = whole / max(together(step for source, step in steps.items() if source in self._core), 1e-12)
        if self._wanted is None or abs(horizon / self._wanted_for - 1) > _MOVED:
            wanted = worth_having(self.gains, steps, self._core, self._effective, whole)
            self._insurance = insurance(steps, whole) if (self._pattern == 0).all() else self._insurance
            if wanted != self._wanted:
                parts = {"first of all": [self._insurance] if self._insurance else [], "left out": sorted(set(steps) - wanted)}
                more = "".join(f"; {name}: {', '.join(sources)}" for name, sources in parts.items() if sources)
                self.on_decision(f"worth having in {seconds:.0f} s: {', '.join(sorted(wanted))}{more}")
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
        self._core = frozenset(name for name in names if weights[name]) or names
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
        self._mean[work.source][rows] = self.average(scores)
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


def _chunk(seconds: np.ndarray, reach: int, remaining: float, slots: int) -> int:
    """How many of the rows worth their time make a chunk. seconds: (n,) until each is done.

    Towards the end of a pass, smaller ones let several slots end together.
    """
    least, most = np.searchsorted(seconds, np.clip([0, remaining / _CHUNKS], *_CHUNK_S), "right")
    share = len(seconds) // (2 * slots) if slots > 1 else most
    return max(1, int(min(most, max(least, min(reach, share)))))


def _worth(patches: Sequence[_Patch], seconds: float) -> float:
    """What a second is worth if there are so many: the gain per second that the last row still brings; 0 if there is time for everything."""
    several = {patch.work: patch for patch in reversed(patches)}.values()  # with contexts still to come, where there are two of a work
    if sum(patch.ends[_MID][-1] for patch in several) <= seconds:
        return 0.0
    low, high = 0.0, max(float(patch.alone[0]) for patch in several)
    for _ in range(_HALVINGS):
        worth = (low + high) / 2 if low else high / 10
        if sum(_seconds_at(patch, worth) for patch in several) > seconds:
            low = worth
        else:
            high = worth
    return high


def _seconds_at(patch: _Patch, worth: float) -> float:
    """What a patch takes if a second is worth so much."""
    reach = patch.reach(worth)
    seconds = float(patch.ends[_MID][reach - 1]) if reach else 0.0
    return seconds if reach and patch.gains[reach - 1] >= worth * seconds else 0.0
