"""What will happen after submitting, played through here: the saved version of a notebook, and its hidden rerun.

The same staged datasets twice, each time in a new box: with the public test set under the old mount layout, and with a look-alike of the
hidden one under the new layout with the rerun's marker. Both must give a valid submission to which every member has contributed every row,
and the first the same, but for the rounding of numbers, as inference outside the box. What a valid submission is, the members' task says.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from packaging.utils import parse_wheel_filename
from tqdm import tqdm

from kit import assemble, manifest, runtime
from kit.config import Recipe
from kit.data.competition import TESTS, find_test, named_in, sample_beside
from kit.data.tables import read_table
from kit.errors import BundleError, ConfigError, DataError, RehearsalError
from kit.manifest import Manifest
from kit.rehearsal import box
from kit.rehearsal.doctor import base_of
from kit.rehearsal.limits import Limits
from kit.rehearsal.lint import judge
from kit.rehearsal.rerun import link_files, look_alike
from kit.sample import write_sample
from kit.tasks import Task
from kit.vendor.bundle import pack
from kit.vendor.dataset import stage
from kit.vendor.lookalike import Lookalike
from kit.vendor.profile import Profile
from kit.vendor.site import DATASET_METADATA
from kit.vendor.wheels import DISTRIBUTION, Index, pack_code, vendor

SUBMISSION, OUTCOME = "submission.csv", "outcome.json"
_ROUNDING = 1e-4  # of a number in a submission
ROWS = 2400  # of the look-alike: some twenty times the public rows of the sample competition
_OWNER = "owner"
_ANSWERS = "test_answers.csv"
SAMPLE_RECIPES: Mapping[str, Sequence[str]] = {
    "sample_rules": (),
    "sample_deberta": ("model.config.num_hidden_layers=1", "train.epochs=1", "train.fgm=0", "train.precision=fp32"),
}
"""Shipped recipes and changes to them: rules and an encoder, which need not be good, but soon there."""


@dataclass(frozen=True)
class Rehearsal:
    """folder: what was written in both runs. summary: as in its summary.json."""

    folder: Path
    summary: dict[str, Any]


class _Layout(NamedTuple):
    """Where the site mounts things, below its input folder."""

    datasets: str
    competitions: str


_OLD, _NEW = _Layout(".", "."), _Layout(f"datasets/{_OWNER}", "competitions")


def rehearse(
    datasets: Path,
    notebook: Path,
    competition: Path,
    *,
    profile: Profile,
    artifacts: Path = Path("artifacts"),
    rows: int = ROWS,
    limits: Limits | None = None,
    level: str | None = None,
) -> Rehearsal:
    """Run the unchanged notebook twice in a box and judge what it submits. Writes artifacts/rehearsals/<time>/summary.json, also as `latest`.

    datasets: a folder of staged datasets or of bundles; all are mounted. rows: of the look-alike. level: of the box; None: the best here.
    Raises BundleError and DataError before anything runs; RehearsalError, once the summary is written, where a run or its submission would
    fail on the site, or differs from what comes out outside the box.
    """
    begun, competition = time.monotonic(), competition.resolve()
    staged = [manifest.verify(folder) for folder in tqdm(_bundles_in(datasets), "verify", disable=None)]
    _check_bases(staged)
    recipes = _recipes(staged)
    task = assemble.make_task(Recipe.load(recipes[0])) if recipes else None  # of all: a member of another could not read the test set
    test = find_test(competition, named_in(recipes))
    public = read_table(test, ids=task.id_column if task else None).frame
    public_rows, ids = len(public), task.id_column if task else str(public.columns[0])
    folder = _new_folder(artifacts.resolve() / "rehearsals")
    play = _Play(staged, notebook, profile, limits or Limits(), level, folder, task, test.relative_to(competition), ids)
    steps: dict[str, Callable[[], None]] = {
        "public": lambda: play.run("public", competition, public_rows, _OLD, rerun=False),
        "outside": lambda: play.compare(competition),
        "rerun": lambda: play.run("rerun", play.look_alike(competition, rows), rows, _NEW, rerun=True),
    }
    with tqdm(steps.items(), "rehearse", disable=None) as bar:
        for name, step in bar:
            bar.set_postfix_str(name)
            try:
                step()
            except RehearsalError as error:  # the next run would fail alike
                play.problems.append(str(error))
                break
    summary = {"seconds": round(time.monotonic() - begun, 1), **play.summary()}
    manifest.write_atomically(folder / "summary.json", json.dumps(summary, indent=1))
    if play.problems:
        more = f" (and {len(play.problems) - 1} more, see there)" if len(play.problems) > 1 else ""
        raise RehearsalError(f"{play.problems[0]}{more}; what was written is in {folder}")
    return Rehearsal(folder, summary)


@dataclass
class _Play:
    """The runs of one rehearsal. task: of the members, if there are any. test: the test set's place in the competition's folder; ids: the column of its ids.

    problems: what would cost the submission, one line each.
    """

    datasets: Sequence[Manifest]
    notebook: Path
    profile: Profile
    limits: Limits
    level: str | None
    folder: Path
    task: Task | None
    test: Path
    ids: str
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    attempts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    is_identical: bool = False
    differing: int = 0

    @property
    def members(self) -> dict[str, Manifest]:
        """Member bundles by name; of one in parts, the first."""
        return {dataset.name: dataset for dataset in self.datasets if dataset.kind == "member" and dataset.part[0] == 1}

    def run(self, name: str, competition: Path, rows: int, layout: _Layout, *, rerun: bool) -> None:
        """Run the notebook in a new box with a new environment; raises RehearsalError where it does not run to its end."""
        mounts, working, environment = (self.folder / name / part for part in ("input", "working", "environment"))
        for dataset in self.datasets:
            link_files(dataset.root, mounts / layout.datasets / dataset.root.name, but=[DATASET_METADATA])
        link_files(competition, mounts / layout.competitions / competition.name)
        try:
            lookalike = Lookalike.create(environment, self.profile, hide={DISTRIBUTION, *_vendored(mounts)})
            self.differing = len(lookalike.differing)
            boxed = box.run(
                self.notebook, mounts=mounts, working=working, lookalike=lookalike, limits=self.limits, level=self.level, rerun=rerun
            )
        except RehearsalError as error:
            self.attempts += [f"{name} run: {attempt}" for attempt in error.attempts]
            raise RehearsalError(f"{name} run: {error}") from None
        finally:
            shutil.rmtree(mounts)
            shutil.rmtree(environment, ignore_errors=True)
        self.level = boxed.level
        self.attempts += [f"{name} run: {attempt}" for attempt in boxed.attempts]
        outcome = _outcome(working / OUTCOME)
        found = [*self._faults(working, competition), *_idle(outcome, self.members, rows)]
        self.problems += [f"{name} run: {problem}" for problem in found]
        told = {key: outcome.get(key, {}) for key in ("scored", "failures")}
        self.runs[name] = {"seconds": boxed.seconds, "peak_mb": boxed.peak_mb, "rows": rows, "valid": not found, **told}

    def look_alike(self, competition: Path, rows: int) -> Path:
        """A folder like the competition's, with a test set of so many rows."""
        return look_alike(competition, self.folder / competition.name, rows=rows, test=str(self.test), ids=self.ids)

    def compare(self, competition: Path) -> None:
        """The same inference with the same bundles in the ordinary environment, as a plain process."""
        out, test = self.folder / "outside" / SUBMISSION, competition / self.test
        members = [str(member.root) for _, member in sorted(self.members.items())]
        command = [runtime.python(), "-m", "kit", "infer", *members, "--test", str(test), "--out", str(out)]
        _run([*command, *(["--sample-submission", str(sample)] if (sample := sample_beside(test)) else [])])
        inside = self.folder / "public" / "working" / SUBMISSION
        self.is_identical = inside.is_file() and agree(inside, out, self.ids)
        if not self.is_identical:
            self.problems.append(f"{SUBMISSION} of the public run differs from {out}, made outside the box from the same bundles: compare their packages")

    def _faults(self, working: Path, competition: Path) -> Iterator[str]:
        """Why the site would refuse the submission, or not find in it what the sample submission has."""
        test = competition / self.test
        findings = judge(working / SUBMISSION, self.task, sample=sample_beside(test), test=test) if self.task else []
        yield from (f"{finding.check}: {finding.what}" for finding in findings if finding.level != "ok")

    def summary(self) -> dict[str, Any]:
        """Everything but the time."""
        hidden = self.runs.get("rerun", {})
        return {
            "level": self.level,
            "profile": self.profile.name,
            "differing": self.differing,
            "rows": hidden.get("rows", 0),
            "valid": len(self.runs) == 2 and all(run["valid"] for run in self.runs.values()),
            "identical_to_outside": self.is_identical,
            "sockets": len(self.attempts),
            "attempts": self.attempts,
            "peak_mb": max((run["peak_mb"] for run in self.runs.values()), default=0),
            "runs": self.runs,
            "forecast": _forecast(self.runs, self.limits.wall_s),
            "problems": self.problems,
        }


