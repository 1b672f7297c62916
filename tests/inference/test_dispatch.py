"""The loop of a run on a simulated crew, and on a scripted one where the order of events matters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.budget import Budget
from kit.inference.crew import Event, Fetch, Order
from kit.inference.dispatch import Dispatch, Settings
from kit.inference.planner import Pass
from kit.inference.simulate import Clock, Fault, Law, Speed
from tests.inference.worlds import BATCH_TOKENS, World, make_world, rows_of

WEAK = Law("weak", {"full": 0.6}, row_s=0.1, load_s=2)
STRONG = Law("strong", {"full": 2.0, "short": 1.7}, row_s=0.5, load_s=5)


def said(world: World, *words: str) -> list[str]:
    return [text for text in world.listener.decisions if all(word in text for word in words)]


class ScriptedCrew:
    """Tells what it is told to tell; each entry of the script is (seconds that pass, events for the latest order)."""

    def __init__(self, clock: Clock, script: list[tuple[float, list[Event]]]) -> None:
        self.slots = ("cpu",)
        self.clock, self.script = clock, script
        self.sent: list[Order | Fetch] = []
        self.dismissed = 0

    def send(self, slot: int, order: Order | Fetch) -> None:
        self.sent.append(order)

    def wait(self, seconds: float) -> list[Event]:
        passing, events = self.script.pop(0) if self.script else (seconds + 1e-6, [])
        self.clock.now += min(passing, seconds + 1e-6)
        return events

    def dismiss(self, slot: int) -> None:
        self.dismissed += 1

    def close(self) -> None:
        pass


def scripted(script: list[tuple[float, list[Event]]], total_s: float = 1000.0, patience_s: float = 60.0) -> tuple[World, ScriptedCrew, Dispatch]:
    world = make_world([WEAK], rows=30, total_s=total_s)
    crew = ScriptedCrew(world.clock, script)
    return world, crew, Dispatch(world.planner, crew, world.budget, {"weak": Settings(100)}, world.listener, patience_s)


def test_everything_is_scored_when_there_is_time_and_the_run_ends_then() -> None:
    world = make_world([WEAK, STRONG], total_s=1000)
    world.dispatch.run()
    assert world.planner.left() == {}
    assert world.budget.elapsed() < 120
    assert {span.state for span in world.dispatch.spans} == {"done"}
    assert all(span.start <= span.end and span.load_s >= 0 for span in world.dispatch.spans)


def test_at_the_deadline_what_is_running_is_cut_and_given_back() -> None:
    world = make_world([STRONG], total_s=20, speeds=[Speed((10.0,), (1.0, 0.001))])
    world.dispatch.run()
    assert world.budget.elapsed() == pytest.approx(20, abs=0.5)
    assert [span.state for span in world.dispatch.spans][-1] == "cut"
    assert world.dispatch.spans[-1].end == pytest.approx(20, abs=0.01)
    assert not any(taken.any() for taken in world.planner._taken.values())
    assert said(world, "the time is up")


def test_at_the_deadline_the_processes_that_work_are_ended() -> None:
    _, crew, dispatch = scripted([], total_s=10)
    dispatch.run()
    assert crew.dismissed == 1


def test_nothing_begins_in_the_reserve() -> None:
    world = make_world([WEAK])
    budget = Budget(100, 40, used_s=61, clock=world.clock)
    Dispatch(world.planner, world.crew, budget, {"weak": Settings(100)}, world.listener).run()
    assert world.dispatch.spans == []
    assert np.isnan(world.planner.prediction()).all()


def test_two_slots_share_the_rows_and_end_together() -> None:
    law = Law("weak", {"full": 0.6}, row_s=2.0, load_s=2)
    world = make_world([law], slots=("cuda:0", "cuda:1"), speeds=[Speed(), Speed(factors=(0.5,))], total_s=10_000)
    world.dispatch.run()
    assert sorted(rows_of(world, "weak")) == list(range(120))
    ends = [max(span.end for span in world.dispatch.spans if span.slot == slot) for slot in (0, 1)]
    assert abs(ends[0] - ends[1]) < 10
    assert max(ends) < 120 * 2.0 / 1.5 + 20


def test_with_two_slots_no_row_is_scored_twice_by_a_fit() -> None:
    law = Law("strong", {"full": 2.0, "short": 1.5, "flipped": 2.0}, fits=("fold0", "fold1", "fold2"), row_s=0.2, load_s=3)
    world = make_world([law, WEAK], slots=("cuda:0", "cuda:1"), total_s=5000)
    world.dispatch.run()
    for work in {span.work for span in world.dispatch.spans}:
        rows = rows_of(world, work.member, work.view, fit=work.fit)
        assert len(rows) == len(set(rows)), work


def test_a_device_that_becomes_slower_is_followed() -> None:
    world = make_world([Law("strong", {"full": 2.0}, row_s=0.5, load_s=5)], total_s=65, speeds=[Speed((20.0,), (1.0, 0.25))])
    world.dispatch.run()
    early, late = ([span for span in world.dispatch.spans if span.state == "done" and (span.start < 20) == first] for first in (True, False))
    assert late[-1].forecast.mid / len(late[-1].rows) > 2 * early[-1].forecast.mid / len(early[-1].rows)
    assert world.planner.player("strong").token.forecast().mid * 100 == pytest.approx(0.5 / 0.25, rel=0.35)


@pytest.mark.parametrize("kind", ["dies", "raises"])
def test_a_member_that_dies_is_given_up_and_its_scores_kept(kind: str) -> None:
    world = make_world([WEAK, STRONG], faults={"strong": Fault(kind, after=30)}, total_s=1000)  # type: ignore[arg-type]
    world.dispatch.run()
    assert list(world.planner.dropped) == ["strong"]
    assert len(rows_of(world, "strong")) + len(rows_of(world, "strong", "short")) >= 30
    assert len(said(world, "strong is given up")) == 1
    assert len(rows_of(world, "weak")) == 120


def test_a_member_that_hangs_is_given_up_after_the_patience() -> None:
    world = make_world([WEAK, STRONG], faults={"strong": Fault("hangs")}, patience_s=30, total_s=1000)
    world.dispatch.run()
    (span,) = [span for span in world.dispatch.spans if span.state == "failed"]
    assert span.end - span.start == pytest.approx(max(30, 3 * span.forecast.high), abs=0.1)
    assert said(world, "strong is given up: no sign of life for")
    assert len(rows_of(world, "weak")) == 120


def test_a_beat_renews_the_patience() -> None:
    order = 1
    beats = [(50.0, [Event(0, order, "beat")]) for _ in range(5)]
    _world, crew, dispatch = scripted(beats)
    dispatch.run()
    assert dispatch.spans[0].end == pytest.approx(5 * 50 + 60, abs=1)
    assert dispatch.spans[0].state == "failed"
    assert crew.dismissed == 1


def test_events_of_an_order_that_was_given_up_are_ignored() -> None:
    late = Event(0, 1, "scored", 1.0, rows=(0,), prediction=np.full((1, 5), 0.2, np.float32))
    failed = Event(0, 1, "failed", why="out of memory", memory=True)
    world, crew, dispatch = scripted([(1.0, [failed]), (1.0, [late]), (1.0, [failed])], total_s=50)
    dispatch.run()
    assert np.isnan(world.planner.prediction()).all()
    assert [order.serial for order in crew.sent] == [1, 2]
    assert [order.batch_tokens for order in crew.sent if isinstance(order, Order)] == [100, 25]


def test_lack_of_memory_is_met_by_smaller_batches_then_shorter_then_lower_precision_then_not_at_all() -> None:
    world = make_world([WEAK, STRONG], faults={"strong": Fault("memory", most_tokens=0)}, precision="fp32", total_s=2000)
    world.dispatch.run()
    told = [text.rpartition(": ")[2] for text in said(world, "strong: OutOfMemoryError")]
    assert told == [f"batches of {BATCH_TOKENS // 4} tokens", "shorter sequences only", "in fp16"]
    assert said(world, "strong is given up: OutOfMemoryError")
    assert len(rows_of(world, "weak")) == 120


@pytest.mark.parametrize(("most_tokens", "view", "steps"), [(BATCH_TOKENS // 4, "full", 1), (BATCH_TOKENS // 8, "short", 2), (BATCH_TOKENS // 16, "short", 3)])
def test_the_first_step_back_that_helps_is_the_last(most_tokens: int, view: str, steps: int) -> None:
    world = make_world([STRONG], faults={"strong": Fault("memory", most_tokens=most_tokens)}, precision="fp32", total_s=2000)
    world.dispatch.run()
    assert len(said(world, "OutOfMemoryError")) == steps
    assert world.planner.dropped == {}
    assert len(rows_of(world, "strong", view)) == 120


def test_two_slots_that_lack_memory_at_once_are_one_step_back() -> None:
    world = make_world([Law("weak", {"full": 0.6}, row_s=2.0, load_s=2)], slots=("cuda:0", "cuda:1"), faults={"weak": Fault("memory", most_tokens=BATCH_TOKENS // 4)})
    world.dispatch.run()
    assert sorted(rows_of(world, "weak")) == list(range(120))
    assert len(said(world, "batches of 1024 tokens")) == 1
    assert len(said(world, "once more")) == 1


def test_scores_that_are_not_finite_are_left_out_and_said() -> None:
    world = make_world([WEAK, STRONG], faults={"strong": Fault("nan")}, total_s=2000)
    world.dispatch.run()
    assert said(world, "strong fold0", "rows are left out", "not finite")
    assert len(rows_of(world, "weak")) == 120
    assert np.isfinite(world.planner.prediction()).all()
    assert world.planner.left() == {}


def test_contexts_are_there_before_the_rows_are_scored() -> None:
    world = make_world([Law("reader", {"full": 2.0}, row_s=0.1, load_s=2, key="k")], rows=700)
    world.dispatch.run()
    fetched: set[int] = set()
    for span in world.dispatch.spans:
        if span.key:
            fetched |= set(span.rows)
        else:
            assert set(span.rows) <= fetched
    assert len(rows_of(world, "reader")) == 700
    assert [len(span.rows) for span in world.dispatch.spans if span.key] == [256, 444]


def test_without_contexts_it_is_scored_all_the_same_and_said() -> None:
    world = make_world([Law("reader", {"full": 2.0}, row_s=0.1, load_s=2, key="k")], fetch_s=float("inf"))
    world.dispatch.run()
    assert world.dispatch.no_contexts == {"k": "OSError: no such index"}
    assert said(world, "contexts k: OSError", "scored without")
    assert len(rows_of(world, "reader")) == 120


def test_contexts_that_take_too_long_leave_time_for_scoring() -> None:
    world = make_world([Law("reader", {"full": 2.0}, row_s=0.05, load_s=2, key="k")], rows=1000, fetch_s=1.0, total_s=600)
    world.dispatch.run()
    assert np.isfinite(world.planner.prediction()).all(-1).sum() > 100


def test_an_earlier_start_s_scores_are_not_scored_again() -> None:
    world = make_world([STRONG])
    world.planner.record(Pass("strong", "fold0"), np.arange(100), world.truth["strong"]["fold0", "full"][:100])
    world.dispatch.run()
    undisturbed = make_world([STRONG])
    undisturbed.dispatch.run()
    assert sorted(rows_of(world, "strong")) == list(range(100, 120))
    np.testing.assert_array_equal(world.planner.prediction(), undisturbed.planner.prediction())


def test_spans_are_written_as_json_values() -> None:
    world = make_world([WEAK], rows=10)
    world.dispatch.run()
    summary = world.dispatch.spans[0].summary()
    assert summary["member"] == "weak"
    assert summary["rows"] == len(world.dispatch.spans[0].rows)
    assert summary["state"] == "done"
    assert len(summary["forecast_s"]) == 3


def test_with_time_to_spare_and_time_too_short_the_better_end_has_more_of_it() -> None:
    merits = []
    for total_s in (8.0, 40.0, 400.0):
        world = make_world([WEAK, STRONG], rows=400, total_s=total_s, seed=5)
        world.dispatch.run()
        merits.append(world.merit)
    assert merits[0] < merits[1] < merits[2]


FAULTS = st.one_of(
    st.none(),
    st.builds(Fault, st.sampled_from(["dies", "raises", "hangs", "nan", "memory"]), st.integers(0, 200), st.sampled_from([0, 512, 2048])),
)
PERIODS = st.tuples(st.floats(0.1, 300), st.floats(0.1, 5), st.floats(0.1, 5))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    total_s=st.floats(1, 2000), slots=st.integers(1, 3), fits=st.integers(1, 3), faults=st.tuples(FAULTS, FAULTS), periods=PERIODS,
    fetch_s=st.sampled_from([0.0, 0.5, float("inf")]), load_s=st.floats(0.0, 100),
)  # fmt: skip
def test_whatever_happens_it_ends_by_the_deadline_with_all_that_was_scored(
    total_s: float, slots: int, fits: int, faults: tuple[Fault | None, Fault | None], periods: tuple[float, float, float], fetch_s: float, load_s: float
) -> None:
    names = tuple(f"fold{fit}" for fit in range(fits))
    laws = [
        Law("weak", {"full": 0.6, "flipped": 0.6}, fits=names, row_s=0.05, load_s=load_s),
        Law("strong", {"full": 2.0, "short": 1.5}, fits=names, row_s=0.4, load_s=5, start_s=1, key="k"),
    ]
    struck = {law.name: fault for law, fault in zip(laws, faults, strict=True) if fault}
    speed = Speed(periods[:1], periods[1:])
    world = make_world(laws, rows=60, total_s=total_s, slots=["cuda:0"] * slots, speeds=[speed] * slots, faults=struck, fetch_s=fetch_s, spread=3.0)
    world.dispatch.run()
    assert world.budget.elapsed() <= total_s + 0.1 * slots + 1e-3  # a tenth of a second to end a process
    assert all(span.state != "busy" for span in world.dispatch.spans)
    good = [span for span in world.dispatch.spans if span.state == "done" and not span.key and struck.get(span.name, Fault("dies")).kind != "nan"]
    scored = {row for span in good for row in span.rows}
    assert scored == set(np.flatnonzero(np.isfinite(world.planner.prediction()).all(-1))) or any(fault.kind == "nan" for fault in struck.values())
    for work in {span.work for span in good}:
        rows = np.concatenate([span.rows for span in good if span.work == work])
        assert len(rows) == len(set(rows.tolist()))


# --- members that stream their layers ------------------------------------------------------------------------------------------------------


def orders_of(world: World, name: str) -> list[int]:
    """Rows of a member's orders, in their order."""
    return [len(span.rows) for span in world.dispatch.spans if span.name == name]


