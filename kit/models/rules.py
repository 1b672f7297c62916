"""A linear model on a handful of lexical features of (context, prompt + option): cheap, instant, and wrong in other ways than encoders.

Fits the contract of kit.models like any other: its "tokenizer" turns a pair of texts into features with word weights (IDF) learned from
the training texts. Knows no task.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kit.errors import BundleError, ConfigError
from kit.models.checkpoint import load_weights, save_weights

if TYPE_CHECKING:
    from kit.tasks import Batch, Encoding

FILE = "config.json"
FEATURES = ("characters", "length", "covered", "uncovered", "sentence", "pairs", "numbers", "negation")
_USUAL_WEIGHT = 20.0  # of the words of an option, so that features are about 1
_NEGATIONS = frozenset(("no", "not", "never", "none", "neither", "nor", "cannot", "without", "unlike", "except", "n't"))


class RuleTokens:
    """Texts → features (F,) float32, in the order of FEATURES.

    Sums rather than shares: what the prompt adds to them is the same for every option, and so does not count among them.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        self._weights = weights
        self._unseen = max(weights.values(), default=1.0)
        self._context = lru_cache(maxsize=1024)(self._read_context)

    @classmethod
    def open(cls, folder: Path) -> RuleTokens:
        """The word weights of a folder. Raises BundleError."""
        path = Path(folder) / FILE
        try:
            return cls({word: float(weight) for word, weight in json.loads(path.read_text(encoding="utf-8"))["idf"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path}: the word weights cannot be read ({error}): train the run again") from None

    def encode(self, text: str, pair: str | None = None, *, max_length: int, stride: int = 0) -> list[Encoding]:
        """One encoding; input_ids has one entry, since the cost does not grow with the text."""
        words = _words(pair or "")
        different = set(words)
        context, sentences, bigrams = self._context(text)
        numbers = {word for word in different if word[0].isdigit()}
        features = [
            len(pair or "") / 100,
            math.log1p(len(pair or "")),
            self._weight(different & context) / _USUAL_WEIGHT,
            self._weight(different - context) / _USUAL_WEIGHT,
            max((self._weight(different & sentence) for sentence in sentences), default=0.0) / _USUAL_WEIGHT,
            len(set(pairwise(words)) & bigrams) / 10,
            len(numbers & context) / len(numbers) if numbers else 0.5,
            float(any(word in _NEGATIONS for word in words)),
        ]
        return [{"input_ids": np.zeros(1, np.int32), "features": np.array(features, np.float32)}]

    def pad(self, encodings: Sequence[Encoding]) -> Batch:
        """features (R, F) float32."""
        return {"features": torch.from_numpy(np.stack([encoding["features"] for encoding in encodings]))}

    def id(self, word: str) -> int:
        """Rules have no vocabulary: raises ConfigError."""
        raise ConfigError(f'model.kind = "rules" has no token ids ({word!r} was asked for): choose an encoder for this task')

    def save(self, folder: Path) -> None:
        """Write the word weights."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE).write_text(json.dumps({"idf": self._weights}, ensure_ascii=False), encoding="utf-8")

    def _read_context(self, text: str) -> tuple[set[str], list[set[str]], set[tuple[str, str]]]:
        words = _words(text)
        return set(words), [set(_words(part)) for part in re.split(r"(?<=[.!?])\s", text)], set(pairwise(words))

    def _weight(self, words: set[str]) -> float:
        return sum(self._weights.get(word, self._unseen) for word in sorted(words))  # sorted: the same sum in every process


class Rules(nn.Module):
    """Features (R, F) → (R, outputs), linear, starting at zero."""

    gives = "row"

    def __init__(self, *, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(len(FEATURES), outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def invent(cls, folder: Path, texts: Callable[[], Iterable[str]], *, seed: int, config: dict[str, Any]) -> None:
        """Learn the word weights: log(N / documents with the word). `config` may set least_documents (default 2)."""
        least = int(config.get("least_documents", 2))
        counts, total = Counter[str](), 0
        for text in texts():
            counts.update(set(_words(text)))
            total += 1
        RuleTokens({word: math.log((1 + total) / count) for word, count in sorted(counts.items()) if count >= least}).save(folder)

    @classmethod
    def create(cls, source: Path, *, outputs: int) -> Rules:
        """See kit.models.Model."""
        return cls(outputs=outputs)

    @classmethod
    def load(cls, folder: Path, *, outputs: int) -> Rules:
        """See kit.models.Model."""
        model = cls(outputs=outputs)
        load_weights(model, folder)
        return model

    @classmethod
    def tokens(cls, folder: Path) -> RuleTokens:
        """See kit.models.Model."""
        return RuleTokens.open(folder)

    def forward(self, batch: Batch) -> Tensor:
        """(R, F) → (R, outputs) float32."""
        return self.head(batch["features"]).float()

    @property
    def input_embeddings(self) -> nn.Parameter:
        """Rules have none: raises ConfigError."""
        raise ConfigError('train.fgm needs input embeddings, and model.kind = "rules" has none: set train.fgm = 0')

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """[nothing below, the head]."""
        return [[], list(self.parameters())]

    def checkpoint_activations(self) -> None:
        """Nothing to save."""

    def reinit_layers(self, count: int) -> None:
        """See kit.models.Model: there are no layers."""
        if count:
            raise ConfigError(f'train.reinit_layers = {count}: model.kind = "rules" has no layers')

    def save(self, folder: Path) -> None:
        """Write the weights."""
        save_weights(self, folder)


def _words(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,]\d+)*|n't|\w+", text.lower())
