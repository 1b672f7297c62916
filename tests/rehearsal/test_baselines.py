"""kit.rehearsal.baselines: the trivial rules, on questions where the result is plain to see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kit.metrics import map_at_k
from kit.rehearsal.baselines import longest, mean_score, overlap, random_map, sentence, unigram
from kit.tasks import Tokens
from kit.tasks.causal_lm import CausalLM, Document
from kit.tasks.essay_regression import Essay, EssayRegression
from kit.tasks.extractive_qa import Answer, ExtractiveQA, Reading
from kit.tasks.multiple_choice import Question
from tests import tiny

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


def no_tokens() -> Tokens:
    raise AssertionError("this rule reads no tokens")


def test_mean_score_is_that_of_the_graded_essays_for_every_one() -> None:
    task = EssayRegression(columns=("one", "other"))
    graded = [Essay("a", "x", (1.0, 2.0)), Essay("b", "y", (2.0, 5.0))]
    assert mean_score(task, graded, [Essay(id_, "z") for id_ in "cde"], no_tokens).tolist() == [[1.5, 3.5]] * 3


def test_sentence_is_the_one_that_shares_most_words_with_the_question() -> None:
    context = "The mill burned. A fire in the mill was put out by Ada Crane in 1868. It rained."
    reading = Reading("a", "Who put out the fire in the mill?", context, (Answer("Ada Crane", context.index("Ada")),))
    task = ExtractiveQA()
    start, stop = sentence(task, [], [reading], no_tokens)[0, :2].astype(int)
    assert context[start:stop] == "A fire in the mill was put out by Ada Crane in 1868."
    f1 = task.metrics["f1"](sentence(task, [], [reading], no_tokens), task.targets([reading]))
    assert f1 == pytest.approx(2 * (2 / 11) / (1 + 2 / 11)), "2 of 11 words, articles apart"


@pytest.mark.parametrize("packing", [False, True])
def test_unigram_gives_every_token_its_smoothed_share_of_those_learnt(tmp_path: Path, packing: bool) -> None:
    tokens = tiny.prompting(tmp_path, "llama3")
    task = CausalLM(max_length=16, packing=packing)
    learnt, asked = [Document("1", "aab" * 9)], [Document("2", "abz"), Document("3", "aa" * 20)]
    ids = [[token for feature in task.encode([document], tokens) for token in feature.encodings[0]["input_ids"][1:].tolist()] for document in (*learnt, *asked)]
    kinds = {token for some in ids for token in some}
    shares = {token: (ids[0].count(token) + 0.5) / (len(ids[0]) + 0.5 * len(kinds)) for token in kinds}
    expected = [[np.mean([np.log(shares[token]) for token in some]), len(some)] for some in ids[1:]]
    assert sum(shares.values()) == pytest.approx(1)
    np.testing.assert_allclose(unigram(task, learnt, asked, lambda: tokens), expected, rtol=1e-6)
