"""What is scored next, and why: the planner on made-up members, without a crew."""

from __future__ import annotations

import numpy as np
import pytest

from kit.budget import Budget, Cost
from kit.inference.planner import Pass, Planner
from kit.inference.simulate import Fault, Law
from tests.inference.worlds import TASK, World, make_world, rows_of

WEAK = Law("weak", {"full": 0.6}, row_s=0.1, load_s=2)
STRONG = Law("strong", {"full": 2.0, "short": 1.7}, fits=("fold0", "fold1"), row_s=1.0, load_s=5)


def score_next(world: World, loaded: Pass | None, remaining: float) -> Pass | None:
    """Do what the planner chooses."""
    choice = world.planner.next(loaded, remaining)
    if choice is None:
        return None
    world.planner.take(choice.work, choice.rows)
    world.planner.record(choice.work, choice.rows, world.truth[choice.work.member][choice.work[1:]][choice.rows])
    return choice.work


def score_all(world: World, work: Pass, rows: np.ndarray | None = None) -> None:
    rows = np.arange(world.planner.rows) if rows is None else rows
    world.planner.record(work, rows, world.truth[work.member][work[1:]][rows])


def test_nothing_is_chosen_without_time_or_when_all_is_done() -> None:
    world = make_world([WEAK])
    assert world.planner.next(None, 0.0) is None
    assert world.planner.next(None, -1.0) is None
    score_all(world, Pass("weak", "fold0"))
    assert world.planner.next(None, 1e6) is None
    assert world.planner.left() == {}


def test_the_choice_says_in_one_line_what_it_brings_and_costs() -> None:
    choice = make_world([WEAK, STRONG]).planner.next(None, 1000.0)
    assert choice is not None
    assert "\n" not in choice.why
    for part in (" ".join(choice.work), f"{len(choice.rows)} rows", f"+{choice.gain / 120:.5f}", f"{choice.forecast.mid:.1f} s", "per s", "next best"):
        assert part in choice.why


def test_the_dear_member_goes_to_the_most_doubtful_rows() -> None:
    world = make_world([WEAK, STRONG])
    score_all(world, Pass("weak", "fold0"))
    doubt = TASK.doubt(world.planner.prediction())
    work, chosen = None, Pass("strong", "fold0", "short")
    while int(world.planner._has["strong@short"].sum()) < 40:
        work = score_next(world, work, 60.0)
        assert work == chosen
    scored = world.planner._has["strong@short"]
    assert doubt[scored].mean() > doubt[~scored].mean() + 0.05


def test_among_rows_of_equal_gain_the_shorter_come_first() -> None:
    world = make_world([WEAK])
    world.planner.player("weak").sizes["full"][:] = np.where(np.arange(120) % 2, 200.0, 50.0)
    choice = world.planner.next(None, 20.0)
    assert choice is not None
    assert (choice.rows % 2 == 0).all()


def test_what_takes_too_long_to_load_waits_for_what_is_loaded() -> None:
    twin = Law("twin", {"full": 0.6}, row_s=0.1, load_s=2)
    world = make_world([WEAK, twin])
    loaded = Pass("twin", "fold0")
    score_all(world, loaded, np.arange(10))
    choice = world.planner.next(loaded, 100.0)
    assert choice is not None
    assert choice.work == loaded
    world.planner.player("weak").load = Cost(0.001)
    fresh = world.planner.next(None, 3.0)
    assert fresh is not None
    assert fresh.work.member == "weak"  # the twin's loading would take most of the time


def test_nothing_is_loaded_that_could_not_score_a_row_in_time() -> None:
    world = make_world([Law("slow", {"full": 2.0}, row_s=0.1, load_s=500)])
    assert world.planner.next(None, 20.0) is None


