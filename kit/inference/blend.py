"""Several sources' predictions → one, by what their OOF predictions were worth. Knows probabilities and a merit; no model, task, file or clock.

The logarithmic opinion pool p ∝ Π p_m^w_m (Genest & Zidek 1986) with w ≥ 0, fitted by maximum likelihood for every pattern (the sources that
scored a row) anew. Beside it: hill climbing (Caruana et al. 2004) and a gradient-boosted ranker. What is used is decided by nested
cross-validation, in which the choice of the best single source is repeated in every fold, so that a reported gain is an honest one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from kit.errors import ConfigError, nearest
from kit.metrics import bootstrap

Merit = Callable[[np.ndarray, np.ndarray], np.ndarray]  # prediction (N, C), targets (N,) → what each row adds to the metric (N,)

_FLOOR = 1e-6  # a probability of 0 would veto an option for good
_RIDGE = 1e-3  # pulls weights together where sources agree, so that they do not run off in opposite directions
_LEAST = 1e-3  # a smaller exponent counts as 0: in float32 it would blur the order of the options
_FOLDS = 5
_NOISE = 1.0  # standard errors of a paired gain that are still noise: a change for no gain is wrong in one case of six at most
_FEW = 30  # rows: with fewer a standard error means nothing, so that nothing beats the best single source
_ROUNDS = 10  # of hill climbing
_TREE_ROWS = 200  # "auto" tries the ranker from here on: fewer rows teach trees nothing
_TREES = {"max_iter": 30, "learning_rate": 0.15, "max_leaf_nodes": 8, "l2_regularization": 1.0, "early_stopping": False, "random_state": 0}


@dataclass(frozen=True)
class _Rows:
    """logs (M, N, C) of the sources' probabilities, NaN where a source has none; hints (H, N, C); the right options (N,)."""

    logs: np.ndarray
    hints: np.ndarray
    targets: np.ndarray

    def at(self, rows: np.ndarray) -> _Rows:
        return _Rows(self.logs[:, rows], self.hints[:, rows], self.targets[rows])


@dataclass(frozen=True)
class _Verdict:
    """What a pattern came to: the method in use ("single": one source) and its fit on all rows; nested predictions, and merits of every method."""

    method: str
    blend: str  # the best method for several sources, in use or not
    fitted: _Pool
    oof: np.ndarray  # (N, C) float32, honest
    merits: dict[str, np.ndarray]  # method → (S,) on the S rows that all sources scored, nested


