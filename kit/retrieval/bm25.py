"""BM25: lexical search (Lucene's variant) with bm25s, compiled by numba where there is one. Does not know the texts after building.

Reference: Lù, "BM25S: Orders of magnitude faster lexical search via eager sparse scoring" (2024).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from kit import manifest
from kit.errors import BundleError, ConfigError, DataError, DependencyError
from kit.retrieval import Hits
from kit.retrieval.corpus import Corpus

SETTINGS = "settings.json"
_BLOCK = 4096  # passages tokenised at a time
_QUERIES = 32  # queries a thread takes at a time
_COMPILED = 20_000  # passages from which on a search that numba takes seconds to compile is faster in the end
_MANY = 50_000  # passages from which on compiling the sort of the postings pays


class BM25:
    """An index of words over a corpus, memory-mapped."""

    def __init__(self, index: Any, tokenizer: Any) -> None:
        self._index = index
        self._tokenizer = tokenizer

    @classmethod
    def build(cls, corpus: Corpus, folder: Path, *, k1: float = 1.5, b: float = 0.75, stopwords: str = "en") -> Self:
        """Index the corpus into `folder`; done already if the folder holds this index. stopwords: a language, or "none".

        Raises ConfigError for a bad option and DataError for a corpus without a single word.
        """
        if k1 < 0 or not 0 <= b <= 1:
            raise ConfigError(f"bm25: k1 = {k1} must not be negative and b = {b} must lie between 0 and 1")
        folder = Path(folder)
        settings = {"k1": k1, "b": b, "stopwords": stopwords, "corpus": corpus.digest, "passages": len(corpus)}
        if not (folder / SETTINGS).is_file() or _settings(folder) != settings:
            (folder / SETTINGS).unlink(missing_ok=True)
            tokens = _Tokens(corpus, _tokenizer(stopwords))
            if not tokens.vocab:
                raise DataError(f"{corpus.folder}: no passage holds a word to index: check the texts, or set stopwords = 'none'")
            _index(tokens, k1, b).save(folder, show_progress=False)
            manifest.write_atomically(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")  # last: it says the rest is complete
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open a built index. Raises BundleError naming what is missing or damaged."""
        folder = Path(folder)
        settings = _settings(folder)
        try:
            backend = "auto" if settings["passages"] >= _COMPILED else "numpy"  # bm25s' own choice on loading is numpy
            index = _bm25s().BM25.load(folder, mmap=True, backend=backend, show_progress=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{folder}: the bm25 index cannot be opened ({error}): build it again") from None
        if index.scores["num_docs"] != settings["passages"] or len(index.scores["data"]) != len(index.scores["indices"]):
            raise BundleError(f"{folder}: the bm25 index does not fit its {SETTINGS}: build it again")
        tokenizer = _tokenizer(settings["stopwords"])
        tokenizer.word_to_id = index.vocab_dict
        return cls(index, tokenizer)

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The k passages with the highest positive BM25 score for each query, ties by the lower id."""
        hits = Hits(np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32))
        words = list(self._tokenizer.streaming_tokenize(queries, update_vocab=False, allow_empty=False))
        rows = [row for row, ids in enumerate(words) if ids]
        blocks = [rows[i : i + _QUERIES] for i in range(0, len(rows), _QUERIES)]
        # threads do not wait for each other: numba's code releases the GIL
        with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(rows), desc="bm25", unit="q", disable=None) as bar:
            found = pool.map(lambda block: self._best([words[row] for row in block], k), blocks)
            for block, (ids, scores) in zip(blocks, found, strict=True):
                hits.ids[block, : ids.shape[1]] = np.where(scores > 0, ids, -1)
                hits.scores[block, : ids.shape[1]] = np.where(scores > 0, scores, -np.inf)
                bar.update(len(block))
        return hits

    def _best(self, words: list[list[int]], k: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and scores (Q, min(k, N)), exact also where equal scores straddle the k-th place (bm25s then takes any of them)."""
        total = self._index.scores["num_docs"]
        k, asked = min(k, total), min(k + 1, total)
        found = self._index.retrieve(words, k=asked, show_progress=False, backend_selection=self._index.backend)
        ids, scores = _ordered(found.documents, found.scores)
        for row in np.flatnonzero((scores[:, -1] == scores[:, k - 1]) & (scores[:, -1] > 0) & (asked > k)):
            every = self._index.get_scores_from_ids(words[row])
            best = np.flatnonzero(every >= np.partition(every, -k)[-k])
            tied_ids, tied_scores = _ordered(best[None], every[best][None])
            ids[row, :k], scores[row, :k] = tied_ids[0, :k], tied_scores[0, :k]
        return ids[:, :k], scores[:, :k]


def _ordered(ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by falling score, then rising id."""
    order = np.lexsort((ids, -scores), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


class _Tokens:
    """What bm25s indexes: word ids of every passage, 4 bytes each instead of lists of Python integers, and the vocabulary."""

    def __init__(self, corpus: Corpus, tokenizer: Any) -> None:
        self._flat, self._ends = array("i"), array("q", [0])
        for words in tokenizer.streaming_tokenize(_texts(corpus), update_vocab=True, allow_empty=False):
            self._flat.extend(words)
            self._ends.append(len(self._flat))
        self.ids = self
        self.vocab = tokenizer.word_to_id

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            yield self._flat[self._ends[i] : self._ends[i + 1]].tolist()


def _texts(corpus: Corpus) -> Iterator[str]:
    with tqdm(total=len(corpus), desc="bm25 words", unit="", disable=None) as bar:
        for start in range(0, len(corpus), _BLOCK):
            texts = corpus.texts(start, min(start + _BLOCK, len(corpus)))
            yield from texts
            bar.update(len(texts))


def _index(tokens: _Tokens, k1: float, b: float) -> Any:
    index = _bm25s().BM25(k1=k1, b=b, method="lucene", backend="auto")
    if index.backend == "numba" and len(tokens) >= _MANY:
        index.activate_numba_csc()  # its counting sort takes 16 bytes per posting less than numpy's sort
    index.index(tokens, create_empty_token=False, show_progress=False)
    return index


def _tokenizer(stopwords: str) -> Any:
    """Lower-cased words of two characters or more, without stop words (lists that come with bm25s)."""
    try:
        return _bm25s().tokenization.Tokenizer(stopwords=[] if stopwords == "none" else stopwords)
    except ValueError:
        raise ConfigError(f"bm25.stopwords = {stopwords!r} is unknown: name a language that bm25s knows, such as 'en', or 'none'") from None


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return {key: settings[key] for key in ("k1", "b", "stopwords", "corpus", "passages")}
    except FileNotFoundError:
        raise BundleError(f"{folder}: no {SETTINGS}, so this is no bm25 index, or an unfinished one: build it again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder / SETTINGS}: is damaged ({error!r}): build the bm25 index again") from None


def _bm25s() -> Any:
    """The library, imported with jax hidden: it would start jax on the GPU, which takes most of its memory, for nothing we use."""
    hidden = "bm25s" not in sys.modules
    jax = sys.modules.get("jax")
    try:
        if hidden:
            sys.modules["jax"] = None  # type: ignore[assignment]
        import bm25s
    except ImportError:
        raise DependencyError("bm25s is not installed: pip install bm25s, or set retrieve.retriever.kind = 'dense'") from None
    finally:
        if hidden:
            sys.modules.pop("jax")
            if jax is not None:
                sys.modules["jax"] = jax
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
