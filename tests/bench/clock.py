"""What the planner is worth, and what running under the clock costs. `make bench-clock`, or `python -m tests.bench.clock --only value|overhead|memory`.

value: real members of different cost on two competitions; their real predictions and costs, measured here once (artifacts/bench/clock-members.npz;
--measure: anew), are replayed on a fake clock under several policies at 10 to 100 % of the full cost: the real planner through the real dispatch,
a cascade of fixed fractions, and all members in order. Once on the test set, and once on OOF rows: blend and gain curves are fitted on one half
and the other half is the test set, for several random halves. Costs are those of 4,000 rows like these, as many as the hidden test set has: with a
few seconds in all, loading would decide. Contexts are there beforehand, for every policy alike.
overhead: wall time of `kit infer` beside a plain loop over the same fits and rows in one process, in turns.
memory: the largest RSS of the parent process with 20,000 rows.
Questions that are no part of the kit come from the folder that KIT_DATA names (default ../shared/data); without it, only the sample competition is used.
Writes artifacts/bench/clock.json and clock-value.png. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from kit import assemble, manifest, runtime
from kit.budget import Budget
from kit.config import Recipe
from kit.data.tables import read_table
from kit.inference import cost
from kit.inference.blend import Blend
from kit.inference.crew import Event, Fetch, Order
from kit.inference.dispatch import Dispatch, Settings
from kit.inference.member import Member, Weighed, weigh
from kit.inference.planner import FULL, Pass, Planner, Player
from kit.inference.scores import Scores
from kit.inference.submission import Submission
from kit.metrics import bootstrap
from kit.report.plots import draw_values
from kit.sample import write_sample
from kit.tasks import Task
from tests.bench import quality

BENCH = Path("artifacts/bench")
RESULTS = BENCH / "clock.json"
MEASURED = BENCH / "clock-members.npz"
PICTURE = BENCH / "clock-value.png"
SHARES = (0.1, 0.25, 0.5, 1.0)
FRACTIONS = (0.4, 0.1)  # of the rows, that the cascade's second and third member score
HIDDEN_ROWS = 4000
HALVINGS = 5
REPEATS = 5
MANY_ROWS = 20_000
MANY_SECONDS = 150
Passes = dict[Pass, np.ndarray]
"""Predictions (N, C) by pass; NaN where a row is not scored."""


# --- the members -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Competition:
    """name: for people. root: its artifacts. recipes: shipped recipe → changed settings, one member each. setting: of every recipe."""

    name: str
    root: Path
    recipes: tuple[tuple[str, tuple[str, ...]], ...]
    setting: tuple[str, ...]

    def bundles(self) -> list[Path]:
        """Train what is not trained yet, and pack."""
        from kit.training.crossval import train
        from kit.vendor.bundle import pack

        recipes = [Recipe.load(name, [*self.setting, *changes]) for name, changes in self.recipes]
        packed = pack([train(recipe, artifacts=self.root).folder for recipe in recipes], artifacts=self.root)
        return [folder for folder in packed if manifest.read(folder).kind == "member"]


def science() -> Competition | None:
    """The exam's 150 official questions; members are trained as in tests.bench.quality. None where the data are missing."""
    corpus = quality.DATA / quality.CORPUS
    if not corpus.is_file():
        print(f"{corpus} is missing, so the real questions are left out: set KIT_DATA to the folder with mcq/ and corpus/")
        return None
    quality.write_competition(quality.ROOT)
    wide = ("task.max_length=320", "retrieve.context.sentences=8", "retrieve.context.max_chars=1500")
    recipes = (
        ("llm_science_rules", ()),
        ("llm_science_minilm", ('name="llm_science_minilm_64"', "task.max_length=64", "train.epochs=1")),
        ("llm_science_minilm", ()),
        ("llm_science_minilm", ('name="llm_science_minilm_320"', *wide, "train.freeze_embeddings=true", "train.freeze_layers=6", "train.epochs=1")),
    )
    answers = read_table(quality.DATA / "mcq" / "official_train_150.csv").frame[["id", "answer"]]
    answers.to_csv(quality.ROOT / "test_answers.csv", index=False)
    setting = (f'data.folder="{quality.ROOT}"', f'retrieve.corpus="{corpus.resolve()}"')
    return Competition("150 official questions", quality.ROOT, recipes, setting)


