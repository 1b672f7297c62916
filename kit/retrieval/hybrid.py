"""Hybrid: lexical and dense search fused by their ranks. Has two retrievers and knows nothing of how they work.

Reference: Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods" (SIGIR 2009).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from kit import manifest
from kit.errors import BundleError, ConfigError
from kit.retrieval import Hits
from kit.retrieval.bm25 import BM25
from kit.retrieval.corpus import Corpus
from kit.retrieval.dense import Dense

SETTINGS = "settings.json"


class Hybrid:
    """Two retrievers over one corpus, in the sub-folders bm25/ and dense/."""

    def __init__(self, retrievers: Sequence[BM25 | Dense], depth: int, k_rrf: float) -> None:
        self._retrievers = retrievers
        self._depth = depth
        self._k_rrf = k_rrf

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        folder: Path,
        *,
        bm25: Mapping[str, Any] | None = None,
        dense: Mapping[str, Any] | None = None,
        depth: int = 100,
        k_rrf: float = 60,
    ) -> Self:
        """Build both retrievers with their options. depth: hits taken of each; k_rrf: the larger, the less the first ranks count.

        Raises ConfigError and what the two raise.
        """
        if depth < 1 or k_rrf < 0:
            raise ConfigError(f"hybrid: depth = {depth} must be at least 1 and k_rrf = {k_rrf} must not be negative")
        folder = Path(folder)
        retrievers = (BM25.build(corpus, folder / "bm25", **(bm25 or {})), Dense.build(corpus, folder / "dense", **(dense or {})))
        manifest.write_atomically(folder / SETTINGS, json.dumps({"depth": depth, "k_rrf": k_rrf}) + "\n")
        return cls(retrievers, depth, k_rrf)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open both retrievers. Raises BundleError naming what is missing or damaged."""
        folder = Path(folder)
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            depth, k_rrf = int(settings["depth"]), float(settings["k_rrf"])
        except FileNotFoundError:
            raise BundleError(f"{folder}: no {SETTINGS}, so this is no hybrid index, or an unfinished one: build it again") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{folder / SETTINGS}: is damaged ({error!r}): build the hybrid index again") from None
        return cls([BM25.load(folder / "bm25"), Dense.load(folder / "dense")], depth, k_rrf)

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The k best passages by the sum over both retrievers of 1 / (k_rrf + rank), ties by the lower id."""
        return fuse([retriever.search(queries, max(self._depth, k)) for retriever in self._retrievers], k, self._k_rrf)


def fuse(results: Sequence[Hits], k: int, k_rrf: float = 60) -> Hits:
    """Reciprocal rank fusion of results for the same queries: score = Σ 1 / (k_rrf + rank), ranks from 1."""
    total = len(results[0].ids)
    fused = Hits(np.full((total, k), -1, np.int64), np.full((total, k), -np.inf, np.float32))
    for row in range(total):
        ids = np.concatenate([hits.ids[row] for hits in results])
        points = np.concatenate([1 / (k_rrf + 1 + np.arange(hits.ids.shape[1])) for hits in results])
        found, place = np.unique(ids[ids >= 0], return_inverse=True)
        scores = np.bincount(place, points[ids >= 0], len(found))
        best = np.lexsort((found, -scores))[:k]
        fused.ids[row, : len(best)], fused.scores[row, : len(best)] = found[best], scores[best]
    return fused
