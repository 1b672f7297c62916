"""kit.data.folds: every row in one fold, balanced as promised, the same every time."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from kit.data.folds import make_folds
from kit.errors import DataError, DependencyError

iterative = pytest.mark.skipif(find_spec("iterstrat") is None, reason="package iterative-stratification is not installed")


def sizes(fold: np.ndarray, folds: int) -> np.ndarray:
    assert fold.dtype == np.int8 and fold.ndim == 1
    counts = np.bincount(fold, minlength=folds)
    assert len(counts) == folds
    return counts


def table_of(fold: np.ndarray, strata: np.ndarray, folds: int) -> np.ndarray:
    """(strata, folds) counts."""
    return np.array([np.bincount(fold[strata == label], minlength=folds) for label in np.unique(strata)])


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.integers(2, 7), st.integers(-3, 3))
def test_stratified_folds_are_balanced_within_one_in_size_and_in_each_stratum(labels: list[int], folds: int, seed: int) -> None:
    folds = min(folds, len(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold = make_folds(len(labels), folds, by="stratified", strata=labels, seed=seed)
    assert np.ptp(sizes(fold, folds)) <= 1
    assert np.ptp(table_of(fold, np.array(labels), folds), axis=1).max() <= 1


def test_stratified_folds_spread_like_scikit_learns() -> None:
    strata = np.random.default_rng(0).choice(list("ABCDE"), 503, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    ours = table_of(make_folds(503, 5, by="stratified", strata=strata), strata, 5)
    theirs = np.array([[np.sum(strata[rows] == label) for _, rows in StratifiedKFold(5).split(strata, strata)] for label in np.unique(strata)])
    assert np.sort(ours, axis=1).tolist() == np.sort(theirs, axis=1).tolist()


def test_strata_that_are_all_smaller_than_the_folds_are_dealt_by_chance() -> None:
    strata = [str(row) for row in range(20)]
    fold = make_folds(20, 5, by="stratified", strata=strata)
    assert sizes(fold, 5).tolist() == [4] * 5
    assert fold.tolist() != [row % 5 for row in range(20)]


def grades(count: int, seed: int = 0) -> np.ndarray:
    """Six grades (N, 6) in half points that go together, as those of essays."""
    rng = np.random.default_rng(seed)
    own = rng.normal(3, 0.6, (count, 1))
    return (np.rint(2 * (own + rng.normal(0, 0.4, (count, 6)))) / 2).clip(1, 5)


def unevenness(fold: np.ndarray, strata: np.ndarray, folds: int) -> float:
    """By how many rows, in the mean, a fold holds more or less of a grade than an even share."""
    counts = [table_of(fold, column, folds) for column in strata.T]
    return float(np.mean([abs(count - count.mean(1, keepdims=True)).mean() for count in counts]))


@iterative
@pytest.mark.parametrize("seed", range(3))
def test_multilabel_folds_spread_every_grade_of_every_column(seed: int) -> None:
    strata = grades(600, seed)
    fold = make_folds(600, 4, by="multilabel", strata=strata, seed=seed)
    assert np.ptp(sizes(fold, 4)) <= 12
    assert unevenness(fold, strata, 4) < 0.5 * unevenness(make_folds(600, 4, by="random", seed=seed), strata, 4)


@iterative
@given(st.data(), st.integers(2, 6), st.integers(-3, 3))
def test_no_multilabel_fold_is_empty(data: st.DataObject, folds: int, seed: int) -> None:
    rows = data.draw(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=folds, max_size=30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold = make_folds(len(rows), folds, by="multilabel", strata=np.array(rows), seed=seed)
    assert sizes(fold, folds).min() >= 1


@iterative
def test_multilabel_folds_of_one_column_are_those_of_its_labels() -> None:
    strata = np.random.default_rng(0).choice(list("ABC"), 90, p=[0.6, 0.3, 0.1])
    fold = make_folds(90, 3, by="multilabel", strata=strata)
    assert np.ptp(table_of(fold, strata, 3), axis=1).max() <= 1
    assert fold.tolist() == make_folds(90, 3, by="multilabel", strata=strata[:, None]).tolist()
    assert sizes(make_folds(9, 3, by="multilabel", strata=["A"] * 9), 3).tolist() == [3] * 3


def test_stratified_folds_of_several_labels_spread_each_combination() -> None:
    strata = np.array([[row % 2, row % 3 == 0] for row in range(120)])
    fold = make_folds(120, 5, by="stratified", strata=strata)
    assert np.ptp(table_of(fold, strata @ [2, 1], 5), axis=1).max() <= 1


@given(st.integers(2, 50), st.integers(2, 9), st.integers(-3, 3))
def test_random_folds_differ_in_size_by_one_at_most(count: int, folds: int, seed: int) -> None:
    folds = min(folds, count)
    assert np.ptp(sizes(make_folds(count, folds, by="random", seed=seed), folds)) <= 1


@given(st.data(), st.integers(2, 6), st.booleans())
def test_rows_of_one_group_stay_in_one_fold_and_no_fold_is_empty(data: st.DataObject, folds: int, stratified: bool) -> None:
    groups = data.draw(st.lists(st.integers(0, 12), min_size=folds, max_size=60).filter(lambda drawn: len(set(drawn)) >= folds))
    strata = data.draw(st.lists(st.sampled_from("ABC"), min_size=len(groups), max_size=len(groups))) if stratified else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold = make_folds(len(groups), folds, by="grouped", groups=groups, strata=strata)
    assert sizes(fold, folds).min() >= 1
    assert all(len(set(fold[np.array(groups) == group])) == 1 for group in groups)


def test_grouped_folds_are_about_equal_in_size() -> None:
    groups = np.random.default_rng(0).zipf(1.5, 2000).clip(max=60)
    counts = sizes(make_folds(2000, 5, by="grouped", groups=groups), 5)
    largest = np.bincount(groups).max()
    assert counts.max() <= max(largest, 2000 / 5 * 1.05)


def test_grouped_folds_follow_the_strata_when_given() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 4)
    strata = np.repeat(rng.choice(list("AB"), 100, p=[0.8, 0.2]), 4)
    spread = table_of(make_folds(400, 5, by="grouped", groups=groups, strata=strata), strata, 5)
    assert np.ptp(spread, axis=1).max() <= 4


def test_groups_may_be_texts() -> None:
    fold = make_folds(6, 3, by="grouped", groups=["Heart", "Quark", "Heart", "Tide", "Quark", "Tide"])
    assert fold[0] == fold[2] and fold[1] == fold[4] and fold[3] == fold[5]
    assert len(set(fold)) == 3


CASES: list[dict[str, Any]] = [
    {"by": "random"},
    {"by": "stratified", "strata": ["A", "B", "C"] * 20},
    {"by": "grouped", "groups": [row // 2 for row in range(60)]},
    {"by": "grouped", "groups": [row // 2 for row in range(60)], "strata": ["A", "B", "C"] * 20},
]


@iterative
def test_the_same_seed_gives_the_same_multilabel_folds_and_another_seed_others() -> None:
    def folds(strata: np.ndarray, seed: int = 0) -> list[int]:
        return make_folds(60, 5, by="multilabel", strata=strata, seed=seed).tolist()

    assert folds(grades(60)) == folds(grades(60)) == folds(10 - grades(60)) != folds(grades(60), seed=1)


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_folds_and_another_seed_others(case: dict[str, Any]) -> None:
    first = make_folds(60, 5, **case)
    assert first.tolist() == make_folds(60, 5, **case).tolist()
    assert first.tolist() != make_folds(60, 5, **case, seed=1).tolist()


def test_folds_do_not_depend_on_how_labels_are_spelt() -> None:
    letters = ["A", "B", "C", "D"] * 10
    numbers = ["BDAC".index(letter) for letter in letters]
    assert make_folds(40, 4, by="stratified", strata=letters).tolist() == make_folds(40, 4, by="stratified", strata=numbers).tolist()


def test_as_many_folds_as_rows_leaves_one_out() -> None:
    for case in ({"by": "random"}, {"by": "stratified", "strata": ["A"] * 5}, {"by": "grouped", "groups": list("abcde")}):
        assert sorted(make_folds(5, 5, **case)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("count", "folds", "case", "message"),
    [
        (4, 5, {"by": "random"}, "data.folds = 5, but the table has only 4 rows"),
        (0, 2, {"by": "random"}, "the table has only 0 rows"),
        (4, 1, {"by": "random"}, "data.folds = 1: give 2 to 127"),
        (400, 128, {"by": "random"}, "data.folds = 128: give 2 to 127"),
        (4, 3, {"by": "grouped", "groups": list("aabb")}, "data.folds = 3, but data.group has only 2 different values"),
        (4, 2, {"by": "grouped", "groups": ["a", "b", None, "c"]}, r"row 3: the group \(data.group\) is missing"),
        (4, 2, {"by": "grouped", "groups": ["a", " ", "b", "c"]}, r"row 2: the group \(data.group\) is missing"),
        (3, 2, {"by": "grouped", "groups": [1.0, 2.0, float("nan")]}, r"row 3: the group \(data.group\) is missing"),
        (4, 2, {"by": "grouped"}, "folds of 4 rows need groups of as many, not none"),
        (4, 2, {"by": "stratified"}, "folds of 4 rows need strata of as many, not none"),
        (4, 2, {"by": "multilabel"}, "folds of 4 rows need strata of as many, not none"),
        (4, 2, {"by": "multilabel", "strata": np.zeros((3, 2))}, "folds of 4 rows need strata of as many, not 3"),
        (4, 2, {"by": "stratified", "strata": ["A"] * 3}, "folds of 4 rows need strata of as many, not 3"),
    ],
)
def test_folds_that_cannot_be_are_refused(count: int, folds: int, case: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_folds(count, folds, **case)


def test_multilabel_folds_say_which_package_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("iterstrat", "iterstrat.ml_stratifiers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match='data.fold_by = "multilabel" needs package iterative-stratification: pip install iterative-stratification, or set'):
        make_folds(4, 2, by="multilabel", strata=list("abab"))
