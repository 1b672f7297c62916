"""Bundles and a test set → submission.csv, inside the budget and without network. Knows no name of a task or a model.

The file is valid from the first seconds on and better after every fit: fallback order, then the pool of all that is scored so far.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from kit import assemble, manifest, paths, runtime
from kit.budget import Budget
from kit.config import Recipe
from kit.data.tables import read_table
from kit.errors import BundleError, DataError, KitError
from kit.inference.blend import fit_weights, pool
from kit.inference.submission import Submission
from kit.metrics import bootstrap
from kit.predict import stream
from kit.tasks import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One member bundle: a recipe and its trained fits."""

    folder: Path
    name: str
    recipe: Recipe
    fits: tuple[str, ...]
    index: str | None

    @classmethod
    def open(cls, bundle: manifest.Manifest) -> Member:
        """The member of a verified bundle."""
        recipe = Recipe.load(bundle.root / "recipe.toml")
        return cls(bundle.root, bundle.name, recipe, tuple(bundle.meta["fits"]), bundle.meta["index"])

    @cached_property
    def task(self) -> Task:
        """The member's task."""
        return assemble.make_task(self.recipe)

    @cached_property
    def oof(self) -> pd.DataFrame:
        """OOF predictions p0 … and targets t0 …, by id."""
        return pd.read_parquet(self.folder / "oof.parquet").set_index("id")

    @property
    def bytes(self) -> int:
        """Size of its weights: what stands for its cost before any is measured."""
        return sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))


@dataclass
class Progress:
    """What a member has given so far: sums over fits of its predictions (N, C), and how many fits scored each row."""

    total: np.ndarray
    count: np.ndarray
    failure: str | None = None

    @property
    def prediction(self) -> np.ndarray:
        """Mean over fits (N, C); NaN where no fit scored the row."""
        with np.errstate(invalid="ignore"):
            return (self.total / self.count[:, None]).astype(np.float32)

    def add(self, prediction: np.ndarray) -> None:
        """Add one fit's predictions (N, C); rows that are not finite (not scored, or overflowed) are left out."""
        good = np.isfinite(prediction).all(-1)
        self.total[good] += prediction[good]
        self.count[good] += 1


@dataclass(frozen=True)
class Outcome:
    """finished: every fit of every member scored every row. weights and rows (scored) by member. failures: member → reason."""

    submission: Path
    rows: int
    finished: bool
    weights: dict[str, float]
    scored: dict[str, int]
    failures: dict[str, str]
    seconds: dict[str, float]
    oof: dict[str, dict[str, float]]
    predictions: dict[str, np.ndarray] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Everything but the predictions, as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "predictions"} | {"submission": str(self.submission)}

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
) -> Outcome:
    """Score a test set with the member bundles named (folders, or names mounted below `root`) and write the submission.

    Without `bundles`, every member bundle below `root` is used; without `test`, the competition's test.csv found there and the
    sample submission beside it. Index bundles are found by the name their member gives. A member that fails is left out, and named in the outcome. Raises DataError
    for a wrong test set and BundleError for a damaged bundle, both after the fallback submission is written where that is possible.
    use_contexts = False scores without retrieval, to see what it is worth.
    """
    root = root or runtime.input_root()
    if test is None:
        folder = paths.find_competition(root)
        test, sample = folder / "test.csv", sample or _fitting_sample(folder)
    if bundles is None:
        bundles = [folder for _, folder in sorted(paths.find_bundles(root).items()) if manifest.read(folder).kind == "member"]
    return _Inference(bundles, Path(test), Path(out), sample, budget or Budget(), root, use_contexts).run()


def _fitting_sample(folder: Path) -> Path | None:
    """The sample submission beside a test set, if it names the same ids; one that does not must not cost the run."""
    sample = folder / "sample_submission.csv"
    if not sample.is_file():
        return None
    try:
        if set(read_table(sample).frame["id"]) == set(read_table(folder / "test.csv").frame["id"]):
            return sample
        log.warning("%s names other ids than test.csv: rows are written in the order of test.csv", sample)
    except DataError as error:
        log.warning("%s: rows are written in the order of test.csv", error)
    return None


def weigh(members: Sequence[Member]) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """Pool weights (M,) from the OOF rows that all members share, and the first metric of each member and of the pool on them."""
    shared = members[0].oof.index
    for member in members[1:]:
        shared = shared.intersection(member.oof.index, sort=False)
    if not len(shared):
        raise BundleError(f"the members {', '.join(member.name for member in members)} have no OOF row in common: train them on one table")
    frames = [member.oof.loc[shared] for member in members]
    predictions = [frame.filter(regex=r"^p\d+$").to_numpy(np.float32) for frame in frames]
    targets = frames[0]["t0"].to_numpy()
    weights = fit_weights(predictions, targets)
    name, metric = next(iter(members[0].task.metrics.items()))
    each = {member.name: prediction for member, prediction in zip(members, predictions, strict=True)}
    estimates = {who: bootstrap(metric, values, targets) for who, values in {**each, "blend": pool(predictions, weights)}.items()}
    return weights, {who: {name: estimate.value, "se": estimate.se} for who, estimate in estimates.items()}


