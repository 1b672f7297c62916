"""Folds → fits → out-of-fold predictions, in one run folder that a second call continues. Knows no name of a task or a model.

artifacts/runs/<recipe>-<hash8>/: recipe.toml, inputs.json, folds.npy, oof.parquet, metrics.json, curves.png, soft/ (what a teacher says of the
rows of each fit), and one folder per fit (fold0 …, fold0-seed1 … with several seeds, full) holding its model and tokens, valid.npy,
valid-<view>.npy, history.json and metrics.json (written last: the fit is done). oof.parquet: id, fold, t0 …, p0 …, p0@<view> … where a view
differs, and the task's hints, overlap0 ….
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import filter_trackers

from kit import assemble, manifest, runtime
from kit.config import Recipe
from kit.data.audit import duplicates, overlaps
from kit.data.folds import make_folds
from kit.data.tables import Table, read_table
from kit.errors import ConfigError, DependencyError
from kit.metrics import bootstrap
from kit.tasks import Task, Tokens
from kit.training.distill import Teacher, taught
from kit.training.loop import fit, predict_together
from kit.training.track import JSONLines

log = logging.getLogger(__name__)

FULL = "full"
_DEBUG_ROWS = 32
_SUM = 1e-3  # that soft labels may be off, for they are rounded where they are written
_EQUAL = 1e-6  # between predictions of two views that say the same


class Run(NamedTuple):
    """folder: of the run. metrics: {"folds": {fit: {name: estimate}}, "oof": {name: estimate}, "views": {view: {name: estimate}}}.

    "oof" only once every fold is fitted, "views" only where a view says something else than the usual one. An estimate has value, se, low and high (95 %).
    """

    folder: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """What a recipe trains on: its own labelled examples in table order, extra ones that are never validated on, and pseudo-labels to begin with."""

    own: list[Any]
    extra: list[Any]
    pretrain: list[Any]
    groups: list[str] | None
    index: str | None
    digest: str


def train(
    recipe: Recipe, *, artifacts: Path = Path("artifacts"), folds: Sequence[int] | None = None, full: bool = False, debug: bool = False
) -> Run:
    """Fit the recipe's folds (all, or the chosen ones, or one fit on everything) that are not fitted yet, and write OOF and metrics.

    debug: a few rows and one epoch, in a run of its own. Runs under `accelerate launch` and `torchrun` as it is.
    Raises ConfigError, DataError, BundleError.
    """
    if debug:
        short = [f"train.epochs={min(1, recipe.train.epochs)}", f"train.swa={min(1, recipe.train.swa)}", "train.awp_from=0", "data.folds=2"]
        recipe = recipe.with_overrides([f'name="{recipe.name}-debug"', *short])
    assemble.check(recipe)
    chosen = _chosen_folds(recipe, folds)
    accelerator = _accelerator(recipe)
    task = assemble.make_task(recipe)
    teacher = Teacher.find(recipe, task, artifacts)
    with accelerator.main_process_first():
        rows = _DEBUG_ROWS if debug else None
        examples = read_examples(recipe, task, artifacts, rows=rows)
        numbers = _folds(recipe, task, examples)
        lesson = None
        if teacher:
            if not debug:  # a few rows have folds of their own
                teacher.check(examples.own, numbers, task)
            read = read_examples(teacher.recipe, assemble.make_task(teacher.recipe), artifacts, rows=rows)
            lesson = _Lesson(teacher, read)
        source = _backbone(recipe, examples, artifacts)
        beside = [_weights_digest(path) for path in assemble.beside(recipe, source)]
        parts = [recipe.digest, examples.digest, _weights_digest(source), *([teacher.digest] if teacher else []), *beside]
        folder = artifacts / "runs" / f"{recipe.name}-{assemble.digest(parts)}"
        if accelerator.is_main_process:
            _write_run(folder, recipe, task, examples, numbers)
    _start_trackers(accelerator, recipe, folder)
    trainer = _Trainer(recipe, task, examples, source, folder, numbers, accelerator, lesson)
    if full or not recipe.train.epochs:
        trainer.fit(FULL, None, recipe.train.seeds[0])
    else:
        for fold in chosen:
            for seed in recipe.train.seeds:
                trainer.fit(fit_name(recipe, fold, seed), fold, seed)
    with accelerator.main_process_first():
        metrics = summarise(folder, recipe, task, examples.own, numbers, write=accelerator.is_main_process)
    accelerator.end_training()  # last: it takes the process group down
    return Run(folder, metrics)


class _Lesson(NamedTuple):
    """A teacher, and the examples as it reads them."""

    teacher: Teacher
    examples: Examples


def read_examples(recipe: Recipe, task: Task, artifacts: Path, *, rows: int | None = None) -> Examples:
    """The labelled examples of the recipe's tables, with contexts where the recipe retrieves them. Raises DataError."""
    base = Path(recipe.data.folder)
    table = read_table(base / recipe.data.train, ids=task.id_column)
    if recipe.data.group is not None and recipe.data.group not in table.frame:
        raise table.error(f"data.group = {recipe.data.group!r} is no column (columns: {', '.join(table.frame.columns)})")
    own = task.read(table)[:rows]
    extra = [example for name in recipe.data.extra for example in task.read(read_table(base / name, ids=task.id_column))[:rows]]
    pretrain = [example for name in recipe.data.pretrain for example in _pseudo(read_table(base / name, ids=task.id_column), task)[:rows]]
    for label, some in (("data.train", own), ("data.extra", extra), ("data.pretrain", pretrain)):
        unknown = [row for row, example in enumerate(some) if not task.is_labelled(example)]
        if unknown:
            raise ConfigError(f"{label}: example {unknown[0] + 1} has no answer: give a table that has its answer column, filled in every row")
    if recipe.retrieve:
        every = iter(assemble.cached_contexts([*own, *extra, *pretrain], task, recipe, artifacts))
        own, extra, pretrain = ([next(every) for _ in some] for some in (own, extra, pretrain))
    groups = table.frame[recipe.data.group].tolist()[:rows] if recipe.data.group else None
    texts = {label: task.queries(some, "prompt_options") for label, some in (("extra", extra), ("pretrain", pretrain))}
    if task.submits:  # of a corpus it would take longer than training
        _warn_of_leaks(recipe, task.queries(own, "prompt_options"), texts)
    files = [manifest.sha256(base / name) for name in (recipe.data.train, *recipe.data.extra, *recipe.data.pretrain)]
    index = assemble.index_name(recipe) if recipe.retrieve else None
    return Examples(own, extra, pretrain, groups, index, assemble.digest([files, index, rows]))


