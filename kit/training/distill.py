"""A teacher run → soft labels of the rows that a student's fit is trained on. Knows no loss and no way to fold.

Leak-free by this rule: the fit of a fold is taught only by the teacher's fit of the same fold, which has not seen the fold's rows either.
Out-of-fold predictions will not do: each row's comes from a fit that has seen all other folds, and a student that imitates it learns their
answers too (measured on answers that are pure chance, 2 folds: OOF accuracy 0.53 instead of 0.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator

from kit import assemble, manifest, runtime
from kit.config import Recipe
from kit.errors import ConfigError, DataError
from kit.paths import model_folder
from kit.tasks import Task
from kit.training.loop import predict_together

_OOF = "oof.parquet"


@dataclass(frozen=True)
class Teacher:
    """A run or member bundle of which every fold is fitted. recipe: its own, on the student's data. bundles: where its base is, if it has one."""

    folder: Path
    recipe: Recipe
    bundles: Path

    @classmethod
    def find(cls, recipe: Recipe, task: Task, artifacts: Path) -> Teacher | None:
        """The teacher that a student's recipe names, if it does. Raises ConfigError where it is missing, or only one of teacher and loss is set."""
        named, share = recipe.data.teacher, getattr(task, "distill", 0.0)
        if named is None:
            if share:
                raise ConfigError(f"task.distill = {share}, but there is no data.teacher: name a run on the same rows, or set task.distill = 0")
            return None
        if not share:
            raise ConfigError(f'data.teacher = "{named}", but task {recipe.task.kind!r} has no task.distill above 0: set it, or drop data.teacher')
        folder = _folder(named, Path(recipe.data.folder), artifacts)
        if not (folder / _OOF).is_file():
            known = "a run whose folds are all fitted (run:NAME), bundle:NAME or a folder"
            raise ConfigError(f'data.teacher = "{named}": {folder / _OOF} is missing: give {known}')
        own = Recipe.load(folder / "recipe.toml")
        return cls(folder, own.model_copy(update={"data": recipe.data.model_copy(update={"teacher": None})}), artifacts / "bundles")

    @property
    def digest(self) -> str:
        """Changes with what the teacher has learnt."""
        return manifest.sha256(self.folder / _OOF)

    def check(self, own: Sequence[Any], numbers: np.ndarray, task: Task) -> None:
        """Raise DataError, naming file and id, unless the teacher was trained on these rows (id and target) in these folds (N,)."""
        file = self.folder / _OOF
        table = _read(file)
        missing = [example.id for example in own if example.id not in table.index]
        if missing:
            rows = f"{len(missing)} rows" if len(missing) > 1 else "1 row"
            raise DataError(f"{file}: no row with id {missing[0]!r} ({rows} of data.train): the teacher must be trained on the same table")
        table = table.loc[[example.id for example in own]]
        targets, known = np.asarray(task.targets(own)).reshape(len(own), -1), table.filter(regex=r"^t\d+$").to_numpy()
        width = table.filter(regex=r"^p\d+$").shape[1]
        if (known.shape[1], width) != (targets.shape[1], task.width(own)):
            wanted = f"{targets.shape[1]} and {task.width(own)}: name a teacher of the same task"
            raise DataError(f"{file}: has {known.shape[1]} targets and {width} predictions (columns t0 …, p0 …) instead of {wanted}")
        same = "set data.folds, fold_by, group and fold_seed as the teacher's recipe has them"
        faults = {"the target differs: the teacher must be trained on the same table": (known != targets).any(1)}
        if self.recipe.train.epochs:  # without, it has seen no row
            faults[f"the fold differs, so the teacher's fits have seen what this run is validated on: {same}"] = table["fold"].to_numpy() != numbers
        for why, wrong in faults.items():
            if wrong.any():
                raise DataError(f"{file}: id {table.index[int(wrong.argmax())]!r}: {why} ({int(wrong.sum())} rows)")

    def says(self, fits: Sequence[str], examples: Sequence[Any], accelerator: Accelerator, *, label: str) -> np.ndarray:
        """Probabilities (N, C) of examples as the teacher reads them, the mean over its fits of these names. Raises ConfigError, BundleError, DataError."""
        task, settings = assemble.make_task(self.recipe), self.recipe.infer
        source = str(self.recipe.model.options["source"])
        base = model_folder(source, Path(self.recipe.data.folder), self.bundles) if assemble.on_base(self.recipe) else None
        total = []
        for name in fits:
            folder = self.folder / name
            if not folder.is_dir():
                raise ConfigError(f"data.teacher: {self.folder} has no fit {name!r}: name the teacher's run, with all of its folds")
            model, tokens = assemble.load_model(self.recipe, task, folder, base=base), assemble.load_tokens(self.recipe, folder)
            total.append(
                predict_together(
                    model, task, examples, tokens,
                    runtime=runtime.choose(settings.precision, str(accelerator.device)), accelerator=accelerator,
                    batch_tokens=settings.batch_tokens, label=f"{label} taught by {name}",
                )
            )  # fmt: skip
            del model
            runtime.free_memory()
        mean = np.mean(total, axis=0)
        unsure = ~np.isfinite(mean).all(1)
        if unsure.any():
            raise DataError(f"{self.folder}: says nothing finite of id {examples[int(unsure.argmax())].id!r} ({int(unsure.sum())} rows): train the teacher again")
        return mean


def taught(examples: Sequence[Any], said: np.ndarray) -> list[Any]:
    """The examples with the teacher's probabilities (N, C) as `soft`."""
    return [replace(example, soft=tuple(row)) for example, row in zip(examples, said.tolist(), strict=True)]


def _folder(named: str, base: Path, artifacts: Path) -> Path:
    kind, _, name = named.partition(":")
    if kind == "run":
        return artifacts / "runs" / name
    return model_folder(named, base, artifacts / "bundles") if kind == "bundle" else base / named


def _read(file: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(file)
        table = table.set_index(table["id"].astype(str))[[column for column in table if column != "id"]]
        table["fold"]
    except Exception as error:  # pyarrow and pandas raise unrelated types for damaged files
        raise DataError(f"{file}: cannot be read as OOF predictions ({type(error).__name__}): train the teacher again") from None
    if not table.index.is_unique:
        raise DataError(f"{file}: id {table.index[table.index.duplicated()][0]!r} stands twice: train the teacher again")
    return table
