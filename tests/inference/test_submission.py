"""kit.inference.submission: a valid file at every moment, in the right order, and the metric of what is in it."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.data.tables import Table
from kit.errors import DataError
from kit.inference.submission import Submission, score
from kit.tasks.multiple_choice import MultipleChoice
from tests.packed import read_rows, write_rows

TASK = MultipleChoice()
OPTIONS = ("one", "two", "three", "four", "five")


def table(*ids: str) -> Table:
    """A test set of these ids."""
    columns = {"id": ids, "prompt": [f"prompt {id_}" for id_ in ids], **{letter: [text] * len(ids) for letter, text in zip("ABCDE", OPTIONS, strict=True)}}
    return Table("test.csv", pd.DataFrame(columns, dtype=str))


def write(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("id", "prediction")) -> Path:
    return write_rows(path, [header, *rows])


def test_the_fallback_is_valid_and_names_the_options_in_their_order(tmp_path: Path) -> None:
    Submission.open(tmp_path / "s.csv", TASK, table("4", "7"), None).write()
    assert (tmp_path / "s.csv").read_bytes() == b"id,prediction\n4,A B C\n7,A B C\n"


def test_rows_stand_in_the_order_of_the_sample_submission(tmp_path: Path) -> None:
    sample = write(tmp_path / "sample.csv", [("c", "A B C"), ("a", "A B C"), ("b", "A B C")])
    submission = Submission.open(tmp_path / "s.csv", TASK, table("a", "b", "c"), sample)
    prediction = np.eye(5, dtype=np.float32)[[0, 1, 2]]
    submission.write(prediction)
    assert read_rows(tmp_path / "s.csv")[1:] == [["c", "C A B"], ["a", "A B C"], ["b", "B A C"]]


def test_without_a_sample_submission_rows_stand_in_the_order_of_the_test_set(tmp_path: Path) -> None:
    submission = Submission.open(tmp_path / "s.csv", TASK, table("9", "10", "1"), None)
    submission.write(np.eye(5, dtype=np.float32)[[4, 3, 2]])
    assert read_rows(tmp_path / "s.csv")[1:] == [["9", "E A B"], ["10", "D A B"], ["1", "C A B"]]


def test_rows_without_a_prediction_keep_the_fallback(tmp_path: Path) -> None:
    prediction = np.array([[np.nan] * 5, [0.1, 0.2, 0.3, 0.25, 0.15]], np.float32)
    Submission.open(tmp_path / "s.csv", TASK, table("a", "b"), None).write(prediction)
    assert read_rows(tmp_path / "s.csv")[1:] == [["a", "A B C"], ["b", "C D B"]]


@pytest.mark.parametrize("id_", ["007", "1.0", "9" * 30, "x y", 'say "hi", then', "é物", " padded ", "True", "NaN", "1e5", "-1"])
def test_ids_of_any_kind_are_copied_as_they_are(tmp_path: Path, id_: str) -> None:
    sample = write(tmp_path / "sample.csv", [("z", "A B C"), (id_, "A B C")])
    Submission.open(tmp_path / "s.csv", TASK, table(id_, "z"), sample).write()
    assert [row[0] for row in read_rows(tmp_path / "s.csv")[1:]] == ["z", id_]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", "b", "x"], "id 'x' is not in the test set (1 such ids)"),
        (["a"], "id 'b' is not in the sample submission (1 such ids)"),
    ],
)
def test_a_sample_submission_of_another_test_set_is_refused(tmp_path: Path, ids: list[str], words: str) -> None:
    sample = write(tmp_path / "sample.csv", [(id_, "A B C") for id_ in ids])
    with pytest.raises(DataError) as refused:
        Submission.open(tmp_path / "s.csv", TASK, table("a", "b"), sample)
    assert words in str(refused.value)
    assert str(sample) in str(refused.value)
    assert "give the sample submission that belongs to this test set" in str(refused.value)


def test_a_reader_never_sees_a_part_of_the_file(tmp_path: Path) -> None:
    """A thread reads while another writes two versions of the file in turn: every reading is one of the two, whole."""
    ids = [str(number) for number in range(2000)]
    submission = Submission.open(tmp_path / "s.csv", TASK, table(*ids), None)
    other = np.tile(np.array([0.0, 0.1, 0.2, 0.3, 0.4], np.float32), (len(ids), 1))
    submission.write()
    first = submission.path.read_bytes()
    submission.write(other)
    second = submission.path.read_bytes()
    seen: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(submission.path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(40):
            submission.write(other if turn % 2 else None)
    finally:
        done.set()
        reader.join()
    assert seen == {first, second}
    submission.close()
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    submission = Submission.open(tmp_path / "s.csv", TASK, table("a", "b"), None)
    submission.write()
    with pytest.raises(ValueError, match="reshape"):
        submission.write(np.zeros((3, 5), np.float32))
    assert read_rows(tmp_path / "s.csv") == [["id", "prediction"], ["a", "A B C"], ["b", "A B C"]]


def map_at_3(predictions: dict[str, str], answers: dict[str, str]) -> float:
    """The competition's definition, in plain loops."""
    total = 0.0
    for id_, answer in answers.items():
        for rank, letter in enumerate(predictions[id_].split()):
            if letter == answer:
                total += 1 / (rank + 1)
    return total / len(answers)


letters = st.lists(st.sampled_from("ABCDE"), min_size=1, max_size=3, unique=True).map(" ".join)


