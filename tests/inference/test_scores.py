"""Scores on disk: what was appended comes back, whatever was cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kit.inference.planner import Pass
from kit.inference.scores import Scores

WORK = Pass("mini", "fold0", "short")


def random_scores(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 5)).astype(np.float32)


def test_what_is_appended_is_read_again_by_pass(tmp_path: Path) -> None:
    scores, other = Scores(tmp_path, 5), Pass("mini", "fold0.best", "full")
    first, second, third = random_scores(3), random_scores(2, 1), random_scores(1, 2)
    first[1] = np.nan
    scores.append(WORK, np.array([7, 2, 4]), first)
    scores.append(WORK, np.array([0, 9]), second)
    scores.append(other, np.array([5]), third)
    read = {work: (rows, prediction) for work, rows, prediction in Scores(tmp_path, 5).read(10)}
    assert set(read) == {WORK, other}
    assert read[WORK][0].tolist() == [7, 2, 4, 0, 9]
    np.testing.assert_array_equal(read[WORK][1], np.concatenate([first, second]))
    np.testing.assert_array_equal(read[other][1], third)


@pytest.mark.parametrize("cut", [1, 11, 23])
def test_a_record_that_was_cut_off_is_left_out_and_overwritten(tmp_path: Path, cut: int) -> None:
    scores, values = Scores(tmp_path, 5), random_scores(3)
    scores.append(WORK, np.array([0, 1, 2]), values)
    (path,) = tmp_path.rglob("*.scores")
    path.write_bytes(path.read_bytes()[:-cut])
    (read,) = scores.read(3)
    assert read[1].tolist() == [0, 1]
    scores.append(WORK, np.array([2]), values[2:])
    (read,) = scores.read(3)
    assert read[1].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(read[2], values)


def test_rows_that_the_test_set_does_not_have_are_left_out(tmp_path: Path) -> None:
    Scores(tmp_path, 5).append(WORK, np.array([0, 3, -1, 2]), random_scores(4))
    (read,) = Scores(tmp_path, 5).read(3)
    assert read[1].tolist() == [0, 2]


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert list(Scores(tmp_path / "none", 5).read(3)) == []
