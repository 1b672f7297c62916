"""Runs on a clock that nobody waits for: the real planner, blend and dispatch, with scoring processes that are made up.

Owns: the simulated clock and crew, made-up competitions, and what thousands of runs of them come to. Does not know real members, files or devices.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from kit import assemble
from kit.budget import Budget, Cost
from kit.inference.blend import Blend
from kit.inference.crew import Event, Fetch, Order
from kit.inference.dispatch import Dispatch, Settings
from kit.inference.planner import FULL, Pass, Planner, Player

FaultKind = Literal["dies", "raises", "hangs", "nan", "memory"]
_INSTANT = 1e-6  # by this much the clock moves on even if nobody asks: time never stands still
_HALF = ("fp16", "bf16")
_TRIAL = 0.05  # of a pass over all layers


# --- the clock and the crew ----------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """A monotonic clock in seconds that stands still until it is moved."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Speed:
    """Speed of a device over time, 1 as expected: factors[0] until times[0], then factors[1] …"""

    times: tuple[float, ...] = ()
    factors: tuple[float, ...] = (1.0,)

    def end(self, start: float, work: float) -> float:
        """When work that takes so many seconds at speed 1 is done."""
        now = start
        for until, factor in zip((*self.times, np.inf), self.factors, strict=True):
            if until <= now:
                continue
            if work <= (until - now) * factor:
                return now + work / factor
            work -= (until - now) * factor
            now = until
        raise AssertionError("a device never stops")


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a member, once it has scored `after` rows.

    memory: orders fail whose batch is above `most_tokens` full-view fp32 tokens; 0: all of them. Others happen once and for all.
    """

    kind: FaultKind
    after: int = 0
    most_tokens: int = 0


@dataclass(frozen=True)
class Actor:
    """A simulated member. predictions: (N, C) by (fit, view). sizes: tokens per row (N,) by view. token_s, load_s: true seconds at speed 1.

    start_s: seconds to start its process, when the slot had another one. read_s: seconds to read all layers, of one that streams them.
    """

    predictions: Mapping[tuple[str, str], np.ndarray]
    sizes: Mapping[str, np.ndarray]
    token_s: float
    load_s: float
    start_s: float = 0.0
    fault: Fault | None = None
    read_s: float = 0.0


class SimulatedCrew:
    """A Crew of actors (by member name) on a simulated clock: `wait` moves it to the next event.

    speeds: of each slot. fetch_s: seconds per context, by key (inf: its retrieval fails). noise: by how much the logarithm of an order's seconds varies.
    """

    def __init__(
        self,
        clock: Clock,
        actors: Mapping[str, Actor],
        slots: Sequence[str] = ("cpu",),
        *,
        speeds: Sequence[Speed] | None = None,
        fetch_s: Mapping[str, float] | None = None,
        noise: float = 0.0,
        seed: int = 0,
        beat_s: float = 10.0,
        dismiss_s: float = 0.1,
    ) -> None:
        self.slots = tuple(slots)
        self._clock, self._actors, self._fetch_s = clock, actors, fetch_s or {}
        self._speeds = speeds or [Speed()] * len(self.slots)
        self._noise, self._rng = noise, np.random.default_rng(seed)
        self._beat_s, self._dismiss_s = beat_s, dismiss_s
        self._process: dict[int, tuple[str, str]] = {}  # member or key, and the fit that is loaded
        self._coming: dict[int, list[tuple[float, Event]]] = {slot: [] for slot in range(len(self.slots))}
        self._scored: dict[str, int] = {}

    def send(self, slot: int, order: Order | Fetch) -> None:
        """Plan the events of an order."""
        assert not self._coming[slot], f"slot {slot} is busy"
        if isinstance(order, Fetch):
            self._send_fetch(slot, order)
        else:
            self._send_order(slot, order)

    def wait(self, seconds: float) -> list[Event]:
        """The next events; [] after `seconds`."""
        due = min((events[0][0] for events in self._coming.values() if events), default=np.inf)
        end = max(self._clock.now + seconds, self._clock.now + _INSTANT)
        self._clock.now = max(self._clock.now, min(due, end))
        happened: list[Event] = []
        for slot, events in self._coming.items():
            happened += [event for at, event in events if at <= self._clock.now]
            self._coming[slot] = [(at, event) for at, event in events if at > self._clock.now]
        return happened

    def dismiss(self, slot: int) -> None:
        """End the slot's process; nothing more is heard of its order."""
        self._coming[slot] = []
        self._process.pop(slot, None)
        self._clock.now += self._dismiss_s

    def close(self) -> None:
        """End all processes."""
        for slot in list(self._process):
            self.dismiss(slot)

    def _send_fetch(self, slot: int, order: Fetch) -> None:
        self._process[slot] = (order.key, "")
        each = self._fetch_s.get(order.key, 0.0)
        if np.isinf(each):
            self._plan(slot, order.serial, 0.0, 1.0, Event(slot, order.serial, "failed", why="OSError: no such index"))
        else:
            self._plan(slot, order.serial, 0.0, each * len(order.rows), Event(slot, order.serial, "fetched", rows=order.rows))

    def _send_order(self, slot: int, order: Order) -> None:
        actor, process = self._actors[order.member], self._process.get(slot)
        load_s = actor.load_s if process != (order.member, order.fit) else 0.0
        load_s += actor.start_s if process is None or process[0] != order.member else 0.0
        self._process[slot] = (order.member, order.fit)
        rows = np.array(order.rows)
        compute = actor.token_s * float(actor.sizes[order.view][rows].sum()) * float(np.exp(self._noise * self._rng.normal()))
        event = self._outcome(slot, order, actor)
        work = max(compute, actor.read_s)
        if actor.read_s and event is not None and event.kind == "scored":
            event = replace(event, pace=(compute, actor.read_s))
            if order.trial:
                event, work = replace(event, rows=(), prediction=event.prediction[:0]), _TRIAL * work  # type: ignore[index]
        if event is not None and event.kind == "scored":
            self._scored[order.member] = self._scored.get(order.member, 0) + len(rows)
        self._plan(slot, order.serial, load_s, work if event is None or event.kind == "scored" else work / 2, event)

    def _outcome(self, slot: int, order: Order, actor: Actor) -> Event | None:
        """The last event of an order; None if nothing is ever heard of it."""
        rows, fault = order.rows, actor.fault
        prediction = actor.predictions[order.fit, order.view][list(rows)]
        strikes = fault is not None and self._scored.get(order.member, 0) >= fault.after
        if fault is not None and strikes:
            if fault.kind == "hangs":
                return None
            if fault.kind == "memory" and self._batch(order, actor) > fault.most_tokens:
                return Event(slot, order.serial, "failed", why="OutOfMemoryError: out of memory", memory=True)
            if fault.kind in ("dies", "raises"):
                why = "the process was ended by signal 11" if fault.kind == "dies" else "RuntimeError: made up"
                return Event(slot, order.serial, "failed", why=why)
            if fault.kind == "nan":
                prediction = np.full_like(prediction, np.nan)
        tokens = int(actor.sizes[order.view][list(rows)].sum())
        return Event(slot, order.serial, "scored", tokens=tokens, rows=rows, prediction=prediction)

    @staticmethod
    def _batch(order: Order, actor: Actor) -> float:
        """Memory of a batch, in full-view fp32 tokens."""
        share = float(actor.sizes[order.view].mean() / actor.sizes[FULL].mean())
        return order.batch_tokens * share * (0.5 if order.precision in _HALF else 1.0)

    def _plan(self, slot: int, serial: int, load_s: float, work: float, last: Event | None) -> None:
        """Beats while it works, and the last event."""
        begin = self._clock.now + load_s
        end = self._speeds[slot].end(begin, work)
        if last is not None:
            beats = np.arange(begin + self._beat_s, end, self._beat_s).tolist()
            last = replace(last, seconds=end - begin, load_s=load_s)
            self._coming[slot] = [*((at, Event(slot, serial, "beat")) for at in beats), (end, last)]