def samples() -> tuple[Competition, Competition]:
    """The embedded sample competition; and again without the rules, which there are so good that the blend needs no other member."""
    root = write_sample(BENCH / "sample")
    wide = ("task.max_length=256", "retrieve.context.passages=3", "retrieve.context.sentences=3", "retrieve.context.max_chars=1200")
    encoders: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("sample_deberta", ()),
        ("sample_minilm", ('name="sample_minilm_64"', "task.max_length=64", "train.fgm=0.0")),
        ("sample_minilm", ()),
        ("sample_minilm", ('name="sample_minilm_256"', *wide, "train.fgm=0.0", "train.epochs=2")),
    )
    whole = Competition("sample competition", root, (("sample_rules", ()), *encoders), (f'data.folder="{root}"',))
    return whole, replace(whole, name="sample, encoders only", recipes=encoders)


def members_of(competition: Competition) -> list[Member]:
    """The members, the cheapest first where the recipes stand in that order."""
    return [Member.open(manifest.read(folder)) for folder in competition.bundles()]


# --- what is replayed: real predictions, real costs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A test set whose predictions and costs are known.

    predictions: (N, C) by pass. seconds: (N,) by (member, view). load: seconds by member. sizes: the kit's estimate of tokens, (N,) by (member, view).
    """

    predictions: Passes
    seconds: dict[tuple[str, str], np.ndarray]
    load: dict[str, float]
    sizes: dict[tuple[str, str], np.ndarray]
    targets: np.ndarray

    @property
    def fits(self) -> dict[str, tuple[str, ...]]:
        """Names of the fits by member."""
        return {name: tuple(work.fit for work in self.predictions if work.member == name and work.view == FULL) for name in self.load}

    @property
    def full_s(self) -> float:
        """Seconds of every fit of every member on every row in the full view."""
        return sum(len(self.fits[name]) * (load + self.seconds[name, FULL].sum()) for name, load in self.load.items())

    def only(self, rows: np.ndarray) -> World:
        """These rows of it."""
        predictions = {work: values[rows] for work, values in self.predictions.items()}
        seconds, sizes = ({key: values[rows] for key, values in each.items()} for each in (self.seconds, self.sizes))
        return World(predictions, seconds, self.load, sizes, self.targets[rows])

    def like(self, rows: int) -> World:
        """As expensive as a test set of so many rows: each row stands for several like it. Loading costs what it costs."""
        times = rows / len(self.targets)
        seconds, sizes = ({key: values * times for key, values in each.items()} for each in (self.seconds, self.sizes))
        return replace(self, seconds=seconds, sizes=sizes)


def measured(competition: Competition, members: Sequence[Member], *, anew: bool) -> tuple[World, World]:
    """The test set and the training table (OOF, one fit named "oof") as worlds; measured unless that was done for these very members."""
    known = dict(np.load(MEASURED)) if MEASURED.is_file() else {}
    mine = {key.removeprefix(f"{competition.name} "): values for key, values in known.items() if key.startswith(f"{competition.name} ")}
    digest = np.array(assemble.digest([member.digest for member in members]))
    if anew or mine.get("digest") != digest:
        mine = _measure(competition, members) | {"digest": digest}
        others = {key: values for key, values in known.items() if not key.startswith(f"{competition.name} ")}
        MEASURED.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(MEASURED, **others, **{f"{competition.name} {key}": values for key, values in mine.items()})
    return _worlds(mine, members)


def _measure(competition: Competition, members: Sequence[Member]) -> dict[str, np.ndarray]:
    """Score the test set with every fit in every view; tokens of test and training rows; seconds of loading and of a token."""
    from kit.predict import predict

    chosen, found = runtime.choose(), dict[str, np.ndarray]()
    answers = read_table(competition.root / "test_answers.csv").frame.set_index("id")["answer"]
    for member in members:
        tables = {name: _examples(competition, member, f"{name}.csv") for name in ("test", "train")}
        found["targets train"] = member.task.targets(tables["train"])
        found["targets test"] = np.array(["ABCDEFGHIJ".index(answers[question.id]) for question in tables["test"]])
        loads, each = list[float](), {view: list[float]() for view in member.views}
        for fit in member.fits:
            for view, task in member.views.items():
                begun = time.perf_counter()
                tokens, model = assemble.load_tokens(member.recipe, member.folder / fit), assemble.load_model(member.recipe, task, member.folder / fit)
                loads.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                features = task.encode(tables["test"], tokens)
                scores = predict(model, task, features, tokens, runtime=chosen, batch_tokens=member.recipe.infer.batch_tokens)
                found[f"prediction {member.name} {fit} {view}"] = task.decode(scores, features, tables["test"])
                each[view].append((time.perf_counter() - begun) / sum(feature.tokens for feature in features))
        for view, task in member.views.items():
            for name, examples in tables.items():
                counts = np.array([feature.tokens for feature in task.encode(examples, tokens)], float)
                found[f"seconds {name} {member.name} {view}"] = counts * statistics.median(each[view])
                found[f"sizes {name} {member.name} {view}"] = task.sizes(examples)
        found[f"load {member.name}"] = np.array(statistics.median(loads))
        print(f"measured {member.name}: load {statistics.median(loads):.2f} s, {found[f'seconds test {member.name} full'].mean():.4f} s per row and fit")
    return found


def _examples(competition: Competition, member: Member, table: str) -> list[Any]:
    """The rows of a table with the contexts that the member reads."""
    return assemble.cached_contexts(member.task.read(read_table(competition.root / table)), member.task, member.recipe, competition.root)


def _worlds(found: Mapping[str, np.ndarray], members: Sequence[Member]) -> tuple[World, World]:
    views = [(member.name, view) for member in members for view in member.views]
    load = {member.name: float(found[f"load {member.name}"]) for member in members}
    tested = {Pass(m.name, fit, view): found[f"prediction {m.name} {fit} {view}"] for m in members for fit in m.fits for view in m.views}
    held_out = {Pass(member.name, "oof", view): _oof(member, view) for member in members for view in member.views}
    return tuple(  # type: ignore[return-value]
        World(
            predictions, {key: found[f"seconds {name} {key[0]} {key[1]}"] for key in views}, load,
            {key: found[f"sizes {name} {key[0]} {key[1]}"] for key in views}, found[f"targets {name}"],
        )
        for name, predictions in (("test", tested), ("train", held_out))
    )  # fmt: skip


def _oof(member: Member, view: str) -> np.ndarray:
    """OOF predictions (N, C) of a view, in the order of the training table."""
    return member.oof.filter(regex=r"^p\d+$" if view == FULL else rf"^p\d+@{view}$").to_numpy(np.float32)


# --- the policies ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Replay:
    """A crew of one slot that answers what was really predicted after the seconds that it really took, on a clock of its own."""

    world: World
    slots: tuple[str, ...] = ("cpu",)
    now: float = 0.0
    loaded: tuple[str, str] | None = None
    waiting: tuple[float, Event] | None = None

    def clock(self) -> float:
        return self.now

    def send(self, slot: int, order: Order | Fetch) -> None:
        assert isinstance(order, Order), "contexts are there beforehand"
        rows = np.array(order.rows)
        load = 0.0 if self.loaded == (order.member, order.fit) else self.world.load[order.member]
        seconds = float(self.world.seconds[order.member, order.view][rows].sum())
        prediction = self.world.predictions[Pass(order.member, order.fit, order.view)][rows]
        self.loaded = order.member, order.fit
        event = Event(slot, order.serial, "scored", seconds=seconds, load_s=load, tokens=1, rows=order.rows, prediction=prediction)
        self.waiting = self.now + load + seconds, event

    def wait(self, seconds: float) -> list[Event]:
        assert self.waiting, "nothing was sent"
        at, event = self.waiting
        beat = self.now + min(seconds, 5.0)
        if at > beat:
            self.now = beat
            return [Event(0, event.serial, "beat")]
        self.now, self.waiting = at, None
        return [event]

    def dismiss(self, slot: int) -> None:
        self.waiting = self.loaded = None

    def close(self) -> None:
        pass


@dataclass
class Told:
    """Hears a dispatch, and keeps the lines of its log."""

    lines: list[str] = field(default_factory=list)

    def scored(self, work: Pass, rows: np.ndarray, prediction: np.ndarray) -> None:
        pass

    def fetched(self, key: str, rows: np.ndarray, hints: Mapping[str, np.ndarray], chars: np.ndarray) -> None:
        pass

    def decided(self, text: str) -> None:
        self.lines.append(text)


@dataclass(frozen=True)
class Case:
    """A world, and what a policy knows of it: the blend of its members, the task, the members (the cheapest first)."""

    world: World
    weighed: Weighed
    members: Sequence[Member]

    @property
    def task(self) -> Task:
        return self.members[0].task

    @property
    def rows(self) -> int:
        return len(self.world.targets)

    def merit(self, prediction: np.ndarray) -> np.ndarray:
        """Of each row (N,); one that nobody has scored counts as what a random order is expected to get."""
        width = prediction.shape[1]
        orders = [self.task.merit(np.arange(width, 0, -1.0)[None], np.array([right]))[0] for right in range(width)]
        return np.where(np.isfinite(prediction).all(1), self.task.merit(prediction, self.world.targets), np.mean(orders))


Policy = Callable[[Case, float], np.ndarray]
"""(case, seconds) → prediction (N, C)."""


def by_planner(case: Case, seconds: float) -> np.ndarray:
    """The kit's planner, with the costs it would guess for such members on a CPU before it measures them."""
    world, task = case.world, case.task
    crew, told = Replay(world), Told()
    players = [
        Player(
            member.name, world.fits[member.name], {view: world.sizes[member.name, view] for view in member.views},
            cost.load_cost(member.bytes), cost.token_cost(member.parameters, "cpu"),
        )
        for member in case.members
    ]  # fmt: skip
    width = next(iter(world.predictions.values())).shape[1]
    planner = Planner(
        players, case.weighed.blend, case.weighed.targets, task.merit, task.doubt, task.regret, case.rows, width, on_decision=told.decided
    )
    settings = {member.name: Settings(member.recipe.infer.batch_tokens) for member in case.members}
    budget = Budget(seconds, reserve_s=0.0, used_s=0.0, clock=crew.clock)
    Dispatch(planner, crew, budget, settings, told).run()
    assert not planner.dropped, planner.dropped
    return planner.prediction()


