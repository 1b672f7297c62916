"""kit.sample: the embedded competition has the exam's format, and no trick answers it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from kit.data.audit import duplicates, overlaps
from kit.data.tables import read_table
from kit.metrics import accuracy, map_at_k
from kit.rehearsal.baselines import longest, overlap, random_map
from kit.retrieval.bm25 import BM25
from kit.retrieval.corpus import Corpus
from kit.sample import FILES, write_sample
from kit.tasks.multiple_choice import MultipleChoice, Question

OPTIONS = list("ABCDE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample") / "competition")


@pytest.fixture(scope="module")
def train(folder: Path) -> list[Question]:
    return MultipleChoice().read(read_table(folder / "train.csv"))


@pytest.fixture(scope="module")
def test_part(folder: Path) -> list[Question]:
    return MultipleChoice().read(read_table(folder / "test.csv"))


@pytest.fixture(scope="module")
def targets(folder: Path, test_part: list[Question]) -> np.ndarray:
    answers = read_table(folder / "test_answers.csv").frame
    assert answers["id"].tolist() == [question.id for question in test_part]
    return np.array([OPTIONS.index(letter) for letter in answers["answer"]])


@pytest.fixture(scope="module")
def passages(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "passages.jsonl").read_text(encoding="utf-8").splitlines()]


def test_there_are_passages_of_readable_length_under_distinct_names(passages: list[dict[str, str]]) -> None:
    assert len(passages) >= 160
    for passage in passages:
        assert set(passage) == {"id", "title", "text"}
        assert 80 <= len(passage["text"].split()) <= 150, passage["id"]
        assert passage["title"].strip()
    for column in ("id", "title", "text"):
        assert len({passage[column] for passage in passages}) == len(passages)
    assert duplicates([passage["text"] for passage in passages], threshold=0.6) == []


def test_the_tables_have_the_columns_of_the_exam(folder: Path, train: list[Question], test_part: list[Question]) -> None:
    assert list(read_table(folder / "train.csv").frame) == ["id", "prompt", *OPTIONS, "answer"]
    assert list(read_table(folder / "test.csv").frame) == ["id", "prompt", *OPTIONS]
    assert list(read_table(folder / "sample_submission.csv").frame) == ["id", "prediction"]
    assert list(read_table(folder / "test_answers.csv").frame) == ["id", "answer"]
    assert len(train) >= 240
    assert len(test_part) >= 120
    for questions in (train, test_part):
        assert [question.id for question in questions] == [str(row) for row in range(len(questions))]
    assert all(question.answer is None for question in test_part)


def test_the_sample_submission_names_every_test_row_and_three_distinct_letters(folder: Path, test_part: list[Question]) -> None:
    frame = read_table(folder / "sample_submission.csv").frame
    assert frame["id"].tolist() == [question.id for question in test_part]
    assert all(re.fullmatch("[A-E] [A-E] [A-E]", text) and len(set(text.split())) == 3 for text in frame["prediction"])


def test_every_question_has_five_distinct_options(train: list[Question], test_part: list[Question]) -> None:
    for question in (*train, *test_part):
        even = {re.sub(r"\W+", " ", option).strip().casefold() for option in question.options}
        assert len(question.options) == 5
        assert len(even) == 5, question
        assert "" not in even
        assert question.prompt.strip()


def test_every_letter_is_right_about_as_often(train: list[Question], targets: np.ndarray) -> None:
    for answers in (np.array([question.answer for question in train]), targets):
        shares = np.bincount(answers, minlength=5) / len(answers)
        assert shares.max() <= 0.28
        assert shares.min() >= 0.12


def test_length_does_not_give_the_answer_away(train: list[Question], test_part: list[Question], targets: np.ndarray) -> None:
    for questions, right in ((train, np.array([question.answer for question in train])), (test_part, targets)):
        length = longest(questions)
        assert accuracy(length, right) <= 0.28
        assert accuracy(-length, right) <= 0.28
        assert map_at_k(length, right) <= random_map(5) + 0.08


def test_words_shared_with_the_best_passage_do_not_suffice(
    folder: Path, test_part: list[Question], targets: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("index")
    corpus = Corpus.build(folder / "passages.jsonl", place / "corpus")
    hits = BM25.build(corpus, place / "bm25").search([question.prompt for question in test_part], 1)
    best = [corpus[int(row[0])].text if row[0] >= 0 else "" for row in hits.ids]
    value = map_at_k(overlap(test_part, best), targets)
    assert random_map(5) < value <= 0.70


def test_the_option_most_like_the_others_is_right_no_more_often_than_chance(test_part: list[Question], targets: np.ndarray) -> None:
    def centrality(question: Question) -> list[float]:
        words = [set(re.findall(r"\w+", option.lower())) for option in question.options]
        return [sum(len(own & other) / len(own | other) for other in words) for own in words]

    assert map_at_k(np.array([centrality(question) for question in test_part]), targets) <= 0.45


def test_no_question_of_the_test_part_stands_in_the_training_part(train: list[Question], test_part: list[Question]) -> None:
    def texts(questions: list[Question]) -> list[str]:
        return [" ".join((question.prompt, *sorted(question.options))) for question in questions]

    assert overlaps(texts(test_part), texts(train), threshold=0.8) == []
    assert duplicates(texts(train), threshold=0.8) == []
    assert duplicates(texts(test_part), threshold=0.8) == []
    assert overlaps([question.prompt for question in test_part], [question.prompt for question in train], threshold=0.9) == []


def test_answers_are_only_where_a_competitor_does_not_look(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert "answer" not in read_table(folder / "test.csv").frame
    assert "answer" not in (folder / "passages.jsonl").read_text(encoding="utf-8").partition("\n")[0].partition('"text"')[0]


def test_writing_again_mends_what_was_changed_and_leaves_other_files(tmp_path: Path, folder: Path) -> None:
    write_sample(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "train.csv").write_text("spoiled")
    (tmp_path / "a" / "b" / "mine.txt").write_text("kept")
    assert write_sample(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert {name: (tmp_path / "a" / "b" / name).read_bytes() for name in FILES} == {name: (folder / name).read_bytes() for name in FILES}
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted((*FILES, "mine.txt"))
