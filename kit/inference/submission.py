"""The submission file: valid from the first second, replaced atomically, checked and scored. Knows no model and no clock."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kit.data.tables import Table, read_table
from kit.errors import DataError
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
        table = read_table(sample)
        order = table.frame["id"].tolist()
        different = sorted(set(order) ^ set(ids))
        if different:
            where = "not in the test set" if different[0] in order else "not in the sample submission"
            raise DataError(f"{sample}: id {different[0]!r} is {where} ({len(different)} such ids): give the sample submission that belongs to this test set")
        return cls(path, task, test, examples, order)

    def write(self, prediction: np.ndarray | None = None) -> None:
        """Replace the file by these predictions (N, C); without any, by the task's fallback (options in their order).

        Raises DataError, and leaves the file as it was, where the site would refuse the new one; OSError where it cannot be written.
        """
        if prediction is None:
            prediction = np.full((len(self.examples), self.task.width(self.examples)), np.nan, np.float32)
        rows = self.task.rows(prediction, self.examples)
        rows = rows.set_index("id", drop=False).loc[list(self.order)].reset_index(drop=True)
        if faults := self.task.check(table := Table(str(self.path), rows), self.test):
            raise table.error(faults[0].why, row=faults[0].row, column=faults[0].column)
        content = rows.to_csv(index=False, lineterminator="\n").encode()
        try:
            write_atomically(self.path, content)
        except OSError:  # the disk is full: what was kept free for this
            self._reserve.unlink(missing_ok=True)
            write_atomically(self.path, content)
        with suppress(OSError):
            self._reserve.write_bytes(bytes(_RESERVES * len(content)))

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
    submitted, known = read_table(submission), read_table(answers)
    _check_ids(submitted, known)
    in_order = known.frame.set_index("id", drop=False).loc[submitted.frame["id"].tolist()].reset_index(drop=True)
    prediction, targets = task.parse(submitted, Table(known.source, in_order))
    values = {name: metric(prediction, targets) for name, metric in task.metrics.items()}
    return values | {"se": bootstrap(next(iter(task.metrics.values())), prediction, targets).se, "n": len(targets)}


def _check_ids(submitted: Table, known: Table) -> None:
    here, there = submitted.frame["id"].tolist(), set(known.frame["id"])
    for row, id_ in enumerate(here):
        if id_ not in there:
            raise submitted.error(f"this id is not in {known.source}", row=row, column="id")
    missing = there - set(here)
    if missing:
        raise DataError(f"{submitted.source}: id {min(missing)!r} of {known.source} is missing ({len(missing)} in all): every test row needs a prediction")
