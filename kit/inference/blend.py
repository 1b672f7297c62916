"""Several members' predictions → one, by weights found on OOF. Knows no model, file or clock.

For probabilities: the logarithmic opinion pool p ∝ Π p_m^w_m (Genest & Zidek 1986) with w ≥ 0, fitted by maximum likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize

_FLOOR = 1e-6  # a probability of 0 would veto an option for good
_RIDGE = 1e-3  # pulls weights together where members agree, so that they do not run off in opposite directions


def fit_weights(predictions: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Weights w ≥ 0 (M,) of M members' OOF probabilities (N, C), the ones that make the right options (N,) most likely.

    A row that a member did not score (NaN) is fitted on the others alone.
    """
    logs = np.stack([_log(prediction) for prediction in predictions])  # (M, N, C)
    logs = np.where(np.isfinite(logs).all(-1, keepdims=True), logs, 0.0)
    rows = np.arange(len(targets))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        pooled = np.tensordot(weights, logs, 1)  # (N, C)
        log_p = pooled - _logsumexp(pooled)
        mean = np.einsum("nc,mnc->mn", np.exp(log_p), logs)  # (M, N)
        slope = (mean - logs[:, rows, targets]).mean(1)
        return float(-log_p[rows, targets].mean() + _RIDGE * (weights**2).sum()), slope + 2 * _RIDGE * weights

    begin = np.full(len(logs), 1.0 / len(logs))
    return minimize(loss, begin, jac=True, bounds=[(0.0, None)] * len(logs), method="L-BFGS-B").x


def pool(predictions: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Pooled probabilities (N, C) float32. A row that a member did not score (NaN) is pooled from the others; NaN where nobody did.

    Where all who scored a row have weight 0 they are trusted alike: a poor member's ranking is worth more than none.
    """
    logs = np.stack([_log(prediction) for prediction in predictions])
    scored = np.isfinite(logs).all(-1)  # (M, N)
    trust = np.where(scored, weights[:, None], 0.0)
    trust = np.where(trust.any(0), trust, scored)  # (M, N)
    pooled = np.einsum("mn,mnc->nc", trust, np.where(scored[..., None], logs, 0.0))
    blended = np.exp(pooled - _logsumexp(pooled))
    blended[~scored.any(0)] = np.nan
    return blended.astype(np.float32)


def _log(prediction: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(prediction.astype(np.float64), _FLOOR))  # NaN stays NaN


def _logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(-1, keepdims=True)
    return top + np.log(np.exp(values - top).sum(-1, keepdims=True))