def test_a_chunk_is_what_is_likely_to_end_in_time() -> None:
    world = make_world([STRONG])
    for _ in range(20):
        world.planner.player("strong").token.update(1.0, 100)
    score_all(world, Pass("strong", "fold0"), np.arange(5))
    choice = world.planner.next(Pass("strong", "fold0"), 12.0)
    assert choice is not None
    assert choice.forecast.mid <= 2.0
    assert choice.forecast.high <= 12
    last = world.planner.next(Pass("strong", "fold0"), 1.5)
    assert last is not None
    assert len(last.rows) >= 1
    assert last.forecast.high <= 1.5


def test_with_ample_time_every_fit_is_scored_in_full_and_no_cheaper_view_but_as_insurance() -> None:
    world = make_world([STRONG], total_s=3000)
    world.dispatch.run()
    assert sorted(rows_of(world, "strong", fit="fold0")) == sorted(rows_of(world, "strong", fit="fold1")) == list(range(120))
    assert world.planner.left() == {}
    assert len(rows_of(world, "strong", "short")) == 0 or world.planner._insurance == "strong@short"


def test_the_cheaper_view_takes_over_when_time_is_short() -> None:
    world = make_world([Law("strong", {"full": 2.0, "short": 1.9}, row_s=1.0, load_s=1)], total_s=70)
    world.dispatch.run()
    assert len(rows_of(world, "strong", "short")) > 60
    assert np.isfinite(world.planner.prediction()).all()


def test_a_member_without_weight_is_not_scored_beyond_insurance() -> None:
    noise = Law("noise", {"full": 0.0}, row_s=0.5, load_s=2)
    world = make_world([Law("strong", {"full": 2.0}, row_s=0.1, load_s=2), noise], total_s=5000)
    assert world.planner.core == {"strong"}
    world.dispatch.run()
    assert len(rows_of(world, "noise")) == 0
    assert len(rows_of(world, "strong")) == 120


def test_views_that_pay_are_scored_beside_the_full_one() -> None:
    world = make_world([Law("strong", {"full": 1.5, "flipped": 1.5}, row_s=0.1, load_s=2)], total_s=5000, seed=4)
    assert world.planner.core == {"strong", "strong@flipped"}
    world.dispatch.run()
    assert len(rows_of(world, "strong", "flipped")) == len(rows_of(world, "strong")) == 120


def test_the_full_view_counts_instead_of_the_cheaper_one() -> None:
    world = make_world([STRONG])
    score_all(world, Pass("strong", "fold0", "short"))
    score_all(world, Pass("strong", "fold0"), np.arange(60))
    alone = make_world([STRONG])
    score_all(alone, Pass("strong", "fold0"), np.arange(60))
    np.testing.assert_array_equal(world.planner.prediction()[:60], alone.planner.prediction()[:60])
    assert np.isfinite(world.planner.prediction()[60:]).all()
    assert np.isnan(alone.planner.prediction()[60:]).all()


def test_what_a_dropped_member_has_scored_still_counts() -> None:
    world = make_world([WEAK, Law("strong", {"full": 2.0}, row_s=1.0, load_s=5)])
    score_all(world, Pass("strong", "fold0"))
    best = world.merit
    world.planner.drop("strong", "it died")
    score_all(world, Pass("weak", "fold0"))
    assert world.merit > best - 0.03
    assert world.planner.next(None, 1e4) is None
    assert any("strong is given up: it died" in text for text in world.listener.decisions)


def test_a_member_restricted_to_its_cheaper_view_keeps_what_it_scored_in_full() -> None:
    world = make_world([STRONG])
    score_all(world, Pass("strong", "fold0"), np.arange(60))
    before = world.planner.prediction().copy()
    assert world.planner.restrict("strong")
    np.testing.assert_array_equal(world.planner.prediction(), before)
    loaded: Pass | None = None
    while (loaded := score_next(world, loaded, 1e4)) is not None:
        assert loaded.view == "short"
    np.testing.assert_array_equal(world.planner.prediction()[:60], before[:60])
    assert np.isfinite(world.planner.prediction()).all()
    assert not make_world([WEAK]).planner.restrict("weak")


