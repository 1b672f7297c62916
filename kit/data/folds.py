"""Rows → folds: stratified (by one label or several), grouped or random. Does not know what a row or a stratum means.

A fold is the validation part of one fit; every row is in exactly one. The same arguments give the same folds on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold

from kit.errors import DataError, DependencyError

_MOST = np.iinfo(np.int8).max


def make_folds(
    count: int,
    folds: int,
    *,
    by: Literal["stratified", "multilabel", "grouped", "random"],
    strata: Sequence[object] | np.ndarray | None = None,
    groups: Sequence[object] | np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Fold of each of `count` rows, (N,) int8 in 0 … folds - 1.

    stratified: each of the `strata` (N,) is spread evenly, within one row; of several labels a row, (N, K), each combination.
    multilabel: each label of each of the K columns is spread about evenly, the rarest first. grouped: rows of equal `groups` (N,)
    stay together, the folds as equal in size (or in strata, when given) as that allows. random: by chance. Stratified and random
    folds differ in size by at most one row. Raises DataError for more folds than rows or groups, and for a missing group.
    """
    if not 2 <= folds <= _MOST:
        raise DataError(f"data.folds = {folds}: give 2 to {_MOST}")
    if folds > count:
        raise DataError(f"data.folds = {folds}, but the table has only {count} rows: lower data.folds or give more rows")
    rng = np.random.default_rng(seed % 2**32)
    if by == "random":
        return _assigned(count, KFold(folds, shuffle=True, random_state=seed % 2**32).split(np.zeros(count)))
    if by == "stratified":
        return _deal(_codes(count, "strata", strata), folds, rng)
    if by == "multilabel":
        return _spread(_columns(count, strata), folds, seed % 2**32)
    return _group(count, folds, _codes(count, "groups", groups), None if strata is None else _codes(count, "strata", strata), rng)


def _deal(strata: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Deal the shuffled rows like cards, stratum after stratum. StratifiedKFold balances alike, but refuses strata smaller than the folds."""
    strata = rng.permutation(strata.max() + 1)[strata]  # which strata fill up the folds is chance, too
    fold = np.empty(len(strata), np.int8)
    fold[np.lexsort((rng.random(len(strata)), strata))] = np.arange(len(strata)) % folds
    return fold


def _spread(columns: Sequence[np.ndarray], folds: int, seed: int) -> np.ndarray:
    """Iterative stratification (Sechidis et al. 2011) of columns of codes (N,): every code of every column is a label that a row has or has not."""
    try:
        from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
    except ModuleNotFoundError:
        why = 'data.fold_by = "multilabel" needs package iterative-stratification'
        raise DependencyError(f'{why}: pip install iterative-stratification, or set data.fold_by = "stratified"') from None
    count = len(columns[0])
    labels = np.concatenate([np.ones((count, 1), bool), *(codes[:, None] == np.arange(codes.max() + 1) for codes in columns)], 1)
    return _assigned(count, MultilabelStratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels))


def _group(count: int, folds: int, groups: np.ndarray, strata: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    distinct = groups.max() + 1
    if folds > distinct:
        raise DataError(f"data.folds = {folds}, but data.group has only {distinct} different values: lower data.folds or group by another column")
    groups = rng.permutation(distinct)[groups]  # the shuffle; scikit-learn's own separates groups from strata before 1.7
    if strata is None:
        return _assigned(count, GroupKFold(folds).split(groups, groups=groups))
    return _assigned(count, StratifiedGroupKFold(folds).split(groups, _without_rare(strata, folds), groups))


def _without_rare(strata: np.ndarray, folds: int) -> np.ndarray:
    """Strata with fewer rows than folds join the largest one: they cannot be in every fold, and scikit-learn warns or refuses."""
    sizes = np.bincount(strata)
    return np.where(sizes[strata] < folds, sizes.argmax(), strata)


def _assigned(count: int, splits: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    fold = np.empty(count, np.int8)
    for index, (_, rows) in enumerate(splits):
        fold[rows] = index
    return fold


def _columns(count: int, strata: Sequence[object] | np.ndarray | None) -> list[np.ndarray]:
    """Codes (N,) of each column of labels (N, K), or of the one of (N,)."""
    return [_codes(count, "strata", column) for column in (strata.T if isinstance(strata, np.ndarray) and strata.ndim == 2 else [strata])]


def _codes(count: int, name: str, labels: Sequence[object] | np.ndarray | None) -> np.ndarray:
    """Labels (N,), or rows of labels (N, K), → 0, 1, … in order of first appearance, so that folds do not depend on how labels sort. Raises DataError."""
    if labels is None or len(labels) != count:
        raise DataError(f"folds of {count} rows need {name} of as many, not {'none' if labels is None else len(labels)}")
    series = pd.Series(list(map(tuple, labels)) if isinstance(labels, np.ndarray) and labels.ndim == 2 else labels)
    blank = series.isna() | series.map(lambda label: isinstance(label, str) and not label.strip())
    if name == "groups" and blank.any():
        raise DataError(f"row {int(blank.to_numpy().argmax()) + 1}: the group (data.group) is missing: fill it, or fold by another column")
    return pd.factorize(series, use_na_sentinel=False)[0]
