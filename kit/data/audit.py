"""Finds texts that stand twice, within a set or in two sets: leakage between training and validation. Knows no table or task.

Similarity is the Jaccard index of the sets of character 5-grams (Broder 1997), after case, width, punctuation and spacing are
evened out; 1 is equality but for those. All pairs are compared, block by block, so nothing is missed and memory stays small.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer

GRAM = 5
_BLOCK = 256  # rows compared at once: (256, N) float32


class Overlap(NamedTuple):
    """Two texts that are nearly equal, by position; similarity in 0 … 1."""

    left: int
    right: int
    similarity: float


def overlaps(a: Sequence[str], b: Sequence[str], *, threshold: float = 0.9) -> list[Overlap]:
    """For each text of `a` (left) with a near-duplicate in `b` (right), the most similar one, the earlier if equal. Blank texts have none."""
    grams = _grams_of([*a, *b])
    return list(_best_pairs(grams[: len(a)], grams[len(a) :], threshold, earlier_only=False))


def duplicates(texts: Sequence[str], *, threshold: float = 0.9) -> list[Overlap]:
    """For each text (right) that nearly repeats earlier ones, the most similar of those (left), the earliest if equal."""
    grams = _grams_of(texts)
    return [Overlap(right, left, similarity) for left, right, similarity in _best_pairs(grams, grams, threshold, earlier_only=True)]


def evened(text: str) -> str:
    """The text as it is compared: without case, width, signs and spacing, and padded so that a short one has 5-grams too; "" for a blank text."""
    even = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"\w+", even) or even.split()  # a text of signs alone keeps them
    padding = " " * (GRAM - 1)
    return f"{padding}{' '.join(words)}{padding}" if words else ""


def _best_pairs(a: csr_matrix, b: csr_matrix, threshold: float, *, earlier_only: bool) -> Iterator[Overlap]:
    """(row of a, most similar row of b, similarity) where that reaches the threshold; earlier_only: among b's rows above that row."""
    if not a.shape[0] or not b.shape[0]:
        return
    sizes = np.diff(b.indptr)  # 5-grams of each text of b
    for start in range(0, a.shape[0], _BLOCK):
        block = a[start : start + _BLOCK]
        shared = (block @ b.T).toarray()  # (block, rows of b)
        either = np.diff(block.indptr)[:, None] + sizes - shared
        similarity = shared / np.maximum(either, 1)
        if earlier_only:
            similarity = np.tril(similarity, start - 1)
        best = similarity.argmax(1)
        for row, right in enumerate(best):
            if similarity[row, right] >= threshold:
                yield Overlap(start + row, int(right), float(similarity[row, right]))


def _grams_of(texts: Sequence[str]) -> csr_matrix:
    """(texts, distinct 5-grams) float32 of 0 and 1."""
    if not any(_grams(text) for text in texts):
        return csr_matrix((len(texts), 0), dtype=np.float32)
    return CountVectorizer(analyzer=_grams, binary=True, dtype=np.float32).fit_transform(texts)


def _grams(text: str) -> set[str]:
    """The 5-grams of the evened text; none for a blank one."""
    even = evened(text)
    return {even[i : i + GRAM] for i in range(len(even) - GRAM + 1)}
