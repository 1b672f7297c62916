"""Several sources' predictions → one, by what their OOF predictions were worth. Knows kinds of prediction and a merit; no model, task, file or clock.

Probabilities: the logarithmic opinion pool p ∝ Π p_m^w_m (Genest & Zidek 1986) with w ≥ 0, fitted by maximum likelihood for every pattern (the
sources that scored a row) anew. Beside it: hill climbing (Caruana et al. 2004) and a gradient-boosted ranker. Values: the linear pool Σ w_m v_m by
least squares, its weights free or pulled to a sum of 1, and hill climbing; weights may be negative. Spans: the mean of the sources' probabilities
over all spans that any of them names, weights by hill climbing. What is used is decided by nested cross-validation, in which the choice of the best
single source is repeated in every fold, so that a reported gain is an honest one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from kit.errors import ConfigError, nearest
from kit.metrics import bootstrap

Merit = Callable[[np.ndarray, np.ndarray], np.ndarray]  # prediction (N, C), targets (N, …) → what each row adds to the metric (N,)

_FLOOR = 1e-6  # a probability of 0 would veto an option for good
_RIDGE = 1e-3  # pulls weights together where sources agree, so that they do not run off in opposite directions
_LEAST = 1e-3  # a smaller exponent counts as 0: in float32 it would blur the order of the options
_FOLDS = 5
_NOISE = 1.0  # standard errors of a paired gain that are still noise: a change for no gain is wrong in one case of six at most
_FEW = 30  # rows: with fewer a standard error means nothing, so that nothing beats the best single source
_ROUNDS = 10  # of hill climbing
_TREE_ROWS = 200  # "auto" tries the ranker from here on: fewer rows teach trees nothing
_STEPS = np.linspace(-0.5, 0.5, 21)  # by which hill climbing moves values towards a source, or away from it
_PULL = 100.0  # of weights of values to a sum of 1: times the mean square of the values
_TREES = {"max_iter": 30, "learning_rate": 0.15, "max_leaf_nodes": 8, "l2_regularization": 1.0, "early_stopping": False, "random_state": 0}


@dataclass(frozen=True)
class _Rows:
    """values (M, N, C): what the sources say, as their kind is computed with, NaN where a source has none; hints (H, N, C); the targets (N, …)."""

    values: np.ndarray
    hints: np.ndarray
    targets: np.ndarray

    def at(self, rows: np.ndarray) -> _Rows:
        return _Rows(self.values[:, rows], self.hints[:, rows], self.targets[rows])


class _Fitted(Protocol):
    """A method, fitted. weights: of the sources (M,)."""

    @property
    def weights(self) -> np.ndarray: ...

    def predict(self, values: np.ndarray, hints: np.ndarray) -> np.ndarray:
        """Values (M, N, C) and hints (H, N, C) of rows → their prediction (N, C); NaN where nobody scored."""
        ...


class _Method(NamedTuple):
    """A way to blend. least: rows from which on "auto" tries it. whole: it is for rows that are done only."""

    fit: Callable[[_Rows, Merit], _Fitted]
    least: int = 0
    whole: bool = False


@dataclass(frozen=True)
class _Kind:
    """A kind of prediction. inward: predictions → what is computed with; outward: back. single: the best source alone.

    methods: by name; the first one serves all patterns, and is taken unless another is better by more than noise.
    """

    inward: Callable[[np.ndarray], np.ndarray]
    outward: Callable[[np.ndarray], np.ndarray]
    single: Callable[[_Rows, Merit, _Kind], _Fitted]
    methods: dict[str, _Method]


@dataclass(frozen=True)
class _Verdict:
    """What a pattern came to: the method in use ("single": one source) and its fit on all rows; nested predictions, and merits of every method."""

    method: str
    blend: str  # the best method for several sources, in use or not
    fitted: _Fitted
    oof: np.ndarray  # (N, C) float32, honest
    merits: dict[str, np.ndarray]  # method → (S,) on the S rows that all sources scored, nested


@dataclass(frozen=True, eq=False)
class Blend:
    """How rows are pooled, whichever sources have scored them. Patterns are fitted when they are first asked for, and kept."""

    names: tuple[str, ...]
    complete: frozenset[str]
    method: str
    merit: Merit
    _kind: _Kind
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
        kind: str = "probabilities",
        method: str = "auto",
        hints: Mapping[str, np.ndarray] | None = None,
        complete: Collection[str] | None = None,
        seed: int = 0,
    ) -> Blend:
        """A blend of sources by their OOF predictions (N, C) (a row that a source did not score is NaN) and the targets (N, …).

        kind: what predictions are, as in kit.tasks.Task.blends. method: of "probabilities" "pool" (log pool), "hill" (hill climbing), "ranker"
        (boosted trees); of "values" "linear" (least squares, weights pulled to a sum of 1), "free" (without that), "hill"; of "spans" "hill"; "auto"
        (the first of these; the others where they beat it by more than noise). hints: (N, C) each, for the ranker. complete: the sources of a row
        that is done (default: all); other methods than the first in "auto", and the ranker, are for rows of exactly this pattern. Raises ConfigError
        for an unknown kind or method.
        """
        if kind not in _KINDS:
            raise ConfigError(f"a blend of {kind!r} is unknown{nearest(kind, _KINDS)}")
        methods = _KINDS[kind].methods
        if method not in (*methods, "auto"):
            raise ConfigError(f"blend method {method!r} is unknown{nearest(method, {*methods, 'auto'})}")
        shapes = {name: values.shape for name, values in {**oof, **(hints or {})}.items()}
        assert oof and len(targets) and {shape[:1] for shape in shapes.values()} == {(len(targets),)}, f"{len(targets)} rows, but {shapes}"
        assert len(set(shapes.values())) == 1, f"different numbers of options: {shapes}"
        names = tuple(oof)
        rows = _Rows(_stack(oof, names, _KINDS[kind]), _stack_hints(hints, tuple(hints or ()), shapes[names[0]]), np.asarray(targets))
        folds = np.random.default_rng(seed).permutation(len(targets)) % _FOLDS
        return cls(names, frozenset(names if complete is None else complete), method, merit, _KINDS[kind], rows, tuple(hints or ()), folds)

    def weights(self, pattern: Collection[str]) -> dict[str, float]:
        """For rows that exactly these sources scored: exponents (temperature included), or factors, of values negative ones, too.

        0 for all but one where a blend is not worth it.
        """
        return dict(zip(self._ordered(pattern), map(float, self._verdict(pattern).fitted.weights), strict=True)) if pattern else {}

    def best_single(self, pattern: Collection[str]) -> str:
        """The source with the highest OOF merit among these, on the rows that all of them scored."""
        return self._ordered(pattern)[_best(self._rows_of(pattern), self.merit, self._kind)]

    def pool(self, predictions: Mapping[str, np.ndarray], hints: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Predictions (N, C) float32, every row pooled as its own pattern (the sources whose rows are finite) demands; NaN where nobody scored.

        Where the ranker is in use, rows without hints are pooled.
        """
        names = self._ordered(predictions)
        values = _stack(predictions, names, self._kind)
        known = _stack_hints(hints, self._hints, values.shape[1:])
        pooled = np.full(values.shape[1:], np.nan, np.float32)
        patterns, of_row = np.unique(_scored(values).T, axis=0, return_inverse=True)
        for number, members in enumerate(patterns):
            if members.any():
                rows = np.flatnonzero(of_row.reshape(-1) == number)
                fitted = self._verdict([names[index] for index in np.flatnonzero(members)]).fitted
                pooled[rows] = fitted.predict(values[members][:, rows], known[:, rows])
        return pooled

    def oof(self, pattern: Collection[str]) -> np.ndarray:
        """OOF predictions (N, C) float32 of this pattern: every row by a method, a best source and weights that were found on other rows.

        A row with holes is pooled from those of the pattern that scored it.
        """
        return self._verdict(pattern).oof.copy()

    def report(self, pattern: Collection[str] | None = None) -> dict[str, Any]:
        """How the pattern (default: the complete one) is blended, and what that is worth on the rows that all its sources scored.

        method: the best one for several sources; used: whether it is in use; gain: its merit over that of the best single source, both found
        on other rows (None where no row was scored by all), so that it may differ from the difference of the estimates; temperature: 1 / Σ weights (None: a sum of 0).
        """
        pattern = self.complete if pattern is None else pattern
        verdict, weights = self._verdict(pattern), self.weights(pattern)
        merits = {**self._merits(pattern), "blend": verdict.merits[verdict.blend]}
        return {
            "method": verdict.blend,
            "used": verdict.method != "single",
            "weights": weights,
            "temperature": 1.0 / total if (total := sum(weights.values())) else None,
            "gain": _estimate(merits["blend"] - verdict.merits["single"]),
            "best": self.best_single(pattern),
            "estimates": {name: {"value": float(each.mean()), "se": _error(each)} for name, each in merits.items() if len(each)},
        }

    def _merits(self, pattern: Collection[str]) -> dict[str, np.ndarray]:
        """Source → merits of the rows that it scored."""
        rows = self._rows_of(pattern)
        pairs = zip(self._ordered(pattern), rows.values, _scored(rows.values), strict=True)
        return {name: self.merit(self._kind.outward(values[on]), rows.targets[on]) for name, values, on in pairs}

    def _ordered(self, pattern: Collection[str]) -> tuple[str, ...]:
        assert set(pattern) <= set(self.names), f"sources {sorted(set(pattern) - set(self.names))} have no OOF (known: {self.names})"
        return tuple(name for name in self.names if name in pattern)

    def _rows_of(self, pattern: Collection[str]) -> _Rows:
        assert pattern, "a pattern holds at least one source"
        sources = [self.names.index(name) for name in self._ordered(pattern)]
        return replace(self._rows, values=self._rows.values[sources])

    def _verdict(self, pattern: Collection[str]) -> _Verdict:
        key = frozenset(pattern)
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(self._rows_of(key), self._methods(key))
        return self._verdicts[key]

    def _methods(self, pattern: frozenset[str]) -> list[str]:
        """The methods that are tried for a pattern: the first is taken unless a later one is better by more than noise."""
        if len(pattern) == 1:
            return []
        methods, (first, *_) = self._kind.methods, self._kind.methods
        if self.method != "auto" and (pattern == self.complete or not methods[self.method].whole):
            return [self.method]
        if pattern != self.complete:
            return [first]
        return [name for name, method in methods.items() if len(self._folds) >= method.least]

    def _fit(self, method: str, rows: _Rows) -> _Fitted:
        return self._kind.single(rows, self.merit, self._kind) if method == "single" else self._kind.methods[method].fit(rows, self.merit)

    def _judge(self, rows: _Rows, methods: list[str]) -> _Verdict:
        """Nested predictions of each method; the one in use, also for each fold by the merits of the others' rows; its fit on all rows."""
        nested = {method: self._nested(rows, method) for method in ("single", *methods)}
        shared = np.flatnonzero(_scored(rows.values).all(0))
        merits = {method: self.merit(prediction[shared], rows.targets[shared]) for method, prediction in nested.items()}
        best = self.merit(self._fit("single", rows).predict(rows.values[:, shared], rows.hints[:, shared]), rows.targets[shared])
        blend, chosen = _decide(merits, best)
        oof = np.empty_like(nested["single"], np.float32)
        for fold in range(_FOLDS):
            held, others = self._folds == fold, self._folds[shared] != fold
            _, method = _decide({name: values[others] for name, values in merits.items()}, best[others])
            oof[held] = nested[method][held]
        return _Verdict(chosen, blend, self._fit(chosen, rows), oof, merits)

    def _nested(self, rows: _Rows, method: str) -> np.ndarray:
        """(N, C): every row by what the method fits on the other folds."""
        prediction = np.empty(rows.values.shape[1:])
        for fold in range(_FOLDS):
            held = self._folds == fold
            fitted = self._fit(method, rows.at(~held))
            prediction[held] = fitted.predict(rows.values[:, held], rows.hints[:, held])
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


