"""kit.rehearsal.baselines: the trivial rules, on questions where the result is plain to see."""

from __future__ import annotations

import numpy as np
import pytest

from kit.metrics import map_at_k
from kit.rehearsal.baselines import longest, overlap, random_map
from kit.tasks.multiple_choice import Question

QUESTIONS = [Question("1", "p", ("aa", "a", "aaaa", "")), Question("2", "p", ("red fox", "Red Fox fox", "blue", "the the fox"))]


def test_longest_scores_an_option_by_its_characters() -> None:
    scores = longest(QUESTIONS)
    assert scores.dtype == np.float32
    assert scores.tolist() == [[2, 1, 4, 0], [7, 11, 4, 11]]


def test_overlap_is_the_share_of_different_words_that_the_passage_has_in_any_case() -> None:
    scores = overlap(QUESTIONS, ["nothing here", "A red FOX runs, the dog not."])
    assert scores.tolist() == [[0, 0, 0, 0], [1, 1, 0, 1]]
    assert overlap(QUESTIONS[1:], ["fox"]).tolist() == [[0.5, 0.5, 0, 0.5]]


def test_overlap_without_a_passage_is_zero() -> None:
    assert not overlap(QUESTIONS, ["", ""]).any()


def test_overlap_refuses_another_number_of_passages() -> None:
    with pytest.raises(ValueError, match="shorter"):
        overlap(QUESTIONS, ["one"])


@pytest.mark.parametrize("options", [2, 3, 5, 26])
def test_random_map_is_the_mean_over_random_orders(options: int) -> None:
    rng = np.random.default_rng(0)
    assert random_map(options) == pytest.approx(map_at_k(rng.random((40000, options)), np.zeros(40000, int)), abs=0.01)


def test_random_map_of_five_options() -> None:
    assert random_map(5) == pytest.approx((1 + 1 / 2 + 1 / 3) / 5)
