"""What a task is: the verbs that stand between a table and a model, the same for every task. Knows no model and no file.

A task is a frozen dataclass of values. Letters: N examples, B batch, C options, T tokens, R rows of a collated batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from kit.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
Encoding = dict[str, np.ndarray]
"""One sequence: input_ids (T,) int32; segment (T,) int8, 0 text, 1 pair, -1 special; offsets (T, 2) int32, characters of the segment's text."""
Metric = Callable[[np.ndarray, Sequence[Any]], float]

MISSING = ("NaN", "nan", "None", "NULL", "null", "NA", "N/A", "n/a", "<NA>", "#N/A", "#NA", "-nan", "-NaN")
"""Texts that pandas, and so the site, reads from a CSV file as no value at all."""
TASKS = {
    "causal_lm": "kit.tasks.causal_lm:CausalLM",
    "essay_regression": "kit.tasks.essay_regression:EssayRegression",
    "extractive_qa": "kit.tasks.extractive_qa:ExtractiveQA",
    "multiple_choice": "kit.tasks.multiple_choice:MultipleChoice",
    "multiple_choice_prompt": "kit.tasks.prompted:Prompted",
}


class Table(Protocol):
    """A checked table of texts, as kit.data.tables reads it."""

    @property
    def source(self) -> str:
        """The file."""
        ...

    @property
    def frame(self) -> pd.DataFrame:
        """(N, columns) of str."""
        ...

    def error(self, why: str, *, row: int | None = None, column: str | None = None) -> DataError:
        """The DataError that names this file, the row (0-based position in `frame`), the column and the value there."""
        ...


class Tokens(Protocol):
    """Text → encodings → padded batch."""

    def encode(self, text: str, pair: str | None = None, *, max_length: int, stride: int = 0, pair_first: bool = False) -> list[Encoding]:
        """Encodings of a text, or of a text and its pair. Only `text` is ever cut: to fit `max_length` with stride 0, or into windows.

        pair_first: the pair stands in front, for models that read both as one sequence.
        """
        ...

    def pad(self, encodings: Sequence[Encoding]) -> Batch:
        """(R, T) tensors input_ids, attention_mask, token_type_ids, segment, padded on the right to the longest."""
        ...

    def id(self, word: str) -> int:
        """The id of a word that is one token; raises ConfigError if it is not."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files from which a model's `tokens` reads them again."""
        ...


class PromptTokens(Tokens, Protocol):
    """Tokens for models that go on from a text. Texts may hold special tokens as `chat` marks them; what `plain` gives holds none."""

    @property
    def limit(self) -> int:
        """The longest sequence the model has positions for."""
        ...

    def prompt(self, text: str, cut: tuple[int, int], *, max_length: int) -> Encoding:
        """A text to go on from: behind what stands before every text (BOS), unless it came from `chat`, and with nothing at its end.

        cut: characters (start, stop) whose tokens go, from the end, until the rest fits `max_length`; beyond that the beginning of the text goes.
        """
        ...

    def branch(self, text: str, *, end: bool = False) -> Encoding:
        """The tokens of a text that goes on from another. end: with the token that ends a text, if there is one."""
        ...

    def join(self, groups: Sequence[Sequence[Encoding]]) -> Batch:
        """A batch of trees: input_ids, position_ids and branch (B, T) int64 of B groups (trunk, branch 1, …), each in a row, padded on the right.

        branch: 0 in the trunk, k in branch k, -1 where padded. Positions of a branch go on from the trunk's end.
        """
        ...

    def letter_ids(self, letters: Sequence[str], after: str) -> list[int]:
        """The ids by which a text `after` goes on to each letter or word. Raises ConfigError where one is no single token, or two are the same."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's chat template filled in, up to where its answer begins: role and content of each message. Raises ConfigError if there is none."""
        ...

    def plain(self, text: str) -> str:
        """A text from outside, made free of whatever `chat` marks special tokens with."""
        ...


@dataclass(frozen=True)
class Feature:
    """The model-ready unit of one example (an example may have several: stride windows).

    row: index of the example. encodings: the sequences that go through the model together. target: what the loss compares with.
    joined: the encodings are a trunk and its branches, one sequence for the model (kit.models.prefix).
    """

    row: int
    encodings: tuple[Encoding, ...]
    target: Any = None
    joined: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences, unpadded."""
        return sum(len(encoding["input_ids"]) for encoding in self.encodings)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of a batch that it fills, and the longest of them."""
        return (1, self.tokens) if self.joined else (len(self.encodings), max(len(encoding["input_ids"]) for encoding in self.encodings))


class Fault(NamedTuple):
    """Why the site would refuse a prediction. row: 0-based position in the submission. column: where it stands."""

    row: int
    column: str
    why: str


class View(NamedTuple):
    """Another way to encode rows for the same weights. more: scored beside the usual one, to average; otherwise instead of it, for it costs less."""

    task: Task
    more: bool


def suffices(gives: str, needs: str) -> bool:
    """Whether a model of the one word does for a task of the other: who says what follows any text says what follows a question."""
    return gives == needs or (gives, needs) == ("next_token", "answer_token")


def mean_of_fits(predictions: np.ndarray) -> np.ndarray:
    """The mean (N, C) float64 of predictions (F, N, C), each row over the fits in which it is finite; NaN where it is in none."""
    good = np.isfinite(predictions).all(-1)
    total = np.where(good[..., None], predictions, 0.0).sum(0, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / good.sum(0)[:, None])


