"""What a retriever is: a noun with build / search / load over a memory-mapped corpus. Knows no task, question or recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np

if TYPE_CHECKING:
    from kit.retrieval.corpus import Corpus

RETRIEVERS = {
    "bm25": "kit.retrieval.bm25:BM25",
    "dense": "kit.retrieval.dense:Dense",
    "hybrid": "kit.retrieval.hybrid:Hybrid",
}


class Hits(NamedTuple):
    """ids: (Q, k) int64 positions in the corpus, best first, -1 where there is no hit. scores: (Q, k) float32, -inf there."""

    ids: np.ndarray
    scores: np.ndarray


class Retriever(Protocol):
    """Search over one corpus. Options given to `build` are saved in the folder; `load` needs the folder alone."""

    @classmethod
    def build(cls, corpus: Corpus, folder: Path, *args: Any, **options: Any) -> Self:
        """Index the corpus into `folder`, streaming, with progress; a second call after an interruption resumes."""
        ...

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open a built index, memory-mapped. Raises BundleError naming the file that is missing or damaged."""
        ...

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The k best passages for each query, ties by the lower id."""
        ...