def by_cascade(case: Case, seconds: float) -> np.ndarray:
    """As in notebooks: the cheapest member on all rows, the next on the 40 % least certain, the best on the 10 % least certain of what came out.

    The best, and the second best for the next one, are known from OOF, among the members dearer than the first.
    """
    first, *others = case.members
    second, best = sorted(others, key=lambda member: next(iter(case.weighed.oof[member.name].values())))[-2:]
    scored = Scored(case, seconds)
    scored.add(first, np.arange(case.rows))
    for member, fraction in zip((second, best), FRACTIONS, strict=True):
        doubt = case.task.doubt(scored.prediction())
        scored.add(member, np.argsort(-doubt, kind="stable")[: round(fraction * case.rows)])
    return scored.prediction()


def in_order(case: Case, seconds: float) -> np.ndarray:
    """Every member on every row in the order of the table, the cheapest member first."""
    return _all(case, seconds, case.members)


def dearest_first(case: Case, seconds: float) -> np.ndarray:
    """The same, the dearest member first."""
    return _all(case, seconds, list(reversed(case.members)))


def _all(case: Case, seconds: float, members: Sequence[Member]) -> np.ndarray:
    scored = Scored(case, seconds)
    for member in members:
        scored.add(member, np.arange(case.rows))
    return scored.prediction()


