"""Extractive question answering: where in a text the answer to a question begins and ends, by one number per token for each.

A long text is read in overlapping windows. A window without the answer has its first position, before the text, as target; spans are compared
across windows by the log-probability of their ends in their own window (Devlin et al. 2019, SQuAD v2). Imports torch only to collate.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from kit.errors import ConfigError
from kit.tasks import MISSING, Batch, Encoding, Fault, Feature, Table, Tokens, View
from kit.tasks.spans import NO_SPAN, mean_of_spans
from kit.tasks.squad_metrics import judge

if TYPE_CHECKING:
    from torch import Tensor

SPANS = 8  # of a prediction
_NUMBERS = 3  # of a span: first character, character after the last, log-probability
_CANDIDATES = 4 * SPANS  # of a window: tokens may mean the same characters
_CHARS_PER_TOKEN, _SPECIAL_TOKENS = 4, 3  # of English text in the usual vocabularies; of a pair
_LEAST_STEP = 8  # tokens by which a window is further than the one before
_SHUT = -1e4  # score of what is no token of the text: below any real one, and finite in fp16
_JUDGED = 2**17  # verdicts that are remembered: a bootstrap asks for the same ones again and again
_SHOWN = 40  # characters in an error
_NOWHERE = -1  # both ends of "no answer"


@dataclass(frozen=True)
class Answer:
    """A right answer. start: its first character in the context."""

    text: str
    start: int

    @property
    def stop(self) -> int:
        """The character after its last."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Reading:
    """A question about a text. answers: the right ones, empty where there is none in the text, None in a test set."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None = None
    title: str = ""


class Span(NamedTuple):
    """Characters of a context, start = stop = -1 for no answer, and their log-probability."""

    start: int
    stop: int
    log_p: float


@dataclass(frozen=True)
class ExtractiveQA:
    """The SPANS best spans of each reading (N, 3 * SPANS); prediction: the text of the best."""

    max_length: int = 384
    """Tokens of a window with the question."""
    stride: int = 128
    """Tokens that neighbouring windows share."""
    max_question: int = 64
    """Tokens of a question; what comes after them goes."""
    max_answer: int = 30
    """Tokens of an answer."""
    no_answer: bool = False
    """Whether questions may have no answer in their text, as in SQuAD v2."""
    no_answer_threshold: float = 0.0
    """By how much the log-probability of no answer has to exceed that of the best span."""

    needs = "token"
    outputs = 2
    submits = True
    retrieves = False
    blends = "spans"
    id_column = "id"

    def __post_init__(self) -> None:
        if self.max_answer < 1 or self.max_question < 1 or self.stride < 1:
            raise ConfigError(
                f"task.max_answer = {self.max_answer}, task.max_question = {self.max_question}, task.stride = {self.stride}: give at least 1 token each"
            )
        self._check_room(self.max_length, f"task.max_length = {self.max_length}")
        if self.no_answer_threshold and not self.no_answer:
            raise ConfigError(f"task.no_answer_threshold = {self.no_answer_threshold}, but task.no_answer = false: set it to true, or the threshold to 0")

    def _check_room(self, tokens: int, what: str) -> None:
        if tokens - _SPECIAL_TOKENS - 1 - self.max_question < self.stride + _LEAST_STEP:
            least = self.stride + _LEAST_STEP + self.max_question + _SPECIAL_TOKENS + 1
            raise ConfigError(
                f"{what} leaves no step beside task.max_question = {self.max_question} and task.stride = {self.stride}: give {least} tokens, or less of these"
            )

    @property
    def metrics(self) -> dict[str, Callable[..., float]]:
        """F1 of the words decides; exact match, the words' precision and recall, and how often the span begins and ends right stand beside it."""
        return {name: partial(_mean, name=name) for name in ("f1", "em", "precision", "recall", "start_accuracy", "end_accuracy")}

    def read(self, table: Table) -> list[Reading]:
        """Readings of a table with columns id, question, context and, when known, answers (as kit.data.squad has them) and title. Raises DataError."""
        frame = table.frame
        for column in (self.id_column, "question", "context"):
            _require(table, column)
        titles = frame["title"] if "title" in frame else [""] * len(frame)
        known = frame["answers"] if "answers" in frame else [None] * len(frame)
        readings = []
        columns = (frame["id"], frame["question"], frame["context"], titles, known)
        for row, (id_, question, context, title, given) in enumerate(zip(*columns, strict=True)):
            for column, text in (("question", question), ("context", context)):
                if given is not None and not text.strip():  # in a test set, which cannot be mended, it is read
                    raise table.error(f"the {column} is blank: drop the row", row=row, column=column)
            answers = None if given is None else _read_answers(table, row, context, given)
            if answers == () and not self.no_answer:
                raise table.error("the question has no answer: set task.no_answer = true, or drop the row", row=row, column="answers")
            readings.append(Reading(id_, question, context, answers, title))
        return readings

    def queries(self, examples: Sequence[Reading], form: str) -> list[str]:
        """The question, whatever the form."""
        return [reading.question for reading in examples]

    def augment(self, examples: Sequence[Reading], rng: np.random.Generator) -> Sequence[Reading]:
        """The readings as they are."""
        return examples

    def encode(self, examples: Sequence[Reading], tokens: Tokens) -> list[Feature]:
        """One feature per window of a context, each behind the question; target: positions of the usual answer's first and last token.

        The question stands first, where it is at the same positions in every window: behind the context, encoders learn far more slowly to look at it.
        """
        if examples:
            whole = tokens.encode("a " * self.max_length, "a", max_length=self.max_length)[0]
            self._check_room(len(whole["input_ids"]), f"a model that has positions for {len(whole['input_ids'])} tokens")
        features = []
        for row, reading in enumerate(examples):
            question = _shortened(reading.question, tokens, self.max_question)
            windows = tokens.encode(reading.context, question, max_length=self.max_length, stride=self.stride, pair_first=True)
            answer = None if reading.answers is None else _usual(reading.answers)
            features += [Feature(row, (window,), None if reading.answers is None else _place(window, answer)) for window in windows]
        return features

    def collate(self, features: Sequence[Feature], tokens: Tokens) -> Batch:
        """(B, T) windows, and target (B, 2) when every feature has one."""
        import torch

        batch = tokens.pad([feature.encodings[0] for feature in features])
        targets = [feature.target for feature in features]
        return batch if None in targets else batch | {"target": torch.tensor(targets)}

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """(B, T, 2) → log-probabilities (B, T, 2) that the answer begins and ends at a token: of the text, or at the first position if nowhere."""
        shut = batch["segment"] != 0  # (B, T)
        shut[:, 0] = False
        return output.float().masked_fill(shut[..., None], _SHUT).log_softmax(1)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The mean of the cross-entropies of both ends."""
        return -scores.gather(1, batch["target"][:, None]).mean()

    def decode(self, scores: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Reading]) -> np.ndarray:
        """Per-window scores (T, 2) → the best spans of all windows (N, 3 * SPANS) float32; NaN in rows that nobody scored."""
        windows: list[list[_Window]] = [[] for _ in examples]
        for score, feature in zip(scores, features, strict=True):
            windows[feature.row].append(_read_window(score, feature.encodings[0], examples[feature.row].context, self.max_answer))
        return as_prediction([self._ranked(of_row, reading.context) for of_row, reading in zip(windows, examples, strict=True)])

    def _ranked(self, windows: list[_Window], context: str) -> list[Span]:
        """The spans of a reading, best first; of a text without tokens all of it; none where a score is not finite.

        No answer is as likely as in the window that says so least, and then made less so by the threshold.
        """
        if not all(np.isfinite(window.nowhere) for window in windows):
            return []
        best: dict[tuple[int, int], float] = {}
        for span in (span for window in windows for span in window.spans):
            best[span.start, span.stop] = max(span.log_p, best.get((span.start, span.stop), -np.inf))
        if self.no_answer and windows:
            best[_NOWHERE, _NOWHERE] = min(0.0, min(window.nowhere for window in windows) - self.no_answer_threshold)
        if windows and not best:
            best[0, len(context)] = 0.0
        return _in_order(Span(*place, log_p) for place, log_p in best.items())

    def is_labelled(self, example: Reading) -> bool:
        """Whether its answers are known."""
        return example.answers is not None

    def average(self, predictions: np.ndarray) -> np.ndarray:
        """The mean of the probabilities (N, 3 * SPANS) over all spans that the fits (F, N, 3 * SPANS) name."""
        return mean_of_spans(predictions, np.ones(len(predictions)))

    def targets(self, examples: Sequence[Reading]) -> np.ndarray:
        """JSON texts (N,) {"context": …, "answers": [{"text": …, "answer_start": …}, …]}; answers are null where unknown."""
        return np.array([_target(reading.context, reading.answers) for reading in examples] or [], object)

    def strata(self, examples: Sequence[Reading]) -> np.ndarray:
        """Whether there is an answer (N,) int64: 0 none, 1 one. Questions about one text belong into one fold: data.fold_by = "grouped"."""
        return np.array([bool(reading.answers) for reading in examples], np.int64)

    def width(self, examples: Sequence[Reading]) -> int:
        """Three numbers for every span."""
        return _NUMBERS * SPANS

    def check(self, submission: Table, known: Table | None) -> list[Fault]:
        """Blank answers, unless some question may have none. Raises DataError."""
        _require(submission, "answer")
        if self.no_answer or (known is not None and any(text.split() == ["[]"] for text in known.frame.get("answers", ()))):
            return []
        why = "the answer is blank: every question has one"
        return [Fault(row, "answer", why) for row, text in enumerate(submission.frame["answer"]) if not text.strip()]

    def parse(self, submission: Table, answers: Table) -> tuple[np.ndarray, np.ndarray]:
        """Each answer as its span (N, 3 * SPANS), of all places where the context has it the one that is most right, and targets (N,).

        An answer that does not stand in the context so, letter by letter, is written at the end of the context in `targets`: what is
        measured of words is of the text as submitted.
        """
        _require(answers, "answers")
        if faults := self.check(submission, answers):
            raise submission.error(faults[0].why, row=faults[0].row, column=faults[0].column)
        spans, targets = [], []
        for text, reading in zip(submission.frame["answer"], replace(self, no_answer=True).read(answers), strict=True):
            context, span = _found(text, reading)
            spans.append([span])
            targets.append(_target(context, reading.answers))
        return as_prediction(spans), np.array(targets, object)

    def rows(self, prediction: np.ndarray, examples: Sequence[Reading]) -> pd.DataFrame:
        """Columns id, answer: the text of the best span, blanks as one, "" for no answer; without a span the sentence that is most like the question.

        Where the text is blank, the question stands as answer, for a blank one may be refused. A word that readers of CSV take for a missing value
        ("None", "NA") gets a full stop, which no metric counts.
        """
        texts = []
        for row, reading in zip(prediction, examples, strict=True):
            text = _in_line(_text(row, reading.context))
            is_none = self.no_answer and _is_scored(row) and row[0] < 0
            text = text if text or is_none else _in_line(_text(_hint(reading), reading.context)) or _in_line(reading.question) or "?"
            texts.append(f"{text}." if text in MISSING else text)
        return pd.DataFrame({"id": [reading.id for reading in examples], "answer": texts})

    def views(self) -> dict[str, View]:
        """None: a shorter window is no less to read, for there are more of them then."""
        return {}

    def sizes(self, examples: Sequence[Reading], context_chars: np.ndarray | None = None) -> np.ndarray:
        """Tokens of a reading's windows (N,) float64, by the characters of context and question."""
        chars = np.array([len(reading.context) for reading in examples]) if context_chars is None else np.asarray(context_chars)
        context = chars / _CHARS_PER_TOKEN
        beside = np.minimum(np.array([len(reading.question) for reading in examples]) / _CHARS_PER_TOKEN, self.max_question) + _SPECIAL_TOKENS
        room = self.max_length - beside
        more = np.ceil(np.maximum(0, context - room) / (room - self.stride))  # windows after the first
        return (context + more * self.stride + (more + 1) * beside).astype(np.float64)

    def merit(self, prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """F1 of each row's best span (N,) float64; 0 where nobody scored."""
        return _numbers(prediction, targets, "f1")

    def doubt(self, prediction: np.ndarray) -> np.ndarray:
        """1 - the probability (N,) of the best span; 1 for a row without one."""
        best = prediction[:, :_NUMBERS].astype(np.float64)
        scored = np.isfinite(best).all(1)
        return 1 - np.exp(np.minimum(0.0, np.where(scored, best[:, 2], -np.inf)))

    def regret(self, prediction: np.ndarray, belief: np.ndarray) -> np.ndarray:
        """F1 of characters (N,) that the best spans of `prediction` (N, 3n) lose against those of `belief`, if its probabilities hold."""
        every = belief.reshape(len(belief), -1, _NUMBERS).astype(np.float64)  # (N, n, 3)
        chance = np.exp(np.where(np.isfinite(every).all(2), every[..., 2], -np.inf))
        lost = _alike(every[:, :1], every) - _alike(prediction[:, None, :_NUMBERS].astype(np.float64), every)  # (N, n)
        return np.maximum(0.0, (chance * lost).sum(1) / np.maximum(chance.sum(1), np.finfo(np.float64).tiny))

    def hints(self, examples: Sequence[Reading]) -> dict[str, np.ndarray]:
        """overlap: the sentences of the context as spans, that which shares most words with the question first, with the log of the share."""
        found = [_hint(reading) for reading in examples]
        return {"overlap": np.stack(found) if found else np.empty((0, _NUMBERS * SPANS), np.float32)}


def as_prediction(spans: Sequence[Sequence[Span]]) -> np.ndarray:
    """The first SPANS spans of each row (N, 3 * SPANS) float32, the rest NO_SPAN; NaN where there is none."""
    prediction = np.full((len(spans), SPANS, _NUMBERS), np.nan, np.float32)
    for row, some in enumerate(spans):
        if some:
            prediction[row, len(some) :] = NO_SPAN
        prediction[row, : len(some)] = np.array(some[:SPANS], np.float32).reshape(-1, _NUMBERS)
    return prediction.reshape(len(spans), SPANS * _NUMBERS)


def as_spans(row: np.ndarray) -> list[Span]:
    """The spans of a prediction's row (3n,), best first."""
    there = [span for span in row.reshape(-1, _NUMBERS) if np.isfinite(span).all() and span[0] != NO_SPAN[0]]
    return [Span(int(start), int(stop), float(log_p)) for start, stop, log_p in there]


class _Window(NamedTuple):
    """What a window says: its best spans, and the log-probability that it has none."""

    spans: list[Span]
    nowhere: float


def _read_window(score: np.ndarray, encoding: Encoding, context: str, longest: int) -> _Window:
    """The best spans of a window of up to `longest` tokens, by its scores (T, 2); none reaches out of the text. Blanks around a span are not of it."""
    offsets = encoding["offsets"]
    inside = np.flatnonzero((encoding["segment"] == 0) & (offsets[:, 1] > offsets[:, 0]))
    nowhere = float(score[0].sum())
    if not len(inside):
        return _Window([], nowhere)
    begin, end = score[inside].astype(np.float64).T  # (W,) each
    reach = min(longest, len(inside))
    ends = np.lib.stride_tricks.sliding_window_view(np.pad(end, (0, reach - 1), constant_values=-np.inf), reach)  # (W, reach)
    total = (begin[:, None] + ends).ravel()
    few = min(_CANDIDATES, len(total))
    spans: dict[tuple[int, int], float] = {}
    for place in np.argpartition(-total, few - 1)[:few]:
        first, more = divmod(int(place), reach)
        if np.isfinite(total[place]):
            start, stop = _trimmed(context, int(offsets[inside[first], 0]), int(offsets[inside[first + more], 1]))
            if stop > start:
                spans[start, stop] = max(float(total[place]), spans.get((start, stop), -np.inf))
    return _Window(_in_order(Span(*place, log_p) for place, log_p in spans.items()), nowhere)


def _in_order(spans: Iterable[Span]) -> list[Span]:
    """The SPANS best, best first."""
    return sorted(spans, key=lambda span: (-span.log_p, span.start, span.stop))[:SPANS]


def _trimmed(context: str, start: int, stop: int) -> tuple[int, int]:
    part = context[start:stop]
    return start + len(part) - len(part.lstrip()), stop - len(part) + len(part.rstrip())


def _place(window: Encoding, answer: Answer | None) -> tuple[int, int]:
    """Positions of the answer's first and last token, if the window has all of it; else the first position twice."""
    if answer is None:
        return 0, 0
    offsets = window["offsets"]
    inside = np.flatnonzero((window["segment"] == 0) & (offsets[:, 1] > offsets[:, 0]))
    if not len(inside) or answer.start < offsets[inside[0], 0] or answer.stop > offsets[inside[-1], 1]:
        return 0, 0
    of_it = inside[(offsets[inside, 1] > answer.start) & (offsets[inside, 0] < answer.stop)]
    return (int(of_it[0]), int(of_it[-1])) if len(of_it) else (0, 0)


def _usual(answers: Sequence[Answer]) -> Answer | None:
    """The answer that most people gave, of equals the first; without white space around it."""
    if not answers:
        return None
    usual = Counter(answers).most_common(1)[0][0]
    start, stop = usual.start + len(usual.text) - len(usual.text.lstrip()), usual.start + len(usual.text.rstrip())
    return Answer(usual.text.strip(), start) if stop > start else usual


def _shortened(question: str, tokens: Tokens, longest: int) -> str:
    """A question of at most `longest` tokens."""
    encoding = tokens.encode(question, max_length=longest + _SPECIAL_TOKENS)[0]
    stops = encoding["offsets"][encoding["segment"] == 0, 1][:longest]
    return question[: stops.max()] if len(stops) else question


def _read_answers(table: Table, row: int, context: str, given: str) -> tuple[Answer, ...]:
    """A row's answers. Raises DataError where the context does not have one where it is said to be."""
    try:
        values = json.loads(given)
        answers = tuple(Answer(value["text"], value["answer_start"]) for value in values)
    except (ValueError, TypeError, KeyError, RecursionError):
        values, answers = None, ()
    for answer in answers if isinstance(values, list) else (Answer("", _NOWHERE),):
        if not isinstance(answer.text, str) or type(answer.start) is not int or not answer.text.strip():
            why = 'answers are JSON text, a list of {"text": …, "answer_start": …} with the answer and the number of its first character, [] for none'
            raise table.error(why, row=row, column="answers")
        if answer.start < 0 or context[answer.start : answer.stop] != answer.text:
            there = repr(context[max(0, answer.start) : answer.stop][:_SHOWN]) if 0 <= answer.start < len(context) else "nothing"
            why = f"the context has {there} at character {answer.start}, not {answer.text[:_SHOWN]!r}: count characters of the context from 0"
            raise table.error(why, row=row, column="answers")
    return answers


def _require(table: Table, column: str) -> None:
    if column not in table.frame:
        raise table.error(f"column {column!r} is missing (columns: {', '.join(table.frame.columns)})")


def _target(context: str, answers: Sequence[Answer] | None) -> str:
    known = None if answers is None else [{"text": answer.text, "answer_start": answer.start} for answer in answers]
    return json.dumps({"context": context, "answers": known}, ensure_ascii=False)


def _found(text: str, reading: Reading) -> tuple[str, Span]:
    """A submitted answer as a span, and the context that has it."""
    context, text = reading.context, text.strip()
    if not text:
        return context, Span(_NOWHERE, _NOWHERE, 0.0)
    places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
    if not places:
        context, places = f"{context}\n{text}", [len(context) + 1]
    starts = {answer.start for answer in reading.answers or ()}
    stops = {answer.stop for answer in reading.answers or ()}
    start = max(places, key=lambda place: (place in starts) + (place + len(text) in stops))
    return context, Span(start, start + len(text), 0.0)


def _is_scored(row: np.ndarray) -> bool:
    return bool(np.isfinite(row[:_NUMBERS]).all())


def _text(row: np.ndarray, context: str) -> str:
    """The text of a row's best span; "" for no answer and for no span."""
    return context[max(0, int(row[0])) : max(0, int(row[1]))] if _is_scored(row) else ""


def _in_line(text: str) -> str:
    return " ".join(text.split())


def _hint(reading: Reading) -> np.ndarray:
    """The sentences of a context (3 * SPANS,), by the share of the question's different words that they have."""
    asked = _words(reading.question)
    spans = []
    for match in re.finditer(r"\S.*?(?:[.!?](?=\s)|$)", reading.context, re.DOTALL):
        start, stop = _trimmed(reading.context, *match.span())
        shared = len(asked & _words(match[0])) + 1  # never none: its logarithm is a number
        spans.append(Span(start, stop, float(np.log(shared / (len(asked) + 1)))))
    return as_prediction([_in_order(spans)])[0]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """F1 of the characters of spans (N, 1, 3) and (N, n, 3) → (N, n) float64; 1 where both are no answer, 0 where one is missing."""
    shared = np.minimum(one[..., 1], other[..., 1]) - np.maximum(one[..., 0], other[..., 0])
    length = (one[..., 1] - one[..., 0]) + (other[..., 1] - other[..., 0])
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.nan_to_num(2 * np.maximum(0, shared) / length, posinf=0.0)
    return np.where((one[..., 0] == _NOWHERE) & (other[..., 0] == _NOWHERE), 1.0, f1)


def _numbers(prediction: np.ndarray, targets: np.ndarray, name: str) -> np.ndarray:
    """A number of each row's best span (N,) float64."""
    best = np.where(np.isfinite(prediction[:, :_NUMBERS]).all(1, keepdims=True), prediction[:, :2], np.nan).tolist()
    return np.array([_verdict(target, *ends)[name] if ends[0] == ends[0] else 0.0 for target, ends in zip(targets, best, strict=True)], np.float64)


def _mean(prediction: np.ndarray, targets: np.ndarray, name: str) -> float:
    return float(_numbers(prediction, targets, name).mean())


@lru_cache(maxsize=_JUDGED)
def _verdict(target: str, start: float, stop: float) -> dict[str, float]:
    """What the metrics say of one span of a target's context."""
    known = json.loads(target)
    assert known["answers"] is not None, f"a row has no answers: score labelled rows only ({target[:_SHOWN]}…)"
    answers = [Answer(answer["text"], answer["answer_start"]) for answer in known["answers"]]
    begin, end = int(start), int(stop)
    words = judge(known["context"][max(0, begin) : max(0, end)], [answer.text for answer in answers])
    places = [(answer.start, answer.stop) for answer in answers] or [(_NOWHERE, _NOWHERE)]
    ends = {"start_accuracy": begin in {place[0] for place in places}, "end_accuracy": end in {place[1] for place in places}}
    return {"f1": words.f1, "em": words.exact, "precision": words.precision, "recall": words.recall} | {name: float(is_right) for name, is_right in ends.items()}
