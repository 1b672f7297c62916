"""Multiple choice, scored in pairs: context + (prompt + option) through one shared encoder, one score per option.

Knows questions, features, loss, decoding and the submission's rows. Does not know which model scores them, files or folds.
Imports torch only to collate, so that a process which scores nothing need not load it.
The pair form is that of SWAG/RACE fine-tuning (Devlin et al. 2019); label smoothing after Szegedy et al. 2016, distillation after
Hinton et al. 2015.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from kit.errors import ConfigError
from kit.metrics import accuracy, accuracy_at_k, average_precision, map_at_k
from kit.tasks import Batch, Fault, Feature, Table, Tokens, View, mean_of_fits

if TYPE_CHECKING:
    from torch import Tensor

LETTERS = ascii_uppercase
_USUAL_OPTIONS = 5
_LEAST_TOKENS = 8  # of a sequence
_CHARS_PER_TOKEN, _SPECIAL_TOKENS = 4, 3  # of English text in the usual vocabularies; of a pair
_BLANK = -1e4  # score of a blank option: below any real one, and finite in fp16


@dataclass(frozen=True)
class Question:
    """One question. id: as in the table. answer: index of the right option, None in a test set. An option may be blank.

    soft: what a teacher says of the options, probabilities (C,), where there is one.
    """

    id: str
    prompt: str
    options: tuple[str, ...]
    answer: int | None = None
    context: str = ""
    soft: tuple[float, ...] | None = None


@dataclass(frozen=True)
class MultipleChoice:
    """Scores (N, C) for questions of C options; prediction: the three best letters."""

    max_length: int = 256
    """Tokens of one sequence; the context is cut to fit, the question and the option never."""
    shuffle_options: bool = True
    """Shuffle the options of every training question in every epoch; the label moves along."""
    label_smoothing: float = 0.0
    top: int = 3
    """Letters in a prediction."""
    distill: float = 0.0
    """Share of the loss that compares with the teacher (data.teacher) instead of the answer."""
    temperature: float = 1.0
    """By which the scores of teacher and student are divided before they are compared; a higher one tells more of the wrong options."""

    needs = "row"
    outputs = 1
    submits = True
    retrieves = True
    blends = "probabilities"
    id_column = "id"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing = {self.label_smoothing}: give a number from 0 to below 1")
        if self.max_length < _LEAST_TOKENS or self.top < 1:
            raise ConfigError(f"task.max_length = {self.max_length}, task.top = {self.top}: give at least {_LEAST_TOKENS} tokens and 1 letter")
        if not (0 <= self.distill <= 1 and 0 < self.temperature < math.inf):
            raise ConfigError(f"task.distill = {self.distill}, task.temperature = {self.temperature}: give a share from 0 to 1 and a temperature above 0")

    @property
    def metrics(self) -> dict[str, Callable[..., float]]:
        """MAP@3 decides; accuracy and accuracy@3 are reported beside it."""
        return {
            f"map@{self.top}": partial(map_at_k, k=self.top),
            "accuracy": accuracy,
            f"accuracy@{self.top}": partial(accuracy_at_k, k=self.top),
        }

    def read(self, table: Table) -> list[Question]:
        """Questions of a table with columns id, prompt, A, B, … and, when known, answer and context. Raises DataError."""
        frame = table.frame
        letters = _option_columns(table)
        for column in ("id", "prompt"):
            _require(table, column)
        texts = list(zip(*(frame[letter] for letter in letters), strict=True))
        answers = frame["answer"] if "answer" in frame else [""] * len(frame)
        contexts = frame["context"] if "context" in frame else [""] * len(frame)
        labelled = "answer" in frame
        questions = []
        for row, (id_, prompt, options, answer, context) in enumerate(
            zip(frame["id"], frame["prompt"], texts, answers, contexts, strict=True)
        ):
            if labelled and not any(option.strip() for option in options):
                raise table.error("every option is blank", row=row, column=letters[0])
            index = _answer_index(table, row, answer, options, letters) if labelled else None
            questions.append(Question(id_, prompt, options, index, context))
        return questions

    def queries(self, examples: Sequence[Question], form: str) -> list[str]:
        """The prompt, with form "prompt_options" followed by the options."""
        forms: dict[str, Callable[[Question], str]] = {
            "prompt": lambda question: question.prompt,
            "prompt_options": lambda question: " ".join((question.prompt, *question.options)),
        }
        return [forms[form](question) for question in examples]

    def augment(self, examples: Sequence[Question], rng: np.random.Generator) -> Sequence[Question]:
        """The questions with their options in a new random order, if `shuffle_options`."""
        return [_reorder(question, rng.permutation(len(question.options))) for question in examples] if self.shuffle_options else examples

    def encode(self, examples: Sequence[Question], tokens: Tokens) -> list[Feature]:
        """One feature per question, holding C sequences (context, prompt + option)."""
        return [
            Feature(
                row,
                tuple(
                    tokens.encode(question.context, f"{question.prompt} {option}".strip(), max_length=self.max_length)[0]
                    for option in question.options
                ),
                label(question),
            )
            for row, question in enumerate(examples)
        ]

    def collate(self, features: Sequence[Feature], tokens: Tokens) -> Batch:
        """(B*C, T) sequences, and what `labels` gives."""
        return tokens.pad([encoding for feature in features for encoding in feature.encodings]) | labels(features)

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """(B*C, 1) → (B, C); a blank option scores below every real one."""
        return output.view(batch["blank"].shape).masked_fill(batch["blank"], _BLANK)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy with the answers; for questions that a teacher has seen the share `distill` of it is cross-entropy with what the teacher says."""
        hard = self._hard_loss(scores, batch)
        if not self.distill or "soft" not in batch:
            return hard.mean()
        taught = ~batch["soft"].isnan().any(1)
        share = self.distill * taught.to(hard.dtype)  # (B,)
        return ((1 - share) * hard + share * self._soft_loss(scores, batch)).mean()

    def _hard_loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy with the answers (B,), the smoothed share spread over the options that are not blank."""
        log_p = scores.log_softmax(-1)
        right = -log_p.gather(1, batch["target"][:, None]).squeeze(1)
        if not self.label_smoothing:
            return right
        real = (~batch["blank"]).to(log_p.dtype)
        even = -(log_p * real).sum(1) / real.sum(1)
        return (1 - self.label_smoothing) * right + self.label_smoothing * even

    def _soft_loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy (B,) with the teacher's probabilities over the real options, both at `temperature`.

        Times its square, so that a temperature does not make gradients smaller. 0 for a question without a teacher.
        """
        logs = batch["soft"].to(scores.dtype).log() / self.temperature
        soft = logs.masked_fill(batch["blank"], -math.inf).softmax(-1).nan_to_num(0.0)
        return -(soft * (scores / self.temperature).log_softmax(-1)).sum(-1) * self.temperature**2

    def decode(self, scores: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Question]) -> np.ndarray:
        """Per-feature scores (C,) → probabilities (N, C) float32; a row that nobody scored is NaN."""
        prediction = np.full((len(examples), self.width(examples)), np.nan, np.float32)
        if features:
            prediction[[feature.row for feature in features]] = _softmax(np.stack(scores).astype(np.float32))
        return prediction

    def average(self, predictions: np.ndarray) -> np.ndarray:
        """The mean (N, C) over fits (F, N, C)."""
        return mean_of_fits(predictions)

    def is_labelled(self, example: Question) -> bool:
        """Whether it has an answer."""
        return example.answer is not None

    def targets(self, examples: Sequence[Question]) -> np.ndarray:
        """Right options (N,) int64, -1 where unknown."""
        return np.array([-1 if question.answer is None else question.answer for question in examples], np.int64)

    def strata(self, examples: Sequence[Question]) -> np.ndarray:
        """Folds are stratified by the right letter."""
        return self.targets(examples)

    def width(self, examples: Sequence[Question]) -> int:
        """Options of a question."""
        return len(examples[0].options) if examples else 0

    def check(self, submission: Table, known: Table | None) -> list[Fault]:
        """Predictions that are not 1 to `top` different letters of options. Without `known`, options are A to E. Raises DataError."""
        _require(submission, "prediction")
        letters = _known_letters(known)
        objections = [_objection(text.split(), letters, self.top) for text in submission.frame["prediction"]]
        return [Fault(row, "prediction", why) for row, why in enumerate(objections) if why]

    def parse(self, submission: Table, answers: Table) -> tuple[np.ndarray, np.ndarray]:
        """Ranks as scores (N, top + 26): the first letter 1, the second 1/2 …, letters not named -1, below `top` empty columns of 0.

        So a letter that is not named ranks below `top` also where fewer are named. The answers need columns id and answer.
        """
        _require(submission, "prediction")
        _require(answers, "answer")
        if faults := self.check(submission, answers):
            raise submission.error(faults[0].why, row=faults[0].row, column=faults[0].column)
        known = _known_letters(answers)
        prediction = np.full((len(submission.frame), self.top + len(LETTERS)), -1.0, np.float32)
        prediction[:, : self.top] = 0.0
        for row, text in enumerate(submission.frame["prediction"]):
            for rank, letter in enumerate(text.split()):
                prediction[row, self.top + LETTERS.index(letter)] = 1 / (rank + 1)
        for row, letter in enumerate(answers.frame["answer"]):
            if letter.strip() not in known:
                raise answers.error(f"the answer must be one of {', '.join(known)}", row=row, column="answer")
        targets = np.array([self.top + LETTERS.index(letter.strip()) for letter in answers.frame["answer"]], np.int64)
        return prediction, targets

    def rows(self, prediction: np.ndarray, examples: Sequence[Question]) -> pd.DataFrame:
        """Columns id, prediction: the best distinct letters, space separated; ties and NaN fall back to option order, blank options last."""
        blank = np.array([[not option.strip() for option in question.options] for question in examples], bool).reshape(prediction.shape)
        value = np.where(np.isfinite(prediction), prediction, -np.inf)
        order = np.lexsort((-value, blank), axis=-1)[:, : self.top]  # real before blank, then best first; stable
        text = [" ".join(LETTERS[index] for index in row) for row in order]
        return pd.DataFrame({"id": [question.id for question in examples], "prediction": text})

    def views(self) -> dict[str, View]:
        """Half the tokens, "short". None that is scored beside the usual one: in pair scoring another order of the options changes nothing."""
        return {"short": View(replace(self, max_length=max(_LEAST_TOKENS, self.max_length // 2)), more=False)}

    def sizes(self, examples: Sequence[Question], context_chars: np.ndarray | None = None) -> np.ndarray:
        """Tokens of a question's C sequences (N,) float64, by the characters of context, prompt and option, each sequence at most `max_length`."""
        context = np.array([len(question.context) for question in examples]) if context_chars is None else np.asarray(context_chars)
        prompt = np.array([len(question.prompt) for question in examples])
        options = self._per_option(examples, lambda question: [len(option) for option in question.options])
        tokens = ((context + prompt)[:, None] + options) / _CHARS_PER_TOKEN + _SPECIAL_TOKENS  # (N, C)
        return np.minimum(tokens, self.max_length).sum(1, dtype=np.float64)

    def merit(self, prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Average precision at `top` of each row (N,) float64."""
        return average_precision(prediction, targets, self.top)

    def doubt(self, prediction: np.ndarray) -> np.ndarray:
        """1 - the merit (N,) that the probabilities (N, C) themselves expect: 0 for a sure row. A row that is not finite counts as uniform."""
        options = prediction.shape[1]
        scored = np.isfinite(prediction).all(1, keepdims=True)
        sorted_p = -np.sort(-np.where(scored, prediction, 1 / max(1, options)).astype(np.float64), axis=1)[:, : self.top]
        return 1 - sorted_p @ (1 / np.arange(1, sorted_p.shape[1] + 1))

    def regret(self, prediction: np.ndarray, belief: np.ndarray) -> np.ndarray:
        """Merit (N,) that ranking by `prediction` (N, C) loses against ranking by `belief` (N, C), if its probabilities hold."""
        rights = [np.full(len(belief), option) for option in range(belief.shape[1])]
        lost = np.stack([self.merit(belief, right) - self.merit(prediction, right) for right in rights], 1)  # (N, C)
        return (lost * belief).sum(1)

    def hints(self, examples: Sequence[Question]) -> dict[str, np.ndarray]:
        """overlap: share of the option's different words that the context has, NaN without a context. length: characters, 0 for a blank option."""
        return {
            "overlap": self._per_option(examples, lambda question: word_shares(question.options, question.context)),
            "length": self._per_option(examples, lambda question: [len(option) if option.strip() else 0 for option in question.options]),
        }

    def _per_option(self, examples: Sequence[Question], numbers: Callable[[Question], list[Any]]) -> np.ndarray:
        """`numbers` of every question (N, C) float32."""
        return np.array([numbers(question) for question in examples], np.float32).reshape(len(examples), self.width(examples))


Label = tuple[int | None, tuple[bool, ...], tuple[float, ...] | None]
"""What a feature's loss compares with: the answer, which options are blank, what a teacher says."""


def label(question: Question) -> Label:
    """The target of a question's feature."""
    return question.answer, tuple(not option.strip() for option in question.options), question.soft


def labels(features: Sequence[Feature]) -> Batch:
    """blank (B, C) bool; target (B,) int64 when every feature has an answer; soft (B, C) float32 when any has a teacher, NaN in rows of the others."""
    import torch

    answers, blank, soft = zip(*(feature.target for feature in features), strict=True)
    batch = {"blank": torch.tensor(blank)}
    if None not in answers:
        batch["target"] = torch.tensor(answers)
    if any(soft):
        unknown = (math.nan,) * len(blank[0])
        batch["soft"] = torch.tensor([one or unknown for one in soft])
    return batch


def word_shares(options: Sequence[str], passage: str) -> list[float]:
    """Share of each option's different words that the passage has, in any case; 0 for a blank option, NaN where the passage is blank."""
    if not passage.strip():
        return [np.nan] * len(options)
    known = _words(passage)
    return [len(words & known) / max(1, len(words)) for words in map(_words, options)]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _softmax(scores: np.ndarray) -> np.ndarray:
    """(N, C) → (N, C); a row that is not finite becomes NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        return odds / odds.sum(-1, keepdims=True)


def _option_columns(table: Table) -> list[str]:
    """The option columns A, B, …: the unbroken run of letters from A on. Raises DataError."""
    present = [letter for letter in LETTERS if letter in table.frame]
    letters = list(LETTERS[: len(present)])
    if len(present) < 2 or present != letters:
        missing = next(letter for letter in LETTERS if letter not in table.frame)
        raise table.error(f"column {missing!r} is missing: options are columns A, B, … without a gap, at least two (columns: {', '.join(table.frame.columns)})")
    return letters


def _answer_index(table: Table, row: int, answer: str, options: tuple[str, ...], letters: list[str]) -> int:
    answer = answer.strip()
    if answer not in letters:
        raise table.error(f"the answer must be one of {', '.join(letters)}", row=row, column="answer")
    if not options[letters.index(answer)].strip():
        raise table.error("the answer names a blank option", row=row, column="answer")
    return letters.index(answer)


def _require(table: Table, column: str) -> None:
    if column not in table.frame:
        raise table.error(f"column {column!r} is missing (columns: {', '.join(table.frame.columns)})")


def _known_letters(known: Table | None) -> list[str]:
    """The options of a table; where it does not have them, A to E, or on to the last letter among its answers."""
    frame = known.frame if known else pd.DataFrame()
    last = max((LETTERS.find(letter.strip()) for letter in frame.get("answer", ()) if len(letter.strip()) == 1), default=0)
    return [letter for letter in LETTERS if letter in frame] or list(LETTERS[: max(last + 1, _USUAL_OPTIONS)])


def _objection(letters: list[str], known: list[str], top: int) -> str:
    """Why the site would refuse these letters as a prediction; empty if it would not."""
    if not 1 <= len(letters) <= top:
        return f"a prediction is 1 to {top} letters separated by spaces"
    strange = [letter for letter in letters if letter not in known]
    if strange:
        return f"{strange[0]!r} is no option ({known[0]} to {known[-1]})"
    return "a letter is named twice" if len(set(letters)) < len(letters) else ""


def _reorder(question: Question, order: np.ndarray) -> Question:
    answer = None if question.answer is None else int(np.flatnonzero(order == question.answer)[0])
    soft = None if question.soft is None else tuple(question.soft[i] for i in order)
    return replace(question, options=tuple(question.options[i] for i in order), answer=answer, soft=soft)