def _pseudo(table: Table, task: Task) -> list[Any]:
    """Examples of a table of pseudo-labels; columns p0 …, one for each of a row's predictions, are soft labels. Raises DataError."""
    examples = task.read(table)
    columns = [column for column in table.frame if re.fullmatch(r"p\d+", column)]
    if not columns:
        return examples
    if not hasattr(task, "distill"):
        raise table.error(f"soft labels ({', '.join(columns)}) are for tasks of options: write pseudo-labels as the training table has its targets", column=columns[0])
    if columns != [f"p{number}" for number in range(task.width(examples))]:
        raise table.error(f"soft labels need columns p0 to p{task.width(examples) - 1}, one for each option", column=columns[-1])
    said = table.frame[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    wrong = ~(np.isfinite(said) & (said >= 0)).all(1) | (np.abs(said.sum(1) - 1) > _SUM)
    if wrong.any():
        raise table.error("soft labels are probabilities that add up to 1", row=int(wrong.argmax()), column=columns[0])
    return taught(examples, said)


def _pretrain_task(task: Any) -> Task:
    """The task whose loss, for examples with soft labels, compares with these alone."""
    return replace(task, distill=1.0) if hasattr(task, "distill") else task


def _warn_of_leaks(recipe: Recipe, own: Sequence[str], others: Mapping[str, Sequence[str]]) -> None:
    """Say where near-duplicates make OOF look better than the truth. others: texts by the setting of `data` that names their tables."""
    file = recipe.data.train
    for label, texts in others.items():
        if seen := overlaps(texts, own):
            first = f"{label} row {seen[0].left + 1} nearly repeats row {seen[0].right + 1}"
            log.warning("%s of %s (%d such rows): OOF will look too good", first, file, len(seen))
    if recipe.data.fold_by != "grouped" and (twice := duplicates(own)):
        log.warning("rows %d and %d of %s are nearly equal (%d such pairs): name a data.group", twice[0].left + 1, twice[0].right + 1, file, len(twice))


def fit_name(recipe: Recipe, fold: int, seed: int) -> str:
    """Folder name of a fit: fold0, or fold0-seed1 with several seeds."""
    return f"fold{fold}" if len(recipe.train.seeds) == 1 else f"fold{fold}-seed{seed}"


def fits_of(recipe: Recipe, folds: Iterable[int]) -> list[str]:
    """The fits that have not seen these folds: those of every seed, or the one of a recipe that trains nothing."""
    return [fit_name(recipe, fold, seed) for fold in folds for seed in recipe.train.seeds] if recipe.train.epochs else [FULL]


def summarise(folder: Path, recipe: Recipe, task: Task, own: Sequence[Any], numbers: np.ndarray, *, write: bool) -> dict[str, Any]:
    """Metrics per fit and, when every fold is there, of the OOF predictions (mean over seeds), with bootstrap standard errors."""
    names = [fits_of(recipe, [fold]) for fold in range(recipe.data.folds)]
    folds_of = numbers
    if not recipe.train.epochs:  # one fit for the rows of all folds
        names, numbers = names[:1], np.zeros_like(numbers)
    done = {path.parent.name for path in folder.glob("*/metrics.json")}
    targets = task.targets(own)
    fitted = {name: targets[numbers == number] for number, fold in enumerate(names) for name in fold if name in done}
    folds = {name: _estimates(task, np.load(folder / name / _valid()), held) for name, held in fitted.items()}
    metrics: dict[str, Any] = {"folds": {**({FULL: {}} if FULL in done else {}), **folds}}
    if len(fitted) == sum(map(len, names)):
        oof = _out_of_fold(folder, names, numbers, task)
        views = _views(folder, names, numbers, task, oof)
        metrics["oof"] = _estimates(task, oof, targets)
        if views:
            metrics["views"] = {view: _estimates(task, prediction, targets) for view, prediction in views.items()}
        if write:
            write_oof(folder / "oof.parquet", own, folds_of, targets, oof, views=views, hints=task.hints(own))
    if write:
        manifest.write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1))
    return metrics