def _single(rows: _Rows, merit: Merit, kind: _Kind) -> _Pool:
    weights = np.zeros(len(rows.values))
    best = _best(rows, merit, kind)
    weights[best] = _likeliest(rows.values[[best]], rows.targets)[0]
    return _Pool(weights)


def _pool(rows: _Rows, merit: Merit) -> _Pool:
    return _Pool(_likeliest(rows.values, rows.targets))


def _hill(rows: _Rows, merit: Merit) -> _Pool:
    """Adds the source that raises the merit of the mean most, again and again; the best mean's shares, with the likeliest temperature."""
    scale = np.array([_likeliest(logs[None], rows.targets)[0] for logs in rows.values])  # a source that is too sure must not drown the others
    logs = _filled(rows.values) * scale[:, None, None]
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
    weights = _likeliest(rows.values, rows.targets)
    ready = _rankable(rows.values, rows.hints)
    if ready.sum() < _FEW:
        return _Pool(weights)
    from sklearn.ensemble import HistGradientBoostingClassifier  # takes a second to import, and most blends need none
    from threadpoolctl import threadpool_limits

    pairs = _features(rows.values[:, ready], rows.hints[:, ready], weights)
    right = np.eye(rows.values.shape[-1], dtype=bool)[rows.targets[ready]]
    with threadpool_limits(1, "openmp"):  # so small a job takes ten times as long when its threads wait for a core that works for others
        return _Ranker(weights, HistGradientBoostingClassifier(**_TREES).fit(pairs, right.ravel()))


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