@dataclass(frozen=True, eq=False)
class Blend:
    """How rows are pooled, whichever sources have scored them. Patterns are fitted when they are first asked for, and kept."""

    names: tuple[str, ...]
    complete: frozenset[str]
    method: str
    merit: Merit
    _rows: _Rows
    _hints: tuple[str, ...]
    _folds: np.ndarray
    _verdicts: dict[frozenset[str], _Verdict] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        oof: Mapping[str, np.ndarray],
        targets: np.ndarray,
        merit: Merit,
        *,
        method: str = "auto",
        hints: Mapping[str, np.ndarray] | None = None,
        complete: Collection[str] | None = None,
        seed: int = 0,
    ) -> Blend:
        """A blend of sources by their OOF probabilities (N, C) (a row that a source did not score is NaN) and the right options (N,).

        method: "pool" (log pool), "hill" (hill climbing), "ranker" (boosted trees), "auto" (pool; hill or ranker where they beat it by more
        than noise). hints: (N, C) each, for the ranker. complete: the sources of a row that is done (default: all); hill in "auto", and the
        ranker, are for rows of exactly this pattern, all others are pooled. Raises ConfigError for an unknown method.
        """
        if method not in (*_METHODS, "auto") or method == "single":
            raise ConfigError(f"blend method {method!r} is unknown{nearest(method, {*_METHODS, 'auto'} - {'single'})}")
        shapes = {name: values.shape for name, values in {**oof, **(hints or {})}.items()}
        assert oof and len(targets) and {shape[:1] for shape in shapes.values()} == {(len(targets),)}, f"{len(targets)} rows, but {shapes}"
        assert len(set(shapes.values())) == 1, f"different numbers of options: {shapes}"
        names = tuple(oof)
        rows = _Rows(_stack(oof, names), _stack_hints(hints, tuple(hints or ()), shapes[names[0]]), np.asarray(targets))
        folds = np.random.default_rng(seed).permutation(len(targets)) % _FOLDS
        return cls(names, frozenset(names if complete is None else complete), method, merit, rows, tuple(hints or ()), folds)

    def weights(self, pattern: Collection[str]) -> dict[str, float]:
        """Exponents (temperature included) for rows that exactly these sources scored: 0 for all but one where a blend is not worth it."""
        return dict(zip(self._ordered(pattern), map(float, self._verdict(pattern).fitted.weights), strict=True)) if pattern else {}

    def best_single(self, pattern: Collection[str]) -> str:
        """The source with the highest OOF merit among these, on the rows that all of them scored."""
        return self._ordered(pattern)[_best(self._rows_of(pattern), self.merit)]

    def pool(self, predictions: Mapping[str, np.ndarray], hints: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Probabilities (N, C) float32, every row pooled as its own pattern (the sources whose rows are finite) demands; NaN where nobody scored.

        Where the ranker is in use, rows without hints are pooled.
        """
        names = self._ordered(predictions)
        logs = _stack(predictions, names)
        known = _stack_hints(hints, self._hints, logs.shape[1:])
        pooled = np.full(logs.shape[1:], np.nan, np.float32)
        patterns, of_row = np.unique(_scored(logs).T, axis=0, return_inverse=True)
        for number, members in enumerate(patterns):
            if members.any():
                rows = np.flatnonzero(of_row.reshape(-1) == number)
                fitted = self._verdict([names[index] for index in np.flatnonzero(members)]).fitted
                pooled[rows] = fitted.predict(logs[members][:, rows], known[:, rows])
        return pooled

    def oof(self, pattern: Collection[str]) -> np.ndarray:
        """OOF predictions (N, C) float32 of this pattern: every row by a method, a best source and weights that were found on other rows.

        A row with holes is pooled from those of the pattern that scored it.
        """
        return self._verdict(pattern).oof.copy()

    def report(self, pattern: Collection[str] | None = None) -> dict[str, Any]:
        """How the pattern (default: the complete one) is blended, and what that is worth on the rows that all its sources scored.

        method: the best one for several sources; used: whether it is in use; gain: its merit over that of the best single source, both found
        on other rows (None where no row was scored by all), so that it may differ from the difference of the estimates; temperature: 1 / Σ weights.
        """
        pattern = self.complete if pattern is None else pattern
        verdict, weights = self._verdict(pattern), self.weights(pattern)
        merits = {**self._merits(pattern), "blend": verdict.merits[verdict.blend]}
        return {
            "method": verdict.blend,
            "used": verdict.method != "single",
            "weights": weights,
            "temperature": 1.0 / sum(weights.values()),
            "gain": _estimate(merits["blend"] - verdict.merits["single"]),
            "best": self.best_single(pattern),
            "estimates": {name: {"value": float(each.mean()), "se": _error(each)} for name, each in merits.items() if len(each)},
        }

    def _merits(self, pattern: Collection[str]) -> dict[str, np.ndarray]:
        """Source → merits of the rows that it scored."""
        rows = self._rows_of(pattern)
        pairs = zip(self._ordered(pattern), rows.logs, _scored(rows.logs), strict=True)
        return {name: self.merit(np.exp(logs[on]), rows.targets[on]) for name, logs, on in pairs}

    def _ordered(self, pattern: Collection[str]) -> tuple[str, ...]:
        assert set(pattern) <= set(self.names), f"sources {sorted(set(pattern) - set(self.names))} have no OOF (known: {self.names})"
        return tuple(name for name in self.names if name in pattern)

    def _rows_of(self, pattern: Collection[str]) -> _Rows:
        assert pattern, "a pattern holds at least one source"
        sources = [self.names.index(name) for name in self._ordered(pattern)]
        return _Rows(self._rows.logs[sources], self._rows.hints, self._rows.targets)

    def _verdict(self, pattern: Collection[str]) -> _Verdict:
        key = frozenset(pattern)
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(self._rows_of(key), self._methods(key))
        return self._verdicts[key]

    def _methods(self, pattern: frozenset[str]) -> list[str]:
        """The methods that are tried for a pattern: the first is taken unless a later one is better by more than noise."""
        if len(pattern) == 1:
            return []
        if self.method in ("pool", "hill"):
            return [self.method]
        if pattern != self.complete:
            return ["pool"]
        if self.method == "ranker":
            return ["ranker"]
        return ["pool", "hill", "ranker"] if len(self._folds) >= _TREE_ROWS else ["pool", "hill"]

    def _judge(self, rows: _Rows, methods: list[str]) -> _Verdict:
        """Nested predictions of each method; the one in use, also for each fold by the merits of the others' rows; its fit on all rows."""
        nested = {method: self._nested(rows, method) for method in ("single", *methods)}
        shared = np.flatnonzero(_scored(rows.logs).all(0))
        merits = {method: self.merit(prediction[shared], rows.targets[shared]) for method, prediction in nested.items()}
        best = self.merit(_single(rows, self.merit).predict(rows.logs[:, shared], rows.hints[:, shared]), rows.targets[shared])
        blend, chosen = _decide(merits, best)
        oof = np.empty_like(nested["single"], np.float32)
        for fold in range(_FOLDS):
            held, others = self._folds == fold, self._folds[shared] != fold
            _, method = _decide({name: values[others] for name, values in merits.items()}, best[others])
            oof[held] = nested[method][held]
        return _Verdict(chosen, blend, _METHODS[chosen](rows, self.merit), oof, merits)

    def _nested(self, rows: _Rows, method: str) -> np.ndarray:
        """(N, C): every row by what the method fits on the other folds."""
        prediction = np.empty(rows.logs.shape[1:])
        for fold in range(_FOLDS):
            held = self._folds == fold
            fitted = _METHODS[method](rows.at(~held), self.merit)
            prediction[held] = fitted.predict(rows.logs[:, held], rows.hints[:, held])
        return prediction


@dataclass(frozen=True)
class _Pool:
    """The log pool with weights (M,)."""

    weights: np.ndarray

    def predict(self, logs: np.ndarray, hints: np.ndarray) -> np.ndarray:
        """Logs (M, N, C) of the sources' probabilities and hints (H, N, C) → probabilities (N, C) float64; NaN where nobody scored.

        Where all who scored a row have weight 0 they are trusted alike: a poor source's ranking is worth more than none.
        """
        scored = _scored(logs)  # (M, N)
        trust = np.where(scored, self.weights[:, None], 0.0)
        trust = np.where(trust.any(0), trust, scored)
        pooled = softmax(np.einsum("mn,mnc->nc", trust, _filled(logs)), axis=-1)
        pooled[~scored.any(0)] = np.nan
        return pooled


@dataclass(frozen=True)
class _Ranker(_Pool):
    """Boosted trees over (row, option) pairs, for rows that all sources scored and whose hints are known; the pool for the others."""

    trees: Any

    def predict(self, logs: np.ndarray, hints: np.ndarray) -> np.ndarray:
        prediction = super().predict(logs, hints)
        ready = _rankable(logs, hints)
        if ready.any():
            right = self.trees.predict_proba(_features(logs[:, ready], hints[:, ready], self.weights))[:, 1].reshape(-1, logs.shape[-1])
            ruled_out = np.all(logs[:, ready] < np.log(1.01 * _FLOOR), axis=0)  # by every source, as a blank option is
            right[ruled_out] = _FLOOR
            prediction[ready] = right / right.sum(-1, keepdims=True)
        return prediction


def _single(rows: _Rows, merit: Merit) -> _Pool:
    weights = np.zeros(len(rows.logs))
    best = _best(rows, merit)
    weights[best] = _likeliest(rows.logs[[best]], rows.targets)[0]
    return _Pool(weights)


def _pool(rows: _Rows, merit: Merit) -> _Pool:
    return _Pool(_likeliest(rows.logs, rows.targets))


def _hill(rows: _Rows, merit: Merit) -> _Pool:
    """Adds the source that raises the merit of the mean most, again and again; the best mean's shares, with the likeliest temperature."""
    scale = np.array([_likeliest(logs[None], rows.targets)[0] for logs in rows.logs])  # a source that is too sure must not drown the others
    logs = _filled(rows.logs) * scale[:, None, None]
    counts, total = np.zeros(len(logs)), np.zeros(logs.shape[1:])
    top, shares = -np.inf, np.ones(len(logs))
    for size in range(1, _ROUNDS + 1) if len(rows.targets) else ():
        values = [merit(softmax((total + one) / size, axis=-1), rows.targets).mean() for one in logs]
        added = int(np.argmax(values))
        counts[added] += 1
        total += logs[added]
        if values[added] > top:
            top, shares = values[added], counts / size
    return _Pool(shares * scale * _likeliest(np.tensordot(shares, logs, 1)[None], rows.targets))


def _ranker(rows: _Rows, merit: Merit) -> _Pool:
    weights = _likeliest(rows.logs, rows.targets)
    ready = _rankable(rows.logs, rows.hints)
    if ready.sum() < _FEW:
        return _Pool(weights)
    from sklearn.ensemble import HistGradientBoostingClassifier  # takes a second to import, and most blends need none
    from threadpoolctl import threadpool_limits

    pairs = _features(rows.logs[:, ready], rows.hints[:, ready], weights)
    right = np.eye(rows.logs.shape[-1], dtype=bool)[rows.targets[ready]]
    with threadpool_limits(1, "openmp"):  # so small a job takes ten times as long when its threads wait for a core that works for others
        return _Ranker(weights, HistGradientBoostingClassifier(**_TREES).fit(pairs, right.ravel()))


_METHODS: dict[str, Callable[[_Rows, Merit], _Pool]] = {"single": _single, "pool": _pool, "hill": _hill, "ranker": _ranker}


def _features(logs: np.ndarray, hints: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N*C, 3 (M + 1) + 2 H): log p, rank and margin of each source and of their pool (trees add badly); each hint, and by how much it leads its row."""
    pooled = log_softmax(np.tensordot(weights, logs, 1), axis=-1)
    opinions = np.concatenate([logs, pooled[None]])  # (M + 1, N, C)
    rank = (opinions[..., None, :] > opinions[..., :, None]).sum(-1)
    ordered = np.sort(opinions, axis=-1)
    margin = opinions - np.where(opinions == ordered[..., -1:], ordered[..., -2:-1], ordered[..., -1:])
    lead = hints - np.nanmean(hints, axis=-1, keepdims=True)
    columns = np.concatenate([opinions, rank, margin, hints, lead])
    return columns.reshape(len(columns), -1).T


def _rankable(logs: np.ndarray, hints: np.ndarray) -> np.ndarray:
    """(N,): all sources scored the row, and every hint says something about it."""
    return _scored(logs).all(0) & np.isfinite(hints).any(-1).all(0)


def _likeliest(logs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Exponents w ≥ 0 (M,) that make the right options most likely. A row that a source did not score is fitted on the others alone.

    Where none is better than chance, all are trusted alike.
    """
    rows = _scored(logs).any(0)
    targets, flat = targets[rows], _filled(logs[:, rows]).reshape(len(logs), -1)  # (M, N*C)
    count, width = len(targets), logs.shape[-1]
    if not count:
        return np.ones(len(logs))
    right = np.eye(width)[targets]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = log_softmax((weights @ flat).reshape(count, width), axis=-1)
        slope = flat @ (np.exp(log_p) - right).ravel() / count
        return float(-log_p[np.arange(count), targets].mean() + _RIDGE * (weights**2).sum()), slope + 2 * _RIDGE * weights

    begin = np.full(len(logs), 1.0 / len(logs))
    found = minimize(loss, begin, jac=True, bounds=[(0.0, None)] * len(logs), method="L-BFGS-B").x
    return np.where(found >= _LEAST, found, 0.0) if (found >= _LEAST).any() else np.ones(len(logs))


def _best(rows: _Rows, merit: Merit) -> int:
    """The source with the highest mean merit, on the rows that all scored, or each on its own where those are too few."""
    scored = _scored(rows.logs)
    shared = scored.all(0)
    own = [shared if shared.sum() >= _FEW else mine for mine in scored]
    means = [merit(np.exp(logs[on]), rows.targets[on]).mean() if on.any() else -np.inf for logs, on in zip(rows.logs, own, strict=True)]
    return int(np.argmax(means))


def _decide(merits: Mapping[str, np.ndarray], best: np.ndarray) -> tuple[str, str]:
    """The best method for several sources, and the method to use: that one, or "single" where it is not better by more than noise.

    Better than the best source as it is found anew in every fold, and than the one that is best on all rows: `best`, its merits.
    """
    blend, *others = [method for method in merits if method != "single"] or ["single"]
    for other in others:
        if _beats(merits[other], merits[blend]):
            blend = other
    return blend, blend if _beats(merits[blend], merits["single"]) and _beats(merits[blend], best) else "single"


def _beats(one: np.ndarray, other: np.ndarray) -> bool:
    gains = one - other
    return len(gains) >= _FEW and bool(gains.mean() > _NOISE * _error(gains))


def _error(merits: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(merits.std(ddof=1) / np.sqrt(len(merits))) if len(merits) > 1 else 0.0


def _estimate(gains: np.ndarray) -> dict[str, float] | None:
    """The mean and its 95 % interval, by bootstrap over rows; None of no rows."""
    return bootstrap(lambda values, _: float(values.mean()), gains, gains)._asdict() if len(gains) else None


def _stack(predictions: Mapping[str, np.ndarray], names: Collection[str]) -> np.ndarray:
    """(M, N, C) float64 logs; NaN stays NaN."""
    return np.log(np.maximum(np.stack([predictions[name] for name in names]).astype(np.float64), _FLOOR))


def _stack_hints(hints: Mapping[str, np.ndarray] | None, names: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """(H, N, C); a hint that is not given is NaN."""
    given = [(hints or {}).get(name, np.full(shape, np.nan)) for name in names]
    return np.stack(given).astype(np.float64) if given else np.empty((0, *shape))


def _scored(logs: np.ndarray) -> np.ndarray:
    """(M, N): a row with one option missing counts as not scored."""
    return np.isfinite(logs).all(-1)


def _filled(logs: np.ndarray) -> np.ndarray:
    return np.where(_scored(logs)[..., None], logs, 0.0)
