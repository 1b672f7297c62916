"""kit.inference.blend: weights by maximum likelihood for every pattern, and no blend that is not worth it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest

from kit.errors import ConfigError
from kit.inference.blend import Blend
from kit.metrics import average_precision as merit

N, C = 400, 5
RIDGE = 1e-3  # how far the fit may stay behind in log-likelihood, for weights that do not run off
CHANCE = (1 + 1 / 2 + 1 / 3) / C  # merit of a guess


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def likelihood(prediction: np.ndarray, targets: np.ndarray) -> float:
    return float(np.log(np.maximum(prediction[np.arange(len(targets)), targets], 1e-12)).mean())


def member(targets: np.ndarray, *, skill: float, seed: int) -> np.ndarray:
    """Probabilities that know the target with the given skill (0: chance)."""
    noise = np.random.default_rng(seed).normal(size=(len(targets), C))
    return softmax(noise + skill * np.eye(C)[targets]).astype(np.float32)


def members(targets: np.ndarray, *skills: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Sources a, b, c, … with these skills, their errors independent."""
    seeds = range(100 * seed, 100 * seed + len(skills))
    return {name: member(targets, skill=skill, seed=own) for name, skill, own in zip("abcdefgh", skills, seeds, strict=False)}


def questions(rows: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 7]).integers(0, C, rows)


@pytest.fixture
def targets() -> np.ndarray:
    return questions()