class Silent:
    """A listener that only keeps the decisions."""

    def __init__(self) -> None:
        self.decisions: list[str] = []

    def scored(self, work: Pass, rows: np.ndarray, prediction: np.ndarray) -> None:
        """Nothing to keep."""

    def fetched(self, key: str, rows: np.ndarray, hints: Mapping[str, np.ndarray], chars: np.ndarray) -> None:
        """Nothing to keep."""

    def decided(self, text: str) -> None:
        """Keep it."""
        self.decisions.append(text)


# --- made-up competitions ------------------------------------------------------------------------------------------------------------

_OPTIONS = 5
_SHARED, _OWN, _VIEW, _FIT = 0.6, 0.7, 0.35, 0.35  # how much of the logits is noise of the row, of the member, its view, its fit
_LEAST_S = 300.0  # of a budget: of shorter ones the reserve and a loading time leave next to nothing
_FAILS = 0.1  # chance that a member fails
_FETCH_FAILS = 0.03
_BATCH_TOKENS = 4096
_KEY = "contexts"


@dataclass(frozen=True)
class Law:
    """What a made-up member is like: skill by view, how sure it is of itself, its fits; seconds per row, to load, to start; contexts it needs."""

    name: str
    skills: dict[str, float]
    sharpness: float = 1.0
    fits: tuple[str, ...] = ("fold0",)
    row_s: float = 0.0
    load_s: float = 0.0
    start_s: float = 0.0
    key: str | None = None


