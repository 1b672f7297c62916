"""Essay regression, a part of tests.bench.families: six scores of an essay, by the competition's own essays or, where quick, by the sample's.

Held out is one of four multilabel folds. `fine_tuned` and the peer see the same essays for the same epochs at the same rate. Peer: the library's
AutoModelForSequenceClassification with num_labels = 6 and problem_type "regression", its Trainer, texts padded to max_length as in its fine-tuning
tutorial; it gets the scores less their means over the training part, which its head would otherwise take most of the steps to find. Ours drops
nothing in the backbone, as regressions are usually trained, has a rate of its own for the head and lower ones for lower layers, a smooth L1 loss and
attention pooling. `fine_tuned_all` sees all of the training part, as do the frozen embeddings. Blend: each held-out essay by weights that were found
on others. Speed: short fits in turns; "own_with_dropout" is ours with the backbone as it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from kit import assemble, runtime
from kit.config import Recipe
from kit.data.folds import make_folds
from kit.data.tables import read_table
from kit.inference.blend import Blend
from kit.metrics import bootstrap, mcrmse
from kit.sample import write_sample
from kit.tasks.essay_regression import Essay, EssayRegression
from tests.bench.turns import (
    Fitted,
    clock,
    emptied,
    estimated,
    fitted,
    in_turns,
    kept,
    kept_values,
    read,
    real_table,
    speeds,
    trained,
    trainer_arguments,
    without_dropout,
)

PUBLISHED = {"deberta_v3_base_4_folds_cv": 0.4546, "winners_ensemble": 0.4410}
"""MCRMSE of others on this competition, of all folds and larger models: cited, not measured here."""


@dataclass(frozen=True)
class Setting:
    """recipe: ours. table: of KIT_DATA; None: the sample's. essays: that `fine_tuned` and the peer see. timed, read: of a turn's training and reading."""

    recipe: str
    table: str | None
    essays: int
    epochs: int
    timed: int
    read: int
    turns: int
    overrides: tuple[str, ...] = ()


FULL = Setting("feedback_minilm", "fb3/train.csv.gz", essays=600, epochs=2, timed=48, read=64, turns=5)
QUICK = Setting("sample_essays", None, essays=24, epochs=1, timed=8, read=8, turns=1, overrides=("task.max_length=64",))


class Part(NamedTuple):
    """train: essays of three folds in random order; held: of the fourth. backbone: as it comes; calm: without dropout."""

    train: list[Essay]
    held: list[Essay]
    backbone: Path
    calm: Path
    folder: Path


class Fit(NamedTuple):
    """What a model is fitted with."""

    recipe: Recipe
    train: Sequence[Essay]
    seed: int = 0


def essay_regression(setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """The section of the results, again after every model."""
    recipe = Recipe.load(setting.recipe, [f"train.epochs={setting.epochs}", *setting.overrides])
    task = assemble.make_task(recipe)
    assert isinstance(task, EssayRegression)
    part = _part(setting, recipe, task, folder)
    few = part.train[: setting.essays]
    fits = {
        "frozen_ridge": Fit(_frozen(recipe, "ridge"), part.train),
        "fine_tuned": Fit(recipe, few),
        "trainer": Fit(recipe, few),
        "frozen_svr": Fit(_frozen(recipe, "svr"), part.train),
        "fine_tuned_all": Fit(recipe, part.train),
        "second_seed": Fit(recipe, few, seed=1),
    }
    sizes = {"training_part": len(part.train), "fine_tuned": len(few), "held_out": len(part.held), "epochs": setting.epochs, "max_length": task.max_length}
    models: dict[str, Fitted] = {}
    speed: dict[str, Any] = {}
    for name, one in fits.items():
        models[name] = kept(folder / "kept", name, [one.recipe.digest, len(one.train), len(part.held)], partial(_fitted, name, one, part))
        if name == "trainer":
            speed = kept_values(folder / "kept", "speed", asdict(setting), lambda: _speed(setting, recipe, part))
        yield _section(task, part, models) | {"speed": speed, "sizes": sizes, "published": PUBLISHED}


def _fitted(name: str, one: Fit, part: Part, place: Path) -> Fitted:
    if name == "trainer":
        return _trainer(one.recipe, part.backbone, one.train, part.held, place)
    return fitted(one.recipe, part.backbone if name.startswith("frozen") else part.calm, one.train, part.held, place, seed=one.seed)


def _part(setting: Setting, recipe: Recipe, task: EssayRegression, folder: Path) -> Part:
    table = real_table(setting.table, task.id_column) if setting.table else read_table(write_sample(folder / "sample", "essays") / "train.csv", ids=task.id_column)
    essays = task.read(table)
    numbers = make_folds(len(essays), 4, by="multilabel", strata=task.strata(essays), seed=0)
    order = np.random.default_rng(0).permutation(len(essays))
    train, held = ([essays[row] for row in order if (numbers[row] == 0) == out] for out in (False, True))
    if not setting.table:
        train, held = train[: setting.essays], held[: setting.essays]
    backbone = assemble.backbone(recipe, Path(), Path(), [])
    return Part(train, held, backbone, without_dropout(backbone, folder / "backbone"), folder)


def _frozen(recipe: Recipe, regression: str) -> Recipe:
    """The recipe with frozen embeddings in place of its encoder."""
    values = recipe.model_dump(exclude_none=True)
    values |= {"model": {"kind": "frozen", "source": recipe.model.options["source"], "regression": regression}, "train": {"epochs": 1}}
    return Recipe.of(values)


# --- the peer ----------------------------------------------------------------------------------------------------------------------------------


def _trainer(recipe: Recipe, backbone: Path, train: Sequence[Essay], held: Sequence[Essay], folder: Path) -> Fitted:
    seconds, (trainer, means) = _trainer_epochs(recipe, backbone, train, folder)
    return Fitted(seconds, _trainer_reads(trainer, means, recipe, backbone, held)[1])


def _trainer_epochs(recipe: Recipe, backbone: Path, train: Sequence[Essay], folder: Path) -> tuple[float, tuple[Trainer, np.ndarray]]:
    """Seconds from essays to a trained model on disk; the Trainer, and what it was not to learn (K,)."""
    device = runtime.choose().device
    begun = clock(device)
    grades = np.array([essay.grades for essay in train], np.float32)
    means = grades.mean(0)
    arguments = trainer_arguments(recipe.train, folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=grades.shape[1], problem_type="regression", dtype=torch.float32)
    rows: Any = [row | {"labels": own} for row, own in zip(_padded(recipe, backbone, train), (grades - means).tolist(), strict=True)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    model.save_pretrained(folder)
    return clock(device) - begun, (trainer, means)


def _trainer_reads(trainer: Trainer, means: np.ndarray, recipe: Recipe, backbone: Path, essays: Sequence[Essay]) -> tuple[float, np.ndarray]:
    """Seconds from essays to predictions, and these (N, K)."""
    device = runtime.choose().device
    begun = clock(device)
    rows: Any = _padded(recipe, backbone, essays)
    prediction = trainer.predict(rows).predictions + means
    return clock(device) - begun, prediction.astype(np.float32)


def _padded(recipe: Recipe, backbone: Path, essays: Sequence[Essay]) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    found = tokenizer([essay.text for essay in essays], padding="max_length", truncation=True, max_length=recipe.task.options["max_length"])
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


# --- figures -----------------------------------------------------------------------------------------------------------------------------------


def _speed(setting: Setting, recipe: Recipe, part: Part) -> dict[str, Any]:
    """Training and reading in turns, one epoch of a few essays."""
    short = recipe.with_overrides(["train.epochs=1"])
    train, held, folder = part.train[: setting.timed], part.held[: setting.read], part.folder / "timed"
    training, given = in_turns(
        {
            "own": lambda: trained(short, part.calm, train, emptied(folder / "own")),
            "own_with_dropout": lambda: trained(short, part.backbone, train, emptied(folder / "own")),
            "trainer": lambda: _trainer_epochs(short, part.backbone, train, folder / "trainer"),
        },
        setting.turns,
    )
    trainer, means = given["trainer"]
    reading, _ = in_turns(
        {"own": lambda: read(given["own"], short, part.calm, held), "trainer": lambda: _trainer_reads(trainer, means, short, part.backbone, held)},
        setting.turns,
    )
    return speeds(training, len(train), reading, len(held))


def _section(task: EssayRegression, part: Part, models: dict[str, Fitted]) -> dict[str, Any]:
    """Every model's MCRMSE, with those that are made of several."""
    targets = task.targets(part.held)
    said = {name: one.prediction for name, one in models.items()}
    found: dict[str, dict[str, Any]] = {name: {"mcrmse": _mcrmse(task, said[name], targets), "minutes": one.seconds / 60} for name, one in models.items()}
    if "second_seed" in said:
        found["mean_of_two_seeds"] = {"mcrmse": _mcrmse(task, (said["fine_tuned"] + said["second_seed"]) / 2, targets)}
    trivial = np.tile(task.targets(part.train).mean(0), (len(targets), 1))
    section: dict[str, Any] = {"models": found, "trivial": {"mean_of_training_scores": {"mcrmse": _mcrmse(task, trivial, targets)}}}
    if "trainer" in said:
        pair = np.stack([said["fine_tuned"], said["trainer"]], 1)  # (N, 2, K)
        gain = bootstrap(lambda both, right: mcrmse(both[:, 0], right) - mcrmse(both[:, 1], right), pair, targets)
        section["fine_tuned_less_trainer"] = {"mcrmse": gain.value, "ci95": [gain.low, gain.high]}
    members: dict[str, np.ndarray] = {name: said[name] for name in said if name not in ("trainer", "second_seed")}
    return section | {"blend": {method: _blend(task, members, targets, method) for method in ("auto", "linear", "free", "hill")}}


def _blend(task: EssayRegression, members: dict[str, np.ndarray], targets: np.ndarray, method: str) -> dict[str, Any]:
    """auto: the method that the kit takes. Weights: as found on all held-out essays; the metric is of those found without the essay's fold."""
    blend = Blend.fit(members, targets, task.merit, kind="values", method=method)
    report = blend.report()
    return {
        "mcrmse": _mcrmse(task, blend.oof(members), targets), "method": report["method"], "used": report["used"], "weights": blend.weights(members)
    }  # fmt: skip


def _mcrmse(task: EssayRegression, prediction: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    return estimated(lambda said, right: -task.metrics["neg_mcrmse"](said, right), prediction, targets)
