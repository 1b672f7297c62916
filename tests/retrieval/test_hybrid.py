from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kit.errors import BundleError, ConfigError
from kit.retrieval import Hits
from kit.retrieval.bm25 import BM25
from kit.retrieval.corpus import Corpus
from kit.retrieval.dense import Dense
from kit.retrieval.hybrid import Hybrid, fuse

MakeCorpus = Callable[..., Corpus]


def hits(*rows: list[int]) -> Hits:
    ids = np.array(rows, np.int64)
    return Hits(ids, np.where(ids < 0, -np.inf, 1.0).astype(np.float32))


def test_fusion_is_the_sum_of_reciprocal_ranks() -> None:
    fused = fuse([hits([7, 3, 5, -1]), hits([3, 9, -1, -1])], 5, k_rrf=60)
    assert fused.ids.tolist() == [[3, 7, 9, 5, -1]]
    expected = [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63, -np.inf]
    np.testing.assert_allclose(fused.scores[0], expected, rtol=1e-6)


def test_fused_ties_come_by_the_lower_id() -> None:
    assert fuse([hits([8, 2]), hits([2, 8])], 2).ids.tolist() == [[2, 8]]
    assert fuse([hits([9, 4]), hits([1, 6])], 3).ids.tolist() == [[1, 9, 4]]


def test_queries_without_hits_stay_without() -> None:
    fused = fuse([hits([-1, -1], [1, -1]), hits([-1, -1], [-1, -1])], 2)
    assert fused.ids.tolist() == [[-1, -1], [1, -1]]
    assert np.isneginf(fused.scores).tolist() == [[True, True], [False, True]]


def test_a_hybrid_fuses_what_its_two_retrievers_find(make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path) -> None:
    corpus, queries = make_corpus(), ["entropy of a cell", "speed"]
    Hybrid.build(corpus, tmp_path / "h", bm25={"k1": 1.2}, dense={"model": str(encoder_folder)}, depth=4, k_rrf=10)
    parts = [BM25.load(tmp_path / "h" / "bm25"), Dense.load(tmp_path / "h" / "dense")]
    expected = fuse([part.search(queries, 4) for part in parts], 3, 10)
    found = Hybrid.load(tmp_path / "h").search(queries, 3)
    assert (found.ids == expected.ids).all() and (found.scores == expected.scores).all()


def test_wrong_options_and_a_missing_index_are_named(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="depth = 0 must be at least 1"):
        Hybrid.build(make_corpus(), tmp_path / "h", depth=0)
    with pytest.raises(BundleError, match="this is no hybrid index"):
        Hybrid.load(tmp_path)
