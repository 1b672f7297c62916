"""The promise of inference, put to the test: whatever happens to a run, there is a valid submission, in time, and what was done is not lost.

Part 1 kills the real command at random moments and starts it again; part 2 runs it once per fault of kit.rehearsal.injure. Owns what is
promised and how it is counted. Does not know what is done to a run, nor how inference works.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from tqdm import tqdm

from kit import assemble, manifest, runtime
from kit.config import Recipe
from kit.data.competition import find_test, named_in, sample_beside
from kit.errors import BundleError, ConfigError, RehearsalError, nearest
from kit.rehearsal.injure import FAULTS, RUN, SUBMISSION, Fault, Run, infer_command, kill, lives, own_disk
from kit.rehearsal.lint import judge
from kit.sample import write_sample
from kit.tasks import Task
from kit.vendor.bundle import pack

ANSWERS = "test_answers"  # .csv, .json …: as the test set
PROMISED_S = 5.0  # after its first start there is a valid file
GRACE_S = 2.0  # that a run may end late, and that what it started may live longer
_KILLED_RUN_S = 1800.0  # budget of a run that is to be killed: time enough, so that time decides nothing
_STUCK_S = 300.0  # after which a run that should end by itself is given up
_LATE_S = 60.0  # the same, after the time that it had
_LEAST_S = 0.2
_SHOWN = 400  # characters of what a run said
OPTIONS = """
[task]
kind = "multiple_choice"

[model]
kind = "rules"
source = "scratch"

[model.config]
least_documents = 2

[data]
folds = 2

