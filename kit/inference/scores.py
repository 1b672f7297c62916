"""What has been scored, kept on disk as it comes, so that a run that was killed goes on where it was. Knows no model and no clock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kit.inference.planner import Pass

_SUFFIX = ".scores"


@dataclass(frozen=True)
class Scores:
    """Predictions by pass below a folder: one file of records (row, C float32) for each, only ever appended to.

    A record that a kill has cut off is left out when reading, and overwritten when writing.
    """

    folder: Path
    width: int

    def append(self, work: Pass, rows: np.ndarray, prediction: np.ndarray) -> None:
        """Keep predictions (n, C) of these rows. Raises OSError where the disk is full; what was kept before stays readable."""
        path = self._path(work)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = np.empty(len(rows), self._type)
        records["row"], records["prediction"] = rows, prediction
        with open(path, "ab") as file:
            os.truncate(file.fileno(), file.tell() - file.tell() % self._type.itemsize)
            file.write(records.tobytes())

    def read(self, rows: int) -> Iterator[tuple[Pass, np.ndarray, np.ndarray]]:
        """Everything kept, by pass: rows (n,) below `rows`, and predictions (n, C)."""
        for path in sorted(self.folder.glob(f"*/*{_SUFFIX}")):
            data = path.read_bytes()
            records = np.frombuffer(data[: len(data) - len(data) % self._type.itemsize], self._type)
            records = records[(records["row"] >= 0) & (records["row"] < rows)]
            fit, _, view = path.name.removesuffix(_SUFFIX).rpartition(".")
            yield Pass(path.parent.name, fit, view), records["row"].astype(np.int64), records["prediction"].copy()

    @property
    def _type(self) -> np.dtype:
        return np.dtype([("row", "<i4"), ("prediction", "<f4", (self.width,))])

    def _path(self, work: Pass) -> Path:
        return self.folder / work.member / f"{work.fit}.{work.view}{_SUFFIX}"
