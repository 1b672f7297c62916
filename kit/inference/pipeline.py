"""Bundles and a test set → submission.csv, inside the budget and without network. Knows no name of a task or a model, and imports no torch.

The file is valid from the first seconds on and gets better after every chunk: fallback order, then what retrieval alone says, then the blend of all that
is scored so far. What is scored is kept in a run folder, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kit import __version__, assemble, manifest, paths, runtime
from kit.budget import Budget
from kit.data.competition import find_test, named_in, sample_beside
from kit.data.tables import read_table
from kit.errors import BundleError, DataError, KitError
from kit.inference import cost
from kit.inference.crew import Crew, Processes
from kit.inference.dispatch import OPENING, PATIENCE_S, Dispatch, Settings
from kit.inference.member import Member, Weighed, weigh
from kit.inference.planner import Pass, Planner, Player
from kit.inference.scores import Scores
from kit.inference.submission import Submission

log = logging.getLogger(__name__)

_SCORES = "scores"
_WRITE_SHARE = 0.02  # of the time may go into rewriting files
_WRITE_S = 1.0  # seconds between two rewritings, at least


@dataclass(frozen=True)
class Outcome:
    """finished: every fit that the blend uses scored every row, and nothing failed. weights and rows (scored) by member. failures: member → reason.

    expected: the metric that OOF lets expect. run: the folder with the state, timeline.json and decisions.log.
    """

    submission: Path
    run: Path
    rows: int
    finished: bool
    expected: float
    weights: dict[str, float]
    scored: dict[str, int]
    failures: dict[str, str]
    seconds: dict[str, float]
    oof: dict[str, dict[str, float]]
    predictions: dict[str, np.ndarray] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Everything but the predictions, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "predictions"}
        return values | {"submission": str(self.submission), "run": str(self.run)}

    def save(self, folder: Path) -> None:
        """Write outcome.json, and each member's predictions (N, C), rows as in the test set, into predictions.npz."""
        manifest.write_atomically(folder / "outcome.json", json.dumps(self.summary(), indent=1))
        np.savez(folder / "predictions.npz", **self.predictions)  # type: ignore[arg-type]


def infer(
    bundles: Sequence[str | Path] | None = None,
    *,
    test: Path | None = None,
    out: Path = Path("submission.csv"),
    sample: Path | None = None,
    budget: Budget | None = None,
    root: Path | None = None,
    use_contexts: bool = True,
    method: str = "auto",
    patience_s: float = PATIENCE_S,
    open_crew: Callable[[Path], Crew] | None = None,
) -> Outcome:
    """Score a test set with the member bundles named (folders, or names mounted below `root`) and write the submission.

    Without `bundles`, every member bundle below `root` is used; without `test`, the competition's test set found there, under the name that the
    members' recipes give it or another usual one, and the sample submission beside it. Index bundles are found by the name their member gives.
    Whatever a member dies of, the others go on, and the outcome names it. State and log go to `<out>.run` beside the submission; the same call
    continues there. Raises DataError for a wrong test set and BundleError if no member can be used, both after the fallback submission is written
    where that is possible.

    use_contexts = False scores without retrieval, to see what it is worth. method: of the blend, as in kit.inference.blend. patience_s: a scoring
    process that gives no sign of life for so long hangs. open_crew: who scores, opened on the run folder (None: processes).
    """
    root = root or runtime.input_root()
    if bundles is None:
        bundles = [folder for _, folder in sorted(paths.find_bundles(root).items()) if manifest.read(folder).kind == "member"]
    if test is None:
        test = find_test(root, named_in(_recipes(bundles, root)))
        sample = sample or _fitting_sample(test)
    options = _Options(bundles, Path(test), Path(out), sample, root, use_contexts, method, patience_s, open_crew)
    return _Inference(options, budget or Budget()).run()


def _recipes(bundles: Iterable[str | Path], root: Path) -> Iterator[Path]:
    """Where the recipes of member bundles are, as far as these are there."""
    for bundle in bundles:
        with suppress(BundleError):
            yield paths.find_bundle(bundle, root) / "recipe.toml"


def _fitting_sample(test: Path) -> Path | None:
    """The sample submission beside a test set, if it names the same ids; one that does not must not cost the run."""
    sample = sample_beside(test)
    if sample is None:
        return None
    try:
        named, asked = (read_table(path, ids=None).frame for path in (sample, test))
        if set(named.iloc[:, 0]) == set(asked.get(named.columns[0], [])):  # the first column of a submission names the rows
            return sample
        log.warning("%s names other ids than %s: rows are written in the order of the latter", sample, test.name)
    except DataError as error:
        log.warning("%s: rows are written in the order of %s", error, test.name)
    return None


