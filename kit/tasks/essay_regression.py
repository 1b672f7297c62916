"""Texts that are graded: K scores on one scale, by one head. As it stands, the essays of Feedback Prize - English Language Learning.

Knows essays, features, losses and the submission's rows. Does not know which model reads them, files or folds.
Imports torch only to collate and for the loss, so that a process which scores nothing need not load it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from kit.errors import ConfigError, nearest
from kit.metrics import mcrmse, rmse
from kit.tasks import Batch, Fault, Feature, Table, Tokens, View, mean_of_fits

if TYPE_CHECKING:
    from torch import Tensor

Objective = Literal["smooth_l1", "rmse", "mse"]
_LEAST_TOKENS = 8  # of a sequence
_CHARS_PER_TOKEN, _SPECIAL_TOKENS = 4, 2  # of English text in the usual vocabularies; of a text
_UNKNOWN = -math.inf  # the score of an essay that nobody has graded
_STEPS = 8  # of the scale, which folds tell apart: half points from 1 to 5
_SMALL = 1e-9  # added to a mean of squares, whose root has no slope at 0


@dataclass(frozen=True)
class Essay:
    """One essay. id: as in the table. grades: in the order of the task's columns, None in a test set."""

    id: str
    text: str
    grades: tuple[float, ...] | None = None


