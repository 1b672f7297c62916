"""SQuAD's two JSON forms as rows of texts: articles with paragraphs and questions (v1.1 and v2), and answers by question id. Reads no file.

Readings become columns id, title, context, question and, where the file has answers, answers: JSON text, a list of {"text", "answer_start"}
(characters, from 0), empty where the question has none. Answers by id become columns id and answer. Other keys are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kit.errors import DataError

_SHOWN = 80  # characters of a value in an error
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}


class Rows(NamedTuple):
    """columns: texts by name. places: where in the file each row stands, as errors name it."""

    columns: dict[str, list[str]]
    places: list[str]


def flatten(source: str, values: Any) -> Rows:
    """The rows of parsed JSON. source: the file, for errors. Raises DataError naming article, paragraph and question."""
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        return _readings(source, values["data"])
    if not isinstance(values, dict) or not values:
        raise DataError(f'{source}: holds neither readings nor answers: give {{"data": [articles]}} as SQuAD has it, or {{"question id": "answer", …}}')
    for id_, answer in values.items():
        if not isinstance(answer, str):
            raise DataError(f"{source}: the answer of id {id_!r} = {_shown(answer)} is no text: give one text for every question id")
    return Rows({"id": [*values], "answer": [*values.values()]}, [f"answer {number}" for number in range(1, len(values) + 1)])


def answers_json(ids: Sequence[str], answers: Sequence[str]) -> str:
    """Answers by question id, in the form in which the official evaluation takes them."""
    return json.dumps(dict(zip(ids, answers, strict=True)), ensure_ascii=False, indent=1) + "\n"


def _readings(source: str, articles: list[Any]) -> Rows:
    rows: list[dict[str, str]] = []
    places: list[str] = []
    for place, row in _questions(source, articles):
        if rows and row.keys() != rows[0].keys():
            with_, without = (place, places[0]) if "answers" in row else (places[0], place)
            raise DataError(f"{source}: {without}: key 'answers' is missing, but {with_} has it: give all questions their answers, or none")
        rows.append(row)
        places.append(place)
    if not rows:
        raise DataError(f"{source}: holds no question: give articles with paragraphs whose 'qas' are not empty")
    return Rows({name: [row[name] for row in rows] for name in rows[0]}, places)


def _questions(source: str, articles: list[Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every question: where it stands, and its row."""
    for number, article in enumerate(articles, 1):
        at = f"article {number}"
        paragraphs = _get(source, at, article, "paragraphs", list)
        title = _get(source, at, article, "title", str) if "title" in article else ""
        for count, paragraph in enumerate(paragraphs, 1):
            at = f"article {number}{f' ({_shown(title)})' if title else ''}, paragraph {count}"
            context = _get(source, at, paragraph, "context", str)
            for nth, asked in enumerate(_get(source, at, paragraph, "qas", list), 1):
                place = f"{at}, question {nth}"
                row = {"id": _get(source, place, asked, "id", str), "title": title, "context": context}
                row["question"] = _get(source, place, asked, "question", str)
                if "answers" in asked:
                    row["answers"] = json.dumps(_answers(source, f"{place} (id {row['id']!r})", asked), ensure_ascii=False)
                yield place, row


def _answers(source: str, place: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    answers = []
    for number, answer in enumerate(_get(source, place, asked, "answers", list), 1):
        at = f"{place}, answer {number}"
        answers.append({"text": _get(source, at, answer, "text", str), "answer_start": _get(source, at, answer, "answer_start", int)})
    if answers and asked.get("is_impossible"):
        raise DataError(f"{source}: {place}: is_impossible is true, but there are {len(answers)} answers: drop the one or the others")
    return answers


def _get(source: str, place: str, values: Any, key: str, kind: type) -> Any:
    """A key's value, of that kind. Raises DataError."""
    if not isinstance(values, dict):
        raise DataError(f"{source}: {place} = {_shown(values)}: give an object with key {key!r}")
    if key not in values:
        raise DataError(f"{source}: {place}: key {key!r} is missing (keys: {', '.join(values) or 'none'})")
    value = values[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{source}: {place}: {key} = {_shown(value)}: give {_KINDS[kind]}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
