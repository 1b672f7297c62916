"""kit.inference.blend: weights by maximum likelihood, and what is pooled where members have no say."""

from __future__ import annotations

import numpy as np
import pytest

from kit.inference.blend import fit_weights, pool

N, C = 400, 5
RIDGE = 1e-3  # how far the fit may stay behind in log-likelihood, for weights that do not run off


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def likelihood(prediction: np.ndarray, targets: np.ndarray) -> float:
    return float(np.log(np.maximum(prediction[np.arange(len(targets)), targets], 1e-12)).mean())


def member(targets: np.ndarray, *, skill: float, seed: int) -> np.ndarray:
    """Probabilities that know the target with the given skill (0: chance)."""
    noise = np.random.default_rng(seed).normal(size=(len(targets), C))
    return softmax(noise + skill * np.eye(C)[targets]).astype(np.float32)


@pytest.fixture
def targets() -> np.ndarray:
    return np.random.default_rng(0).integers(0, C, N)


def by_hand(predictions: list[np.ndarray], weights: tuple[float, ...]) -> np.ndarray:
    """The logarithmic pool, written as the product of powers that it is."""
    product = np.prod([p.astype(np.float64) ** w for p, w in zip(predictions, weights, strict=True)], axis=0)
    return product / product.sum(-1, keepdims=True)


@pytest.mark.parametrize("skills", [(2.0, 1.0), (1.0, 1.0), (3.0, 0.0), (0.5, 2.5)])
def test_two_weights_are_those_of_a_search_over_a_grid(targets: np.ndarray, skills: tuple[float, float]) -> None:
    predictions = [member(targets, skill=skill, seed=seed) for seed, skill in enumerate(skills)]
    grid = np.linspace(0, 4, 81)
    best = max((likelihood(by_hand(predictions, (a, b)), targets) - RIDGE * (a * a + b * b), a, b) for a in grid for b in grid)
    weights = fit_weights(predictions, targets)
    assert weights == pytest.approx(best[1:], abs=0.06)
    assert likelihood(pool(predictions, weights), targets) - RIDGE * (weights**2).sum() >= best[0] - 1e-5


def test_pooled_probabilities_are_the_normalised_product_of_powers(targets: np.ndarray) -> None:
    predictions = [member(targets, skill=skill, seed=seed) for seed, skill in enumerate((2.0, 1.0, 0.5))]
    weights = np.array([0.7, 1.3, 0.0])
    pooled = pool(predictions, weights)
    assert pooled.dtype == np.float32
    assert pooled == pytest.approx(by_hand(predictions, (0.7, 1.3, 0.0)), abs=1e-6)
    assert pooled.sum(-1) == pytest.approx(np.ones(N), abs=1e-5)


def test_a_useless_member_gets_almost_no_weight_and_no_weight_is_negative(targets: np.ndarray) -> None:
    good, useless, contrary = (member(targets, skill=skill, seed=seed) for seed, skill in enumerate((2.0, 0.0, -1.0)))
    weights = fit_weights([good, useless, contrary], targets)
    assert (weights >= 0).all()
    assert weights[0] > 0.5
    assert weights[1] < 0.12
    assert weights[2] == 0.0


def test_a_member_that_stands_twice_does_not_change_the_blend(targets: np.ndarray) -> None:
    a, b = member(targets, skill=2.0, seed=1), member(targets, skill=1.0, seed=2)
    once, twice = fit_weights([a, b], targets), fit_weights([a, b, a], targets)
    assert twice[0] + twice[2] == pytest.approx(once[0], abs=0.02)
    assert pool([a, b, a], twice) == pytest.approx(pool([a, b], once), abs=5e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_blend_is_as_likely_as_the_best_member_on_what_it_is_fitted_on(targets: np.ndarray, seed: int) -> None:
    skills = np.random.default_rng(seed).uniform(-0.5, 3, 4)
    predictions = [member(targets, skill=skill, seed=10 * seed + k) for k, skill in enumerate(skills)]
    blended = pool(predictions, fit_weights(predictions, targets))
    assert likelihood(blended, targets) >= max(likelihood(p, targets) for p in predictions) - RIDGE


def test_one_member_alone_keeps_its_order(targets: np.ndarray) -> None:
    only = member(targets, skill=2.0, seed=0)
    pooled = pool([only], fit_weights([only], targets))
    assert (pooled.argsort(-1) == only.argsort(-1)).all()


def test_a_row_is_pooled_from_the_members_that_scored_it_and_nan_where_none_did(targets: np.ndarray) -> None:
    a, b = member(targets, skill=2.0, seed=1), member(targets, skill=1.0, seed=2)
    full = pool([a, b], np.array([1.0, 0.5]))
    a[3], b[4], a[5], b[5] = np.nan, np.nan, np.nan, np.nan
    pooled = pool([a, b], np.array([1.0, 0.5]))
    assert pooled[3] == pytest.approx(by_hand([b[3:4]], (0.5,))[0], abs=1e-6)
    assert pooled[4] == pytest.approx(a[4], abs=1e-6)
    assert np.isnan(pooled[5]).all()
    rest = np.setdiff1d(np.arange(N), [3, 4, 5])
    assert (pooled[rest] == full[rest]).all()


def test_a_row_with_one_option_missing_counts_as_not_scored() -> None:
    a, b = np.array([[0.7, np.nan, 0.3]]), np.array([[0.1, 0.8, 0.1]])
    assert pool([a, b], np.array([1.0, 1.0]))[0] == pytest.approx(b[0], abs=1e-6)


def test_a_member_of_weight_0_serves_where_no_other_scored_the_row() -> None:
    strong, weak = np.array([[0.6, 0.3, 0.1], [np.nan] * 3]), np.array([[0.1, 0.1, 0.8], [0.2, 0.5, 0.3]])
    pooled = pool([strong, weak], np.array([1.0, 0.0]))
    assert pooled == pytest.approx(np.array([strong[0], weak[1]]), abs=1e-6)


def test_members_that_are_all_no_better_than_chance_are_trusted_alike() -> None:
    a, b = np.array([[0.6, 0.3, 0.1]]), np.array([[0.1, 0.3, 0.6]])
    assert pool([a, b], np.zeros(2))[0] == pytest.approx(by_hand([a, b], (1.0, 1.0))[0], abs=1e-6)


def test_a_probability_of_0_is_no_veto() -> None:
    sure, other = np.array([[0.0, 0.6, 0.4]]), np.array([[0.999998, 1e-6, 1e-6]])
    pooled = pool([sure, other], np.array([1.0, 2.0]))
    assert np.isfinite(pooled).all()
    assert pooled[0].argmax() == 0


def test_weights_are_fitted_on_the_rows_that_a_member_scored(targets: np.ndarray) -> None:
    good, part = member(targets, skill=2.0, seed=1), member(targets, skill=2.0, seed=2)
    part[: N // 2] = np.nan
    weights = fit_weights([good, part], targets)
    assert np.isfinite(weights).all()
    assert weights[0] > 0.3
    assert weights[1] > 0.3
    broken = fit_weights([good, np.full_like(good, np.nan)], targets)
    assert broken[0] == pytest.approx(fit_weights([good], targets)[0], abs=1e-3)
