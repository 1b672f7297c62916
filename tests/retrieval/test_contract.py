"""What every retriever promises, whichever way it searches."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.retrieval import RETRIEVERS, Hits, Retriever
from kit.retrieval.corpus import Corpus

MakeCorpus = Callable[..., Corpus]
Build = Callable[[Corpus, Path], Retriever]
QUERIES = ["Which law says that entropy never falls?", "ÅNGSTRÖM größe 物理学", "xyzzy qwert", "", "enzyme " * 300]


def retriever_class(kind: str) -> Any:
    module, name = RETRIEVERS[kind].split(":")
    return getattr(import_module(module), name)


@pytest.fixture(params=sorted(RETRIEVERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build(kind: str, encoder_folder: Path) -> Build:
    dense = {"model": str(encoder_folder)}
    options: dict[str, dict[str, Any]] = {"bm25": {}, "dense": dense, "hybrid": {"dense": dense}}
    return lambda corpus, folder: retriever_class(kind).build(corpus, folder, **options[kind])


def check(hits: Hits, queries: int, k: int, passages: int) -> None:
    assert hits.ids.shape == hits.scores.shape == (queries, k)
    assert (hits.ids.dtype, hits.scores.dtype) == (np.int64, np.float32)
    for ids, scores in zip(hits.ids.tolist(), hits.scores.tolist(), strict=True):
        found = [i for i in ids if i >= 0]
        assert ids == found + [-1] * (k - len(found)), "hits come first"
        assert len(set(found)) == len(found) and all(i < passages for i in found)
        assert np.isfinite(scores[: len(found)]).all() and np.isneginf(scores[len(found) :]).all()
        assert sorted(zip([-s for s in scores[: len(found)]], found, strict=True)) == [(-s, i) for s, i in zip(scores, found, strict=False)]


def test_a_loaded_index_finds_what_the_built_one_found(build: Build, kind: str, make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus()
    built = build(corpus, tmp_path / "index").search(QUERIES, 4)
    loaded = retriever_class(kind).load(tmp_path / "index").search(QUERIES, 4)
    check(built, len(QUERIES), 4, len(corpus))
    assert (built.ids == loaded.ids).all() and (built.scores == loaded.scores).all()


def test_k_beyond_the_corpus_is_padded(build: Build, make_corpus: MakeCorpus, tmp_path: Path) -> None:
    check(build(make_corpus(), tmp_path / "index").search(QUERIES, 50), len(QUERIES), 50, 6)


def test_one_passage_and_no_query_are_fine(build: Build, make_corpus: MakeCorpus, tmp_path: Path) -> None:
    retriever = build(make_corpus([("Alone", "The only passage.")]), tmp_path / "index")
    hits = retriever.search(["only passage"], 1)
    check(hits, 1, 1, 1)
    assert hits.ids.tolist() == [[0]]
    check(retriever.search([], 3), 0, 3, 1)


def test_a_query_equal_to_a_passage_finds_it_first(build: Build, make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus()
    retriever = build(corpus, tmp_path / "index")
    assert retriever.search(corpus.texts(0, len(corpus)), 1).ids[:, 0].tolist() == list(range(len(corpus)))


def test_equal_passages_come_by_the_lower_id(build: Build, make_corpus: MakeCorpus, tmp_path: Path) -> None:
    retriever = build(make_corpus([("", "equal words"), ("", "other thing")] * 5), tmp_path / "index")
    assert retriever.search(["equal words"], 3).ids.tolist() == [[0, 2, 4]]


def test_batches_do_not_change_the_hits(build: Build, make_corpus: MakeCorpus, tmp_path: Path) -> None:
    retriever = build(make_corpus(), tmp_path / "index")
    together = retriever.search(QUERIES * 10, 3)
    for row, query in enumerate(QUERIES):
        assert (together.ids[row :: len(QUERIES)] == retriever.search([query], 3).ids).all()


def test_building_twice_gives_the_same_index(build: Build, make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus()
    first, second = (build(corpus, tmp_path / "index").search(QUERIES, 3) for _ in range(2))
    assert (first.ids == second.ids).all() and (first.scores == second.scores).all()