def _valid(view: str | None = None) -> str:
    """The file of a fit's predictions for its validation rows, in the usual view or another one."""
    return "valid.npy" if view is None else f"valid-{view}.npy"


def _out_of_fold(folder: Path, names: Sequence[Sequence[str]], numbers: np.ndarray, task: Task, view: str | None = None) -> np.ndarray:
    """Predictions (N, C) float32 by the fits of each fold, the mean over its seeds."""
    parts = [task.average(np.stack([np.load(folder / name / _valid(view)) for name in fold])) for fold in names]
    oof = np.empty((len(numbers), parts[0].shape[1]), np.float32)
    for number, part in enumerate(parts):
        oof[numbers == number] = part
    return oof


def _views(folder: Path, names: Sequence[Sequence[str]], numbers: np.ndarray, task: Task, oof: np.ndarray) -> dict[str, np.ndarray]:
    """Out-of-fold predictions of the views that every fit has predicted and that differ from those of the usual view."""
    there = [view for view in task.views() if all((folder / name / _valid(view)).is_file() for fold in names for name in fold)]
    found = {view: _out_of_fold(folder, names, numbers, task, view) for view in there}
    return {view: prediction for view, prediction in found.items() if not np.allclose(prediction, oof, rtol=0, atol=_EQUAL, equal_nan=True)}


def _estimates(task: Task, prediction: np.ndarray, targets: np.ndarray) -> dict[str, dict[str, float]]:
    return {name: bootstrap(metric, prediction, targets)._asdict() for name, metric in task.metrics.items()}