def test_rows_that_did_not_come_out_finite_are_not_tried_again_and_end_the_work() -> None:
    world = make_world([STRONG])
    loaded: Pass | None = None
    for _ in range(1000):
        choice = world.planner.next(loaded, 1e4)
        if choice is None:
            break
        world.planner.take(choice.work, choice.rows)
        world.planner.record(choice.work, choice.rows, np.full((len(choice.rows), 5), np.nan))
        loaded = choice.work
    else:
        pytest.fail("it never ends")
    assert np.isnan(world.planner.prediction()).all()


def test_rows_that_are_being_scored_are_not_given_out_again_until_released() -> None:
    world = make_world([WEAK])
    first = world.planner.next(None, 1000.0, 2)
    assert first is not None
    world.planner.take(first.work, first.rows)
    second = world.planner.next(None, 1000.0, 2)
    assert second is not None
    assert not set(first.rows) & set(second.rows)
    world.planner.release(first.work, first.rows)
    assert world.planner.left() == {"weak": 120}


def test_a_slot_does_not_load_a_member_for_rows_that_another_will_be_through_with_before() -> None:
    world = make_world([Law("weak", {"full": 0.6}, row_s=0.1, load_s=50)])
    work = Pass("weak", "fold0")
    score_all(world, work, np.arange(60))
    world.planner.take(work, np.arange(60, 80))
    assert world.planner.next(None, 1000.0, 2) is None  # 4 s of work are left, loading takes 50
    assert world.planner.next(work, 1000.0, 2) is not None


def test_contexts_come_first_and_only_once() -> None:
    world = make_world([Law("reader", {"full": 2.0}, row_s=0.1, load_s=2, key="k")])
    choice = world.planner.next(None, 1000.0)
    assert choice is not None
    assert sorted(choice.prepare) == list(range(120))
    assert "contexts of 120 rows for reader" in choice.why
    world.planner.fetching("k")
    assert world.planner.next(None, 1000.0) is None
    world.planner.fetched("k", np.arange(40))
    ready = world.planner.next(None, 7.0)
    assert ready is not None
    assert len(ready.prepare) == 0
    assert set(ready.rows) <= set(range(40))
    world.planner.fetched("k")
    rest = world.planner.next(None, 1000.0)
    assert rest is not None
    assert len(rest.prepare) == 0


def test_a_faster_machine_changes_what_is_worth_having() -> None:
    laws = [Law("strong", {"full": 2.0, "short": 1.2}, row_s=1.0, load_s=1)]
    world = make_world(laws)
    choice = world.planner.next(None, 50.0)
    assert choice is not None
    assert choice.work.view == "short"
    for _ in range(10):
        world.planner.player("strong").token.update(0.1, 100)
    choice = world.planner.next(None, 50.0)
    assert choice is not None
    assert choice.work.view == "full"
    assert sum("worth having" in text for text in world.listener.decisions) == 2


def test_with_ample_time_a_slot_stays_with_what_it_has_loaded() -> None:
    weak = Law("weak", {"full": 1.8}, fits=("fold0", "fold1"), row_s=0.1, load_s=2)
    world = make_world([weak, Law("strong", {"full": 2.0}, row_s=0.1, load_s=2)])
    score_all(world, Pass("weak", "fold0"))
    score_all(world, Pass("weak", "fold1"), np.arange(60))
    ample, short = world.planner.next(Pass("weak", "fold1"), 1e5), world.planner.next(Pass("weak", "fold1"), 8.0)
    assert ample is not None
    assert short is not None
    assert ample.work == Pass("weak", "fold1")
    assert short.work == Pass("strong", "fold0")


def test_rows_that_are_or_will_be_there_in_full_are_not_scored_in_the_cheaper_view() -> None:
    world = make_world([STRONG])
    score_all(world, Pass("strong", "fold0"), np.arange(60))
    world.planner.take(Pass("strong", "fold0"), np.arange(60, 80))
    assert np.flatnonzero(world.planner._open(Pass("strong", "fold0", "short"))).tolist() == list(range(80, 120))


