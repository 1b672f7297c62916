"""The other task families, short: each trained and tried on its sample by commands of the kit, and judged beside a trivial rule.

Owns the table of families and what is measured of them. Does not know where the commands run, which its caller sees to, and knows no model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kit import assemble
from kit.config import Recipe
from kit.data.tables import read_table
from kit.metrics import bootstrap
from kit.rehearsal.baselines import mean_score, sentence, unigram
from kit.sample import write_sample
from kit.tasks import Task, Tokens

Kit = Callable[..., dict[str, Any]]
"""Runs a verb of the kit with its arguments, and gives what it says with --json. Raises KitError."""
Baseline = Callable[[Task, Sequence[Any], Sequence[Any], Callable[[], Tokens]], np.ndarray]
"""(task, examples to learn from, N examples to predict, the trained model's tokens) → (N, C)."""

_INPUT, _ANSWERS, _ARTIFACTS = "input", "answers", "artifacts"
_SUBMISSION = "submission.csv"


@dataclass(frozen=True)
class Family:
    """recipe: a shipped one, or a TOML file. sample: as kit.sample names it. metric: of the task, which people know as `label`, with this sign.

    rule: what the baseline is called.
    """

    recipe: str
    sample: str
    metric: str
    label: str
    sign: int
    rule: str
    baseline: Baseline

    @property
    def name(self) -> str:
        """What it is called before its task is known."""
        return f"family {Path(self.recipe).stem}"


FAMILIES = (
    Family("sample_essays", "essays", "neg_mcrmse", "MCRMSE", -1, "mean of the training scores", mean_score),
    Family("sample_reading", "readings", "f1", "F1", 1, "sentence most like the question", sentence),
    Family("sample_text", "exam", "negative_perplexity", "perplexity per token", -1, "unigram model of the training part", unigram),
)


def play(family: Family, folder: Path, kit: Kit) -> None:
    """Train the family on its sample and, where it submits, pack it and predict the test set, all anew in `folder`. Raises KitError."""
    shutil.rmtree(folder, ignore_errors=True)
    recipe = _recipe(family, folder)
    for answers in write_sample(folder / _INPUT, family.sample).glob("test_answers.*"):
        (folder / _ANSWERS).mkdir()
        answers.rename(folder / _ANSWERS / answers.name)
    artifacts = f"--artifacts={folder / _ARTIFACTS}"
    run = kit("train", family.recipe, f"--set=data.folder={recipe.data.folder}", artifacts)["run"]
    if assemble.make_task(recipe).submits:
        bundles = kit("pack", run, artifacts)["bundles"]
        kit("infer", *bundles, f"--test={folder / _INPUT / recipe.data.test}", f"--out={folder / _SUBMISSION}")


def judge(family: Family, folder: Path) -> dict[str, Any]:
    """What came out of `play`: task, metric, value, se, baseline (name, value, se), gain (value, se) and rows.

    Of the test set or, where nothing is submitted, of the predictions out of fold. gain: how much better than the baseline on the same rows,
    above 0 whichever way the metric goes. Raises KitError.
    """
    recipe = _recipe(family, folder)
    task = assemble.make_task(recipe)
    run = next((folder / _ARTIFACTS / "runs").iterdir())
    trial = (_on_test_set if task.submits else _out_of_fold)(task, recipe, folder, run)
    baseline = np.empty_like(trial.prediction)
    for learnt, asked in trial.parts:
        rows = [trial.asked[row] for row in asked]
        baseline[asked] = family.baseline(task, [trial.learnt[row] for row in learnt], rows, lambda: _tokens(recipe, run))
    metric, columns = task.metrics[family.metric], task.width(trial.asked)
    value, rule = (bootstrap(metric, values, trial.targets) for values in (trial.prediction, baseline))
    both = np.concatenate([trial.prediction, baseline], 1)
    gain = bootstrap(lambda pair, targets: metric(pair[:, :columns], targets) - metric(pair[:, columns:], targets), both, trial.targets)
    return {
        "task": recipe.task.kind, "metric": family.label, "value": family.sign * value.value, "se": value.se,
        "baseline": {"name": family.rule, "value": family.sign * rule.value, "se": rule.se},
        "gain": {"value": gain.value, "se": gain.se}, "rows": len(trial.asked),
    }  # fmt: skip


class _Trial(NamedTuple):
    """prediction (N, C) and targets (N, …) of the N examples asked; parts: rows of `learnt` from which rows of `asked` may be predicted."""

    learnt: Sequence[Any]
    asked: Sequence[Any]
    prediction: np.ndarray
    targets: np.ndarray
    parts: list[tuple[np.ndarray, np.ndarray]]


def _on_test_set(task: Task, recipe: Recipe, folder: Path, run: Path) -> _Trial:
    learnt, asked = (task.read(read_table(folder / _INPUT / name, ids=task.id_column)) for name in (recipe.data.train, recipe.data.test))
    answers = next((folder / _ANSWERS).iterdir())
    submitted, known = (read_table(path, ids=task.id_column) for path in (folder / _SUBMISSION, answers))
    order = submitted.frame[task.id_column].tolist()
    known = replace(known, frame=known.frame.set_index(task.id_column, drop=False).loc[order].reset_index(drop=True), lines=(), places=())
    examples = {example.id: example for example in asked}
    return _Trial(learnt, [examples[id_] for id_ in order], *task.parse(submitted, known), [(np.arange(len(learnt)), np.arange(len(order)))])


def _out_of_fold(task: Task, recipe: Recipe, folder: Path, run: Path) -> _Trial:
    examples = task.read(read_table(folder / _INPUT / recipe.data.train, ids=task.id_column))
    oof = pd.read_parquet(run / "oof.parquet")
    prediction = oof[[f"p{column}" for column in range(task.width(examples))]].to_numpy(np.float32)
    parts = [(np.flatnonzero(oof["fold"] != fold), np.flatnonzero(oof["fold"] == fold)) for fold in range(recipe.data.folds)]
    return _Trial(examples, examples, prediction, task.targets(examples), parts)


def _recipe(family: Family, folder: Path) -> Recipe:
    return Recipe.load(family.recipe, [f"data.folder={folder / _INPUT}"])


def _tokens(recipe: Recipe, run: Path) -> Tokens:
    """As the model of the first fit read texts."""
    return assemble.load_tokens(recipe, min(run.glob("*/metrics.json")).parent)