def write_oof(
    path: Path,
    own: Sequence[Any],
    numbers: np.ndarray,
    targets: np.ndarray,
    oof: np.ndarray,
    *,
    views: Mapping[str, np.ndarray],
    hints: Mapping[str, np.ndarray],
) -> None:
    """id, fold, target(s), one column p0 … per score, p0@view … per view, and the hints, in the order of the training table."""
    columns: dict[str, Any] = {"id": [example.id for example in own], "fold": numbers}
    columns |= _numbered("t", targets.reshape(len(own), -1)) | _numbered("p", oof)
    for view, prediction in views.items():
        columns |= _numbered("p", prediction, f"@{view}")
    for name, values in hints.items():
        columns |= _numbered(name, values)
    part = path.with_suffix(".part")
    pd.DataFrame(columns).to_parquet(part, index=False)
    part.replace(path)


def _numbered(name: str, values: np.ndarray, suffix: str = "") -> dict[str, np.ndarray]:
    return {f"{name}{k}{suffix}": column for k, column in enumerate(values.T)}


@dataclass
class _Trainer:
    recipe: Recipe
    task: Task
    examples: Examples
    source: Path
    folder: Path
    numbers: np.ndarray
    accelerator: Accelerator
    lesson: _Lesson | None

    def fit(self, name: str, fold: int | None, seed: int) -> None:
        """One fit, unless it is done: on the other folds and the extra examples, or (fold None) on everything.

        One that trains nothing is validated on everything.
        """
        folder = self.folder / name
        if (folder / "metrics.json").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state").mkdir(exist_ok=True)
        inside = np.full(len(self.numbers), not self.recipe.train.epochs) if fold is None else self.numbers == fold
        training = _learnt(self.examples, inside)
        if self.lesson:
            training = taught(training, self._said(self.lesson, fold, inside))
        valid = [self.examples.own[row] for row in np.flatnonzero(inside)]
        runtime.seed_everything(seed)
        model = assemble.create_model(self.recipe, self.task, self.source)
        if self.recipe.train.epochs:
            model.reinit_layers(self.recipe.train.reinit_layers)
        elif not model.gives.endswith("_token"):
            raise ConfigError(f"train.epochs = 0, but model {self.recipe.model.kind!r} begins with a random head: train it, or take one that gives the chances of words")
        chosen = runtime.choose(self.recipe.train.precision, str(self.accelerator.device))
        tokens = assemble.load_tokens(self.recipe, self.source)
        begun = time.monotonic()
        result = fit(
            model, self.task, tokens, training, valid,
            settings=self.recipe.train, runtime=chosen, accelerator=self.accelerator, folder=folder, seed=seed,
            pretrain=self.examples.pretrain, pretrain_task=_pretrain_task(self.task),
            batch_tokens=self.recipe.infer.batch_tokens, label=name,
        )  # fmt: skip
        self.accelerator.log({f"{name}/seconds": round(time.monotonic() - begun, 1)})
        views = {view: self._predict(model, other.task, valid, tokens, f"{name} {view}") for view, other in self.task.views().items() if valid}
        if self.accelerator.is_main_process:
            tokens.save(folder)
            for view, prediction in ({None: result.prediction} | views).items():
                np.save(folder / _valid(view), prediction)
            manifest.write_atomically(folder / "metrics.json", json.dumps(result.metrics))
            shutil.rmtree(folder / "state")  # not before the fit counts as done: a kill in between must not cost it

    def _said(self, lesson: _Lesson, fold: int | None, inside: np.ndarray) -> np.ndarray:
        """What the teacher's fits of this fold (of all, for a fit on everything) say of the rows a fit is trained on (Nt, C); kept for the next seed."""
        path = self.folder / "soft" / f"{FULL if fold is None else f'fold{fold}'}.npy"
        self.accelerator.wait_for_everyone()
        if path.is_file():
            return np.load(path)
        recipe = lesson.teacher.recipe
        fits = fits_of(recipe, range(recipe.data.folds) if fold is None else [fold])
        said = lesson.teacher.says(fits, _learnt(lesson.examples, inside), self.accelerator, label=path.stem)
        if self.accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part.npy")
            np.save(part, said)
            part.replace(path)
        self.accelerator.wait_for_everyone()
        return said

    def _predict(self, model: Any, task: Task, valid: Sequence[Any], tokens: Tokens, label: str) -> np.ndarray:
        """What the fitted model says of the validation rows (Nv, C) when `task` encodes them."""
        return predict_together(
            model, task, valid, tokens,
            runtime=runtime.choose(self.recipe.train.precision, str(self.accelerator.device)), accelerator=self.accelerator,
            batch_tokens=self.recipe.infer.batch_tokens, label=label,
        )  # fmt: skip


