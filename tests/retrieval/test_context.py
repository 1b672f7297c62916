from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.retrieval import Hits
from kit.retrieval.bm25 import BM25
from kit.retrieval.context import best_sentences, build_contexts, split_sentences
from kit.retrieval.corpus import Corpus, Passage

MakeCorpus = Callable[..., Corpus]


def hits(*rows: list[int]) -> Hits:
    ids = np.array(rows, np.int64)
    return Hits(ids, np.where(ids < 0, -np.inf, 1.0).astype(np.float32))


SPLITS = {
    "One. Two! Three? Four": ["One.", "Two!", "Three?", "Four"],
    "It is 3.5 m long. See Fig. 2 (e.g. Smith et al. 1999).": ["It is 3.5 m long.", "See Fig. 2 (e.g. Smith et al. 1999)."],
    "J. R. Oppenheimer met Dr. Bohr in the U.S. Army. They spoke.": ["J. R. Oppenheimer met Dr. Bohr in the U.S. Army.", "They spoke."],
    'He said "Stop." Then he left.': ['He said "Stop."', "Then he left."],
    "approx. 5 kg; i.e. Heavy. (Very.) 7 follow.": ["approx. 5 kg; i.e. Heavy.", "(Very.)", "7 follow."],
    "It costs v. much. and so on. End…  New\nline. Ärger": ["It costs v. much. and so on.", "End…", "New\nline.", "Ärger"],
    "She has a Ph.D. Degree": ["She has a Ph.D. Degree"],
    "": [],
    " \n ": [],
    "...": ["..."],
}


@pytest.mark.parametrize("text", SPLITS)
def test_sentences_end_where_they_should(text: str) -> None:
    assert split_sentences(text) == SPLITS[text]


PIECES = ["A", "b", "e.g.", "x.", "Fig.", "?!", '"', "(", ")", "3.5", ".", "…", "\n", "Ω.", "物。", "the"]


@given(st.lists(st.sampled_from(PIECES)).map(" ".join))
def test_splitting_loses_no_word(text: str) -> None:
    assert " ".join(split_sentences(text)).split() == text.split()


def test_many_abbreviations_take_linear_time() -> None:
    assert len(split_sentences("J. " * 100_000)) == 1


def test_whole_passages_come_in_the_order_of_the_hits(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([("A", "First text."), ("", "Second text."), ("C", "Third.")])
    contexts = build_contexts(["q", "q", "q"], corpus, hits([2, 0], [1, -1], [-1, -1]), sentences=0, max_chars=100)
    assert contexts == ["C. Third. A. First text.", "Second text.", ""]


def test_the_most_relevant_sentences_come_first(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([("", "Cats sleep. The spin of an electron is one half."), ("", "Dogs bark. An electron has charge.")])
    (context,) = build_contexts(["What is the spin of an electron?"], corpus, hits([0, 1]), sentences=2, max_chars=200)
    assert context == "The spin of an electron is one half. An electron has charge."


def test_rare_words_outweigh_common_ones() -> None:
    passages = [Passage("0", "", "The cell is here. The cell is there. The cell is big. Ribosome.")]
    assert best_sentences("the cell ribosome", passages, 1) == ["Ribosome."]


def test_the_better_passage_wins_between_equals_and_order_breaks_ties() -> None:
    passages = [Passage("0", "", "Unrelated. Energy one."), Passage("1", "", "Energy two. Energy three.")]
    assert best_sentences("energy", passages, 4) == ["Energy one.", "Energy two.", "Energy three.", "Unrelated."]


def test_a_better_passage_outweighs_a_slightly_better_sentence_only() -> None:
    eight, seven, two = "Energy one two three four five six seven.", "Energy one two three four five six.", "Energy one."
    first, *others = (Passage("", "", text) for text in (eight, seven, eight))  # said again later, it keeps its first rank
    assert best_sentences("energy", [first, *others], 2) == [eight, seven]
    assert best_sentences("energy", [first, Passage("", "", two)], 2) == [two, eight]


def test_a_sentence_is_given_once() -> None:
    passages = [Passage(str(i), "", "Energy is conserved. Other.") for i in range(3)]
    assert best_sentences("energy", passages, 5) == ["Energy is conserved.", "Other."]


def test_forms_of_a_word_meet() -> None:
    passages = [Passage("0", "", "Nothing here. Relativistic speeds.")]
    assert best_sentences("relativity", passages, 1) == ["Relativistic speeds."]


@given(st.text(alphabet="ab .", max_size=60).filter(str.strip), st.integers(1, 70))
def test_a_context_is_cut_between_words(text: str, max_chars: int) -> None:
    class OnePassage:
        def passages(self, ids: list[int]) -> list[Passage]:
            return [Passage("0", "", text)]

    (context,) = build_contexts(["q"], OnePassage(), hits([0]), sentences=0, max_chars=max_chars)  # type: ignore[arg-type]
    words = text.split()
    assert len(context) <= max_chars
    assert text.startswith(context)
    assert context.split() == words[: len(context.split())] or len(words[0]) > max_chars or text[0] == " "


def test_a_word_longer_than_the_context_is_cut_and_a_fitting_end_is_kept(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([("", "物理学" * 10), ("", "one two three")])
    cut = [build_contexts(["q", "q"], corpus, hits([0], [1]), sentences=0, max_chars=n) for n in (7, 8)]
    assert cut == [["物理学物理学物", "one two"], ["物理学物理学物理", "one two"]]


def test_real_questions_get_contexts_with_their_words(tmp_path: Path) -> None:
    root = Path(__file__).parents[2] / os.environ.get("KIT_DATA", "../shared/data")
    source = root / "corpus" / "wikipedia_stem_small.parquet"
    if not source.is_file():
        pytest.skip("needs the development data (KIT_DATA)")
    corpus = Corpus.build(source, tmp_path / "corpus")
    retriever = BM25.build(corpus, tmp_path / "bm25")
    queries = ["Which gas do plants take up in photosynthesis?", "What does albedo measure?"]
    contexts = build_contexts(queries, corpus, retriever.search(queries, 5), sentences=5, max_chars=800)
    assert all(0 < len(context) <= 800 for context in contexts)
    assert "photosynthesis" in contexts[0] and "albedo" in contexts[1].lower()