[train]
epochs = 6
batch_size = 16
lr = 0.2
weight_decay = 0.0
schedule = "cosine"
"""
"""What the options alone tell, without a context."""
_SOON = ('retrieve.retriever={kind="bm25"}', "model.config.num_hidden_layers=1", "train.epochs=1", "train.fgm=0", "train.precision=fp32")
RECIPES: Mapping[str, tuple[str, Sequence[str]]] = {
    "chaos-options": (OPTIONS, ()),
    "chaos-deberta": ("sample_deberta", _SOON),
    "chaos-narrow": ("sample_deberta", (*_SOON, "model.config.hidden_size=64", "model.config.intermediate_size=128", "task.max_length=96")),
}
"""Members of the sample competition that are soon trained and used, and none so good that the others are not worth it: recipe and changes to it."""


def chaos(
    artifacts: Path,
    *,
    kills: int = 300,
    seed: int = 0,
    faults: Collection[str] | None = None,
    bundles: Path | None = None,
    competition: Path | None = None,
) -> dict[str, Any]:
    """Kill runs so many times, try each fault (None: all), and write artifacts/chaos/summary.json, which it gives.

    bundles: a folder of member and index bundles, and the competition they are for, with answers; by default members are trained on the sample.
    Raises ConfigError for an unknown fault, BundleError without bundles, and RehearsalError, once the summary is written, where a promise was broken.
    """
    begun, chosen, folder = time.monotonic(), _chosen(faults), artifacts.resolve() / "chaos"
    shutil.rmtree(folder, ignore_errors=True)
    if bundles is None or competition is None:
        bundles, competition = _sample(folder)
    bench = Bench.prepare(bundles.resolve(), competition.resolve(), folder)
    tally = Tally()
    with tqdm(total=kills, desc="kills", disable=None) as bar:
        rng = np.random.default_rng(seed)
        while len(tally.kills) < kills:
            tally.stories.append(_killed_run(bench, folder / "runs" / f"{len(tally.stories):04d}", rng, kills - len(tally.kills), bar))
    told = {name: _try(bench, name, fault) for name, fault in tqdm(chosen.items(), "faults", disable=None)}
    summary = {**tally.summary(), bench.metric_name: bench.metric, "run_s": round(bench.seconds, 1), "seconds": round(time.monotonic() - begun, 1), "faults": told}
    manifest.write_atomically(folder / "summary.json", json.dumps(summary, indent=1))
    broken = [*tally.broken, *(f"fault {name}: {_verdict(entry)}" for name, entry in told.items() if not (entry["valid"] and entry["in_time"]))]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise RehearsalError(f"{broken[0]}{more}: see {folder / 'summary.json'} and the logs beside it")
    return summary


def _chosen(faults: Collection[str] | None) -> dict[str, Fault]:
    """The faults by name. Raises ConfigError."""
    for name in faults or ():
        if name not in FAULTS:
            raise ConfigError(f"fault {name!r} is unknown{nearest(name, FAULTS)}")
    return {name: fault for name, fault in FAULTS.items() if faults is None or name in faults}


def _verdict(entry: Mapping[str, Any]) -> str:
    return "no valid submission" if not entry["valid"] else f"ended after {entry['seconds']} s, which was too late"


# --- what is run -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What every run is made from, and what one that was left alone gave: bytes of its submission, its metric, its seconds, its best member's bundle."""

    bundles: Path
    competition: Path
    folder: Path
    reference: bytes = b""
    metric: float = 0.0
    seconds: float = 0.0
    victim: str = ""

    @classmethod
    def prepare(cls, bundles: Path, competition: Path, folder: Path) -> Bench:
        """A bench with the reference of an undisturbed run. Raises BundleError, RehearsalError where even that one fails."""
        bench = cls(bundles, competition, folder)
        with Run.start(bench.command(folder / "undisturbed" / SUBMISSION), folder / "undisturbed", folder / "undisturbed.log") as run:
            code = _finish(run, _KILLED_RUN_S)
            seconds = run.seconds
        if code or (why := bench.objection(run.submission)):
            raise RehearsalError(f"the undisturbed run failed ({f'exit code {code}' if code else why}): see {folder / 'undisturbed.log'}")
        weights = run.outcome.get("weights") or {}
        victim = max(bench.members, key=lambda member: weights.get(manifest.read(member).name, 0.0)).name
        return cls(bundles, competition, folder, run.submission.read_bytes(), bench.score(run.submission), seconds, victim)

    @property
    def members(self) -> list[Path]:
        """The member bundles. Raises BundleError where there are none."""
        found = [path.parent for path in sorted(self.bundles.glob(f"*/{manifest.FILE}")) if manifest.read(path.parent).kind == "member"]
        if not found:
            raise BundleError(f"{self.bundles}: no member bundle: pack a trained run into it")
        return found

    @cached_property
    def recipe(self) -> Recipe:
        """Of the first member: they are all for one competition."""
        return Recipe.load(self.members[0] / "recipe.toml")

    @cached_property
    def task(self) -> Task:
        """What the members do."""
        return assemble.make_task(self.recipe)

    @property
    def metric_name(self) -> str:
        """What decides."""
        return next(iter(self.task.metrics))

    @cached_property
    def test(self) -> Path:
        """The test set. Raises DataError."""
        return find_test(self.competition, named_in(member / "recipe.toml" for member in self.members))

    def command(self, out: Path) -> list[str]:
        """Inference of all members with time enough."""
        return infer_command(self.members, self.test, sample_beside(self.test), out, seconds=_KILLED_RUN_S)

    def objection(self, submission: Path) -> str:
        """Why the site could not score it, or what it would wonder at; empty for a valid one."""
        findings = judge(submission, self.task, sample=sample_beside(self.test), test=self.test)
        return next((found.what for found in findings if found.level != "ok"), "")

    def score(self, submission: Path) -> float:
        """The metric, by `kit score`."""
        answers = self.competition / f"{ANSWERS}{''.join(self.test.suffixes)}"
        command = [runtime.python(), "-m", "kit", "score", str(submission), str(answers), "--task", self.recipe.task.kind, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RehearsalError(f"`kit score` of {submission}: {done.stderr.strip().splitlines()[-1:]}")
        return float(json.loads(done.stdout.splitlines()[-1])[self.metric_name])


def _sample(folder: Path) -> tuple[Path, Path]:
    """Bundles of members trained on the sample competition, and that competition. Raises RehearsalError."""
    competition, artifacts, runs = write_sample(folder / "sample"), folder / "members", []
    for name, (recipe, overrides) in tqdm(RECIPES.items(), "training members", disable=None):
        if "\n" in recipe:
            manifest.write_atomically(artifacts / f"{name}.toml", recipe)
        settings = [f"--set={setting}" for setting in (f"name={name}", f"data.folder={json.dumps(str(competition))}", *overrides)]
        source = str(artifacts / f"{name}.toml") if "\n" in recipe else recipe
        command = [runtime.python(), "-m", "kit", "train", source, *settings, "--artifacts", str(artifacts), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RehearsalError(f"`kit train` of {name}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
        runs.append(Path(json.loads(done.stdout.splitlines()[-1])["run"]))
    pack(runs, artifacts=artifacts)
    return artifacts / "bundles", competition


def _finish(run: Run, within_s: float) -> int | None:
    """The exit code of a run, which is killed after that long; None if it had to be."""
    try:
        return int(run.process.wait(timeout=within_s))
    except psutil.TimeoutExpired:
        run.end()
        return None


# --- part 1: kills ---------------------------------------------------------------------------------------------------------------


class Blow(NamedTuple):
    """SIGKILL after so many seconds of a start: to the first process of the "run", a "worker" of it, or its process "group"."""

    after_s: float
    target: str


def draw(rng: np.random.Generator, longest_s: float) -> Blow:
    """A blow at any moment of a run of that length, and a little after its end; half of them to the run, a quarter each to a worker and the group."""
    return Blow(float(rng.uniform(_LEAST_S, 1.1 * longest_s)), str(rng.choice(["run", "run", "worker", "group"])))


@dataclass
class Kill:
    """at_s: since the first start in this run folder. had_file: whether there was a valid submission at once.

    is_valid: whether there was one by the time it was promised: at once, or if that was before, as soon as it was due; None until that is known.
    """

    at_s: float
    target: str
    had_file: bool
    is_valid: bool | None = None


@dataclass
class Story:
    """One run folder from its first start (`first`, on the monotonic clock) to its end.

    due: when there must be a valid file: PROMISED_S after the start; None once there was one, for from then on there must be always.
    first_valid_s: from the first start to the first valid file, if no kill came before it. broken: promises, one line each.
    """

    folder: Path
    first: float = 0.0
    due: float | None = 0.0
    kills: list[Kill] = field(default_factory=list)
    first_valid_s: float | None = None
    is_equal: bool = False
    broken: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Note a broken promise."""
        self.broken.append(f"{self.folder.name}: {line}")

    def begin(self, begun: float) -> None:
        """The run is started, again perhaps."""
        self.first = self.first or begun
        self.due = None if self.due is None else begun + PROMISED_S

    def look(self, objection: str, now: float) -> bool:
        """Take note of what the submission is now; gives whether it is valid."""
        if self.due is not None and objection and now < self.due:
            return False  # nothing was promised yet
        if objection:
            self.say(f"no valid submission {now - self.first:.1f} s after the first start: {objection}")
        for known in self.kills:
            known.is_valid = not objection if known.is_valid is None else known.is_valid
        self.due = None
        return not objection


@dataclass
class Tally:
    """All runs that were killed."""

    stories: list[Story] = field(default_factory=list)

    @property
    def kills(self) -> list[Kill]:
        """Of all runs."""
        return [one for story in self.stories for one in story.kills]

    @property
    def broken(self) -> list[str]:
        """Promises, one line each."""
        return [line for story in self.stories for line in story.broken]

    def summary(self) -> dict[str, Any]:
        """valid: kills with a valid file at the latest when it was due; valid_early: of those in the first seconds, how many found one already.

        resumed: runs that were killed, and how many of them ended with the submission of the undisturbed one.
        """
        early = [one.had_file for one in self.kills if one.at_s < PROMISED_S]
        killed = [story.is_equal for story in self.stories if story.kills]
        firsts = [story.first_valid_s for story in self.stories if story.first_valid_s is not None]
        return {
            "kills": len(self.kills),
            "valid": sum(bool(one.is_valid) for one in self.kills),
            "valid_early": {"kills": len(early), "valid": sum(early)},
            "first_valid_s": {"median": round(statistics.median(firsts), 2), "max": round(max(firsts), 2)} if firsts else {},
            "resumed_equal": all(killed),
            "resumed": {"runs": len(killed), "equal": sum(killed)},
            "runs": len(self.stories),
            "targets": dict(Counter(one.target for one in self.kills)),
            "broken": self.broken,
        }


def _killed_run(bench: Bench, folder: Path, rng: np.random.Generator, most: int, bar: Any) -> Story:
    """Start, kill and start again in one run folder until it ends by itself, after `most` kills undisturbed; kept where a promise was broken."""
    story, command, log = Story(folder), bench.command(folder / SUBMISSION), folder.with_suffix(".log")
    code: int | None = -1
    while code is not None and code < 0:  # killed
        with Run.start(command, folder, log) as run:
            story.begin(run.begun)
            blow, before = draw(rng, bench.seconds) if len(story.kills) < most else None, len(story.kills)
            code = _one_start(bench, story, run, blow, rng)
            bar.update(len(story.kills) - before)
    story.is_equal = run.submission.is_file() and run.submission.read_bytes() == bench.reference
    if not story.is_equal:
        story.say(f"its submission differs from that of the undisturbed run (exit code {code})")
    if not story.broken:
        shutil.rmtree(folder)
        log.unlink()
    return story


def _one_start(bench: Bench, story: Story, run: Run, blow: Blow | None, rng: np.random.Generator) -> int | None:
    """Watch one start, deal the blow, and judge what it leaves. Gives the exit code, negative if the run was killed; None if it did not end."""
    _watch(bench, story, run, blow.after_s if blow else _STUCK_S)
    known = run.family()
    if blow and _strike(run, blow.target, rng):
        now, objection = time.monotonic(), bench.objection(run.submission)
        story.kills.append(Kill(now - story.first, blow.target, not objection))
        story.look(objection, now)
        _watch(bench, story, run, _STUCK_S)  # a run goes on that has lost a worker
    code = _finish(run, _STUCK_S)
    if code is None:
        story.say(f"it did not end within {_STUCK_S:.0f} s")
    elif code >= 0:
        story.look(bench.objection(run.submission), time.monotonic())
    if orphans := _bury(run, known):
        story.say(orphans)
    return code


def _watch(bench: Bench, story: Story, run: Run, seconds: float) -> None:
    """Wait for so many seconds of the run, or its end; look at its submission as soon as there is one, or must be."""
    while story.due is not None and not run.is_over and run.seconds < seconds:
        run.until(run.submission.is_file, min(story.due - time.monotonic(), seconds - run.seconds))
        if story.look(bench.objection(run.submission), time.monotonic()) and run.begun == story.first:
            story.first_valid_s = run.seconds
    run.until(lambda: run.seconds >= seconds)


def _strike(run: Run, target: str, rng: np.random.Generator) -> bool:
    """Deal the blow; False where it came too late. A worker is waited for, if there is none yet."""
    if target == "worker":
        family = run.until(run.family) or []
        return bool(kill([family[rng.integers(len(family))]])) if family else False
    if run.is_over:
        return False
    if target == "group":
        os.killpg(run.process.pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
    else:
        run.process.send_signal(signal.SIGKILL)
    return bool(run.process.wait() == -signal.SIGKILL)


def _bury(run: Run, known: Sequence[psutil.Process]) -> str:
    """Wait until the run and everything that it started are gone; what is there after a while is an orphan: it is killed, and told."""
    run.process.wait()
    end = time.monotonic() + GRACE_S
    while (left := _left(run, known)) and time.monotonic() < end:
        time.sleep(0.05)
    return f"processes {[process.pid for process in kill(left)]} outlived the run by {GRACE_S:.0f} s" if left else ""


def _left(run: Run, known: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Processes of the run that live: those that were seen, and those whose command line names its folder."""
    place = str(run.folder / RUN)
    named = [process for process in psutil.process_iter(["cmdline"]) if any(place in word for word in process.info["cmdline"] or ())]
    return [process for process in {*known, *named} if lives(process)]


# --- part 2: faults --------------------------------------------------------------------------------------------------------------


def _try(bench: Bench, name: str, fault: Fault) -> dict[str, Any]:
    """Run once with a fault and judge what came of it. Submission, run folder and log are kept, the spoiled bundles are not."""
    folder = bench.folder / "faults" / name
    bundles = Path(shutil.copytree(bench.bundles, folder / "bundles"))
    members = [bundles / member.name for member in bench.members]
    fault.before(bundles / bench.victim)
    place, limit_s = folder / "run", fault.limit_s or fault.seconds
    with own_disk(place, fault.disk_mb):
        with Run.start(fault.command(members, bench.test, sample_beside(bench.test), place / SUBMISSION), place, folder / "run.log") as run:
            fault.during(run)
            code = _finish(run, max(0.0, limit_s + _LATE_S - run.seconds))
        seconds, objection = run.seconds, bench.objection(run.submission)
        metric = None if objection else bench.score(run.submission)
        orphans = _bury(run, ())
        entry = {
            "what": fault.what,
            "happened": "; ".join(part for part in (_happened(run, code), objection, orphans) if part),
            "valid": not objection,
            "in_time": code is not None and seconds <= limit_s + GRACE_S and not orphans,
            "seconds": round(seconds, 1),
            "rows_scored": max(run.outcome.get("scored", {}).values(), default=0),
            bench.metric_name: metric,
            "lost": None if metric is None else round(bench.metric - metric, 4),
        }
    shutil.rmtree(bundles)
    return entry


def _happened(run: Run, code: int | None) -> str:
    """What the run said of its end: why members failed and what it did about it, else the last line of its log."""
    if code is None:
        return "it did not end, and was killed"
    outcome, rows = run.outcome, run.outcome.get("rows", 0)
    less = [f"{member} scored {count} of {rows} rows" for member, count in outcome.get("scored", {}).items() if count < rows]
    said = [f"{member}: {why}" for member, why in outcome.get("failures", {}).items()] or less
    said += [text for text in _decisions(run) if not any(text in line or line in text for line in said)]
    if not outcome:
        said = [line for line in run.lines() if line.startswith(("error: ", "warning: "))][-1:] or run.lines()[-1:]
    return f"exit code {code}: {'; '.join(said) or 'every member scored every row'}"[:_SHOWN]


def _decisions(run: Run) -> Iterator[str]:
    """What the run noted beside its plans: that something failed, and the way out."""
    path = Path(run.outcome.get("run", run.folder / RUN)) / "timeline.json"
    decisions = json.loads(path.read_text(encoding="utf-8"))["decisions"] if path.is_file() else []
    yield from (line["text"] for line in decisions if not re.search(r" per s\b|^worth having", line["text"]))