def _learnt(examples: Examples, inside: np.ndarray) -> list[Any]:
    """What a fit is trained on: the own examples that are not inside (N,) its validation part, and the extra ones."""
    return [examples.own[row] for row in np.flatnonzero(~inside)] + examples.extra


def _folds(recipe: Recipe, task: Task, examples: Examples) -> np.ndarray:
    """The fold of each example (N,) int8."""
    data, own = recipe.data, examples.own
    return make_folds(len(own), data.folds, by=data.fold_by, strata=task.strata(own), groups=examples.groups, seed=data.fold_seed)


def _write_run(folder: Path, recipe: Recipe, task: Task, examples: Examples, numbers: np.ndarray) -> None:
    """Recipe, inputs and folds of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write_atomically(folder / "recipe.toml", recipe.to_toml())
    rows = {"rows": len(examples.own), "extra": len(examples.extra)} | ({"pretrain": len(examples.pretrain)} if examples.pretrain else {})
    manifest.write_atomically(folder / "inputs.json", json.dumps({"index": examples.index, **rows, **({} if task.submits else {"submits": False})}))
    np.save(folder / "folds.npy", numbers)


def _backbone(recipe: Recipe, examples: Examples, artifacts: Path) -> Path:
    """The backbone's folder; a new one learns its tokenizer from the texts of the examples, and is shared by runs of equal settings."""
    task = assemble.make_task(recipe)
    every = [*examples.own, *examples.extra, *examples.pretrain]
    beside = [_weights_digest(path) for path in assemble.beside(recipe)]
    name = assemble.digest([recipe.model.model_dump(mode="json"), recipe.train.seeds[0], examples.digest, *beside])
    texts = [f"{getattr(example, 'context', '')} {query}" for example, query in zip(every, task.queries(every, "prompt_options"), strict=True)]
    return assemble.backbone(recipe, artifacts / "backbones" / name, Path(recipe.data.folder), texts, bundles=artifacts / "bundles")


def _weights_digest(source: Path) -> str:
    """Of a file, or of the weights and settings in a folder."""
    files = [source] if source.is_file() else sorted(path for pattern in ("*.safetensors", "*.json") for path in source.glob(pattern))
    return assemble.digest([[path.name, manifest.sha256(path)] for path in files if path.name != manifest.FILE])


def _start_trackers(accelerator: Accelerator, recipe: Recipe, folder: Path) -> None:
    """JSON lines in log.jsonl, or what the recipe names, inside the run folder and without network."""
    chosen = recipe.train.tracker
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = [JSONLines(folder / "log.jsonl")] if chosen == "jsonl" else filter_trackers(chosen, logging_dir=str(folder))
    if not accelerator.log_with:
        raise DependencyError(f'train.tracker = "{chosen}" needs its package: pip install {chosen}, or set train.tracker = "jsonl"')
    accelerator.init_trackers(recipe.name, init_kwargs={"wandb": {"mode": "offline", "dir": str(folder)}})


def _chosen_folds(recipe: Recipe, folds: Sequence[int] | None) -> Sequence[int]:
    for fold in folds or ():
        if not 0 <= fold < recipe.data.folds:
            raise ConfigError(f"--folds {fold}: the recipe has folds 0 to {recipe.data.folds - 1}")
    return range(recipe.data.folds) if folds is None else folds


def _accelerator(recipe: Recipe) -> Accelerator:
    chosen = runtime.choose(recipe.train.precision)
    return Accelerator(
        cpu=chosen.device.type == "cpu",
        mixed_precision="no",  # the loop does its own, the same on CPU and CUDA
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # BERT's own pooler gets no gradient
    )