@dataclass
class Scored:
    """What a policy without a planner has scored by the end of its seconds. Every row counts that was done by then."""

    case: Case
    left: float
    passes: Passes = field(default_factory=dict)

    def add(self, member: Member, rows: np.ndarray) -> None:
        """Score these rows with every fit, one after the other, as far as the time reaches."""
        world = self.case.world
        for fit in world.fits[member.name]:
            done = np.cumsum(world.seconds[member.name, FULL][rows]) + world.load[member.name]
            some = rows[done <= self.left]
            self.left = self.left - float(done[-1]) if len(some) == len(rows) else -1.0
            work = Pass(member.name, fit)
            self.passes[work] = np.full_like(world.predictions[work], np.nan)
            self.passes[work][some] = world.predictions[work][some]

    def prediction(self) -> np.ndarray:
        """Each row pooled with the weights of those who scored it: the same blend that the planner has."""
        return pooled(self.case.weighed.blend, self.passes)


def pooled(blend: Blend, passes: Passes) -> np.ndarray:
    """Mean over fits, then the blend (N, C)."""
    means = {}
    for source in dict.fromkeys(work.source for work in passes):
        fits = np.stack([values for work, values in passes.items() if work.source == source])
        count = np.isfinite(fits).all(-1).sum(0)[:, None]
        with np.errstate(invalid="ignore"):
            means[source] = (np.nansum(fits, 0) / count).astype(np.float32)
    return blend.pool(means)


