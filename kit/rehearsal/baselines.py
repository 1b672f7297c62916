"""Trivial rules for multiple choice, to see what a model is worth beside them. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class _Question(Protocol):
    @property
    def options(self) -> tuple[str, ...]: ...


def longest(questions: Sequence[_Question]) -> np.ndarray:
    """Scores (N, C): the length of the option in characters."""
    return np.array([[len(option) for option in question.options] for question in questions], np.float32)


def overlap(questions: Sequence[_Question], passages: Sequence[str]) -> np.ndarray:
    """Scores (N, C): the share of the option's different words that its question's passage (the best one of BM25) contains."""
    return np.array([[_share(option, passage) for option in q.options] for q, passage in zip(questions, passages, strict=True)], np.float32)


def random_map(options: int, k: int = 3) -> float:
    """Expected MAP@k of a random order of `options` options."""
    return sum(1 / rank for rank in range(1, min(k, options) + 1)) / options


def _share(option: str, passage: str) -> float:
    words = _words(option)
    return len(words & _words(passage)) / max(1, len(words))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