@dataclass
class _World:
    """A made-up competition: laws of its members, OOF blend and targets, and the truth on its test set."""

    laws: list[Law]
    blend: Blend
    oof_targets: np.ndarray
    targets: np.ndarray
    truth: dict[str, dict[tuple[str, str], np.ndarray]]
    sizes: dict[str, dict[str, np.ndarray]]

    @property
    def full_s(self) -> float:
        """Seconds for everything on one slot, as expected."""
        return sum(len(law.fits) * (law.load_s + law.row_s * len(self.targets)) for law in self.laws)


@dataclass(frozen=True)
class Run:
    """One simulated run. usable_s: the budget without its reserve. used, useful: share of it that slots worked, and worked for a result."""

    on_time: bool
    usable_s: float
    used: float
    useful: float
    left: bool
    metric: float
    crash: str = ""


@dataclass(frozen=True)
class Report:
    """What simulated runs came to."""

    runs: list[Run] = field(repr=False)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Run]:
        """Runs that crashed or ended late."""
        return [run for run in self.runs if run.crash or not run.on_time]

    def summary(self) -> dict[str, Any]:
        """on_time: share that ended inside the budget. used_*, useful_*: of the runs that ended with work of positive expected gain left."""
        left = [run for run in self.runs if run.left]
        shares = {name: np.array([getattr(run, name) for run in left] or [np.nan]) for name in ("used", "useful")}
        return {
            "runs": len(self.runs),
            "on_time": float(np.mean([run.on_time for run in self.runs])),
            **{f"{name}_median": float(np.median(values)) for name, values in shares.items()},
            **{f"{name}_p01": float(np.quantile(values, 0.01)) for name, values in shares.items()},
            "left_runs": len(left),
            "metric_mean": float(np.mean([run.metric for run in self.runs])),
            "crashes": sum(bool(run.crash) for run in self.runs),
            "seconds": self.seconds,
        }


