"""Trivial rules, to see what a model is worth beside them. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from kit.tasks import Feature, Task, Tokens
from kit.tasks.multiple_choice import word_shares

_UNSEEN = 0.5  # times that every token counts as seen (Krichevsky and Trofimov 1981)


class _Question(Protocol):
    @property
    def options(self) -> tuple[str, ...]: ...


def longest(questions: Sequence[_Question]) -> np.ndarray:
    """Scores (N, C): the length of the option in characters."""
    return np.array([[len(option) for option in question.options] for question in questions], np.float32)


def overlap(questions: Sequence[_Question], passages: Sequence[str]) -> np.ndarray:
    """Scores (N, C): the share of the option's different words that its question's passage (the best one of BM25) contains, 0 without one."""
    shares = [word_shares(question.options, passage) for question, passage in zip(questions, passages, strict=True)]
    return np.nan_to_num(np.array(shares, np.float32))


def random_map(options: int, k: int = 3) -> float:
    """Expected MAP@k of a random order of `options` options."""
    return sum(1 / rank for rank in range(1, min(k, options) + 1)) / options


def mean_score(task: Task, learnt: Sequence[Any], asked: Sequence[Any], tokens: Callable[[], Tokens]) -> np.ndarray:
    """Values (N, K): for every example the means of the scores that were given to those learnt."""
    return np.tile(task.targets(learnt).mean(0), (len(asked), 1))


def sentence(task: Task, learnt: Sequence[Any], asked: Sequence[Any], tokens: Callable[[], Tokens]) -> np.ndarray:
    """Spans (N, 3n): the sentence of the context that shares most words with the question first."""
    return task.hints(asked)["overlap"]


def unigram(task: Task, learnt: Sequence[Any], asked: Sequence[Any], tokens: Callable[[], Tokens]) -> np.ndarray:
    """Log-probability per token, and tokens (N, 2), where every token is as likely, whatever stands before it, as it is frequent in those learnt.

    Smoothed over the tokens that either part has: kinder to the rule than all that the vocabulary has.
    """
    own = tokens()
    seen, features = (task.encode(examples, own) for examples in (learnt, asked))
    known = np.concatenate([_asked(feature) for feature in seen])
    vocabulary, places = np.unique(np.concatenate([known, *map(_asked, features)]), return_inverse=True)
    counts = np.bincount(places[: len(known)], minlength=len(vocabulary)) + _UNSEEN
    log_p = dict(zip(vocabulary.tolist(), np.log(counts / counts.sum()).tolist(), strict=True))
    return task.decode([np.array([sum(log_p[token] for token in _asked(feature).tolist())]) for feature in features], features, asked)


def _asked(feature: Feature) -> np.ndarray:
    """The tokens of a text that are to be foretold: all but the first."""
    return feature.encodings[0]["input_ids"][1:]