@dataclass(frozen=True)
class EssayRegression:
    """Values (N, K) as the head gives them. Metrics and rows clip them to the scale, and put its middle where nobody scored."""

    max_length: int = 512
    """Tokens of an essay; what is beyond is cut."""
    long_length: int = 0
    """Tokens of the view "long", which is scored beside the usual one: inference may read more than training did (0: no such view)."""
    newline: str = "|"
    """Stands for a line break, which many tokenizers take for a space (empty: texts stay as they are).

    Any visible text will do: where the tokenizer does not know it, its unknown token comes to mean a line break.
    """
    id_column: str = "text_id"
    text_column: str = "full_text"
    columns: Sequence[str] = ("cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions")
    """The K columns of grades."""
    weights: Sequence[float] = ()
    """What each column counts for in the loss (empty: all the same). The metric counts them all the same."""
    low: float = 1.0
    high: float = 5.0
    """The scale's ends."""
    objective: Objective = "smooth_l1"
    """The loss of a column, in quarters of the scale: smooth L1, which is linear beyond one of them; mean squared error; or its root over a batch."""

    needs = "row"
    submits = True
    retrieves = False
    blends = "values"

    def __post_init__(self) -> None:
        for name in ("columns", "weights"):  # lists in a recipe
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_columns(self)
        if not (-math.inf < self.low < self.high < math.inf):
            raise ConfigError(f"task.low = {self.low}, task.high = {self.high}: give the ends of the scale, the lower one first")
        if self.objective not in get_args(Objective):
            raise ConfigError(f"task.objective = {self.objective!r} is unknown{nearest(self.objective, get_args(Objective))}")
        if self.max_length < _LEAST_TOKENS:
            raise ConfigError(f"task.max_length = {self.max_length}: give at least {_LEAST_TOKENS} tokens")
        if self.long_length and self.long_length <= self.max_length:
            raise ConfigError(f"task.long_length = {self.long_length}, task.max_length = {self.max_length}: give a greater length, or 0 for no such view")

    @property
    def outputs(self) -> int:
        """One for each column."""
        return len(self.columns)

    @property
    def metrics(self) -> dict[str, Callable[..., float]]:
        """Minus the mean column-wise RMSE decides; minus the RMSE of each column is reported beside it."""
        each = {f"neg_rmse_{name}": partial(self._negative_rmse, column=column) for column, name in enumerate(self.columns)}
        return {"neg_mcrmse": lambda prediction, targets: -mcrmse(self._submitted(prediction), targets), **each}

    def read(self, table: Table) -> list[Essay]:
        """Essays of a table with a column of ids, one of texts and, when graded, all columns of grades. Raises DataError."""
        ids = _ids(table, self.id_column)
        _require(table, self.text_column)
        texts = table.frame[self.text_column].tolist()
        if not any(name in table.frame for name in self.columns):
            return [Essay(id_, text) for id_, text in zip(ids, texts, strict=True)]
        for row, text in enumerate(texts):  # in a test set it would have to be scored all the same
            if not text.strip():
                raise table.error("the essay is blank: drop the row", row=row, column=self.text_column)
        grades = self._numbers(table)
        return [Essay(id_, text, tuple(own)) for id_, text, own in zip(ids, texts, grades.tolist(), strict=True)]

    def queries(self, examples: Sequence[Essay], form: str) -> list[str]:
        """The texts, whatever the form."""
        return [essay.text for essay in examples]

    def augment(self, examples: Sequence[Essay], rng: np.random.Generator) -> Sequence[Essay]:
        """The essays as they are."""
        return examples

    def encode(self, examples: Sequence[Essay], tokens: Tokens) -> list[Feature]:
        """One feature of one sequence per essay."""
        return [
            Feature(row, (tokens.encode(self._marked(essay.text), max_length=self.max_length)[0],), essay.grades)
            for row, essay in enumerate(examples)
        ]

    def collate(self, features: Sequence[Feature], tokens: Tokens) -> Batch:
        """(B, T) sequences; target (B, K) float32 when every feature has one."""
        import torch

        batch = tokens.pad([encoding for feature in features for encoding in feature.encodings])
        grades = [feature.target for feature in features]
        return batch if None in grades else batch | {"target": torch.tensor(grades, dtype=torch.float32)}

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """(B, K) → (B, K): 0 is the middle of the scale and 1 a quarter of it higher, so that a new head begins in the middle."""
        return output * self._quarter + self._middle

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The weighted mean over the columns of their losses."""
        import torch.nn.functional as F

        error = (scores - batch["target"]) / self._quarter  # (B, K)
        if self.objective == "smooth_l1":
            each = F.smooth_l1_loss(error, error.new_zeros(error.shape), reduction="none").mean(0)
        else:
            each = error.square().mean(0)
            each = (each + _SMALL).sqrt() if self.objective == "rmse" else each
        weights = error.new_tensor(self.weights or [1.0] * self.outputs)
        return (each * weights).sum() / weights.sum()

    def decode(self, scores: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Essay]) -> np.ndarray:
        """Per-feature scores (K,) → (N, K) float32; a row that nobody scored is NaN."""
        prediction = np.full((len(examples), self.outputs), np.nan, np.float32)
        if features:
            prediction[[feature.row for feature in features]] = np.stack(scores)
        return prediction

    def average(self, predictions: np.ndarray) -> np.ndarray:
        """The mean (N, C) over fits (F, N, C)."""
        return mean_of_fits(predictions)

    def is_labelled(self, example: Essay) -> bool:
        """Whether it has grades."""
        return example.grades is not None

    def targets(self, examples: Sequence[Essay]) -> np.ndarray:
        """Grades (N, K) float32; -inf where unknown."""
        unknown = (_UNKNOWN,) * self.outputs
        return np.array([essay.grades or unknown for essay in examples], np.float32).reshape(len(examples), self.outputs)

    def strata(self, examples: Sequence[Essay]) -> np.ndarray:
        """Grades (N, K) in eighths of the scale, half points from 1 to 5; -1 where unknown."""
        share = (self.targets(examples).astype(np.float64) - self.low) / (self.high - self.low)
        return np.where(np.isfinite(share), np.rint(np.nan_to_num(share, neginf=0.0) * _STEPS), -1).astype(np.int64)

    def width(self, examples: Sequence[Essay]) -> int:
        """K, whatever the examples."""
        return self.outputs

    def check(self, submission: Table, known: Table | None) -> list[Fault]:
        """Values that are no numbers on the scale, the first of each row. Raises DataError for a missing column."""
        for name in (self.id_column, *self.columns):
            _require(submission, name)
        rows = submission.frame[[*self.columns]].itertuples(index=False, name=None)
        objections = ([(name, why) for name, text in zip(self.columns, row, strict=True) if (why := self._objection(text))] for row in rows)
        return [Fault(row, *found[0]) for row, found in enumerate(objections) if found]

    def parse(self, submission: Table, answers: Table) -> tuple[np.ndarray, np.ndarray]:
        """Values (N, K) of a submission and the grades (N, K) of the same ids, both float32. Raises DataError, also where ids are missing or strange."""
        ids, known = _ids(submission, self.id_column), {id_: row for row, id_ in enumerate(_ids(answers, self.id_column))}
        for row, id_ in enumerate(ids):
            if id_ not in known:
                raise submission.error(f"this id is not in {answers.source}", row=row, column=self.id_column)
        if missing := sorted(known.keys() - set(ids)):
            raise submission.error(f"{self.id_column} {missing[0]!r} of {answers.source} is missing ({len(missing)} in all): every essay needs a prediction")
        return self._numbers(submission), self._numbers(answers)[[known[id_] for id_ in ids]]

    def rows(self, prediction: np.ndarray, examples: Sequence[Essay]) -> pd.DataFrame:
        """The id column, and the values (N, K) clipped to the scale; its middle where there is none."""
        values = dict(zip(self.columns, self._submitted(prediction).T, strict=True))
        return pd.DataFrame({self.id_column: [essay.id for essay in examples], **values})

    def views(self) -> dict[str, View]:
        """Half the tokens, "short", and with `long_length` more of them, "long"."""
        views = {"short": View(replace(self, max_length=max(_LEAST_TOKENS, self.max_length // 2), long_length=0), more=False)}
        return views | ({"long": View(replace(self, max_length=self.long_length, long_length=0), more=True)} if self.long_length else {})

    def sizes(self, examples: Sequence[Essay], context_chars: np.ndarray | None = None) -> np.ndarray:
        """Tokens (N,) float64 by the characters of the text, at most `max_length`; essays have no context."""
        chars = np.array([len(essay.text) for essay in examples], np.float64)
        return np.minimum(chars / _CHARS_PER_TOKEN + _SPECIAL_TOKENS, self.max_length)

    def merit(self, prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Minus the mean squared error of each row (N,) float64."""
        return -np.square(self._submitted(prediction).astype(np.float64) - targets).mean(1)

    def doubt(self, prediction: np.ndarray) -> np.ndarray:
        """1 for a row (N,) that is not finite and 0 for any other: values do not tell how sure they are."""
        return (~np.isfinite(prediction).all(1)).astype(np.float64)

    def regret(self, prediction: np.ndarray, belief: np.ndarray) -> np.ndarray:
        """The mean squared difference of the rows (N,)."""
        return -self.merit(prediction, self._submitted(belief))

    def hints(self, examples: Sequence[Essay]) -> dict[str, np.ndarray]:
        """length: characters, the same in every column."""
        length = np.array([len(essay.text) for essay in examples], np.float32)
        return {"length": np.repeat(length[:, None], self.outputs, 1)}

    @property
    def _middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def _quarter(self) -> float:
        return (self.high - self.low) / 4

    def _negative_rmse(self, prediction: np.ndarray, targets: np.ndarray, *, column: int) -> float:
        return -float(rmse(self._submitted(prediction), targets)[column])

    def _submitted(self, prediction: np.ndarray) -> np.ndarray:
        """(N, K) on the scale."""
        return np.where(np.isfinite(prediction), prediction, self._middle).clip(self.low, self.high).astype(np.float32)

    def _marked(self, text: str) -> str:
        """The text with every line break as `newline`."""
        return f" {self.newline} ".join(text.replace("\r\n", "\n").replace("\r", "\n").split("\n")) if self.newline else text

    def _numbers(self, table: Table) -> np.ndarray:
        """The grades (N, K) float32 of a table. Raises DataError for the first that is no number on the scale."""
        for name in self.columns:
            _require(table, name)
        texts = [table.frame[name].tolist() for name in self.columns]
        for row in range(len(table.frame)):
            for name, column in zip(self.columns, texts, strict=True):
                if why := self._objection(column[row]):
                    raise table.error(why, row=row, column=name)
        return np.array([[float(text) for text in column] for column in texts], np.float32).T

    def _objection(self, text: str) -> str:
        """Why a text is no number on the scale; empty if it is one."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            return f"is no number: give one from {self.low:g} to {self.high:g}"
        return "" if self.low <= value <= self.high else f"is outside the scale from {self.low:g} to {self.high:g} (task.low, task.high)"


def _check_columns(task: EssayRegression) -> None:
    """Refuse columns of which one is named twice or not at all, and weights that do not belong to them."""
    names = [task.id_column, task.text_column, *task.columns]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"task.id_column, task.text_column and task.columns name {name!r} {count} times: give every one its own column")
    if not task.columns or not all(name.strip() for name in names):
        raise ConfigError(f"task.id_column, task.text_column, task.columns = {names}: give a name to each, and at least one of grades")
    if task.weights and len(task.weights) != len(task.columns):
        raise ConfigError(f"task.weights has {len(task.weights)} numbers, but task.columns {len(task.columns)} names: give one for each, or none")
    if task.weights and not (min(task.weights) >= 0 < sum(task.weights) < math.inf):
        raise ConfigError(f"task.weights = {list(task.weights)}: give numbers from 0 on, not all of them 0")


def _ids(table: Table, column: str) -> list[str]:
    """The ids of a table. Raises DataError where one is blank or stands twice."""
    _require(table, column)
    first: dict[str, int] = {}
    for row, value in enumerate(table.frame[column]):
        if not value.strip():
            raise table.error("the id is empty: give every row its own", row=row, column=column)
        if value in first:
            raise table.error(f"row {first[value] + 1} has the same id: give every row its own", row=row, column=column)
        first[value] = row
    return [*first]


def _require(table: Table, column: str) -> None:
    if column not in table.frame:
        raise table.error(f"column {column!r} is missing{nearest(column, map(str, table.frame.columns))}")