def simulate(runs: int = 2000, seed: int = 0, *, per_world: int = 20, processes: int | None = None) -> Report:
    """Made-up competitions, each run several times with other budgets, devices and faults. processes: as many as there are cores."""
    clock = Budget(used_s=0)
    worlds = [(seed, number, min(per_world, runs - number)) for number in range(0, runs, per_world)]
    done: list[Run] = []
    with tqdm(total=runs, desc="simulate", unit="run", disable=None) as bar:
        for several in _map(_run_world, worlds, processes or os.cpu_count() or 1):
            done += several
            bar.update(len(several))
    return Report(done, clock.elapsed())


def _map(work: Callable[..., list[Run]], tasks: list[tuple[int, int, int]], processes: int) -> Any:
    if processes == 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, tasks)


def _run_world(task: tuple[int, int, int]) -> list[Run]:
    seed, number, runs = task
    rng = np.random.default_rng([seed, number])
    world = _make_world(rng)
    return [_try_run(world, np.random.default_rng([seed, number, run])) for run in range(runs)]


def _try_run(world: _World, rng: np.random.Generator) -> Run:
    try:
        return _run(world, rng)
    except Exception:  # a crash is a result: it is counted and shown
        return Run(False, 0.0, 0.0, 0.0, False, 0.0, traceback.format_exc())


def _make_world(rng: np.random.Generator) -> _World:
    rows, oof_rows = _log_uniform(rng, *((50, 500) if rng.random() < 0.9 else (500, 4000))), int(rng.integers(100, 301))
    laws = [_make_law(f"m{number}", rng) for number in range(rng.choice([1, 2, 3, 4, 5], p=[0.15, 0.3, 0.3, 0.15, 0.1]))]
    oof, oof_targets = score(laws, oof_rows, rng, fits=1)
    truth, targets = score(laws, int(rows), rng, fits=5)
    sources = {Pass(name, "", view).source: values for name, passes in oof.items() for (_, view), values in passes.items()}
    blend = Blend.fit(sources, oof_targets, _task().merit, method="pool")
    full = {law.name: np.exp(rng.normal(6, 0.3, int(rows))) for law in laws}
    shares = {FULL: 1.0, "short": 0.5, "flipped": 1.0}
    sizes = {law.name: {view: full[law.name] * shares[view] for view in law.skills} for law in laws}
    return _World(laws, blend, oof_targets, targets, truth, sizes)


def _make_law(name: str, rng: np.random.Generator) -> Law:
    skill = rng.uniform(0.3, 2.0)
    skills = {FULL: skill}
    if rng.random() < 0.6:
        skills["short"] = skill * rng.uniform(0.6, 0.95)
    if rng.random() < 0.25:
        skills["flipped"] = skill * rng.uniform(0.9, 1.0)
    row_s = float(_log_uniform(rng, 0.05, 2.0)) * skill  # what is better tends to be dearer
    fits = tuple(f"fold{fold}" for fold in range(rng.integers(1, 6)))
    return Law(name, skills, rng.uniform(0.5, 2.0), fits, row_s, rng.uniform(2, 25), rng.uniform(1, 8), _KEY if rng.random() < 0.4 else None)


def score(laws: Sequence[Law], rows: int, rng: np.random.Generator, fits: int) -> tuple[dict[str, dict[tuple[str, str], np.ndarray]], np.ndarray]:
    """Probabilities (N, C) by member and (fit, view), and the right options (N,), drawn from the laws."""
    targets = rng.integers(0, _OPTIONS, rows)
    right = np.eye(_OPTIONS)[targets] * rng.uniform(0.2, 2.0, (rows, 1))
    shape, shared = (rows, _OPTIONS), _SHARED * rng.normal(size=(rows, _OPTIONS))
    scores: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    for law in laws:
        own, noises = _OWN * rng.normal(size=shape), [_FIT * rng.normal(size=shape) for _ in law.fits[:fits]]
        scores[law.name] = {}
        for view, skill in law.skills.items():
            base = skill * right + shared + own + _VIEW * rng.normal(size=shape)
            scores[law.name] |= {(fit, view): _softmax(law.sharpness * (base + noise)) for fit, noise in zip(law.fits, noises, strict=False)}
    return scores, targets


