"""The n best spans of a text as numbers (N, 3n): first character, character after the last, log-probability, best first. Knows no task and no text."""

from __future__ import annotations

import numpy as np

NUMBERS = 3  # of a span
NO_SPAN = (-2.0, -2.0, -1e9)
"""In the place of a span where there are fewer: nobody believes in it."""


def mean_of_spans(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of the probabilities of sources (M, N, 3n), with weights (M,) of at least 0, over all spans that they name → (N, 3n) float64.

    A row that is not finite is not scored; NaN where nobody scored. Where all who scored a row have weight 0 they are trusted alike.
    """
    spans, shares = candidates(values)  # (N, U, 2), (M, N, U)
    scored = np.isfinite(values).all(-1)
    trust = np.where(scored, weights[:, None], 0.0)
    trust = np.where(trust.any(0), trust, scored)
    mean = np.einsum("mn,mnu->nu", trust, shares) / np.maximum(trust.sum(0), np.finfo(float).tiny)[:, None]
    order = np.argsort(-mean, axis=1, kind="stable")[:, : values.shape[-1] // NUMBERS]
    best = np.take_along_axis(mean, order, 1)
    with np.errstate(divide="ignore"):
        found = np.concatenate([np.take_along_axis(spans, order[..., None], 1), np.log(best)[..., None]], -1)
    found[best <= 0] = NO_SPAN
    found[~scored.any(0)] = np.nan
    return found.reshape(len(found), -1)


def candidates(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spans (M, N, 3n) → all that any source names (N, U, 2), and what each source gives them (M, N, U): 0 where it does not name one.

    A span that several name has all of what they give at its first place, and 0 at the others.
    """
    sources, count, width = values.shape
    scored = np.isfinite(values).all(-1)
    each = np.where(scored[..., None], values, 0.0).reshape(sources, count, width // NUMBERS, NUMBERS)
    given = np.where(scored[..., None], np.exp(np.minimum(each[..., 2], 0.0)), 0.0)  # (M, N, n)
    spans = each[..., :2].transpose(1, 0, 2, 3).reshape(count, -1, 2)  # (N, M n, 2)
    equal = (spans[:, :, None] == spans[:, None]).all(-1)  # (N, M n, M n)
    first = equal.argmax(-1)  # (N, M n)
    shares = np.zeros((sources, count, spans.shape[1]))
    for source, own in enumerate(np.split(first, sources, axis=1)):
        for place in range(own.shape[1]):
            shares[source, np.arange(count), own[:, place]] += given[source, :, place]
    return spans, shares