def agree(one: Path, other: Path, ids: str) -> bool:
    """Whether two submissions say the same: cell by cell the same text, or outside of the column `ids` numbers that differ by rounding alone.

    Sums of float32 depend on the rows that go through a model together, and these on the speed of the machine.
    """
    if one.read_bytes() == other.read_bytes():
        return True
    try:
        first, second = (read_table(path, ids=None).frame for path in (one, other))
    except DataError:
        return False
    if list(first) != list(second) or len(first) != len(second):
        return False
    same = (first == second).to_numpy()
    numbers, others = (frame.drop(columns=ids, errors="ignore").apply(pd.to_numeric, errors="coerce") for frame in (first, second))
    near = ((numbers - others).abs() <= _ROUNDING).reindex(columns=first.columns, fill_value=False).to_numpy()
    return bool((same | near).all())


def _outcome(path: Path) -> dict[str, Any]:
    """What inference told of itself, beside the submission."""
    outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return outcome


def _idle(outcome: Mapping[str, Any], members: Mapping[str, Manifest], rows: int) -> Iterator[str]:
    """Members that did not do their work: a valid submission alone may be the fallback, and that of the public rows a shortcut."""
    if not outcome:
        yield f"the notebook wrote no {OUTCOME}, so nobody knows whether every member scored every row: call outcome.save(Path.cwd()) after kit.infer()"
        return
    for name in members:
        scored, reason = outcome.get("scored", {}).get(name, 0), outcome.get("failures", {}).get(name, "")
        if reason or (scored < rows and outcome.get("weights", {}).get(name, 1.0) > 0):
            yield f"member {name} scored {scored} of {rows} rows{f': {reason}' if reason else ''}"