POLICIES: dict[str, Policy] = {"planner": by_planner, "cascade": by_cascade, "in order": in_order, "in order, dearest first": dearest_first}


# --- value -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Half(Member):
    """A member that knows only a part of its OOF."""

    part: pd.DataFrame

    @property
    def oof(self) -> pd.DataFrame:
        return self.part


def value(competitions: Sequence[Competition], *, anew: bool) -> dict[str, Any]:
    """Metric against budget, by policy: on each test set, and on each training table by halves."""
    results = {}
    for competition in competitions:
        members = members_of(competition)
        test, train = measured(competition, members, anew=anew)
        members = sorted(members, key=lambda member: test.seconds[member.name, FULL].sum())
        case = Case(test.like(HIDDEN_ROWS), weigh(members), members)
        print(f"\n{competition.name}: all fits on {case.rows} rows take {test.full_s:.1f} s, on {HIDDEN_ROWS} rows {case.world.full_s:.0f} s")
        results[competition.name] = _panel([case], [np.arange(case.rows)])
        results[f"{competition.name}: OOF"] = _panel(*_halves(train, members))
    draw_values(results, PICTURE)
    return results


def _halves(world: World, members: Sequence[Member]) -> tuple[list[Case], list[np.ndarray]]:
    """Cases with the blend of one half and the rows of the other, and those rows."""
    cases, tested = [], []
    for seed in range(HALVINGS):
        order = np.random.default_rng(seed).permutation(len(world.targets))
        for known, rows in (np.array_split(order, 2), np.array_split(order, 2)[::-1]):
            values = [{part.name: getattr(member, part.name) for part in fields(Member)} for member in members]
            halves = [Half(**own, part=member.oof.iloc[np.sort(known)]) for own, member in zip(values, members, strict=True)]
            cases.append(Case(world.only(rows).like(HIDDEN_ROWS), weigh(halves), halves))
            tested.append(rows)
    return cases, tested


def _panel(cases: Sequence[Case], tested: Sequence[np.ndarray]) -> dict[str, Any]:
    """Every policy at every budget, each row's merit averaged over the cases that test it, with intervals over rows."""
    full_s = statistics.mean(case.world.full_s for case in cases)
    merits = {(name, share): _merits(cases, tested, policy, share) for share in SHARES for name, policy in POLICIES.items()}
    kinds = {
        "policies": {name: {str(share): _estimate(merits[name, share]) for share in SHARES} for name in POLICIES},
        "gains": {name: {str(share): _estimate(merits["planner", share] - merits[name, share]) for share in SHARES} for name in [*POLICIES][1:]},
    }
    oof = {name: next(iter(values.values())) for name, values in cases[0].weighed.oof.items()}
    weights = cases[0].weighed.blend.weights([member.name for member in cases[0].members])
    seconds = {member.name: cases[0].world.seconds[member.name, FULL].mean() for member in cases[0].members}
    panel = {"metric": next(iter(cases[0].task.metrics)), "rows": len(merits["planner", 1.0]), "full_s": full_s, **kinds}
    _print(panel)
    return panel | {"oof": oof, "weights": weights, "seconds_per_row": seconds, "load_s": cases[0].world.load}


