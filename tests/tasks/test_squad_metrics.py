"""kit.tasks.squad_metrics: the words of the official evaluation, by hand."""

from __future__ import annotations

import pytest

from kit.tasks.squad_metrics import judge, normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Quick,\nbrown (fox)!", "quick brown fox"),
        ("a an the", ""),
        ("another theory", "another theory"),
        ("U.S.A.", "usa"),
        ("£5.60", "£560"),
        ("the-end", "theend"),
        ("“quoted” … dots", "“quoted” … dots"),  # only ASCII punctuation goes
        ("ÉTÉ\u00a0A\u2003b", "été b"),
        ("", ""),
    ],
)
def test_normalised_as_the_official_script_does(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("the river Aldra", ["River Aldra"], (1, 1, 1, 1)),
        ("old river Aldra", ["river Aldra"], (0, 0.8, 2 / 3, 1)),
        ("Aldra", ["the old river", "river Aldra"], (0, 2 / 3, 1, 0.5)),
        ("Stone", ["the wood", "a stone"], (1, 1, 1, 1)),
        ("red red stone", ["red stone stone"], (0, 2 / 3, 2 / 3, 2 / 3)),  # words are counted
        ("wood", ["stone"], (0, 0, 0, 0)),
        ("", ["stone"], (0, 0, 0, 0)),
        ("The", ["a"], (1, 0, 0, 0)),  # both without words: an exact match, and no word is shared
        ("", [], (1, 1, 1, 1)),
        ("the.", [], (1, 1, 1, 1)),
        ("stone", [], (0, 0, 0, 0)),
    ],
)
def test_the_best_answer_counts(text: str, answers: list[str], expected: tuple[float, ...]) -> None:
    assert judge(text, answers) == pytest.approx(expected)