@dataclass(frozen=True)
class _Options:
    bundles: Sequence[str | Path]
    test: Path
    out: Path
    sample: Path | None
    root: Path
    use_contexts: bool
    method: str
    patience_s: float
    open_crew: Callable[[Path], Crew] | None


@dataclass
class _Inference:
    """One run. It is the listener of its dispatch: keeps scores, and rewrites the submission."""

    options: _Options
    budget: Budget
    failures: dict[str, str] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    metric: list[dict[str, float]] = field(default_factory=list)
    next_write: float = 0.0

    def run(self) -> Outcome:
        with self.budget.measure("fallback"):
            members = self._open()
            self.task = members[0].task
            self.submission = Submission.open(self.options.out, self.task, read_table(self.options.test, ids=self.task.id_column), self.options.sample)
            self.examples = self.submission.examples
            self.submission.write()
        crew = self._start_crew(members)
        try:
            with self.budget.measure("verify"):
                self.members, indexes = self._verify(members)
                self.task = self.members[0].task  # not that of a member that was damaged
                self.submission = replace(self.submission, task=self.task)
            with self.budget.measure("blend"):
                self.weighed = self._weigh()
            try:
                self._write_setup(indexes)
            except OSError as error:
                crew.close()
                crew = self._move_out(error)
                self._write_setup(indexes)
            self.planner = self._planner(crew.slots)
            self._resume()
            settings = {member.name: Settings(member.recipe.infer.batch_tokens, member.recipe.infer.precision) for member in self.members}
            self.dispatch = Dispatch(self.planner, crew, self.budget, settings, self, self.options.patience_s)
            with self._bar() as self.bar:
                self._dispatch()
        finally:
            crew.close()
        self._rewrite(last=True)
        self.submission.close()
        outcome = self._outcome()
        self._try_to(lambda: outcome.save(self.folder))
        return outcome

    # --- before anything is scored -----------------------------------------------------------------------------------------------

    def _open(self) -> list[Member]:
        """The members that can be read, the smallest first; why the others cannot goes into the failures. Raises where there is none."""
        members: dict[Path, Member] = {}
        refused: KitError | None = None
        for bundle in self.options.bundles:
            try:
                folder = paths.find_bundle(bundle, self.options.root)
                if folder not in members and manifest.read(folder).kind == "member":
                    member = Member.open(manifest.read(folder))
                    assert member.task, "a member has a task"
                    members[folder] = member
            except KitError as error:
                refused = refused or error
                self.failures[Path(bundle).name] = str(error)
        if not members:
            named = ", ".join(map(str, self.options.bundles))
            raise refused or BundleError(f"no member bundle among [{named}] (mounted below {self.options.root}): pack a trained run, and attach it")
        return sorted(members.values(), key=lambda member: member.bytes)

    def _verify(self, members: Sequence[Member]) -> tuple[list[Member], dict[str, Path]]:
        """The members whose files are as they were packed, and the folders of their indexes, by key. Raises BundleError where no member is left."""
        good, indexes, refused = [], {}, None
        for member in members:
            try:
                manifest.verify(member.folder)
                if member.oof.empty:
                    raise BundleError(f"{member.folder}: no OOF predictions, so the blend cannot weigh this member: train every fold and pack it again")
                good.append(member.with_base(self._mounts(members)))
            except (KitError, OSError) as error:
                refused = refused or error
                self.failures[member.name] = str(error)
        if refused and not good:
            raise refused
        readers = good if self.options.use_contexts else []
        for key, index in {member.key: member.index for member in readers if member.key and member.index}.items():
            try:
                indexes[key] = paths.find_bundle(index, self._mounts(good))
                manifest.verify(indexes[key])
            except (KitError, OSError) as error:
                indexes.pop(key, None)
                self.failures |= {member.name: f"scored without contexts: {error}" for member in good if member.key == key}
        return good, indexes

    def _mounts(self, members: Sequence[Member]) -> Path:
        """Where the bundles of indexes and bases are looked for: below the mounts, or beside the members where there are none."""
        return self.options.root if self.options.root.is_dir() else members[0].folder.parent

    def _weigh(self) -> Weighed:
        """The blend of the members; of the best of them alone where they have no OOF row in common."""
        try:
            return weigh(self.members, self.options.method)
        except BundleError as error:
            alone = max(self.members, key=lambda member: weigh([member]).oof["blend"][next(iter(member.task.metrics))])
            self.failures |= {member.name: str(error) for member in self.members if member is not alone}
            self.members = [alone]
            return weigh(self.members)

    def _start_crew(self, members: Sequence[Member]) -> Crew:
        """The crew, which begins to import what scoring needs."""
        try:
            self._make_folder(members)
            return self._open_crew()
        except OSError as error:
            return self._move_out(error)

    def _open_crew(self) -> Crew:
        if self.options.open_crew:
            return self.options.open_crew(self.folder)
        return Processes.open(self.folder, start_s=max(0.0, min(OPENING * self.options.patience_s, self.budget.remaining())))

    def _make_folder(self, members: Sequence[Member]) -> None:
        """The run folder, empty unless it is that of the same test set, members and kit."""
        self.folder = self.options.out.with_suffix(".run").absolute()
        state = [__version__, manifest.sha256(self.options.test), self.options.use_contexts, [[member.name, member.digest] for member in members]]
        self.state = assemble.digest(state)
        if self._old_setup().get("state") != self.state:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)

    def _move_out(self, error: OSError) -> Crew:
        """A crew in a run folder elsewhere, where this one cannot be written: a later start will not find it."""
        self.folder = Path(tempfile.mkdtemp(prefix="kit-run-"))
        self.decided(f"the run folder is {self.folder}, since the one beside the submission cannot be written: {error}")
        return self._open_crew()

    def _old_setup(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "setup.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _write_setup(self, indexes: Mapping[str, Path]) -> None:
        """What scoring processes must know; scores that were made with other contexts are dropped."""
        self.keys = {member.name: member.key if self.options.use_contexts and member.key in indexes else None for member in self.members}
        settings = {member.key: member.recipe.retrieve.model_dump(mode="json") for member in self.members if member.key and member.recipe.retrieve}
        setup = {
            "state": self.state,
            "test": str(self.options.test.absolute()),
            "task": self.members[0].recipe.task.model_dump(mode="json"),
            "members": {member.name: self._place(member) for member in self.members},
            "contexts": {key: {"index": str(index.absolute()), "settings": settings[key]} for key, index in indexes.items()},
        }
        if self._old_setup().get("members", setup["members"]) != setup["members"]:
            shutil.rmtree(self.folder / _SCORES, ignore_errors=True)
        manifest.write_atomically(self.folder / "setup.json", json.dumps(setup, indent=1))

    def _place(self, member: Member) -> dict[str, Any]:
        """Where a member is, for setup.json."""
        base = str(member.base.absolute()) if member.base else None
        return {"folder": str(member.folder.absolute()), "base": base, "key": self.keys[member.name]}

    def _planner(self, slots: Sequence[str]) -> Planner:
        """The planner, before anything is scored."""
        task, rows, width = self.task, len(self.examples), self.task.width(self.examples)
        self.hints = task.hints(self.examples)
        self.guess = np.full((rows, width), np.nan, np.float32)
        players = [self._player(member, slots[0]) for member in self.members]
        known = self.weighed.blend, self.weighed.targets
        return Planner(players, *known, task.merit, task.doubt, task.regret, rows, width, task.average, on_decision=self.decided, hints=self.hints)

    def _player(self, member: Member, device: str) -> Player:
        settings, key = member.recipe.retrieve, self.keys[member.name]
        chars = np.full(len(self.examples), float(settings.context.max_chars)) if key and settings else None
        sizes = {name: task.sizes(self.examples, chars) for name, task in member.views.items()}
        more = frozenset(name for name, view in member.task.views().items() if view.more)
        read = cost.read_cost(member.bytes) if assemble.may_stream(member.recipe) else None
        return Player(member.name, member.fits, sizes, cost.load_cost(member.bytes), cost.token_cost(member.parameters, device), more, key, read)

    def _resume(self) -> None:
        """What an earlier process of this run has scored and retrieved."""
        self.scores = Scores(self.folder / _SCORES, self.planner.width)
        known = {Pass(player.name, fit, view) for player in self.planner.players for fit in player.fits for view in player.sizes}
        kept = 0
        for work, rows, prediction in self.scores.read(self.planner.rows):
            if work in known and len(rows):
                self.planner.record(work, rows, prediction)
                kept += len(rows)
        if kept:
            self.decided(f"{kept} rows x fits are kept from an earlier start of this run")

    def _dispatch(self) -> None:
        """Score until it is done or time is up. An error here, too, must not cost what is there: a notebook that raises loses its submission."""
        try:
            self.dispatch.run()
        except Exception as error:
            log.exception("the run has failed")
            self.failures["run"] = " ".join(f"{type(error).__name__}: {error}".split())
            self.decided(f"the run has failed: {self.failures['run']}")

    # --- while it is scored (the dispatch's listener) ----------------------------------------------------------------------------

    def scored(self, work: Pass, rows: np.ndarray, prediction: np.ndarray) -> None:
        """Keep what came, and rewrite the submission now and then."""
        self._try_to(lambda: self.scores.append(work, rows, prediction))
        self._progress(len(rows))
        self._rewrite()

    def fetched(self, key: str, rows: np.ndarray, hints: Mapping[str, np.ndarray], chars: np.ndarray) -> None:
        """What retrieval alone says of these rows, and how long they are with their contexts."""
        for name, values in hints.items():
            self.hints[name][rows] = values
        self.guess[rows] = next(iter(hints.values()), np.nan)
        for member in self.members:
            if self.keys[member.name] == key:
                sizes, some = self.planner.player(member.name).sizes, [self.examples[row] for row in rows]
                for name, task in member.views.items():
                    sizes[name][rows] = task.sizes(some, chars.astype(float))
        self._rewrite()

    def decided(self, text: str) -> None:
        """Into the log, on screen and on disk."""
        at = self.budget.elapsed()
        self.decisions.append({"at": round(at, 2), "text": text})
        log.info("%7.1f s  %s", at, text)

    def _rewrite(self, last: bool = False) -> None:
        """The submission from all that there is, unless it was written a moment ago; where that fails, the one before stays."""
        if not last and self.budget.elapsed() < self.next_write:
            return
        begun = time.monotonic()
        prediction = self.planner.prediction()
        self.metric.append({"at": round(self.budget.elapsed(), 2), "expected": self.planner.expected()})
        self._try_to(lambda: self.submission.write(np.where(np.isfinite(prediction), prediction, self.guess)))
        self._try_to(self._write_timeline)
        took = time.monotonic() - begun
        self.next_write = self.budget.elapsed() + max(_WRITE_S, took / _WRITE_SHARE)

    def _try_to(self, write: Callable[[], None]) -> None:
        """Write something; a disk that is full must not cost the run."""
        try:
            write()
        except (OSError, DataError) as error:
            log.warning("not written: %s", error)
            self.decisions.append({"at": round(self.budget.elapsed(), 2), "text": f"not written: {error}"})

    def _write_timeline(self) -> None:
        spans = [span.summary() for span in self.dispatch.spans]
        values = {
            "rows": self.planner.rows, "budget_s": self.budget.total_s, "reserve_s": self.budget.reserve_s, "slots": list(self.dispatch.crew.slots), "spans": spans,
            "metric": self.metric, "decisions": self.decisions, "skipped": self._skipped(), "ended": round(self.budget.elapsed(), 2),
        }  # fmt: skip
        manifest.write_atomically(self.folder / "timeline.json", json.dumps(values))
        manifest.write_atomically(self.folder / "decisions.log", "".join(f"{line['at']:9.2f} {line['text']}\n" for line in self.decisions))

    def _skipped(self) -> list[dict[str, Any]]:
        """Members that the blend uses and that did not score everything."""
        return [{"member": name, "rows": rows, "why": self._failures().get(name, "")} for name, rows in self.planner.left().items()]

    def _bar(self) -> Any:
        """Progress in rows x fits of what the final blend uses."""
        passes = {name: len(self.planner.player(name.partition("@")[0]).fits) for name in self.planner.core}
        done = sum(passes.values()) * self.planner.rows - sum(self.planner.left().values())
        return tqdm(total=sum(passes.values()) * self.planner.rows, initial=done, desc="infer", unit="row", disable=None)

    def _progress(self, rows: int) -> None:
        self.bar.update(rows)
        self.bar.set_postfix_str(f"{self.planner.expected():.4f} expected, {self.budget.remaining():.0f} s left")

    # --- what came out -----------------------------------------------------------------------------------------------------------

    def _failures(self) -> dict[str, str]:
        """Member → why it was not, or not as it was meant to be, scored."""
        without = {name: f"scored without contexts: {why}" for key, why in self.dispatch.no_contexts.items() for name in self.keys if self.keys[name] == key}
        late = {name: f"no time left for {rows} of its rows x fits" for name, rows in self.planner.left().items()}
        lost = {name: f"{rows} of its rows x fits are left out: their scores are not finite" for name, rows in self.planner.lost().items()}
        return {**late, **lost, **without, **self.failures, **self.planner.dropped}

    def _outcome(self) -> Outcome:
        names = [member.name for member in self.members]
        own = {name: self.planner.of_member(name) for name in names}
        seconds = {name: sum(span.end - span.start for span in self.dispatch.spans if span.name == name) for name in [*names, "contexts"]}
        failures = self._failures()
        return Outcome(
            submission=self.options.out,
            run=self.folder,
            rows=len(self.examples),
            finished=not failures,
            expected=self.planner.expected(),
            weights=self.weighed.blend.weights(names),
            scored={name: int(np.isfinite(values).all(-1).sum()) for name, values in own.items()},
            failures=failures,
            seconds={**self.budget.measured, **{name: spent for name, spent in seconds.items() if spent}, "total": self.budget.elapsed()},
            oof=self.weighed.oof,
            predictions=own,
        )