def test_what_was_left_out_is_scored_rather_than_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.inference.planner.worth_having", lambda *_: frozenset({"weak"}))
    world = make_world([WEAK, STRONG])
    score_all(world, Pass("weak", "fold0"))
    choice = world.planner.next(None, 1000.0)
    assert choice is not None
    assert choice.work.member == "strong"


def test_the_blend_is_the_same_whatever_the_order_and_the_interruptions() -> None:
    laws = [WEAK, STRONG, Law("third", {"full": 1.0}, fits=("fold0", "fold1", "fold2"), row_s=0.3, load_s=3)]
    passes = [Pass(law.name, fit) for law in laws for fit in law.fits]
    results = []
    for seed in range(3):
        world, rng = make_world(laws), np.random.default_rng(seed)
        chunks = [(work, part) for work in passes for part in np.array_split(rng.permutation(120), rng.integers(1, 6))]
        for index in rng.permutation(len(chunks)):
            score_all(world, *chunks[index])
        results.append(world.planner.prediction())
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_the_second_fit_is_worth_more_where_the_first_two_disagreed() -> None:
    law = Law("strong", {"full": 1.0}, fits=("fold0", "fold1", "fold2"), row_s=0.1, load_s=1)
    alike, apart = make_world([law]), make_world([law])
    for world, second in ((alike, "fold0"), (apart, "fold1")):
        score_all(world, Pass("strong", "fold0"))
        world.planner.record(Pass("strong", "fold1"), np.arange(100), world.truth["strong"][second, "full"][:100])
    rows = np.arange(100, 120)
    gains = [world.planner._gain(Pass("strong", "fold1"))[rows].sum() for world in (alike, apart)]
    assert gains[1] > 1.2 * gains[0] > 0


def test_the_expected_metric_begins_at_chance_and_rises() -> None:
    world = make_world([WEAK, STRONG])
    expected = [world.planner.expected()]
    for work in (Pass("weak", "fold0"), Pass("strong", "fold0")):
        score_all(world, work)
        expected.append(world.planner.expected())
    assert expected[0] == pytest.approx(0.37, abs=0.05)
    assert expected[0] < expected[1] < expected[2] < 1


def test_a_member_s_own_predictions_take_the_cheaper_view_where_there_is_no_other() -> None:
    world = make_world([STRONG])
    score_all(world, Pass("strong", "fold0", "short"), np.arange(80))
    score_all(world, Pass("strong", "fold0"), np.arange(40))
    own = world.planner.of_member("strong")
    np.testing.assert_array_equal(own[:40], world.truth["strong"]["fold0", "full"][:40])
    np.testing.assert_array_equal(own[40:80], world.truth["strong"]["fold0", "short"][40:80])
    assert np.isnan(own[80:]).all()


def test_others_take_over_when_a_member_dies() -> None:
    world = make_world([WEAK, STRONG], faults={"strong": Fault("dies")}, total_s=1000)
    world.dispatch.run()
    assert set(world.planner.dropped) == {"strong"}
    assert len(rows_of(world, "weak")) == 120
    assert np.isfinite(world.planner.prediction()).all()


def test_no_member_is_loaded_again_and_again_for_a_few_rows() -> None:
    laws = [Law(f"m{k}", {"full": 1.0 + 0.2 * k}, fits=("fold0", "fold1"), row_s=0.2, load_s=15, key="k" if k else None) for k in range(3)]
    world = make_world(laws, total_s=230)  # everything takes 300 s
    world.dispatch.run()
    assert sum(span.load_s > 0 for span in world.dispatch.spans) <= 8


def test_choosing_is_quick() -> None:
    laws = [Law(f"m{k}", {"full": 0.5 + 0.3 * k, "short": 0.4}, fits=("a", "b", "c"), row_s=0.1, load_s=5) for k in range(4)]
    world = make_world(laws, rows=1000)
    planner: Planner = world.planner
    planner.next(None, 700.0)
    watch = Budget(used_s=0)
    for _ in range(10):
        planner.next(None, 700.0)
    assert watch.elapsed() < 10 * 0.03  # on a quiet machine 0.003 s each
