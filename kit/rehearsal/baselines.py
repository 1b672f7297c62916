"""Trivial rules for multiple choice, to see what a model is worth beside them. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kit.tasks.multiple_choice import word_shares


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
