"""kit.sample.readings: SQuAD files whose questions can be answered from their texts, and by no trick."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kit.data.tables import read_table
from kit.errors import DataError
from kit.sample.readings import FILES, compose, write_readings
from kit.tasks.extractive_qa import ExtractiveQA, Reading

TASK = ExtractiveQA()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_readings(tmp_path_factory.mktemp("sample") / "readings")


@pytest.fixture(scope="module")
def train(folder: Path) -> list[Reading]:
    return TASK.read(read_table(folder / "train.json"))


@pytest.fixture(scope="module")
def test_part(folder: Path) -> list[Reading]:
    return TASK.read(read_table(folder / "test_answers.json"))


def test_a_seed_gives_the_same_files_and_another_seed_others() -> None:
    assert [*compose()] == [*FILES]
    assert compose() == compose()
    assert compose(1)["train.json"] != compose(2)["train.json"]
    for seed in range(20):
        assert json.loads(compose(seed)["train.json"])["data"]


def test_there_are_texts_of_readable_length_and_seven_questions_about_each(train: list[Reading], test_part: list[Reading]) -> None:
    assert (len(train), len(test_part)) == (168, 56)
    for readings in (train, test_part):
        assert set(Counter(reading.title for reading in readings).values()) == {7}
        assert all(50 <= len(reading.context.split()) <= 130 and "{" not in reading.context for reading in readings)
    every = [*train, *test_part]
    assert len({reading.title for reading in every}) == len({reading.context for reading in every}) == 32
    assert len({reading.id for reading in every}) == len(every)
    assert len({(reading.title, reading.question) for reading in every}) == len(every)


def test_answers_stand_in_their_sentence_once_and_are_short(train: list[Reading], test_part: list[Reading]) -> None:
    for reading in (*train, *test_part):
        (answer,) = reading.answers or ()
        assert 1 <= len(answer.text.split()) <= 5
        assert reading.question.endswith("?") and "{" not in reading.question
        assert answer.text.lower() not in reading.question.lower()


def test_the_test_part_is_about_other_texts_and_answers_are_only_where_a_competitor_does_not_look(folder: Path, train: list[Reading]) -> None:
    asked = TASK.read(read_table(folder / "test.json"))
    assert [reading.answers for reading in asked] == [None] * 56
    assert not {reading.context for reading in asked} & {reading.context for reading in train}
    known = TASK.read(read_table(folder / "test_answers.json"))
    assert [(one.id, one.question, one.context) for one in known] == [(one.id, one.question, one.context) for one in asked]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_the_sample_submission_is_valid_and_worth_little(folder: Path) -> None:
    submission, answers = read_table(folder / "sample_submission.csv"), read_table(folder / "test_answers.json")
    assert submission.frame["id"].tolist() == answers.frame["id"].tolist()
    assert TASK.check(submission, answers) == []
    assert TASK.merit(*TASK.parse(submission, answers)).mean() < 0.1


def test_the_sentence_that_is_most_like_the_question_is_no_answer(test_part: list[Reading]) -> None:
    best = TASK.hints(test_part)["overlap"]
    assert TASK.metrics["em"](best, TASK.targets(test_part)) == 0
    assert TASK.merit(best, TASK.targets(test_part)).mean() < 0.3
    holds = [start <= answer.start and answer.stop <= stop for (start, stop), one in zip(best[:, :2], test_part, strict=True) for answer in one.answers or ()]
    assert np.mean(holds) > 0.5  # so that there is something to learn from


def test_writing_again_mends_what_was_changed_and_leaves_other_files(tmp_path: Path, folder: Path) -> None:
    write_readings(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "train.json").write_text("spoiled")
    (tmp_path / "a" / "b" / "mine.txt").write_text("kept")
    assert write_readings(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert {name: (tmp_path / "a" / "b" / name).read_bytes() for name in FILES} == {name: (folder / name).read_bytes() for name in FILES}
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted((*FILES, "mine.txt"))
    with pytest.raises(DataError, match=r"mine\.txt: is a file: name a folder"):
        write_readings(tmp_path / "a" / "b" / "mine.txt")