def _run(world: _World, rng: np.random.Generator) -> Run:
    """One run of a world with a budget, devices and faults of its own."""
    clock, slots = Clock(), ("cuda:0", "cuda:1")[: rng.integers(1, 3)]
    budget = Budget(float(world.full_s / len(slots) * _log_uniform(rng, 0.03, 3.0)) + _LEAST_S, used_s=0, clock=clock)
    rows = len(world.targets)
    actors = {law.name: _make_actor(law, world, rng) for law in world.laws}
    speeds = [_make_speed(budget.total_s, rng) for _ in slots]
    fetch_s = {_KEY: float("inf") if rng.random() < _FETCH_FAILS else float(_log_uniform(rng, 0.01, 0.2))}
    crew = SimulatedCrew(clock, actors, slots, speeds=speeds, fetch_s=fetch_s, noise=0.05, seed=int(rng.integers(1 << 30)))
    listener, task = Silent(), _task()
    players = [_make_player(law, world, rng) for law in world.laws]
    planner = Planner(players, world.blend, world.oof_targets, task.merit, task.doubt, task.regret, rows, _OPTIONS, on_decision=listener.decided)
    dispatch = Dispatch(planner, crew, budget, {law.name: Settings(_BATCH_TOKENS) for law in world.laws}, listener)
    dispatch.run()
    ended, usable = budget.elapsed(), budget.total_s - (budget.reserve_s or 0.0)
    busy = {state: sum(span.end - span.start for span in dispatch.spans if span.state == state) for state in ("done", "failed", "cut")}
    whole = usable * len(slots)
    left = bool(planner.left()) or planner.next(None, 1e9, len(slots)) is not None
    metric = float(task.merit(np.nan_to_num(planner.prediction(), nan=1 / _OPTIONS), world.targets).mean())
    return Run(ended <= budget.total_s, usable, min(1.0, sum(busy.values()) / whole), min(1.0, busy["done"] / whole), left, metric)


def _make_actor(law: Law, world: _World, rng: np.random.Generator) -> Actor:
    sizes = world.sizes[law.name]
    fault = None
    if rng.random() < _FAILS:
        kinds: tuple[FaultKind, ...] = ("dies", "raises", "hangs", "nan", "memory")
        after = int(rng.uniform(0, len(world.targets) * len(law.fits)))
        fault = Fault(kinds[rng.integers(len(kinds))], after, int(rng.choice([0, _BATCH_TOKENS // 8, _BATCH_TOKENS // 2])))
    token_s = law.row_s / float(sizes[FULL].mean())
    return Actor(world.truth[law.name], sizes, token_s, law.load_s * rng.uniform(0.5, 1.5), law.start_s * rng.uniform(0.5, 1.5), fault)


def _make_player(law: Law, world: _World, rng: np.random.Generator) -> Player:
    sizes = {view: values * np.exp(rng.normal(0, 0.1, len(values))) for view, values in world.sizes[law.name].items()}
    token = Cost(law.row_s / float(world.sizes[law.name][FULL].mean()))
    return Player(law.name, law.fits, sizes, Cost(law.load_s + law.start_s), token, frozenset({"flipped"}) & law.skills.keys(), law.key)


def _make_speed(total_s: float, rng: np.random.Generator) -> Speed:
    changes = rng.poisson(1.5)
    times = tuple(np.sort(rng.uniform(0, total_s, changes)).tolist())
    return Speed(times, tuple(_log_uniform(rng, 0.3, 3.0, changes + 1).tolist()))


def _log_uniform(rng: np.random.Generator, low: float, high: float, size: int | None = None) -> Any:
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _softmax(scores: np.ndarray) -> np.ndarray:
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    return (odds / odds.sum(-1, keepdims=True)).astype(np.float32)


def _task() -> Any:
    return assemble.task_of_kind("multiple_choice")
