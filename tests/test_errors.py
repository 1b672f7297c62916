"""The family of errors, and the hint at the nearest known word."""

from __future__ import annotations

import pytest

from kit import errors
from kit.errors import KitError, nearest


def test_every_error_is_a_kit_error_and_not_one_of_pythons() -> None:
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert {kind.__name__ for kind in kinds} >= {"ConfigError", "DataError", "BundleError", "DependencyError", "BudgetError"}
    for kind in kinds:
        assert issubclass(kind, KitError) and not issubclass(kind, ValueError | OSError | LookupError | TypeError)
        assert str(kind("what, where, what to do")) == "what, where, what to do"


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("lerning_rate", ["lr", "learning_rate"], " (did you mean 'learning_rate'?)"),
        ("bm26", {"bm25": 1, "dense": 2}, " (did you mean 'bm25'?)"),
        ("xyz", ["b", "a"], " (known: a, b)"),
        ("", ["b", "a"], " (known: a, b)"),
        ("x", (name for name in ("q",)), " (known: q)"),
        ("x", [], " (known: )"),
    ],
)
def test_nearest_names_one_word_or_all(word: str, known: list[str], hint: str) -> None:
    assert nearest(word, known) == hint


def test_nearest_does_not_depend_on_the_order_of_what_is_known() -> None:
    assert nearest("ab", ["abc", "abd"]) == nearest("ab", ["abd", "abc"])
