"""What SQuAD's official evaluation says of one answer (Rajpurkar et al. 2016, 2018): texts in, numbers out. Knows no table, span or prediction."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only, as in the official script
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Verdict(NamedTuple):
    """exact: 1 where an answer is matched, else 0. f1: of the words, for the answer where it is highest; precision and recall: of that answer."""

    exact: float
    f1: float
    precision: float
    recall: float


def normalised(text: str) -> str:
    """In lower case, without punctuation and articles, words separated by one blank."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def judge(text: str, answers: Sequence[str]) -> Verdict:
    """A text against all right answers, the best of each; where the question has none, the text without words is right."""
    said = normalised(text)
    if not answers:
        return Verdict(*[float(not said)] * 4)
    known = [normalised(answer) for answer in answers]
    f1, precision, recall = max(_shared(said.split(), words.split()) for words in known)
    return Verdict(float(said in known), f1, precision, recall)


def _shared(said: list[str], known: list[str]) -> tuple[float, float, float]:
    """F1, precision and recall of words; all 0 where none is shared."""
    same = sum((Counter(said) & Counter(known)).values())
    if not same:
        return 0.0, 0.0, 0.0
    precision, recall = same / len(said), same / len(known)
    return 2 * precision * recall / (precision + recall), precision, recall