def _forecast(runs: Mapping[str, Mapping[str, Any]], wall_s: float) -> dict[str, float]:
    """From the two runs: seconds that do not depend on the number of rows, seconds per row, and how many rows the time here would allow."""
    if len(runs) < 2 or runs["rerun"]["rows"] <= runs["public"]["rows"]:
        return {}
    row_s = (runs["rerun"]["seconds"] - runs["public"]["seconds"]) / (runs["rerun"]["rows"] - runs["public"]["rows"])
    fixed_s = max(0.0, runs["public"]["seconds"] - row_s * runs["public"]["rows"])
    return {"fixed_s": round(fixed_s, 1), "row_s": round(row_s, 4), "rows_in_time": int((wall_s - fixed_s) / row_s)} if row_s > 0 else {}


def _vendored(mounts: Path) -> set[str]:
    """Packages whose wheels are mounted."""
    return {str(parse_wheel_filename(path.name)[0]) for path in mounts.rglob("*.whl")}


def _bundles_in(datasets: Path) -> list[Path]:
    """The folders that are to be mounted; whether each is a bundle, `verify` sees. Raises BundleError where there are none."""
    folders = sorted(path for path in datasets.iterdir() if path.is_dir() and not path.name.startswith(".")) if datasets.is_dir() else []
    if not folders:
        raise BundleError(f"{datasets}: no datasets: stage a trained run with `kit vendor bundle`")
    return folders


def _check_bases(staged: Sequence[Manifest]) -> None:
    """Raises BundleError for a member whose base is not there."""
    mounted = {dataset.name for dataset in staged}
    for member in staged:
        base = base_of(member) if member.kind == "member" and "recipe.toml" in member.files else None
        if base and base not in mounted:
            where = member.root.parent
            raise BundleError(f"{member.name}: its base {base} is not in {where} (bundles: {', '.join(sorted(mounted))}): stage it, too, as `kit vendor bundle` does")