class Task(Protocol):
    """needs: what a model must give, see `suffices`: of padded sequences (Tokens.pad) "row" (R, outputs) or "token" (R, T, outputs); of batches of trees
    (PromptTokens.join) with at (M,), places row * T + column, "place" (M, outputs), what its head reads there, or "answer_token" or "next_token" (M,),
    with token (M,): log p(token | the text up to and with that place). "answer_token" is asked for at the last place of a trunk and in branches only.
    """

    @property
    def needs(self) -> str:
        """One of these words."""
        ...

    @property
    def outputs(self) -> int:
        """Numbers the model's head gives per row, token or place."""
        ...

    @property
    def submits(self) -> bool:
        """Whether predictions are handed in. If not, the task makes a model for others to start from: check, parse and rows raise ConfigError.
        """
        ...

    @property
    def retrieves(self) -> bool:
        """Whether examples may be given a context that is found for them."""
        ...

    @property
    def blends(self) -> str:
        """What predictions are, and so how they are blended: "probabilities" (N, C) of options; "values" (N, K), weights may be negative; "spans" (N, 3n),
        the n best, each first character, character after the last and log-probability, best first (see kit.tasks.spans): no answer is (-1, -1, it).
        """
        ...

    @property
    def id_column(self) -> str:
        """The column that names the rows, in tables and in submissions; examples have it as `id`."""
        ...

    @property
    def metrics(self) -> dict[str, Callable[..., float]]:
        """Metrics by name, the first one decides; each takes (prediction, targets) as numpy arrays and is better when larger."""
        ...

    def read(self, table: Table) -> list[Any]:
        """Examples of a table, in its order. Raises DataError."""
        ...

    def queries(self, examples: Sequence[Any], form: str) -> list[str]:
        """What to search the corpus for, one text per example; `form` as in the recipe's retrieve.context.query."""
        ...

    def augment(self, examples: Sequence[Any], rng: np.random.Generator) -> Sequence[Any]:
        """Examples as one training epoch sees them (shuffled options …); the same count and order."""
        ...

    def encode(self, examples: Sequence[Any], tokens: Tokens) -> list[Feature]:
        """Features of the examples, in order of their rows."""
        ...

    def collate(self, features: Sequence[Feature], tokens: Tokens) -> Batch:
        """One batch: the padded sequences of all features, and `target` when they have one."""
        ...

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """The model's output → the small thing loss and decode need; first axis: features (or their rows, one each)."""
        ...

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the batch, a scalar."""
        ...

    def decode(self, scores: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Any]) -> np.ndarray:
        """Per-feature scores → prediction per example, float32 (N, C)."""
        ...

    def is_labelled(self, example: Any) -> bool:
        """Whether the right answer is known: a test set's examples have none."""
        ...

    def average(self, predictions: np.ndarray) -> np.ndarray:
        """Predictions (F, N, C) of several fits → one (N, C), as `mean_of_fits` does for numbers."""
        ...

    def targets(self, examples: Sequence[Any]) -> np.ndarray:
        """What `metrics` compare predictions with, one row per example: of "probabilities" (N,) int64, -1 where unknown; of "values" (N, K) float32,
        -inf where unknown; of "spans" (N,) object, a JSON text {"context": …, "answers": […]} each.
        """
        ...

    def strata(self, examples: Sequence[Any]) -> np.ndarray:
        """What stratified folds spread evenly: one label per example (N,), or several (N, K)."""
        ...

    def width(self, examples: Sequence[Any]) -> int:
        """Columns C of a prediction for these examples."""
        ...

    def check(self, submission: Table, known: Table | None) -> list[Fault]:
        """The first fault of every faulty prediction. known: the test set or the answers, in any order, if there is one. Raises DataError for a missing column."""
        ...

    def parse(self, submission: Table, answers: Table) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (N, C) and targets (N, …) of a submission and the answers to it, rows in the same order. Raises DataError."""
        ...

    def rows(self, prediction: np.ndarray, examples: Sequence[Any]) -> pd.DataFrame:
        """The submission for predictions (N, C), ids copied."""
        ...

    def views(self) -> dict[str, View]:
        """Other ways to encode rows for weights that were trained with this task, by name."""
        ...

    def sizes(self, examples: Sequence[Any], context_chars: np.ndarray | None = None) -> np.ndarray:
        """Tokens each row costs (N,) float64, estimated from characters. context_chars: (N,), in place of the contexts of the examples."""
        ...

    def merit(self, prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """What each row of a prediction (N, C) adds to the first metric (N,) float64: its mean is the metric, or rises and falls with it."""
        ...

    def doubt(self, prediction: np.ndarray) -> np.ndarray:
        """How unsure each row of a prediction (N, C) is, (N,) float64; a row that is not finite is as unsure as can be."""
        ...

    def regret(self, prediction: np.ndarray, belief: np.ndarray) -> np.ndarray:
        """Expected merit (N,) that predicting `prediction` (N, C) loses against `belief` (N, C), where the latter holds; never negative."""
        ...

    def hints(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Numbers about the columns of a prediction that need no model, each (N, C) float32. The first one orders rows that nobody has scored."""
        ...