@given(st.lists(st.tuples(letters, st.sampled_from("ABCDE")), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_score_is_map_at_3_whatever_the_order_of_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], random) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("score")
    predictions = {f"q{number}": prediction for number, (prediction, _) in enumerate(rows)}
    answers = {f"q{number}": answer for number, (_, answer) in enumerate(rows)}
    shuffled = list(predictions.items())
    random.shuffle(shuffled)
    result = score(write(folder / "s.csv", shuffled), write(folder / "a.csv", list(answers.items()), ("id", "answer")), TASK)
    assert result["map@3"] == pytest.approx(map_at_3(predictions, answers), abs=1e-9)
    assert result["accuracy"] == pytest.approx(np.mean([predictions[id_][0] == answer for id_, answer in answers.items()]))
    assert result["n"] == len(rows)
    assert result["se"] >= 0


def test_what_was_written_scores_as_its_predictions_do(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [str(number) for number in range(50)]
    prediction, targets = rng.random((50, 5)).astype(np.float32), rng.integers(0, 5, 50)
    Submission.open(tmp_path / "s.csv", TASK, table(*ids), None).write(prediction)
    answers = write(tmp_path / "a.csv", [(id_, "ABCDE"[target]) for id_, target in zip(ids, targets, strict=True)], ("id", "answer"))
    result = score(tmp_path / "s.csv", answers, TASK)
    assert {name: result[name] for name in TASK.metrics} == pytest.approx({name: metric(prediction, targets) for name, metric in TASK.metrics.items()})


GOOD = [("1", "A B C"), ("2", "B"), ("3", "C D E")]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (GOOD[:2], ["id '3'", "is missing (1 in all)", "every test row needs a prediction"]),
        ([*GOOD, ("4", "A B C")], ["row 4", "column 'id' = '4'", "this id is not in"]),
        ([*GOOD, ("2", "A B C")], ["row 4", "'2'", "row 2 has the same id"]),
        ([*GOOD[:2], ("3", "A B C D")], ["row 3", "'A B C D'", "1 to 3 letters separated by spaces"]),
        ([*GOOD[:2], ("3", "A B A")], ["row 3", "'A B A'", "a letter is named twice"]),
        ([*GOOD[:2], ("3", "a B C")], ["row 3", "'a B C'", "'a' is no option (A to E)"]),
        ([*GOOD[:2], ("3", "A F")], ["row 3", "'A F'", "'F' is no option (A to E)"]),
        ([*GOOD[:2], ("3", "ABC")], ["row 3", "'ABC' is no option"]),
        ([*GOOD[:2], ("3", "A,B,C")], ["row 3", "'A,B,C' is no option"]),
        ([*GOOD[:2], ("3", "")], ["row 3", "1 to 3 letters"]),
        ([*GOOD[:2], ("3", "  ")], ["row 3", "1 to 3 letters"]),
        ([*GOOD[:2], ("", "A")], ["row 3", "the id is empty"]),
    ],
)
def test_an_invalid_submission_is_refused_with_row_and_reason(tmp_path: Path, rows: list[tuple[str, str]], words: list[str]) -> None:
    header = ("id", "prompt", "A", "B", "C", "D", "E", "answer")
    answers = write(tmp_path / "a.csv", [(id_, "p", *OPTIONS, "A") for id_ in "123"], header)
    submission = write(tmp_path / "s.csv", rows)
    with pytest.raises(DataError) as refused:
        score(submission, answers, TASK)
    assert str(submission) in str(refused.value)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert score(write(tmp_path / "good.csv", GOOD), answers, TASK)["n"] == 3


@pytest.mark.parametrize(("header", "words"), [(("id", "predictions"), "column 'prediction' is missing"), (("ids", "prediction"), "column 'id' is missing")])
def test_a_missing_column_is_named(tmp_path: Path, header: tuple[str, str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        score(write(tmp_path / "s.csv", [("1", "A")], header), write(tmp_path / "a.csv", [("1", "A")], ("id", "answer")), TASK)


def test_answers_that_are_no_option_are_refused_in_their_own_file(tmp_path: Path) -> None:
    answers = write(tmp_path / "a.csv", [("1", "Q?")], ("id", "answer"))
    with pytest.raises(DataError, match=r"a.csv: row 1.*the answer must be one of"):
        score(write(tmp_path / "s.csv", [("1", "A")]), answers, TASK)


def test_room_for_the_next_version_is_kept_until_the_end(tmp_path: Path) -> None:
    submission = Submission.open(tmp_path / "s.csv", TASK, table("a", "b"), None)
    submission.write()
    written = (tmp_path / "s.csv").stat().st_size
    [reserve] = [path for path in tmp_path.iterdir() if path.name != "s.csv"]
    assert reserve.stat().st_size >= written
    submission.close()
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv"]


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".s.csv.123.part").write_text("id,pred")
    Submission.open(tmp_path / "s.csv", TASK, table("a"), None)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a file system")
def test_a_new_version_is_written_where_others_have_filled_the_disk(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        submission = Submission.open(tmp_path / "s.csv", TASK, table("a", "b"), None)
        submission.write()
        with pytest.raises(OSError, match="No space left"), open(tmp_path / "filled", "wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        for best, letters in ((4, "E A B"), (2, "C A B")):
            submission.write(np.eye(5, dtype=np.float32)[[best, best]])
            assert [row[1] for row in read_rows(tmp_path / "s.csv")[1:]] == [letters] * 2
    finally:
        subprocess.run(["umount", tmp_path], check=True)
