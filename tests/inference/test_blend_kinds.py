"""kit.inference.blend for values and spans: what is fitted, what holes do, and no blend that is not worth it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from kit.errors import ConfigError
from kit.inference.blend import Blend
from kit.tasks.spans import NO_SPAN

N, K, BEST = 400, 3, 4
RNG = np.random.default_rng


# --- values ---------------------------------------------------------------------------------------------------------------------


def merit(prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -np.square(prediction - targets).mean(-1)


def grades(rows: int = N, seed: int = 0) -> np.ndarray:
    return RNG([seed, 7]).normal(3.0, 0.7, (rows, K)).astype(np.float32)


def said(targets: np.ndarray, *noises: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Sources a, b, … whose errors are independent, with these standard deviations."""
    return {name: (targets + RNG([seed, at]).normal(0, noise, targets.shape)).astype(np.float32) for at, (name, noise) in enumerate(zip("abcdef", noises, strict=False))}


def summed(predictions: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    return np.sum([weight * predictions[name].astype(np.float64) for name, weight in weights.items()], axis=0)


def score(prediction: np.ndarray, targets: np.ndarray) -> float:
    return float(merit(prediction, targets).mean())


def fit(sources: Mapping[str, np.ndarray], targets: np.ndarray, **options: object) -> Blend:
    return Blend.fit(sources, targets, merit, kind="values", **options)


@pytest.fixture
def targets() -> np.ndarray:
    return grades()


@pytest.mark.parametrize("noises", [(0.4, 0.6), (0.5, 0.5), (0.3, 1.0)])
def test_least_squares_finds_the_weights_of_a_search_over_a_grid_that_add_up_to_1(targets: np.ndarray, noises: tuple[float, float]) -> None:
    sources = said(targets, *noises)
    share = max(np.linspace(-1, 2, 301), key=lambda share: score(summed(sources, {"a": share, "b": 1 - share}), targets))
    blend = fit(sources, targets, method="linear")
    assert blend.weights("ab") == pytest.approx({"a": share, "b": 1 - share}, abs=0.02)
    assert blend.pool(sources) == pytest.approx(summed(sources, blend.weights("ab")), abs=1e-5)
    assert blend.pool(sources).dtype == np.float32 and score(blend.pool(sources), targets) > max(score(one, targets) for one in sources.values())


def test_free_weights_shrink_what_is_uncertain_and_pulled_ones_do_not() -> None:
    centred = grades() - 3.0
    sources = said(centred, 0.7, 0.7)
    free, pulled = (sum(fit(sources, centred, method=method).weights("ab").values()) for method in ("free", "linear"))
    assert pulled == pytest.approx(1.0, abs=0.01)
    expected = 0.49 / (0.49 + 0.245)  # variance of what is asked for, and of what is said
    assert free == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("method", ["linear", "free", "hill"])
def test_a_weight_may_be_negative(targets: np.ndarray, method: str) -> None:
    """The second source makes the errors of the first, only larger ones: what it says more is to be taken away."""
    shared = RNG(5).normal(0, 1.0, targets.shape)
    sources = {"a": targets + 0.5 * shared, "b": targets + shared + RNG(6).normal(0, 0.1, targets.shape)}
    blend = fit(sources, targets, method=method)
    assert blend.weights("ab")["b"] < -0.4 and blend.weights("ab")["a"] > 1.4
    assert blend.report()["used"] and score(blend.pool(sources), targets) > -0.06 > -0.2 > score(sources["a"], targets)
    new = grades(1000, seed=1)
    errors = RNG(7).normal(0, 1.0, new.shape)
    test = {"a": new + 0.5 * errors, "b": new + errors + RNG(8).normal(0, 0.1, new.shape)}
    assert score(blend.pool(test), new) == pytest.approx(score(blend.oof("ab"), targets), abs=0.02)


def test_hill_climbing_gets_near_the_best_weights_of_three(targets: np.ndarray) -> None:
    sources = said(targets, 0.4, 0.5, 0.6)
    grid = [(a, b, 1 - a - b) for a, b in itertools.product(np.linspace(-0.2, 1, 25), repeat=2)]
    best = max(score(summed(sources, dict(zip("abc", weights, strict=True))), targets) for weights in grid)
    blend = fit(sources, targets, method="hill")
    assert score(blend.pool(sources), targets) > best - 0.002
    assert sum(blend.weights("abc").values()) == pytest.approx(1.0)


def test_sources_that_agree_share_their_weight(targets: np.ndarray) -> None:
    sources = said(targets, 0.4, 0.5)
    sources["again"] = sources["a"]
    once, twice = (fit({name: sources[name] for name in names}, targets, method="linear").weights(names) for names in (("a", "b"), ("a", "b", "again")))
    assert twice["a"] == pytest.approx(twice["again"], abs=1e-6) and 2 * twice["a"] == pytest.approx(once["a"], abs=0.02)


def test_a_blend_of_values_is_used_where_it_is_better_by_more_than_noise_and_honest_about_it(targets: np.ndarray) -> None:
    good, poor = fit(said(targets, 0.5, 0.5), targets).report(), fit(said(targets, 0.2, 4.0), targets).report()
    assert good["used"] and good["gain"]["value"] == pytest.approx(0.125, abs=0.02) and good["method"] == "linear"
    assert not poor["used"] and poor["weights"] == {"a": 1.0, "b": 0.0} and poor["best"] == "a"


def test_values_that_say_nothing_promise_nothing_in_the_mean_of_many_tables() -> None:
    gains = []
    for seed in range(30):
        answers = grades(60, seed)
        sources = said(answers, 0.3, seed=seed)
        sources |= {name: sources["a"] + RNG([seed, 50 + at]).normal(0, 0.3, answers.shape) for at, name in enumerate("bcde")}  # what a says, and noise
        gains.append(fit(sources, answers, method="linear").report()["gain"]["value"])
    assert np.mean(gains) < 2 * np.std(gains, ddof=1) / np.sqrt(len(gains))


def test_holes_in_values_are_filled_by_the_others_as_heavy_as_all(targets: np.ndarray) -> None:
    sources = said(targets, 0.4, 0.4, 0.4)
    blend = fit(sources, targets, method="linear")
    test = {name: values.copy() for name, values in sources.items()}
    test["a"][0, 1], test["b"][1], test["c"][1], test["a"][2], test["b"][2], test["c"][2] = (np.nan,) * 6
    pooled, pair = blend.pool(test), blend.weights("bc")
    assert pooled[0] == pytest.approx(summed(sources, pair)[0], abs=1e-5)
    assert pooled[1] == pytest.approx(sources["a"][1]) and np.isnan(pooled[2]).all()
    sources["c"][:5] = np.nan  # in OOF a row with holes is not refitted
    oof, weights = fit(sources, targets, method="linear").oof("abc"), fit(sources, targets, method="linear").weights("abc")
    total = sum(weights.values())
    expected = summed({name: sources[name] for name in "ab"}, {name: weights[name] * total / (weights["a"] + weights["b"]) for name in "ab"})
    assert oof[:5] == pytest.approx(expected[:5], abs=0.05) and np.isfinite(oof).all()


def test_opposite_weights_that_cancel_without_the_others_are_replaced_by_even_ones(targets: np.ndarray) -> None:
    shared = RNG(5).normal(0, 1.0, targets.shape)
    sources = {"a": targets + shared, "b": targets + 1.1 * shared, "c": targets + RNG(6).normal(0, 0.1, targets.shape)}
    sources["c"][:3] = np.nan
    oof = fit(sources, targets, method="linear").oof("abc")
    low, high = np.minimum(sources["a"], sources["b"])[:3], np.maximum(sources["a"], sources["b"])[:3]
    assert ((oof[:3] > low - 0.3) & (oof[:3] < high + 0.3)).all()


@pytest.mark.parametrize("rows", [1, 2, 7, 29])
def test_a_handful_of_values_is_not_believed(rows: int) -> None:
    answers = grades(rows)
    blend = fit(said(answers, 0.5, 0.1, 0.5), answers)
    assert not blend.report()["used"] and np.isfinite(blend.oof("abc")).all()


def test_rows_that_no_two_sources_share_leave_even_weights(targets: np.ndarray) -> None:
    sources = said(targets, 0.4, 0.4)
    sources["a"][::2], sources["b"][1::2] = np.nan, np.nan
    blend = fit(sources, targets, method="linear")
    assert np.isfinite(blend.oof("ab")).all() and blend.report()["gain"] is None


# --- spans ----------------------------------------------------------------------------------------------------------------------


def overlap(prediction: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """F1 of the best span with the true one, by characters."""
    common = np.maximum(0, np.minimum(prediction[:, 1], targets[:, 1]) - np.maximum(prediction[:, 0], targets[:, 0]))
    same = (prediction[:, :2] == targets).all(1)
    total = np.maximum(prediction[:, 1] - prediction[:, 0] + targets[:, 1] - targets[:, 0], 1)
    return np.where(same, 1.0, 2 * common / total)


def span_targets(rows: int = N, seed: int = 0) -> np.ndarray:
    starts = RNG([seed, 3]).integers(0, 200, rows)
    found = np.stack([starts, starts + RNG([seed, 4]).integers(3, 12, rows)], 1).astype(float)
    found[:: 10] = -1.0  # no answer
    return found


def reader(targets: np.ndarray, *, skill: float, seed: int) -> np.ndarray:
    """The best spans (N, 3 BEST) of a source that has the true one among them, and believes in it by its skill; sometimes fewer."""
    rng, found = RNG([seed, 9]), np.tile(np.float32(NO_SPAN), (len(targets), BEST))
    for row, true in enumerate(targets):
        spans = [tuple(true)]
        while len(spans) < BEST:
            start = int(rng.integers(0, 200))
            span = (start, start + int(rng.integers(3, 12)))
            spans += [span] * (span not in spans)
        logs = rng.normal(0, 1, BEST) + skill * (np.arange(BEST) == 0)
        logs -= np.log(np.exp(logs).sum())
        order = np.argsort(-logs)[: int(rng.integers(2, BEST + 1))]
        found[row, : 3 * len(order)] = np.concatenate([[*spans[at], logs[at]] for at in order])
    return found


def readers(targets: np.ndarray, *skills: float, seed: int = 0) -> dict[str, np.ndarray]:
    return {name: reader(targets, skill=skill, seed=10 * seed + at) for at, (name, skill) in enumerate(zip("abcd", skills, strict=False))}


def by_hand(predictions: Mapping[str, np.ndarray], weights: Mapping[str, float], row: int) -> dict[tuple[float, float], float]:
    """Span → mean probability, best first."""
    mean: dict[tuple[float, float], float] = {}
    for name, weight in weights.items():
        for start, end, log_p in predictions[name][row].reshape(-1, 3):
            if start != NO_SPAN[0] and weight:
                mean[start, end] = mean.get((start, end), 0.0) + weight * float(np.exp(log_p)) / sum(weights.values())
    return dict(sorted(mean.items(), key=lambda item: -item[1]))


def read(sources: Mapping[str, np.ndarray], targets: np.ndarray, **options: object) -> Blend:
    return Blend.fit(sources, targets, overlap, kind="spans", **options)


def test_spans_are_pooled_by_their_mean_probability_over_the_union() -> None:
    answers = span_targets()
    sources = readers(answers, 1.0, 1.2)
    blend = read(sources, answers)
    weights, pooled = blend.weights("ab"), blend.pool(sources)
    assert blend.report()["used"] and blend.report()["method"] == "hill" and min(weights.values()) > 0
    assert pooled.shape == (N, 3 * BEST) and pooled.dtype == np.float32
    for row in range(0, N, 7):
        expected = by_hand(sources, weights, row)
        found = pooled[row].reshape(-1, 3)
        found = found[: min(BEST, len(expected))]
        assert (pooled[row, found.size :].reshape(-1, 3) == np.float32(NO_SPAN)).all()
        assert found[0, :2].tolist() == [*next(iter(expected))]
        assert np.exp(found[:, 2]) == pytest.approx([*expected.values()][:BEST], abs=1e-5)
        assert all(expected[start, end] == pytest.approx(float(np.exp(log_p)), abs=1e-5) for start, end, log_p in found)


def test_the_blend_of_spans_is_better_than_its_sources_on_new_rows() -> None:
    answers, new = span_targets(), span_targets(2000, seed=1)
    report, blend = read(readers(answers, 1.0, 1.0), answers).report(), read(readers(answers, 1.0, 1.0), answers)
    test = readers(new, 1.0, 1.0, seed=1)
    gain = overlap(blend.pool(test), new).mean() - max(overlap(one, new).mean() for one in test.values())
    assert gain > 0.05 and report["gain"]["value"] == pytest.approx(gain, abs=3 * report["gain"]["se"])


def test_weights_of_spans_are_those_of_hill_climbing_written_out() -> None:
    answers = span_targets(60)
    sources = readers(answers, 1.0, 1.4, 0.8)
    top = {row: {name: by_hand({name: sources[name]}, {name: 1.0}, row) for name in sources} for row in range(60)}

    def value(bag: list[str]) -> float:
        best = []
        for row in range(60):
            mean: dict[tuple[float, float], float] = {}
            for name in bag:
                for span, p in top[row][name].items():
                    mean[span] = mean.get(span, 0.0) + p
            best.append([*max(mean, key=lambda span: mean[span]), 0.0])
        return float(overlap(np.array(best), answers).mean())

    bag: list[str] = []
    steps = []
    for _ in range(10):
        tried = {name: value([*bag, name]) for name in sources}
        bag.append(max(tried, key=lambda name: tried[name]))
        steps.append((round(tried[bag[-1]], 9), -len(bag)))
    bag = bag[: -max(steps)[1]]
    blend = read(sources, answers)
    if blend.report()["used"]:
        assert blend.weights("abc") == pytest.approx({name: bag.count(name) / len(bag) for name in "abc"})
    assert overlap(blend.pool(sources), answers).mean() == pytest.approx(max(steps)[0] if blend.report()["used"] else value(["b"]))


def test_one_source_alone_keeps_its_spans_and_rows_without_any_are_nobodys() -> None:
    answers = span_targets()
    sources = readers(answers, 1.0, 1.2)
    blend = read(sources, answers)
    only = {"a": sources["a"].copy(), "b": sources["b"].copy()}
    only["b"][:] = np.nan
    only["a"][3] = np.nan
    pooled = blend.pool(only)
    assert np.isnan(pooled[3]).all()
    kept = np.arange(N) != 3
    np.testing.assert_allclose(pooled[kept], sources["a"][kept], atol=1e-5)  # equal also where spans are missing


def test_a_poor_reader_is_left_out_and_serves_where_nobody_else_has_read() -> None:
    answers = span_targets()
    sources = readers(answers, 3.0, -2.0)
    blend = read(sources, answers)
    assert not blend.report()["used"] and blend.weights("ab") == {"a": 1.0, "b": 0.0}
    sources["a"][5] = np.nan
    oof = read(sources, answers).oof("ab")
    assert (oof[5, :2] == sources["b"][5, :2]).all()


def test_the_merit_of_a_row_that_was_not_read_is_asked_of_nobody() -> None:
    answers = span_targets(80)
    sources = readers(answers, 1.0, 1.0, 1.0)
    sources["a"][:10] = np.nan
    report = read(sources, answers).report()
    assert all(np.isfinite(one["value"]) for one in report["estimates"].values())


# --- kinds ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method", "known"), [("values", "pool", "free"), ("values", "linaer", "linear"), ("spans", "ranker", "hill")])
def test_every_kind_has_its_own_methods(kind: str, method: str, known: str, targets: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=rf"blend method '{method}' is unknown.*{known}"):
        Blend.fit(said(targets, 0.5), targets, merit, kind=kind, method=method)


def test_an_unknown_kind_is_refused(targets: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"a blend of 'value' is unknown \(did you mean 'values'\?\)"):
        Blend.fit(said(targets, 0.5), targets, merit, kind="value")


def test_without_a_kind_predictions_are_probabilities() -> None:
    p = RNG(0).dirichlet(np.ones(3), 50)
    one, other = (Blend.fit({"a": p}, p.argmax(1), lambda q, t: (q.argmax(1) == t) * 1.0, **kind) for kind in ({}, {"kind": "probabilities"}))
    assert one.weights("a") == other.weights("a")
