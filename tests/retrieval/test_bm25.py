from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.errors import BundleError, ConfigError, DataError
from kit.retrieval.bm25 import BM25, SETTINGS
from kit.retrieval.corpus import Corpus
from tests.retrieval.conftest import SCIENCE

MakeCorpus = Callable[..., Corpus]
MANY = [("", f"{'entropy' if number % 7 else 'cell'} number{number % 50} word{number}") for number in range(20_000)]
QUERIES = ["entropy of word77 and number3", "?", "cell word700"]


def reference(texts: list[str], query: str, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """BM25 by the formula: Σ ln(1 + (N − n + ½) / (n + ½)) · tf / (tf + k1 (1 − b + b · length / mean length))."""
    documents = [Counter(re.findall(r"\w\w+", text.lower())) for text in texts]
    mean = sum(d.total() for d in documents) / len(documents)
    scores = np.zeros(len(texts))
    for word in re.findall(r"\w\w+", query.lower()):
        n = sum(word in d for d in documents)
        idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
        scores += [idf * d[word] / (d[word] + k1 * (1 - b + b * d.total() / mean)) if d[word] else 0 for d in documents]
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4)])
def test_scores_are_those_of_the_formula(make_corpus: MakeCorpus, tmp_path: Path, k1: float, b: float) -> None:
    corpus = make_corpus()
    query = "the entropy of a cell entropy speed"
    expected = reference(corpus.texts(0, len(corpus)), query, k1, b)
    hits = BM25.build(corpus, tmp_path / "bm25", k1=k1, b=b, stopwords="none").search([query], len(corpus))
    found = hits.ids[0] >= 0
    assert found.sum() == (expected > 0).sum()
    np.testing.assert_allclose(hits.scores[0, found], np.sort(expected)[::-1][: found.sum()], rtol=1e-5)
    np.testing.assert_allclose(hits.scores[0, found], expected[hits.ids[0, found]], rtol=1e-5)


def test_equal_scores_come_by_the_lower_id_also_at_the_edge(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    texts = [("", text) for text in ["same words here"] * 50 + ["better better words here"] + ["same words here"] * 50]
    retriever = BM25.build(make_corpus(texts), tmp_path / "bm25")
    for k in (1, 2, 7, 60, 101):
        expected = [50, *(i for i in range(101) if i != 50)][:k]
        assert retriever.search(["better words here"], k).ids[0].tolist() == expected


def test_numpy_stands_in_for_numba_with_the_same_hits(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    BM25.build(make_corpus(MANY), tmp_path / "bm25")
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "from pathlib import Path; from kit.retrieval.bm25 import BM25\n"
        f"r = BM25.load(Path({str(tmp_path / 'bm25')!r})); print(r._index.backend, r.search({QUERIES}, 3).ids.tolist())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"numpy {BM25.load(tmp_path / 'bm25').search(QUERIES, 3).ids.tolist()}"


@pytest.mark.parametrize(("passages", "backend"), [(SCIENCE, "numpy"), (MANY, "numba")], ids=["few", "many"])
def test_a_loaded_index_is_mapped_and_compiled_where_that_pays(make_corpus: MakeCorpus, tmp_path: Path, passages: Any, backend: str) -> None:
    pytest.importorskip("numba")
    BM25.build(make_corpus(passages), tmp_path / "bm25")
    index = BM25.load(tmp_path / "bm25")._index
    assert index.backend == backend
    assert isinstance(index.scores["data"], np.memmap)


def test_stop_words_are_no_hits(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus()
    assert (BM25.build(corpus, tmp_path / "bm25").search(["is the of and"], 3).ids == -1).all()
    assert (BM25.build(corpus, tmp_path / "bm25", stopwords="none").search(["is the of and"], 3).ids >= 0).all()


def test_an_unchanged_index_is_kept_and_another_option_or_corpus_builds_anew(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus, folder = make_corpus(), tmp_path / "bm25"
    BM25.build(corpus, folder)
    data = folder / "data.csc.index.npy"
    built = data.stat().st_mtime_ns
    BM25.build(corpus, folder)
    assert data.stat().st_mtime_ns == built
    BM25.build(corpus, folder, k1=1.0)
    assert data.stat().st_mtime_ns != built
    other = BM25.build(make_corpus([("", "only this")], "other"), folder)
    assert other.search(["only"], 2).ids.tolist() == [[0, -1]]


def test_wrong_options_are_named(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus()
    with pytest.raises(ConfigError, match=r"b = 1.5 must lie between 0 and 1"):
        BM25.build(corpus, tmp_path / "bm25", b=1.5)
    with pytest.raises(ConfigError, match=r"bm25.stopwords = 'klingon' is unknown"):
        BM25.build(corpus, tmp_path / "bm25", stopwords="klingon")


def test_a_corpus_of_stop_words_is_refused(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no passage holds a word to index"):
        BM25.build(make_corpus([("", "It is the.")]), tmp_path / "bm25")


def test_a_missing_or_damaged_index_is_named(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"no {SETTINGS}, so this is no bm25 index"):
        BM25.load(tmp_path)
    folder = tmp_path / "bm25"
    BM25.build(make_corpus(), folder)
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**settings, "passages": 99}))
    with pytest.raises(BundleError, match="does not fit"):
        BM25.load(folder)
    (folder / SETTINGS).write_text(json.dumps(settings))
    (folder / "indices.csc.index.npy").unlink()
    with pytest.raises(BundleError, match=r"indices\.csc\.index\.npy"):
        BM25.load(folder)
    (folder / SETTINGS).write_text("[")
    with pytest.raises(BundleError, match=f"{SETTINGS}: is damaged"):
        BM25.load(folder)


def test_importing_the_library_leaves_jax_alone() -> None:
    program = (
        "import sys, types; jax = sys.modules['jax'] = types.ModuleType('jax')\n"
        "from kit.retrieval.bm25 import _bm25s; _bm25s()\n"
        "import bm25s.selection as s; assert s.JAX_IS_AVAILABLE is False and sys.modules['jax'] is jax"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
