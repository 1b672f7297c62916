"""kit.data.squad: SQuAD's two JSON forms become tables of texts, and a damaged file is refused by article, paragraph and question."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.data.squad import answers_json
from kit.data.tables import read_table
from kit.errors import DataError

DATA = Path(__file__).parents[2] / os.environ.get("KIT_DATA", "../shared/data")
CONTEXT = "The mill stood on the Calder.\nIt burned in 1843 — nobody was hurt 😀."


def asked(id_: str, *answers: tuple[str, int], **more: Any) -> dict[str, Any]:
    return {"id": id_, "question": f"What of {id_}?", "answers": [{"text": text, "answer_start": start} for text, start in answers], **more}


def squad(*questions: dict[str, Any], version: str = "1.1") -> dict[str, Any]:
    paragraphs = [{"context": CONTEXT, "qas": list(questions)}, {"context": "Nothing else.", "qas": []}]
    return {"version": version, "data": [{"title": "Mills", "paragraphs": paragraphs}]}


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


def test_readings_become_rows_with_their_texts_as_they_are(tmp_path: Path) -> None:
    values = squad(asked("q1", ("Calder", 22), ("the Calder", 18)), asked("q2", ("1843", 43)))
    table = read_table(write(tmp_path / "dev.json", values))
    assert list(table.frame) == ["id", "title", "context", "question", "answers"]
    assert table.frame["id"].tolist() == ["q1", "q2"]
    assert set(table.frame["context"]) == {CONTEXT}
    assert set(table.frame["title"]) == {"Mills"}
    assert json.loads(table.frame["answers"][0]) == values["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    assert all(CONTEXT[one["answer_start"] :].startswith(one["text"]) for text in table.frame["answers"] for one in json.loads(text))
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress((tmp_path / "dev.json").read_bytes()))
    assert read_table(tmp_path / "dev.json.gz").frame.equals(table.frame)


def test_a_table_of_readings_is_the_same_as_csv(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "dev.json", squad(asked("q1", ("Calder", 22)), asked("q2"))))
    table.frame.to_csv(tmp_path / "flat.csv", index=False)
    assert read_table(tmp_path / "flat.csv").frame.equals(table.frame)


def test_questions_without_an_answer_have_an_empty_list_and_what_v2_adds_is_passed_over(tmp_path: Path) -> None:
    values = squad(asked("q1", ("1843", 43), is_impossible=False), asked("q2", is_impossible=True, plausible_answers=[{"text": "x"}]), version="v2.0")
    table = read_table(write(tmp_path / "dev.json", values))
    assert [len(json.loads(text)) for text in table.frame["answers"]] == [1, 0]
    assert list(table.frame) == ["id", "title", "context", "question", "answers"]


def test_a_test_set_has_no_column_of_answers(tmp_path: Path) -> None:
    questions = [{"id": "1", "question": "Where?"}, {"id": "2", "question": "When?"}]
    assert list(read_table(write(tmp_path / "test.json", squad(*questions))).frame) == ["id", "title", "context", "question"]


def test_errors_of_a_row_name_its_place(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "dev.json", squad(asked("q1"), asked("q2"))))
    error = str(table.error("is odd", row=1, column="question"))
    assert error == f"{tmp_path}/dev.json: row 2 (article 1 ('Mills'), paragraph 1, question 2, id 'q2'), column 'question' = 'What of q2?': is odd"


def test_answers_by_id_come_back_as_they_were_written(tmp_path: Path) -> None:
    answers = ["Calder", "", 'say "no" — 1843', "None"]
    table = read_table(write(tmp_path / "answers.json", answers_json(list("abcd"), answers)))
    assert list(table.frame) == ["id", "answer"]
    assert (table.frame["id"].tolist(), table.frame["answer"].tolist()) == (list("abcd"), answers)
    assert "row 2 (answer 2, id 'b')" in str(table.error("is odd", row=1))


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A good file, changed."""
    values = squad(asked("q1", ("Calder", 22)), asked("q2", ("1843", 43)))
    change(values)
    return values


def paragraph(values: dict[str, Any]) -> dict[str, Any]:
    return values["data"][0]["paragraphs"][0]


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "cut off": ('{"data": [{"title"', ("cannot be read as JSON",)),
    "a list": ([1, 2], ("neither readings nor answers", '"data"')),
    "nothing": ({}, ("neither readings nor answers",)),
    "no question": ({"data": []}, ("holds no question",)),
    "article is a text": ({"data": ["Mills"]}, ("article 1 = 'Mills'", "'paragraphs'")),
    "no paragraphs": (changed(lambda v: v["data"][0].pop("paragraphs")), ("article 1: key 'paragraphs' is missing", "keys: title")),
    "title is a number": (changed(lambda v: v["data"][0].update(title=7)), ("article 1: title = 7: give a text",)),
    "no context": (changed(lambda v: paragraph(v).pop("context")), ("article 1 ('Mills'), paragraph 1: key 'context' is missing",)),
    "questions are an object": (changed(lambda v: paragraph(v).update(qas={})), ("paragraph 1: qas = {}: give a list",)),
    "question without id": (changed(lambda v: paragraph(v)["qas"][1].pop("id")), ("paragraph 1, question 2: key 'id' is missing",)),
    "id is a number": (changed(lambda v: paragraph(v)["qas"][1].update(id=2)), ("question 2: id = 2: give a text",)),
    "question is null": (changed(lambda v: paragraph(v)["qas"][1].update(question=None)), ("question 2: question = None: give a text",)),
    "same id twice": (changed(lambda v: paragraph(v)["qas"][1].update(id="q1")), ("question 2", "row 1 has the same id")),
    "answers are a text": (changed(lambda v: paragraph(v)["qas"][1].update(answers="1843")), ("question 2 (id 'q2'): answers = '1843': give a list",)),
    "answer without start": (changed(lambda v: paragraph(v)["qas"][1]["answers"][0].pop("answer_start")), ("(id 'q2'), answer 1: key 'answer_start'",)),
    "start is true": (changed(lambda v: paragraph(v)["qas"][1]["answers"][0].update(answer_start=True)), ("answer_start = True: give a whole number",)),
    "impossible but answered": (changed(lambda v: paragraph(v)["qas"][1].update(is_impossible=True)), ("(id 'q2'): is_impossible is true, but there are 1",)),
    "one has no answers": (changed(lambda v: paragraph(v)["qas"][1].pop("answers")), ("question 2: key 'answers' is missing", "question 1 has it")),
    "answer is a number": ({"q1": "x", "q2": 1843}, ("the answer of id 'q2' = 1843 is no text",)),
    "key twice": ('{"q1": "x", "q1": "y"}', ("key 'q1' stands twice",)),
    "blank id": ({" ": "x"}, ("answer 1", "the id is empty")),
    "empty": ("", ("is empty",)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_refused_by_its_place_in_one_line(name: str, tmp_path: Path) -> None:
    values, words = BAD[name]
    path = write(tmp_path / "dev.json", values)
    with pytest.raises(DataError) as error:
        read_table(path)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text
    assert not [word for word in words if word not in text], text


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(json.dumps(squad(asked("q"))).encode())[:-12])
    with pytest.raises(DataError, match=r"dev\.json\.gz: cannot be unpacked as gzip"):
        read_table(tmp_path / "dev.json.gz")


def test_the_published_development_set_is_read_whole() -> None:
    path = DATA / "squad" / "squad_dev_v1.1_dev.json.gz"
    if not path.is_file():
        pytest.skip("needs the development data (KIT_DATA)")
    frame = read_table(path).frame
    assert (len(frame), frame["title"].nunique()) == (7880, 38)