def _merits(cases: Sequence[Case], tested: Sequence[np.ndarray], policy: Policy, share: float) -> np.ndarray:
    """(N,): the mean over cases."""
    total, count = np.zeros(1 + max(rows.max() for rows in tested)), np.zeros(1 + max(rows.max() for rows in tested))
    for case, rows in zip(cases, tested, strict=True):
        total[rows] += case.merit(policy(case, share * case.world.full_s))
        count[rows] += 1
    return total / count


def _estimate(values: np.ndarray) -> dict[str, float]:
    return bootstrap(lambda some, _: float(some.mean()), values, values, draws=2000)._asdict()


def _print(panel: Mapping[str, Any]) -> None:
    for kind in ("policies", "gains"):
        print(f"{'planner minus …' if kind == 'gains' else panel['metric']:<26}" + "".join(f"{share:>26.0%}" for share in SHARES))
        for name, points in panel[kind].items():
            sign = "+" if kind == "gains" else ""
            cells = (f"{p['value']:{sign}.4f} ({p['low']:{sign}.4f} to {p['high']:{sign}.4f})" for p in points.values())
            print(f"{name:<26}" + "".join(f"{cell:>26}" for cell in cells))


# --- overhead --------------------------------------------------------------------------------------------------------------------------


def overhead(competition: Competition) -> dict[str, Any]:
    """Wall seconds of `kit infer` and of the plain loop over what it scored, in turns, and the median of their ratios."""
    folder = BENCH / "clock-overhead"
    bundles = [str(path.resolve()) for path in competition.bundles()]
    test, spec = competition.root / "test.csv", folder / "plain.json"
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[float]] = {"infer": [], "plain": []}
    _time(_infer(bundles, test, folder / "warm" / "submission.csv", hours=2))  # warms the caches, and says what there is to do
    todo = _scored(folder / "warm" / "submission.run", test)
    spec.write_text(json.dumps({"bundles": bundles, "test": str(test), "out": str(folder / "plain.csv"), "root": str(competition.root), **todo}))
    plain = [sys.executable, "-m", "tests.bench.clock", "--plain", str(spec)]
    _time(plain)
    for turn in range(REPEATS):
        for name in ("infer", "plain")[:: 1 if turn % 2 else -1]:
            runs[name].append(_time(_infer(bundles, test, folder / f"turn{turn}" / "submission.csv", hours=2) if name == "infer" else plain))
        print(f"turn {turn + 1}: infer {runs['infer'][-1]:.2f} s, plain loop {runs['plain'][-1]:.2f} s")
    ratios = [one / other for one, other in zip(runs["infer"], runs["plain"], strict=True)]
    outcome = json.loads((folder / f"turn{REPEATS - 1}" / "submission.run" / "outcome.json").read_text())
    same = _agreement(folder / f"turn{REPEATS - 1}" / "submission.csv", folder / "plain.csv")
    result = {"ratio": statistics.median(ratios), "ratios": ratios, **runs, "same_rows": same, "seconds": outcome["seconds"], "rows": outcome["rows"]}
    print(f"overhead: {result['ratio'] - 1:+.1%} (median of {REPEATS}); {same:.1%} of the rows are the same")
    return result


def _infer(bundles: Sequence[str], test: Path, out: Path, *, hours: float) -> list[str]:
    """The command, in a run folder of its own that does not exist yet."""
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir(parents=True)
    return [sys.executable, "-m", "kit", "infer", *bundles, f"--test={test}", f"--out={out}", f"--hours={hours}"]


def _time(command: Sequence[str]) -> float:
    """Wall seconds of a command. A failed one ends the benchmark."""
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - begun


def _scored(run: Path, test: Path) -> dict[str, Any]:
    """What a run has scored: passes with their rows."""
    table = read_table(test)
    width = sum(letter in table.frame for letter in "ABCDEFGHIJ")
    return {"passes": [[*work, rows.tolist()] for work, rows, _ in Scores(run / "scores", width).read(len(table.frame))]}


def _agreement(one: Path, other: Path) -> float:
    """Share of rows with the same prediction."""
    return float((read_table(one).frame.set_index("id")["prediction"] == read_table(other).frame.set_index("id")["prediction"]).mean())


