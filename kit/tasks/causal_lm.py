"""Next-token training on a corpus of texts: what makes a language model, of random weights or of one that is to know a field better.

A document longer than `max_length` becomes several features. Without packing none holds two documents: for texts of a few sizes, since batches are
of similar lengths. With packing an epoch's documents, in an order of its own, are one stream that is cut into chunks of the same length, as in the
training of large models; what is predicted is still a document at a time. Predicts nothing that could be submitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np
import pandas as pd

from kit.errors import ConfigError
from kit.tasks import Batch, Encoding, Fault, Feature, PromptTokens, Table, Tokens, View, mean_of_fits

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_TOKENS = 8  # of a feature
_CHARS_PER_TOKEN, _SPECIAL_TOKENS = 4, 2  # of English text in the usual vocabularies; of a document
_NOTHING = -20.0  # log-probability per token of a document that nobody scored: far below a guess among a million words


@dataclass(frozen=True)
class Document:
    """A text to learn from. id: as in the table. place: in the stream that an epoch's chunks are cut from; None where there is no stream."""

    id: str
    text: str
    place: int | None = None


@dataclass(frozen=True)
class CausalLM:
    """Learns from columns id and text; prediction (N, 2): the mean log-probability of a document's tokens, and how many these are."""

    max_length: int = 512
    """Tokens of one feature, that which begins a text included."""
    packing: bool = False
    """Train on chunks of `max_length` tokens, cut from all documents on end: no padding, and texts of any length."""
    key_words: Sequence[str] = ()
    """Words that make a feature count for more in the loss: 1 + key_alpha × how many of its tokens are such a word, with or without a space before it."""
    key_alpha: float = 0.0

    needs = "next_token"
    outputs = 1
    submits = False
    retrieves = False
    blends = "probabilities"
    id_column = "id"

    def __post_init__(self) -> None:
        if self.max_length < _LEAST_TOKENS:
            raise ConfigError(f"task.max_length = {self.max_length}: give at least {_LEAST_TOKENS} tokens")
        if not 0 <= self.key_alpha < np.inf:
            raise ConfigError(f"task.key_alpha = {self.key_alpha}: give 0 or more")
        if bool(self.key_words) != bool(self.key_alpha):
            raise ConfigError("task.key_words and task.key_alpha (above 0) go together: set both or neither")

    @property
    def metrics(self) -> dict[str, Callable[..., float]]:
        """The mean over documents decides; perplexity is that of all their tokens, negative so that more is better."""
        return {"log_probability": _log_probability, "negative_perplexity": _negative_perplexity}

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
        """The documents as they are; with packing each at a random place of the epoch's stream."""
        if not self.packing:
            return examples
        return [replace(document, place=int(place)) for document, place in zip(examples, rng.permutation(len(examples)), strict=True)]

    def encode(self, examples: Sequence[Document], tokens: Tokens) -> list[Feature]:
        """The parts of each document, each behind the token that begins a text, and the last one with that which ends it.

        With packing, parts are of `max_length` tokens, and each begins with the last token of the part before, so that every token but the first of
        all is asked for once; documents that have places become one stream, whose parts belong to the row they begin in. Raises ConfigError for a key
        word that is no token.
        """
        prompts = cast(PromptTokens, tokens)
        keys = self._key_ids(prompts) if self.key_words else None
        first = prompts.prompt("", (0, 0), max_length=self.max_length)
        size = min(self.max_length, prompts.limit)
        texts = [prompts.branch(prompts.plain(document.text), end=True) for document in examples]
        if not self.packing:
            parts = [(row, _joined([first, part])) for row, text in enumerate(texts) for part in _parts(text, size - len(first["input_ids"]))]
        elif None not in (places := [document.place for document in examples]) and examples:
            parts = sorted(_stream(texts, first, np.argsort(np.array(places)), size), key=lambda part: part[0])
        else:
            parts = [(row, chunk) for row, text in enumerate(texts) for chunk in _chunks(_joined([first, text]), size)]
        return [Feature(row, (part,), None if keys is None else self._weight(part, keys), joined=True) for row, part in parts]

    def _key_ids(self, tokens: PromptTokens) -> list[int]:
        """The tokens that are a key word, with a space before it or without."""
        return sorted({id_ for word in self.key_words for id_ in _ids_of(word, tokens)})

    def _weight(self, part: Encoding, keys: list[int]) -> float:
        return 1 + self.key_alpha * int(np.isin(part["input_ids"][1:], keys).sum())

    def collate(self, features: Sequence[Feature], tokens: Tokens) -> Batch:
        """A batch of trees (B, T) without branches, asked for every token but the first of each; asked (B,): how many these are; weight (B,) by key words."""
        import torch

        batch = cast(PromptTokens, tokens).join([feature.encodings for feature in features])
        following = batch["branch"][:, 1:] == 0  # (B, T-1)
        row, column = following.nonzero(as_tuple=True)
        batch["at"] = row * batch["branch"].shape[1] + column
        batch["token"] = batch["input_ids"][row, column + 1]
        weight = {} if features[0].target is None else {"weight": torch.tensor([feature.target for feature in features])}
        return batch | {"asked": following.sum(1), "owner": row} | weight

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """(M,) → (B, 1): the log-probability of each feature."""
        return output.new_zeros(len(batch["asked"])).index_add(0, batch["owner"], output)[:, None]

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The mean negative log-probability of a token, times the weight of its feature: for chunks of one length the key-token loss of CodeParrot.

        Weights are not divided by their mean: a batch of one counts for what it weighs.
        """
        weighted = scores[:, 0] * batch["weight"] if "weight" in batch else scores
        return -weighted.sum() / batch["asked"].sum()

    def decode(self, scores: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Document]) -> np.ndarray:
        """Log-probability per token of each document, and its tokens, (N, 2) float32; NaN where nobody scored."""
        total, count = np.zeros(len(examples)), np.zeros(len(examples))
        for score, feature in zip(scores, features, strict=True):
            total[feature.row] += float(score[0])
            count[feature.row] += feature.tokens - 1
        with np.errstate(invalid="ignore"):
            return np.stack([total / count, np.where(count, count, np.nan)], 1).astype(np.float32)

    def average(self, predictions: np.ndarray) -> np.ndarray:
        """The mean (N, C) over fits (F, N, C)."""
        return mean_of_fits(predictions)

    def is_labelled(self, example: Document) -> bool:
        """Always: the text is its own target."""
        return True

    def targets(self, examples: Sequence[Document]) -> np.ndarray:
        """Zeros (N,): there is nothing to compare with but the text itself."""
        return np.zeros(len(examples), np.int64)

    def strata(self, examples: Sequence[Document]) -> np.ndarray:
        """All documents alike."""
        return np.zeros(len(examples), np.int64)

    def width(self, examples: Sequence[Document]) -> int:
        """Two numbers per document."""
        return 2

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
        return {"length": np.array([[len(document.text)] * 2 for document in examples], np.float32).reshape(-1, 2)}


def _parts(encoding: Encoding, room: int) -> list[Encoding]:
    """An encoding in as few parts of at most `room` tokens as it takes, all of the same length but for one token."""
    count = max(1, -(-len(encoding["input_ids"]) // room))
    pieces = {name: np.array_split(values, count) for name, values in encoding.items()}
    return [{name: pieces[name][number] for name in pieces} for number in range(count)]


def _stream(texts: Sequence[Encoding], first: Encoding, order: np.ndarray, size: int) -> Iterator[tuple[int, Encoding]]:
    """The chunks of all texts on end, in this order, and the row whose token each asks for first."""
    ends = texts[0]["input_ids"][-1:].tolist() == first["input_ids"].tolist()  # as in GPT-2, where one token ends a text and begins the next
    parts = [part for number, row in enumerate(order) for part in ([texts[row]] if ends and number else [first, texts[row]])]
    lengths = [len(texts[row]["input_ids"]) + len(first["input_ids"]) * (not ends or not number) for number, row in enumerate(order)]
    rows = np.repeat(order, lengths)
    for number, chunk in enumerate(_chunks(_joined(parts), size)):
        yield int(rows[min(number * (size - 1) + 1, len(rows) - 1)]), chunk


def _chunks(encoding: Encoding, size: int) -> list[Encoding]:
    """An encoding cut into parts of `size` tokens, each but the first from the last token of the part before; the last one may be shorter."""
    starts = range(0, max(1, len(encoding["input_ids"]) - 1), size - 1)
    return [{name: values[start : start + size] for name, values in encoding.items()} for start in starts]


def _ids_of(word: str, tokens: PromptTokens) -> list[int]:
    found = []
    for form in (word, f" {word}"):
        with suppress(ConfigError):
            found.append(tokens.id(form))
    if not word.strip() or not found:
        raise ConfigError(f"task.key_words: {word!r} is no single token of this tokenizer: leave it out, or raise model.vocab_size")
    return found


def _joined(encodings: Sequence[Encoding]) -> Encoding:
    return {name: np.concatenate([encoding[name] for encoding in encodings]) for name in encodings[0]}


def _merit(prediction: np.ndarray) -> np.ndarray:
    value = prediction[:, 0].astype(np.float64)
    return np.where(np.isfinite(value), value, _NOTHING)


def _log_probability(prediction: np.ndarray, targets: np.ndarray) -> float:
    return float(_merit(prediction).mean())


def _negative_perplexity(prediction: np.ndarray, targets: np.ndarray) -> float:
    """Minus the exponential of the mean over tokens; a document that nobody scored counts as one of the mean length."""
    tokens = prediction[:, 1].astype(np.float64)
    known = np.isfinite(tokens)
    weight = np.where(known, tokens, tokens[known].mean() if known.any() else 1.0)
    return -float(np.exp(-np.average(_merit(prediction), weights=weight)))


def _refuse() -> NoReturn:
    raise ConfigError('task.kind = "causal_lm" learns from texts and has no submission: name what it trained as model.source of another recipe')
