"""The submission file: valid from the first second, replaced atomically, checked and scored. Knows no model and no clock."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.data.squad import answers_json
from kit.data.tables import Table, read_table
from kit.errors import ConfigError, DataError
from kit.manifest import write_atomically
from kit.metrics import bootstrap
from kit.tasks import Task

_RESERVES = 2  # times the size of the file is kept free for its next version


@dataclass(frozen=True)
class Submission:
    """Where a submission goes and in which order: that of the sample submission where there is one, else that of the test set."""

    path: Path
    task: Task
    test: Table
    examples: Sequence[Any]
    order: Sequence[str]

    @classmethod
    def open(cls, path: Path, task: Task, test: Table, sample: Path | None) -> Submission:
        """A submission for a test set. Raises DataError where the sample submission names other ids than the test set."""
        for part in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)
        examples = task.read(test)
        ids = [example.id for example in examples]
        if sample is None:
            return cls(path, task, test, examples, ids)
        table = read_table(sample, ids=task.id_column)
        order = _column(table, task.id_column).tolist()
        different = sorted(set(order) ^ set(ids))
        if different:
            where = "not in the test set" if different[0] in order else "not in the sample submission"
            raise DataError(f"{sample}: id {different[0]!r} is {where} ({len(different)} such ids): give the sample submission that belongs to this test set")
        return cls(path, task, test, examples, order)

    def write(self, prediction: np.ndarray | None = None) -> None:
        """Replace the file by these predictions (N, C); without any, by the task's fallback (options in their order, …).

        Raises DataError, and leaves the file as it was, where the site would refuse the new one; OSError where it cannot be written.
        """
        if prediction is None:
            prediction = np.full((len(self.examples), self.task.width(self.examples)), np.nan, np.float32)
        rows = self.task.rows(prediction, self.examples)
        rows = rows.set_index(self.task.id_column, drop=False).loc[list(self.order)].reset_index(drop=True)
        if faults := self.task.check(table := Table(str(self.path), rows, ids=self.task.id_column), self.test):
            raise table.error(faults[0].why, row=faults[0].row, column=faults[0].column)
        content = self._content(rows).encode()
        try:
            write_atomically(self.path, content)
        except OSError:  # the disk is full: what was kept free for this
            self._reserve.unlink(missing_ok=True)
            write_atomically(self.path, content)
        with suppress(OSError):
            self._reserve.write_bytes(bytes(_RESERVES * len(content)))

    def _content(self, rows: pd.DataFrame) -> str:
        """CSV, or for a path that ends in .json the answers by id, as the official script of SQuAD takes them. Raises ConfigError where there are no such."""
        if self.path.suffix != ".json":
            return str(rows.to_csv(index=False, lineterminator="\n"))
        if list(rows) != ["id", "answer"]:
            raise ConfigError(f"{self.path}: JSON is for answers by id, and this submission has the columns {', '.join(rows)}: name it .csv")
        return answers_json(rows["id"].tolist(), rows["answer"].tolist())

    def close(self) -> None:
        """Give back the room that was kept for the next version."""
        self._reserve.unlink(missing_ok=True)

    @property
    def _reserve(self) -> Path:
        """A file that holds room for the next version, if others fill the disk."""
        return self.path.with_name(f".{self.path.name}.reserve.part")


def score(submission: Path, answers: Path, task: Task) -> dict[str, float]:
    """The task's metrics of a submission file, with the first one's standard error as "se" and the number of rows as "n".

    Raises DataError naming the row and the reason where the site would refuse the file.
    """
    submitted, known = (read_table(path, ids=task.id_column) for path in (submission, answers))
    column = task.id_column
    _check_ids(submitted, known, column)
    in_order = known.frame.set_index(column, drop=False).loc[submitted.frame[column].tolist()].reset_index(drop=True)
    prediction, targets = task.parse(submitted, Table(known.source, in_order, ids=column))
    values = {name: metric(prediction, targets) for name, metric in task.metrics.items()}
    return values | {"se": bootstrap(next(iter(task.metrics.values())), prediction, targets).se, "n": len(targets)}


def _column(table: Table, name: str) -> pd.Series:
    """A column of a table. Raises DataError where there is none."""
    if name not in table.frame:
        raise DataError(f"{table.source}: column {name!r} is missing (columns: {', '.join(table.frame.columns)}): give the competition's own file")
    return table.frame[name]


def _check_ids(submitted: Table, known: Table, column: str) -> None:
    here, there = _column(submitted, column).tolist(), set(_column(known, column))
    for row, id_ in enumerate(here):
        if id_ not in there:
            raise submitted.error(f"this id is not in {known.source}", row=row, column=column)
    missing = there - set(here)
    if missing:
        raise DataError(f"{submitted.source}: id {min(missing)!r} of {known.source} is missing ({len(missing)} in all): every test row needs a prediction")
