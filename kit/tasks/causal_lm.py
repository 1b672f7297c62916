"""Next-token training on a corpus of texts: what makes a language model, of random weights or of one that is to know a field better.

A document longer than `max_length` becomes several features of equal size. None holds two documents: batches are of similar lengths, so that
packing would save 1 % (padding of the sample's passages, batches of 8). Predicts nothing that could be submitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np
import pandas as pd

from kit.errors import ConfigError
from kit.tasks import Batch, Encoding, Fault, Feature, PromptTokens, Table, Tokens, View

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_TOKENS = 8  # of a feature
_CHARS_PER_TOKEN, _SPECIAL_TOKENS = 4, 2  # of English text in the usual vocabularies; of a document
_NOTHING = -20.0  # log-probability per token of a document that nobody scored: far below a guess among a million words


@dataclass(frozen=True)
class Document:
    """A text to learn from. id: as in the table."""

    id: str
    text: str


@dataclass(frozen=True)
class CausalLM:
    """Learns from columns id and text; prediction (N, 1): the mean log-probability of a document's tokens."""

    max_length: int = 512
    """Tokens of one feature, that which begins a text included."""

    needs = "next_token"
    outputs = 1
    submits = False

    def __post_init__(self) -> None:
        if self.max_length < _LEAST_TOKENS:
            raise ConfigError(f"task.max_length = {self.max_length}: give at least {_LEAST_TOKENS} tokens")

    @property
    def metrics(self) -> dict[str, Callable[..., float]]:
        """The mean over documents decides; perplexity is its exponential, negative so that more is better."""
        return {"log_probability": _log_probability, "negative_perplexity": lambda *given: -float(np.exp(-_log_probability(*given)))}

    def read(self, table: Table) -> list[Document]:
        """Documents of a table with columns id and text. Raises DataError for a blank text."""
        if "text" not in table.frame:
            raise table.error(f"column 'text' is missing (columns: {', '.join(table.frame.columns)})")
        for row, text in enumerate(table.frame["text"]):
            if not text.strip():
                raise table.error("the text is blank: drop the row", row=row, column="text")
        return [Document(id_, text) for id_, text in zip(table.frame["id"], table.frame["text"], strict=True)]

    def queries(self, examples: Sequence[Document], form: str) -> list[str]:
        """The texts, whatever the form."""
        return [document.text for document in examples]

    def augment(self, examples: Sequence[Document], rng: np.random.Generator) -> Sequence[Document]:
        """The documents as they are."""
        return examples

    def encode(self, examples: Sequence[Document], tokens: Tokens) -> list[Feature]:
        """The parts of each document, each behind the token that begins a text, and the last one with that which ends it."""
        prompts = cast(PromptTokens, tokens)
        first = prompts.prompt("", (0, 0), max_length=self.max_length)
        room = min(self.max_length, prompts.limit) - len(first["input_ids"])
        return [
            Feature(row, (_joined(first, part),), joined=True)
            for row, document in enumerate(examples)
            for part in _parts(prompts.branch(prompts.plain(document.text), end=True), room)
        ]

    def collate(self, features: Sequence[Feature], tokens: Tokens) -> Batch:
        """A batch of trees (B, T) without branches, asked for every token but the first of each; asked (B,): how many these are."""
        batch = cast(PromptTokens, tokens).join([feature.encodings for feature in features])
        following = batch["branch"][:, 1:] == 0  # (B, T-1)
        row, column = following.nonzero(as_tuple=True)
        batch["at"] = row * batch["branch"].shape[1] + column
        batch["token"] = batch["input_ids"][row, column + 1]
        return batch | {"asked": following.sum(1), "owner": row}

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """(M,) → (B, 1): the log-probability of each feature."""
        return output.new_zeros(len(batch["asked"])).index_add(0, batch["owner"], output)[:, None]

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The mean negative log-probability of a token."""
        return -scores.sum() / batch["asked"].sum()

    def decode(self, scores: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Document]) -> np.ndarray:
        """Log-probability per token of each document, (N, 1) float32; NaN where nobody scored."""
        total, count = np.zeros(len(examples)), np.zeros(len(examples))
        for score, feature in zip(scores, features, strict=True):
            total[feature.row] += float(score[0])
            count[feature.row] += feature.tokens - 1
        with np.errstate(invalid="ignore"):
            return (total / count).astype(np.float32)[:, None]

    def targets(self, examples: Sequence[Document]) -> np.ndarray:
        """Zeros (N,): there is nothing to compare with but the text itself."""
        return np.zeros(len(examples), np.int64)

    def strata(self, examples: Sequence[Document]) -> np.ndarray:
        """All documents alike."""
        return np.zeros(len(examples), np.int64)

    def width(self, examples: Sequence[Document]) -> int:
        """One number per document."""
        return 1

    def check(self, submission: Table, known: Table | None) -> list[Fault]:
        """Raises ConfigError: there is no submission."""
        _refuse()

    def parse(self, submission: Table, answers: Table) -> tuple[np.ndarray, np.ndarray]:
        """Raises ConfigError: there is no submission."""
        _refuse()

    def rows(self, prediction: np.ndarray, examples: Sequence[Document]) -> pd.DataFrame:
        """Raises ConfigError: there is no submission."""
        _refuse()

    def views(self) -> dict[str, View]:
        """None."""
        return {}

    def sizes(self, examples: Sequence[Document], context_chars: np.ndarray | None = None) -> np.ndarray:
        """Tokens (N,) float64 by the characters of the text; documents have no context."""
        return np.array([len(document.text) for document in examples], np.float64) / _CHARS_PER_TOKEN + _SPECIAL_TOKENS

    def merit(self, prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The log-probabilities (N,) float64; very low where nobody scored."""
        return _merit(prediction)

    def doubt(self, prediction: np.ndarray) -> np.ndarray:
        """How unlikely the documents are (N,) float64."""
        return -_merit(prediction)

    def regret(self, prediction: np.ndarray, belief: np.ndarray) -> np.ndarray:
        """Zeros (N,): nothing is chosen."""
        return np.zeros(len(belief))

    def hints(self, examples: Sequence[Document]) -> dict[str, np.ndarray]:
        """length: characters."""
        return {"length": np.array([[len(document.text)] for document in examples], np.float32).reshape(-1, 1)}


def _parts(encoding: Encoding, room: int) -> list[Encoding]:
    """An encoding in as few parts of at most `room` tokens as it takes, all of the same length but for one token."""
    count = max(1, -(-len(encoding["input_ids"]) // room))
    pieces = {name: np.array_split(values, count) for name, values in encoding.items()}
    return [{name: pieces[name][number] for name in pieces} for number in range(count)]


def _joined(first: Encoding, second: Encoding) -> Encoding:
    return {name: np.concatenate([first[name], second[name]]) for name in first}


def _merit(prediction: np.ndarray) -> np.ndarray:
    value = prediction[:, 0].astype(np.float64)
    return np.where(np.isfinite(value), value, _NOTHING)


def _log_probability(prediction: np.ndarray, targets: np.ndarray) -> float:
    return float(_merit(prediction).mean())


def _refuse() -> NoReturn:
    raise ConfigError('task.kind = "causal_lm" learns from texts and has no submission: name what it trained as model.source of another recipe')