def scored_by(world: World, name: str) -> int:
    return int(np.isfinite(world.planner.of_member(name)).all(-1).sum())


STREAMED = Law("streamed", {"full": 2.0}, row_s=0.5, load_s=5)


def test_a_member_that_streams_is_tried_and_then_gets_all_its_rows_in_one_order() -> None:
    world = make_world([WEAK, STREAMED], total_s=1000, read_s={"streamed": 40})
    world.dispatch.run()
    assert orders_of(world, "streamed") == [16, 120]
    assert scored_by(world, "streamed") == 120
    assert said(world, "a trial of", "streamed")
    assert not any(taken.any() for taken in world.planner._taken.values())


def test_a_member_that_turns_out_not_to_stream_goes_on_in_chunks() -> None:
    world = make_world([WEAK, STREAMED], total_s=1000, read_s={"streamed": 0})
    world.dispatch.run()
    rows = orders_of(world, "streamed")
    assert rows[0] == 16
    assert sum(rows) == 120, "what the trial has scored is not scored again"
    assert len(rows) > 3
    assert len(said(world, "a trial of")) == 1


def test_a_pass_that_might_not_end_in_time_is_not_begun() -> None:
    world = make_world([WEAK, STREAMED], total_s=60, read_s={"streamed": 45})
    world.dispatch.run()
    assert orders_of(world, "streamed") in ([], [16])
    assert scored_by(world, "streamed") == 0
    assert scored_by(world, "weak") == 120


def test_a_pass_takes_no_more_rows_than_end_in_time() -> None:
    world = make_world([STREAMED], total_s=60, read_s={"streamed": 10}, rows=400)
    world.dispatch.run()
    assert "cut" not in {span.state for span in world.dispatch.spans}
    assert 50 <= scored_by(world, "streamed") < 110
