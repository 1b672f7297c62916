"""Hits → the context of each question: whole passages, or the sentences that say most about the query. Knows no retriever."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence

from tqdm import tqdm

from kit.retrieval import Hits
from kit.retrieval.corpus import Corpus, Passage

_RANK_BONUS = 0.1  # share of a sentence's score that it gains in the first passage; half of it in the second, …
_LENGTH = 0.25  # how much a sentence pays for its length: long ones share words by chance (0: nothing, 1: the mean overlap of its words)
_STEM = 6  # characters that stand for a word: "relativity" meets "relativistic"
_WORD = re.compile(r"\w+")
_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)")  # where a sentence may end
_START = re.compile(r"\s+[\"'“‘(\[]*[^\W_a-z]")  # what may follow: no lower-case letter
_SHORT = re.compile(r"(?:^|[\s(\[\"'“‘-])(?:[^\W\d_]|[^\W\d_]{1,2}(?:\.[^\W\d_])+)\.$")  # J.  e.g.  U.S.  Ph.D.
_LONGEST = 20  # characters in which an abbreviation is looked for
_ABBREVIATIONS = frozenset(
    """al approx ca cf ch chap co col corp dept dr ed eds eq eqs est fig figs gen gov hon inc jr lt ltd mr mrs mt mts no nos op
    p pp prof pt ref refs rev resp sgt sp spp sr st subsp univ var viz vol vols vs""".split()  # noqa: SIM905
)


def build_contexts(queries: Sequence[str], corpus: Corpus, hits: Hits, *, sentences: int, max_chars: int) -> list[str]:
    """One context per query, at most `max_chars` characters long, "" where nothing was hit.

    sentences = 0: the hit passages with their titles, in the order of the hits. Otherwise that many sentences of all hit passages,
    each once, those that share most with the query first, so that a cut takes the least relevant.
    """
    contexts = []
    for query, ids in zip(tqdm(queries, desc="contexts", unit="q", disable=None), hits.ids, strict=True):
        passages = corpus.passages([i for i in ids.tolist() if i >= 0])
        parts = best_sentences(query, passages, sentences) if sentences else [_whole(passage) for passage in passages]
        contexts.append(_cut(" ".join(parts), max_chars))
    return contexts


def best_sentences(query: str, passages: Sequence[Passage], count: int) -> list[str]:
    """The sentences with the largest IDF-weighted overlap with the query, best first.

    Long sentences pay for their length, those of better passages gain a little, ties keep the order.
    """
    ranked: dict[str, int] = {}
    for rank, passage in enumerate(passages):
        for sentence in split_sentences(passage.text):
            ranked.setdefault(sentence, rank)
    stems = [_stems(sentence) for sentence in ranked]
    asked = _stems(query)
    seen_in = Counter(stem for words in stems for stem in words & asked)
    # as in BM25: near 0 for a word of every sentence
    weight = {stem: math.log1p((len(stems) - seen + 0.5) / (seen + 0.5)) for stem, seen in seen_in.items()}
    scores = [_overlap(words, weight) * (1 + _RANK_BONUS / (1 + rank)) for words, rank in zip(stems, ranked.values(), strict=True)]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    found = list(ranked)
    return [found[i] for i in order[:count]]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; joined by blanks they give back its words. Abbreviations, initials and decimals do not end one."""
    sentences, start = [], 0
    for end in _END.finditer(text):
        stop = end.end()
        if _START.match(text, stop) and not _is_abbreviated(text[max(start, stop - _LONGEST) : stop]):
            sentences.append(text[start:stop].strip())
            start = stop
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def _is_abbreviated(text: str) -> bool:
    """Whether the full stop at the end of the text belongs to an abbreviation or an initial."""
    if not text.endswith("."):
        return False
    last = text.rstrip(".").rsplit(None, 1)[-1:]
    return bool(last) and last[0].lstrip("([\"'“‘").lower() in _ABBREVIATIONS or _SHORT.search(text) is not None


def _stems(text: str) -> set[str]:
    return {word[:_STEM] for word in _WORD.findall(text.lower())}


def _overlap(words: Collection[str], weight: dict[str, float]) -> float:
    return math.fsum(weight[word] for word in words if word in weight) / math.pow(max(1, len(words)), _LENGTH)


def _whole(passage: Passage) -> str:
    return f"{passage.title}. {passage.text}" if passage.title else passage.text


def _cut(text: str, max_chars: int) -> str:
    """At most `max_chars` characters, without a part of a word unless one word is longer than that."""
    if len(text) <= max_chars:
        return text
    kept = text[:max_chars]
    torn = not (kept[-1].isspace() or text[max_chars].isspace())
    return kept.rsplit(None, 1)[0].rstrip() if torn and len(kept.split()) > 1 else kept.rstrip()