@dataclass
class _Inference:
    bundles: Sequence[str | Path]
    test: Path
    out: Path
    sample: Path | None
    budget: Budget
    root: Path
    use_contexts: bool
    contexts: dict[str, Sequence[Any]] = field(default_factory=dict)
    retrieval_failures: dict[str, str] = field(default_factory=dict)

    def run(self) -> Outcome:
        with self.budget.measure("fallback"):
            folders, self.members, refused = self._open()
            self.examples = self.members[0].task.read(read_table(self.test))
            self.submission = Submission.open(self.out, self.members[0].task, self.examples, self.sample)
            self.submission.write()
        if refused:
            raise refused
        with self.budget.measure("verify"):
            self.indexes = {name: paths.find_bundle(name, self._index_root(folders)) for name in sorted({m.index for m in self.members if m.index})}
            for folder in (*folders, *self.indexes.values()):
                manifest.verify(folder)
            self.weights, oof = weigh(self.members)
        shape = (len(self.examples), self.members[0].task.width(self.examples))
        self.progress = {member.name: Progress(np.zeros(shape), np.zeros(shape[0])) for member in self.members}
        for member in self.members:
            self._run_member(member)
        return self._outcome(oof)

    def _open(self) -> tuple[list[Path], list[Member], KitError | None]:
        """Folders of all bundles, the members among them, the cheapest first, and why one could not be opened (kept until the fallback is written)."""
        folders, members, refused = [], [], None
        for bundle in self.bundles:
            try:
                folder = paths.find_bundle(bundle, self.root)
                if folder in folders:  # another part of the same bundle
                    continue
                folders.append(folder)
                if manifest.read(folder).kind == "member":
                    members.append(Member.open(manifest.read(folder)))
                    assert members[-1].task
            except KitError as error:
                refused = refused or error
        if not members:
            named = ", ".join(map(str, self.bundles))
            raise refused or BundleError(f"no member bundle among [{named}] (mounted below {self.root}): pack a trained run, and attach it")
        return folders, sorted(members, key=lambda member: member.bytes), refused

    def _index_root(self, folders: list[Path]) -> Path:
        """Where index bundles are looked for: below the mounts, or beside the members where there are none."""
        return self.root if self.root.is_dir() else folders[0].parent

    def _run_member(self, member: Member) -> None:
        """Score every fit of one member while time lasts, rewriting the submission after each; a failure costs this member's rest alone."""
        mine = self.progress[member.name]
        examples = self._with_contexts(member)
        try:
            with self.budget.measure(member.name):
                for fit in member.fits:
                    if self.budget.remaining() <= 0:
                        mine.failure = f"no time left before {fit}"
                        break
                    self._run_fit(member, fit, examples)
        except Exception as error:  # whatever a member dies of, the run goes on with the others
            log.exception("member %s failed", member.name)
            mine.failure = _reason(error)

    def _with_contexts(self, member: Member) -> Sequence[Any]:
        """The examples with the contexts this member was trained with; members with equal settings share them.

        Where retrieval fails they stay without: a weaker score is better than none, and the failure is said.
        """
        settings = member.recipe.retrieve
        if settings is None or member.index is None or not self.use_contexts:
            return self.examples
        key = assemble.digest([member.index, settings.model_dump(mode="json")])
        if key not in self.contexts:
            self.contexts[key] = self.examples
            try:
                with self.budget.measure("retrieval"):
                    library = assemble.Library.open(self.indexes[member.index])
                    self.contexts[key] = assemble.add_contexts(self.examples, member.task, settings, library)
            except Exception as error:
                log.exception("retrieval failed")
                self.retrieval_failures[key] = f"scored without contexts, because retrieval failed: {_reason(error)}"
        self.progress[member.name].failure = self.retrieval_failures.get(key)
        return self.contexts[key]

    def _run_fit(self, member: Member, fit: str, examples: Sequence[Any]) -> None:
        """Score the examples with one fit, as far as time and memory reach, and rewrite the submission with what was scored."""
        folder, task, mine = member.folder / fit, member.task, self.progress[member.name]
        tokens = assemble.load_tokens(member.recipe, folder)
        model = assemble.load_model(member.recipe, task, folder)
        features = task.encode(examples, tokens)
        chosen = runtime.choose(member.recipe.infer.precision)
        batches = stream(model, task, features, tokens, runtime=chosen, batch_tokens=member.recipe.infer.batch_tokens)
        scored: dict[int, np.ndarray] = {}
        try:
            with tqdm(total=len(features), desc=f"{member.name} {fit}", unit="row", disable=None, leave=False) as bar:
                for indices, scores in batches:
                    scored.update(zip(indices, scores, strict=True))
                    bar.update(len(indices))
                    if self.budget.remaining() <= 0 and len(scored) < len(features):
                        mine.failure = f"no time left in {fit} after {len(scored)} of {len(features)} rows"
                        break
        finally:
            mine.add(task.decode(list(scored.values()), [features[index] for index in scored], examples))
            self._rewrite()
            del model, batches
            runtime.free_memory()

    def _rewrite(self) -> None:
        if any(mine.count.any() for mine in self.progress.values()):
            self.submission.write(pool([self.progress[member.name].prediction for member in self.members], self.weights))

    def _outcome(self, oof: dict[str, dict[str, float]]) -> Outcome:
        return Outcome(
            submission=self.out,
            rows=len(self.examples),
            finished=all((self.progress[member.name].count == len(member.fits)).all() for member in self.members),
            weights={member.name: float(weight) for member, weight in zip(self.members, self.weights, strict=True)},
            scored={name: int((mine.count > 0).sum()) for name, mine in self.progress.items()},
            failures={name: mine.failure for name, mine in self.progress.items() if mine.failure},
            seconds={**self.budget.measured, "total": self.budget.elapsed()},
            oof=oof,
            predictions={name: mine.prediction for name, mine in self.progress.items()},
        )


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