def _recipes(staged: Sequence[Manifest]) -> list[Path]:
    """The recipe files of members."""
    return [member.locate("recipe.toml") for member in staged if member.kind == "member" and "recipe.toml" in member.files]


def _new_folder(rehearsals: Path) -> Path:
    """A folder named by the time, which `latest` leads to from now on."""
    folder, link = rehearsals / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%fZ"), rehearsals / ".latest"
    folder.mkdir(parents=True)
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(rehearsals / "latest")
    return folder


def _run(command: Sequence[str]) -> str:
    """The standard output of a command of the kit. Raises RehearsalError with its last line of error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RehearsalError(f"`kit {command[3]}` outside the box: {said[0]}")
    return done.stdout


# --- something to rehearse with --------------------------------------------------------------------------------------------------


def staged_or_sample(datasets: Path | None, competition: Path | None, artifacts: Path, profile: Profile) -> tuple[Path, Path]:
    """Datasets and competition to rehearse where they are not named.

    By default what is staged in artifacts/datasets, or `sample_datasets` where nothing is; and the folder that a member was trained in.
    Raises ConfigError where that is not here.
    """
    staged = datasets or artifacts / "datasets"
    if datasets is None and competition is None and not any(staged.glob(f"*/{manifest.FILE}")):
        return sample_datasets(artifacts, profile)
    competition = competition or next(_trained_in(staged), None)
    if competition is None:
        raise ConfigError(f"{staged}: the folder its members were trained in is not here: give --competition the folder with the test set")
    return staged, competition


def _trained_in(datasets: Path) -> Iterator[Path]:
    """Folders with a test set, of the recipes of members."""
    for recipe in _recipes([manifest.read(folder) for folder in _bundles_in(datasets)]):
        data = Recipe.load(recipe).data
        folder = Path(data.folder)
        if any((folder / name).is_file() for name in (data.test, *TESTS)):
            yield folder


def sample_datasets(
    artifacts: Path,
    profile: Profile,
    *,
    requirements: Path = Path("wheels/requirements.in"),
    index: Index | None = None,
    recipes: Mapping[str, Sequence[str]] = SAMPLE_RECIPES,
) -> tuple[Path, Path]:
    """Datasets of members trained on the embedded sample competition, and that competition.

    All of it is kept below artifacts/rehearsals/sample as long as what it is made from stays the same. index: where the wheels come from.
    recipes: shipped ones, and overrides. Raises RehearsalError, and what vendoring and staging raise.
    """
    root = artifacts.resolve() / "rehearsals" / "sample"
    competition = write_sample(root / "kit-sample")
    (competition / _ANSWERS).unlink()
    wheels, members = root / "wheels", root / "members"
    with tqdm(total=3, desc="sample datasets", disable=None) as bar:
        _once(wheels, [requirements.read_text(encoding="utf-8"), profile.digest], lambda: vendor(requirements, [profile], wheels, index=index))
        bar.update()
        code = manifest.read(pack_code(wheels))
        _once(members, [code.digest, recipes], lambda: _train(recipes, competition, members))
        bar.update()
        found = sorted(path.parent for folder in (wheels, members / "bundles") for path in folder.glob(f"*/{manifest.FILE}"))
        stage(found, root / "datasets", owner=_OWNER)
        bar.update()
    return root / "datasets", competition


def _once(folder: Path, key: Any, make: Callable[[], Any]) -> None:
    """Make a folder anew unless it was made from the same."""
    stamp, text = folder / "made-from.json", json.dumps(key)
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)
        make()
        manifest.write_atomically(stamp, text)


def _train(recipes: Mapping[str, Sequence[str]], competition: Path, artifacts: Path) -> None:
    """Runs and bundles of the recipes below `artifacts`."""
    runs = []
    for recipe, overrides in recipes.items():
        settings = [f"--set={setting}" for setting in (f"data.folder={json.dumps(str(competition))}", *overrides)]
        told = _run([runtime.python(), "-m", "kit", "train", recipe, *settings, "--artifacts", str(artifacts), "--json"])
        runs.append(Path(json.loads(told.splitlines()[-1])["run"]))
    pack(runs, artifacts=artifacts)