def by_hand(predictions: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The logarithmic pool, written as the product of powers that it is."""
    product = np.prod([predictions[name].astype(np.float64) ** weight for name, weight in weights.items()], axis=0)
    return product / product.sum(-1, keepdims=True)


def score(prediction: np.ndarray, targets: np.ndarray) -> float:
    return float(merit(prediction, targets).mean())


# --- the pool -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skills", [(2.0, 1.0), (1.0, 1.0), (1.2, 1.6), (0.8, 1.5)])
def test_two_weights_are_those_of_a_search_over_a_grid(targets: np.ndarray, skills: tuple[float, float]) -> None:
    sources = members(targets, *skills)
    grid = np.linspace(0, 3, 61)
    best = max((likelihood(by_hand(sources, {"a": a, "b": b}), targets) - RIDGE * (a * a + b * b), a, b) for a in grid for b in grid)
    blend = Blend.fit(sources, targets, merit, method="pool")
    weights = blend.weights("ab")
    assert list(weights.values()) == pytest.approx(best[1:], abs=0.05)
    assert likelihood(blend.pool(sources), targets) - RIDGE * sum(w * w for w in weights.values()) >= best[0] - 1e-5


@pytest.mark.parametrize("skill", [2.0, 0.05])
def test_one_source_gets_its_temperature_and_keeps_its_order(targets: np.ndarray, skill: float) -> None:
    only = {"a": member(targets, skill=skill, seed=0)}
    blend = Blend.fit(only, targets, merit)
    best = max((likelihood(by_hand(only, {"a": a}), targets) - RIDGE * a * a, a) for a in np.linspace(0, 4, 401))
    assert blend.weights("a")["a"] == pytest.approx(best[1], abs=0.01)
    assert blend.report()["temperature"] == pytest.approx(1 / blend.weights("a")["a"])
    assert (blend.pool(only).argsort(-1) == only["a"].argsort(-1)).all()


@pytest.mark.parametrize("skill", [0.0, -1.0, 0.02])
def test_a_source_no_better_than_chance_keeps_its_order_when_it_is_alone(targets: np.ndarray, skill: float) -> None:
    only = {"a": member(targets, skill=skill, seed=5)}
    assert (Blend.fit(only, targets, merit).pool(only).argsort(-1) == only["a"].argsort(-1)).all()


def test_pooled_probabilities_are_the_normalised_product_of_powers(targets: np.ndarray) -> None:
    sources = members(targets, 1.5, 1.2, 1.0)
    blend = Blend.fit(sources, targets, merit, method="pool")
    pooled = blend.pool(sources)
    assert pooled.dtype == np.float32
    assert min(blend.weights("abc").values()) > 0.1
    assert pooled == pytest.approx(by_hand(sources, blend.weights("abc")), abs=1e-6)
    assert pooled.sum(-1) == pytest.approx(np.ones(N), abs=1e-5)


def test_a_useless_source_gets_almost_no_weight_and_no_weight_is_negative(targets: np.ndarray) -> None:
    blend = Blend.fit(members(targets, 1.5, 1.5, 0.0, -1.0), targets, merit, method="pool")
    weights = blend.weights("abcd")
    assert min(weights["a"], weights["b"]) > 0.8
    assert 0 <= weights["c"] < 0.12
    assert weights["d"] == 0.0
    assert blend.weights("abd") == pytest.approx({**blend.weights("ab"), "d": 0.0}, abs=1e-3)


def test_a_source_that_stands_twice_does_not_change_the_blend(targets: np.ndarray) -> None:
    sources = members(targets, 1.5, 1.2)
    sources["again"] = sources["a"]
    blend = Blend.fit(sources, targets, merit, method="pool")
    once, twice = blend.weights("ab"), blend.weights(sources)
    assert twice["a"] + twice["again"] == pytest.approx(once["a"], abs=0.02)
    assert blend.pool(sources) == pytest.approx(blend.pool({"a": sources["a"], "b": sources["b"]}), abs=5e-3)


@pytest.mark.parametrize("method", ["pool", "hill"])
def test_a_probability_of_0_is_no_veto(targets: np.ndarray, method: str) -> None:
    blend = Blend.fit(members(targets, 1.0, 1.2), targets, merit, method=method)
    sure = {"a": np.array([[0.0, 0.25, 0.25, 0.25, 0.25]]), "b": np.array([[0.9, 0.1, 0, 0, 0]])}
    expected = by_hand({name: np.maximum(p, 1e-6) for name, p in sure.items()}, blend.weights("ab"))
    assert min(blend.weights("ab").values()) > 0.5
    assert blend.pool(sure) == pytest.approx(expected, abs=1e-7)
    assert blend.pool(sure)[0, 0] > 0


def test_contrary_sources_are_trusted_as_they_are_and_alike(targets: np.ndarray) -> None:
    sources = members(targets, -1.0, -1.0)
    alone = Blend.fit(sources, targets, merit)
    assert [alone.weights(name)[name] for name in "ab"] == [1.0, 1.0]
    assert alone.pool({"b": sources["b"]}) == pytest.approx(sources["b"], abs=1e-6)
    liked = Blend.fit(sources, targets, lambda p, t: -merit(p, t), method="pool")  # by this merit their blend is better than either
    assert liked.weights("ab") == {"a": 1.0, "b": 1.0}


# --- patterns and holes ---------------------------------------------------------------------------------------------


def test_every_row_is_pooled_with_the_weights_of_its_own_pattern(targets: np.ndarray) -> None:
    sources = members(targets, 1.5, 1.2, 1.0)
    blend = Blend.fit(sources, targets, merit, method="pool")
    test = members(questions(8, seed=1), 1.5, 1.2, 1.0, seed=1)
    patterns = ["abc", "ab", "ac", "bc", "a", "b", "c", ""]
    for row, pattern in enumerate(patterns):
        for name in set("abc") - set(pattern):
            test[name][row] = np.nan
    pooled = blend.pool(test)
    for row, pattern in enumerate(patterns[:-1]):
        expected = by_hand({name: test[name][[row]] for name in pattern}, blend.weights(pattern))
        assert pooled[[row]] == pytest.approx(expected, abs=1e-6), pattern
    assert np.isnan(pooled[-1]).all()


def test_weights_of_a_pattern_are_fitted_anew_and_not_those_of_the_others_rescaled(targets: np.ndarray) -> None:
    sources = members(targets, 1.5, 1.2)
    sources["again"] = sources["a"]  # takes half of the weight of a, but none of that of b
    blend = Blend.fit(sources, targets, merit, method="pool")
    both, all_three = blend.weights("ab"), blend.weights(sources)
    assert both["a"] == pytest.approx(2 * all_three["a"], rel=0.05)
    assert both["b"] == pytest.approx(all_three["b"], rel=0.05)


def test_sources_that_are_not_given_count_as_not_scored(targets: np.ndarray) -> None:
    sources = members(targets, 1.5, 1.2, 1.0)
    blend = Blend.fit(sources, targets, merit, method="pool")
    part = {name: sources[name] for name in "cb"}
    empty = {**part, "a": np.full((N, C), np.nan, np.float32)}
    assert (blend.pool(part) == blend.pool(empty)).all()


def test_a_row_with_one_option_missing_counts_as_not_scored(targets: np.ndarray) -> None:
    sources = members(targets, 1.5, 1.2)
    blend = Blend.fit(sources, targets, merit, method="pool")
    alone = blend.pool({"b": sources["b"]})
    sources["a"][3, 1] = np.nan
    assert blend.pool(sources)[3] == pytest.approx(alone[3], abs=1e-7)


def test_weights_are_fitted_on_the_rows_that_a_source_scored(targets: np.ndarray) -> None:
    sources = members(targets, 1.5, 1.5)
    sources["b"][: N // 2] = np.nan
    weights = Blend.fit(sources, targets, merit, method="pool").weights("ab")
    assert min(weights.values()) > 0.6
    shared = Blend.fit({name: p[N // 2 :] for name, p in sources.items()}, targets[N // 2 :], merit, method="pool").weights("ab")
    assert abs(weights["a"] - shared["a"]) > 0.01


def test_a_source_without_any_oof_leaves_the_other_as_it_is(targets: np.ndarray) -> None:
    sources = {"a": member(targets, skill=2.0, seed=1), "b": np.full((N, C), np.nan, np.float32)}
    blend = Blend.fit(sources, targets, merit)
    assert blend.weights("ab") == {"a": blend.weights("a")["a"], "b": 0.0}
    assert blend.best_single("ab") == "a"
    assert blend.report()["gain"] is None
    assert (blend.oof("ab") == blend.oof("a")).all()
    assert blend.pool({"b": sources["a"]}) == pytest.approx(sources["a"], abs=1e-6)


def test_sources_that_share_no_row_are_compared_each_on_its_own(targets: np.ndarray) -> None:
    sources = members(targets, 1.0, 2.0)
    sources["a"][N // 2 :], sources["b"][: N // 2] = np.nan, np.nan
    blend = Blend.fit(sources, targets, merit)
    assert blend.best_single("ab") == "b"
    assert blend.weights("ab")["a"] == 0.0
    assert np.isfinite(blend.oof("ab")).all()


def test_the_best_single_source_is_the_best_of_its_pattern(targets: np.ndarray) -> None:
    blend = Blend.fit(members(targets, 0.5, 2.0, 1.0), targets, merit)
    assert [blend.best_single(pattern) for pattern in ("abc", "ac", "a")] == ["b", "c", "a"]


# --- is it worth it? ------------------------------------------------------------------------------------------------


def test_a_blend_of_two_that_know_different_things_is_used_and_its_gain_is_seen_on_new_rows(targets: np.ndarray) -> None:
    blend = Blend.fit(members(targets, 1.2, 1.2), targets, merit)
    report = blend.report()
    new = questions(4000, seed=1)
    test = members(new, 1.2, 1.2, seed=1)
    gain = score(blend.pool(test), new) - max(score(p, new) for p in test.values())
    assert report["used"]
    assert report["gain"]["low"] < report["gain"]["value"] < report["gain"]["high"]
    assert report["gain"]["value"] == pytest.approx(gain, abs=3 * report["gain"]["se"])
    assert gain > 0.05
    assert report["estimates"]["blend"]["value"] == pytest.approx(score(blend.oof("ab"), targets), abs=1e-6)
    assert report["estimates"]["a"]["value"] == pytest.approx(score(members(targets, 1.2, 1.2)["a"], targets))
    assert report["weights"] == blend.weights("ab")
    assert report["temperature"] == pytest.approx(1 / sum(blend.weights("ab").values()))


def test_a_blend_that_does_not_beat_its_best_source_by_more_than_noise_is_not_used(targets: np.ndarray) -> None:
    sources = members(targets, 2.5, 0.0, 0.1)
    blend = Blend.fit(sources, targets, merit)
    assert not blend.report()["used"]
    assert blend.report()["best"] == "a"
    assert blend.weights("abc") == {"a": blend.weights("a")["a"], "b": 0.0, "c": 0.0}
    assert (blend.pool(sources).argsort(-1) == sources["a"].argsort(-1)).all()
    assert (blend.oof("abc") == blend.oof("a")).all()


def test_a_gain_of_more_than_one_standard_error_is_enough_and_oof_rows_follow_what_the_other_rows_call_for() -> None:
    answers = questions(seed=9)
    blend = Blend.fit(members(answers, 2.0, 0.6, seed=9), answers, merit, method="pool")
    report = blend.report()
    assert report["used"]
    assert report["gain"]["se"] < report["gain"]["value"] < 2 * report["gain"]["se"]
    alone = (blend.oof("ab") == blend.oof("a")).all(-1)
    assert 0.15 < alone.mean() < 0.85


def test_oof_rows_that_the_source_in_use_did_not_score_are_those_of_the_others(targets: np.ndarray) -> None:
    sources = members(targets, 2.5, 0.1)
    sources["a"][3] = np.nan
    blend = Blend.fit(sources, targets, merit)
    assert blend.weights("ab")["b"] == 0.0
    assert (blend.oof("ab")[3].argsort() == sources["b"][3].argsort()).all()


def test_where_only_sources_without_weight_scored_a_row_they_serve(targets: np.ndarray) -> None:
    sources = members(targets, 2.5, 0.1)
    blend = Blend.fit(sources, targets, merit)
    assert blend.weights("ab")["b"] == 0.0
    sources["a"][3] = np.nan
    assert (blend.pool(sources)[3].argsort() == sources["b"][3].argsort()).all()


@pytest.mark.parametrize("method", ["pool", "hill"])
def test_sources_that_know_nothing_are_worth_nothing_in_the_mean_of_many_tables_however_well_they_fit_one(method: str) -> None:
    gains, scores, naive = [], [], []
    for seed in range(30):
        answers = questions(60, seed)
        sources = members(answers, 0, 0, 0, 0, 0, seed=seed)
        blend = Blend.fit(sources, answers, merit, method=method, seed=seed)
        gains.append(blend.report()["gain"]["value"])
        scores.append(score(blend.oof(sources), answers))
        draws = np.random.default_rng(seed).exponential(size=(100, 5))
        tuned = max(score(by_hand(sources, dict(zip(sources, draw, strict=True))), answers) for draw in draws)
        naive.append(tuned - max(score(p, answers) for p in sources.values()))
    assert np.mean(naive) > 2.5 * error(naive)  # what tuning and judging on the same rows would have promised
    assert abs(np.mean(gains)) < 2.5 * error(gains)
    assert abs(np.mean(scores) - CHANCE) < 2.5 * error(scores)


def error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def test_noise_beside_a_good_source_promises_no_gain_in_the_mean_of_many_tables() -> None:
    reports = []
    for seed in range(30):
        answers = questions(100, seed)
        reports.append(Blend.fit(members(answers, 1.5, 0, 0, 0, 0, seed=seed), answers, merit, method="pool").report())
    gains = [report["gain"]["value"] for report in reports]
    assert np.mean(gains) < 2 * error(gains)
    assert sum(report["used"] for report in reports) <= 8  # one of six by chance


def test_the_oof_prediction_of_a_row_does_not_depend_on_its_own_answer(targets: np.ndarray) -> None:
    sources = members(targets, 1.0, 1.2, 0.3)
    before = Blend.fit(sources, targets, merit, method="pool").oof("abc")
    for row in (0, 17, 256):
        others = targets.copy()
        others[row] = (targets[row] + 1) % C
        after = Blend.fit(sources, others, merit, method="pool").oof("abc")
        assert (after[row] == before[row]).all()
        assert (after != before).any()


def test_oof_predictions_are_not_those_of_weights_fitted_on_all_rows_but_close(targets: np.ndarray) -> None:
    sources = members(targets, 1.0, 1.2)
    blend = Blend.fit(sources, targets, merit, method="pool")
    apart = np.abs(blend.oof("ab") - blend.pool(sources))
    assert apart.max(-1).min() > 0
    assert apart.max() < 0.1


def test_the_split_depends_on_the_seed_alone(targets: np.ndarray) -> None:
    sources = members(targets, 1.0, 1.2)
    one, same, other = (Blend.fit(sources, targets, merit, seed=seed).oof("ab") for seed in (3, 3, 4))
    assert (one == same).all()
    assert (one != other).any()


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 29])
@pytest.mark.parametrize("method", ["auto", "pool", "hill", "ranker"])
def test_with_a_handful_of_rows_the_best_single_source_is_used(rows: int, method: str) -> None:
    answers = questions(rows)
    sources = members(answers, 1.0, 6.0, 1.0)
    blend = Blend.fit(sources, answers, merit, method=method, hints={"overlap": sources["a"]})
    assert not blend.report()["used"]
    assert blend.best_single("abc") == "b" or rows < 7
    assert sum(weight > 0 for weight in blend.weights("abc").values()) == 1
    assert np.isfinite(blend.oof("abc")).all()
    assert np.isfinite(blend.pool(sources, {"overlap": sources["a"]})).all()


def test_what_a_handful_of_rows_promises_is_not_believed() -> None:
    answers = questions(29, seed=1)
    report = Blend.fit(members(answers, 1.2, 1.2, seed=1), answers, merit).report()
    assert report["gain"]["value"] > 2 * report["gain"]["se"]
    assert not report["used"]


# --- hill climbing and the ranker -----------------------------------------------------------------------------------


def test_hill_climbing_finds_the_merit_of_a_search_over_all_shares(targets: np.ndarray) -> None:
    sources = members(targets, 1.0, 1.3)
    sources["a"] = softmax(8 * np.log(sources["a"]))  # far too sure
    blend = Blend.fit(sources, targets, merit, method="hill")
    best = max(score(by_hand(sources, {"a": share / 8, "b": 1 - share}), targets) for share in np.linspace(0, 1, 101))
    assert blend.report()["method"] == "hill"
    assert score(blend.pool(sources), targets) >= best - 0.004
    assert score(blend.pool(sources), targets) > score(sources["b"], targets) + 0.02
    assert likelihood(blend.pool(sources), targets) > max(likelihood(p, targets) for p in sources.values())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hill_climbing_adds_source_after_source_and_keeps_the_best_mean_at_its_likeliest_temperature(seed: int) -> None:
    answers = questions(100, seed)
    sources = members(answers, 1.0, 1.2, 1.1, seed=seed)
    blend = Blend.fit(sources, answers, merit, method="hill", seed=seed)
    scaled = {name: Blend.fit({name: p}, answers, merit).pool({name: p}).astype(np.float64) for name, p in sources.items()}
    bag: list[str] = []
    steps = []
    for _ in range(10):
        tried = {name: score(softmax(np.log([scaled[one] for one in [*bag, name]]).mean(0)), answers) for name in scaled}
        bag.append(max(tried, key=lambda name: tried[name]))
        steps.append((tried[bag[-1]], -len(bag)))
    bag = bag[: -max(steps)[1]]
    weights, pooled = blend.weights("abc"), blend.pool(sources)
    shares = {name: weights[name] / blend.weights(name)[name] for name in "abc"}
    assert {name: share / sum(shares.values()) for name, share in shares.items()} == pytest.approx(
        {name: bag.count(name) / len(bag) for name in "abc"}
    )
    assert likelihood(pooled, answers) >= max(likelihood(softmax(t * np.log(pooled)), answers) for t in (0.8, 0.9, 1.1, 1.25))


def test_hill_climbing_leaves_a_contrary_source_out(targets: np.ndarray) -> None:
    weights = Blend.fit(members(targets, 1.2, 1.2, -1.0), targets, merit, method="hill").weights("abc")
    assert weights["c"] == 0.0
    assert min(weights["a"], weights["b"]) > 0.3


def specialists(rows: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two sources: the hint says which of them knows the answer; the other one is just as sure."""
    answers = questions(rows, seed)
    rng = np.random.default_rng(seed)
    first = rng.random(rows) < 0.5
    wrong = rng.integers(0, C, rows)
    a, b = (member(np.where(knows, answers, wrong), skill=2.0, seed=2 * seed + k) for k, knows in enumerate((first, ~first)))
    hint = np.repeat(first[:, None], C, 1) + rng.normal(0, 0.1, (rows, C))
    return answers, {"a": a, "b": b}, {"length": hint.astype(np.float32)}


def test_the_ranker_is_chosen_where_a_hint_says_whom_to_trust_and_serves_rows_that_have_it_all() -> None:
    answers, sources, hints = specialists(400, 1)
    blend = Blend.fit(sources, answers, merit, hints=hints)
    plain = Blend.fit(sources, answers, merit, method="pool")
    assert (blend.report()["method"], blend.report()["used"]) == ("ranker", True)
    assert blend.report()["gain"]["value"] > plain.report()["gain"]["value"] + 0.05
    new, test, known = specialists(1000, 2)
    ranked = blend.pool(test, known)
    assert score(ranked, new) > score(plain.pool(test), new) + 0.05
    assert score(blend.oof("ab"), answers) == pytest.approx(score(ranked, new), abs=0.06)
    assert ranked.sum(-1) == pytest.approx(np.ones(1000), abs=1e-5)
    assert blend.pool(test) == pytest.approx(by_hand(test, blend.weights("ab")), abs=1e-6)  # without hints: the pool
    known["length"][5], test["b"][6] = np.nan, np.nan
    mixed = blend.pool(test, known)
    assert mixed[5] == pytest.approx(blend.pool(test)[5], abs=1e-7)
    assert mixed[6] == pytest.approx(plain.pool(test)[6], abs=1e-7)
    assert (mixed[7:] == ranked[7:]).all()


def test_the_ranker_is_not_chosen_where_the_sources_say_all_there_is() -> None:
    chosen = []
    for seed in range(5):
        answers = questions(300, seed)
        hints = {"length": np.random.default_rng([seed, 9]).normal(size=(300, C))}
        chosen.append(Blend.fit(members(answers, 1.5, 1.0, seed=seed), answers, merit, hints=hints).report()["method"])
    assert "ranker" not in chosen
    assert "pool" in chosen


def test_the_ranker_gives_the_same_twice() -> None:
    answers, sources, hints = specialists(300, 3)
    one, two = (Blend.fit(sources, answers, merit, method="ranker", hints=hints) for _ in range(2))
    assert (one.pool(sources, hints) == two.pool(sources, hints)).all()
    assert (one.oof("ab") == two.oof("ab")).all()


def test_the_ranker_keeps_an_option_last_that_every_source_rules_out() -> None:
    answers, sources, hints = specialists(300, 4)
    blend = Blend.fit(sources, answers, merit, method="ranker", hints=hints)
    blank = {name: p.copy() for name, p in sources.items()}
    for prediction in blank.values():
        prediction[:, 2] = 0.0
    assert blend.report()["used"]
    assert (blend.pool(blank, hints).argmin(-1) == 2).all()


def test_the_ranker_is_for_rows_that_are_complete_and_complete_can_be_said() -> None:
    answers, sources, hints = specialists(400, 1)
    sources["a@short"] = member(answers, skill=0.2, seed=9)
    blend = Blend.fit(sources, answers, merit, hints=hints, complete=("a", "b"))
    assert blend.report()["method"] == "ranker"
    assert set(blend.report()["weights"]) == {"a", "b"}
    assert blend.report(sources)["method"] == "pool"
    assert blend.report(("b", "a@short"))["method"] == "pool"


# --- around it ------------------------------------------------------------------------------------------------------


def test_an_unknown_method_is_refused_with_the_nearest(targets: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"blend method 'rankr' is unknown \(did you mean 'ranker'\?\)"):
        Blend.fit(members(targets, 1.0), targets, merit, method="rankr")
    with pytest.raises(ConfigError, match="'single' is unknown"):
        Blend.fit(members(targets, 1.0), targets, merit, method="single")


def test_a_source_without_oof_cannot_be_pooled(targets: np.ndarray) -> None:
    blend = Blend.fit(members(targets, 1.0), targets, merit)
    with pytest.raises(AssertionError, match="'z'"):
        blend.pool({"z": member(targets, skill=1.0, seed=0)})


def test_what_is_given_out_can_be_changed_without_harm(targets: np.ndarray) -> None:
    blend = Blend.fit(members(targets, 1.0, 1.2), targets, merit)
    blend.oof("ab")[:] = 0
    blend.weights("ab")["a"] = 9.0
    assert blend.oof("ab").min() > 0
    assert blend.weights("ab")["a"] < 3


def test_no_pattern_has_no_weights(targets: np.ndarray) -> None:
    assert Blend.fit(members(targets, 1.0, 1.2), targets, merit).weights(()) == {}


def test_a_blend_without_a_ranker_loads_neither_torch_nor_scikit_learn() -> None:
    code = (
        "import sys, numpy as np; from kit.inference.blend import Blend; from kit.metrics import average_precision as merit\n"
        "p = np.random.default_rng(0).dirichlet(np.ones(3), 50); b = Blend.fit({'a': p, 'b': p[::-1]}, p.argmax(1), merit); b.report()\n"
        "assert not {'torch', 'sklearn', 'pandas'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