def plain_loop(spec: Mapping[str, Any]) -> None:
    """What a notebook does: read, retrieve, load each fit and score, blend at the end, write. One process, no clock, nothing kept."""
    from kit.predict import predict

    runtime.go_offline()
    members = {member.name: member for member in (Member.open(manifest.read(Path(folder))) for folder in spec["bundles"])}
    task = next(iter(members.values())).task
    test = read_table(Path(spec["test"]))
    questions = task.read(test)
    examples: dict[str | None, list[Any]] = {None: questions}
    passes: Passes = {}
    for name, fit, view, rows in spec["passes"]:
        member = members[name]
        if member.key not in examples:
            library = assemble.Library.open(member.folder.parent / str(member.index))
            assert member.recipe.retrieve, "a key belongs to a retriever"
            examples[member.key] = assemble.add_contexts(questions, task, member.recipe.retrieve, library)
        some = [examples[member.key][row] for row in rows]
        form, tokens = member.views[view], assemble.load_tokens(member.recipe, member.folder / fit)
        model = assemble.load_model(member.recipe, form, member.folder / fit)
        features = form.encode(some, tokens)
        scores = predict(model, form, features, tokens, runtime=runtime.choose(), batch_tokens=member.recipe.infer.batch_tokens)
        passes[Pass(name, fit, view)] = np.full((len(questions), task.width(questions)), np.nan, np.float32)
        passes[Pass(name, fit, view)][rows] = form.decode(scores, features, some)
    Submission.open(Path(spec["out"]), task, test, None).write(pooled(weigh(list(members.values())).blend, passes))


# --- memory ----------------------------------------------------------------------------------------------------------------------------


def memory(competition: Competition) -> dict[str, Any]:
    """The parent's largest RSS in MB with 20,000 rows, sampled 50 times a second; the budget is too short for more than the cheapest members."""
    folder = BENCH / "clock-memory"
    bundles = [str(path.resolve()) for path in competition.bundles()]
    test, out = folder / "test.csv", folder / "run" / "submission.csv"
    folder.mkdir(parents=True, exist_ok=True)
    frame = read_table(competition.root / "test.csv").frame
    many = pd.concat([frame] * -(-MANY_ROWS // len(frame)))[:MANY_ROWS]
    many.assign(id=range(MANY_ROWS)).to_csv(test, index=False)
    process = psutil.Popen([*_infer(bundles, test, out, hours=MANY_SECONDS / 3600), "--reserve=10"], stdout=subprocess.DEVNULL)
    begun, peak, everything = time.monotonic(), 0, 0
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
            everything = max(everything, peak + sum(child.memory_info().rss for child in process.children(recursive=True)))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        time.sleep(0.02)
    took = time.monotonic() - begun
    outcome = json.loads((out.parent / "submission.run" / "outcome.json").read_text())
    result = {"rows": MANY_ROWS, "parent_mb": peak / 1e6, "all_processes_mb": everything / 1e6, "seconds": took, "budget_s": MANY_SECONDS, "scored": outcome["scored"]}
    print(f"memory: parent {result['parent_mb']:.0f} MB, all processes {result['all_processes_mb']:.0f} MB, {took:.1f} of {MANY_SECONDS} s; {outcome['scored']}")
    return result


def main() -> None:
    """Run the parts, and keep the results of those that are not run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["value", "overhead", "memory"])
    parser.add_argument("--measure", action="store_true", help="measure predictions and costs anew")
    parser.add_argument("--plain", type=Path, help="run the plain loop of this file (used by the overhead part)")
    arguments = parser.parse_args()
    if arguments.plain:
        return plain_loop(json.loads(arguments.plain.read_text()))
    runtime.go_offline()
    competitions = [competition for competition in (science(), *samples()) if competition]
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "value": lambda: value(competitions, anew=arguments.measure),
        "overhead": lambda: overhead(competitions[0]),
        "memory": lambda: memory(competitions[-2]),
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in [arguments.only] if arguments.only else parts:
        results[name] = parts[name]()
        manifest.write_atomically(RESULTS, json.dumps(results, indent=1))
    return None


if __name__ == "__main__":
    main()
