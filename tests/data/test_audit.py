"""kit.data.audit: what stands twice is found, what only looks alike is not."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.data.audit import Overlap, duplicates, overlaps
from kit.data.tables import read_table

DATA = Path(__file__).parents[2] / os.environ.get("KIT_DATA", "../shared/data")
MOND = "Which of the following statements accurately describes the impact of Modified Newtonian Dynamics on galaxy clusters?"
HEART = "Which chamber of the human heart pumps oxygenated blood into the aorta?"


@pytest.mark.parametrize(
    "same",
    [
        MOND.upper(),
        f"  {MOND}\n",
        MOND.replace(" ", "\n "),
        MOND.rstrip("?"),
        MOND.replace("Modified Newtonian Dynamics", '"Modified Newtonian Dynamics"'),
        MOND.replace("f", "\uff46"),  # the full-width letter
    ],
)
def test_texts_equal_but_for_case_spacing_signs_and_width_overlap_wholly(same: str) -> None:
    assert overlaps([MOND], [HEART, same]) == [Overlap(0, 1, 1.0)]


def test_a_changed_letter_in_a_long_text_is_a_near_duplicate() -> None:
    (found,) = overlaps([MOND], [MOND.replace("impact", "inpact")])
    assert 0.9 <= found.similarity < 1


def test_similarity_is_the_share_of_common_five_grams() -> None:
    (found,) = overlaps(["abcdef"], ["abcdeg"], threshold=0.0)
    left = {"    abcdef    "[i : i + 5] for i in range(10)}
    right = {"    abcdeg    "[i : i + 5] for i in range(10)}
    assert found.similarity == pytest.approx(len(left & right) / len(left | right))


def test_the_threshold_is_reached_by_equality() -> None:
    similarity = overlaps([MOND], [HEART], threshold=0.0)[0].similarity
    assert 0 < similarity < 0.5
    assert overlaps([MOND], [HEART], threshold=similarity)
    assert not overlaps([MOND], [HEART], threshold=similarity + 1e-6)


def test_other_questions_on_a_subject_do_not_overlap() -> None:
    assert overlaps([HEART], ["Which chamber of the human heart receives deoxygenated blood from the venae cavae?"]) == []


def test_each_left_text_gets_its_most_similar_right_one() -> None:
    near = MOND.replace("impact", "inpact")
    assert overlaps([HEART, MOND, "unlike"], [near, MOND, HEART, MOND]) == [Overlap(0, 2, 1.0), Overlap(1, 1, 1.0)]


def test_short_texts_overlap_only_when_equal() -> None:
    assert overlaps(["k", "n", "+", "ψ"], ["r", "K", "-", "Ψ"]) == [Overlap(0, 1, 1.0), Overlap(3, 3, 1.0)]


@pytest.mark.parametrize(("a", "b"), [([], []), ([MOND], []), ([], [MOND]), ([""], [""]), ([" \n"], ["", MOND])])
def test_nothing_overlaps_with_no_or_blank_texts(a: list[str], b: list[str]) -> None:
    assert overlaps(a, b) == []
    assert duplicates(a) == []


def test_duplicates_name_the_earlier_text_then_its_repeat() -> None:
    assert duplicates([MOND, HEART, MOND.lower(), "", "", HEART, MOND]) == [Overlap(0, 2, 1.0), Overlap(1, 5, 1.0), Overlap(0, 6, 1.0)]


def test_duplicates_far_apart_are_found_and_no_text_repeats_itself() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=60)) for _ in range(700)]
    assert duplicates(texts) == []
    texts[699], texts[256], texts[600] = texts[3], texts[255], texts[300]
    assert [(found.left, found.right) for found in duplicates(texts)] == [(255, 256), (300, 600), (3, 699)]


@given(st.lists(st.text("ab c.", max_size=12), max_size=8), st.lists(st.text("ab c.", max_size=12), max_size=8))
def test_overlaps_equal_a_plain_comparison_of_all_pairs(a: list[str], b: list[str]) -> None:
    def grams(text: str) -> set[str]:
        words = " ".join("".join(letter if letter.isalnum() else " " for letter in text).split()) or " ".join(text.split())
        return {f"    {words}    "[i : i + 5] for i in range(len(words) + 4)} if words else set()

    expected = []
    for left, text in enumerate(a):
        similarities = [len(grams(text) & grams(other)) / max(len(grams(text) | grams(other)), 1) for other in b]
        if similarities and max(similarities) >= 0.6:
            expected.append((left, similarities.index(max(similarities))))
    assert [(found.left, found.right) for found in overlaps(a, b, threshold=0.6)] == expected


def test_many_equal_texts_give_one_finding_each() -> None:
    found = overlaps([MOND] * 600, [MOND] * 600)
    assert found == [Overlap(left, 0, 1.0) for left in range(600)]


@pytest.mark.skipif(not (DATA / "mcq").is_dir(), reason="the real tables are not on this machine")
def test_a_real_table_overlaps_with_itself_beside_context_and_with_no_other() -> None:
    official = list(read_table(DATA / "mcq" / "official_train_150.csv").frame["prompt"])
    with_context = list(read_table(DATA / "mcq" / "official_train_150_with_context.csv").frame["prompt"])
    other = list(read_table(DATA / "mcq" / "mmlu_stem_4opt.csv").frame["prompt"])[:500]
    assert [(found.left, found.right) for found in overlaps(official, with_context)] == [(row, row) for row in range(150)]
    assert overlaps(official, other) == []