def _best(rows: _Rows, merit: Merit, kind: _Kind) -> int:
    """The source with the highest mean merit, on the rows that all scored, or each on its own where those are too few."""
    scored = _scored(rows.values)
    shared = scored.all(0)
    own = [shared if shared.sum() >= _FEW else mine for mine in scored]
    means = [merit(kind.outward(values[on]), rows.targets[on]).mean() if on.any() else -np.inf for values, on in zip(rows.values, own, strict=True)]
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


def _stack(predictions: Mapping[str, np.ndarray], names: Collection[str], kind: _Kind) -> np.ndarray:
    """(M, N, C) float64, as the kind is computed with; NaN stays NaN."""
    return kind.inward(np.stack([predictions[name] for name in names]).astype(np.float64))


def _stack_hints(hints: Mapping[str, np.ndarray] | None, names: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """(H, N, C); a hint that is not given is NaN."""
    given = [(hints or {}).get(name, np.full(shape, np.nan)) for name in names]
    return np.stack(given).astype(np.float64) if given else np.empty((0, *shape))


def _scored(values: np.ndarray) -> np.ndarray:
    """(M, N): a row with one number missing counts as not scored."""
    return np.isfinite(values).all(-1)


def _filled(values: np.ndarray) -> np.ndarray:
    return np.where(_scored(values)[..., None], values, 0.0)


# --- values ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sum:
    """The linear pool with weights (M,)."""

    weights: np.ndarray

    def predict(self, values: np.ndarray, hints: np.ndarray) -> np.ndarray:
        """See _Fitted. Where not all scored a row, the weights of those who did are enlarged to the sum of all, or even if that makes no sense."""
        scored = _scored(values)  # (M, N)
        trust = np.where(scored, self.weights[:, None], 0.0)
        there, count = trust.sum(0), scored.sum(0)
        whole = self.weights.sum()
        sound = np.where(scored.all(0), True, there * whole > 0.5 * np.abs(trust).sum(0) * abs(whole))  # not when opposite weights cancel
        share = np.divide(whole, there, out=np.ones_like(there), where=sound & ~scored.all(0))
        trust = np.where(sound, trust * share, scored / np.maximum(count, 1))
        pooled = np.einsum("mn,mnc->nc", trust, _filled(values))
        pooled[count == 0] = np.nan
        return pooled


def _single_sum(rows: _Rows, merit: Merit, kind: _Kind) -> _Sum:
    return _Sum(np.eye(len(rows.values))[_best(rows, merit, kind)])


def _least_squares(rows: _Rows, merit: Merit, *, pull: float) -> _Sum:
    """Weights that make the mean square of the errors least, on the rows that all scored; even ones where there are none.

    pull: how much it counts that they do not add up to 1. Where sources agree their weights are pulled to even ones.
    """
    count, ready = len(rows.values), _scored(rows.values).all(0)
    even = np.full(count, 1 / count)
    if not ready.any():
        return _Sum(even)
    said, wanted = rows.values[:, ready].reshape(count, -1), rows.targets[ready].reshape(-1).astype(np.float64)
    pull, ridge = pull * np.square(said).mean(), _RIDGE * (said.var() or 1.0)
    square = said @ said.T / said.shape[1] + pull * np.ones((count, count)) + ridge * np.eye(count)
    right = said @ wanted / said.shape[1] + pull + ridge * even
    return _Sum(np.linalg.solve(square, right))


def _climb(rows: _Rows, merit: Merit) -> _Sum:
    """From the best source on: again and again the step towards or away from one that raises the merit most, as long as one does."""
    ready = _scored(rows.values).all(0)
    weights = _single_sum(rows, merit, _KINDS["values"]).weights
    if not ready.any():
        return _Sum(weights)
    values, targets = rows.values[:, ready], rows.targets[ready]
    at = np.tensordot(weights, values, 1)
    top = merit(at, targets).mean()
    for _ in range(_ROUNDS):
        tried = [(merit((1 - step) * at + step * one, targets).mean(), source, step) for source, one in enumerate(values) for step in _STEPS if step]
        value, source, step = max(tried)
        if value <= top:
            break
        top, at = value, (1 - step) * at + step * values[source]
        weights = (1 - step) * weights + step * np.eye(len(values))[source]
    return _Sum(weights)


# --- spans ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mean:
    """The mean of probabilities, with weights (M,) of at least 0, over all spans that the sources name."""

    weights: np.ndarray

    def predict(self, values: np.ndarray, hints: np.ndarray) -> np.ndarray:
        """See _Fitted and kit.tasks.spans."""
        from kit.tasks.spans import mean_of_spans  # imports pandas, and most blends need none of it

        return mean_of_spans(values, self.weights)


def _single_span(rows: _Rows, merit: Merit, kind: _Kind) -> _Mean:
    return _Mean(np.eye(len(rows.values))[_best(rows, merit, kind)])


def _climb_spans(rows: _Rows, merit: Merit) -> _Mean:
    """Adds the source that raises the merit of the mean most, again and again; the best mean's shares. What a span is worth is asked for once."""
    from kit.tasks.spans import candidates

    spans, shares = candidates(rows.values)
    worth = np.full(spans.shape[:2], np.nan)
    every = np.arange(len(worth))

    def merit_of(mean: np.ndarray) -> float:
        best = mean.argmax(1)
        new = np.flatnonzero(np.isnan(worth[every, best]))
        if len(new):
            prediction = np.full((len(new), rows.values.shape[-1]), np.nan)
            prediction[:, :2], prediction[:, 2] = spans[new, best[new]], 0.0
            worth[new, best[new]] = merit(prediction, rows.targets[new])
        return float(worth[every, best].mean())

    counts, total = np.zeros(len(shares)), np.zeros(shares.shape[1:])
    top, found = -np.inf, np.ones(len(shares))
    for size in range(1, _ROUNDS + 1) if len(every) else ():
        values = [merit_of(total + one) for one in shares]
        added = int(np.argmax(values))
        counts[added] += 1
        total += shares[added]
        if values[added] > top:
            top, found = values[added], counts / size
    return _Mean(found)


# --- kinds ----------------------------------------------------------------------------------------------------------------------


def _same(values: np.ndarray) -> np.ndarray:
    return values


_KINDS = {
    "probabilities": _Kind(
        lambda predictions: np.log(np.maximum(predictions, _FLOOR)),
        np.exp,
        _single,
        {"pool": _Method(_pool), "hill": _Method(_hill), "ranker": _Method(_ranker, least=_TREE_ROWS, whole=True)},
    ),
    "values": _Kind(
        _same,
        _same,
        _single_sum,
        {"linear": _Method(partial(_least_squares, pull=_PULL)), "free": _Method(partial(_least_squares, pull=0.0)), "hill": _Method(_climb)},
    ),
    "spans": _Kind(_same, _same, _single_span, {"hill": _Method(_climb_spans)}),
}
