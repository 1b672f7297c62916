"""The simulated clock and crew, and what simulated runs come to."""

from __future__ import annotations

import numpy as np
import pytest

from kit.inference.crew import Event, Fetch, Order
from kit.inference.simulate import Actor, Clock, Fault, Report, Run, SimulatedCrew, Speed, simulate

ROWS = 10


def make_crew(fault: Fault | None = None, **options: object) -> tuple[Clock, SimulatedCrew]:
    """Member "m": 1 s per row, half in the view "short", 3 s to load, 2 s to start."""
    predictions = {(fit, view): np.random.default_rng(0).random((ROWS, 5)).astype(np.float32) for fit in ("a", "b") for view in ("full", "short")}
    sizes = {"full": np.full(ROWS, 100.0), "short": np.full(ROWS, 50.0)}
    clock = Clock()
    actors = {name: Actor(predictions, sizes, 0.01, 3.0, 2.0, fault) for name in ("m", "other")}
    return clock, SimulatedCrew(clock, actors, **options)  # type: ignore[arg-type]


def order(rows: range, serial: int = 1, member: str = "m", fit: str = "a", view: str = "full", tokens: int = 100, precision: str = "auto") -> Order:
    return Order(serial, member, fit, view, tuple(rows), tokens, precision)


def next_event(crew: SimulatedCrew, seconds: float = 1000.0) -> Event:
    """The next one that is no beat."""
    while True:
        for event in crew.wait(seconds):
            if event.kind != "beat":
                return event


def test_the_clock_moves_to_the_next_event_and_no_further_than_asked() -> None:
    clock, crew = make_crew()
    crew.send(0, order(range(4)))
    assert crew.wait(2.5) == []
    assert clock.now == 2.5
    event = next_event(crew)
    assert clock.now == pytest.approx(2 + 3 + 4)
    assert (event.kind, event.seconds, event.load_s, event.tokens, event.rows) == ("scored", pytest.approx(4), 5.0, 400, (0, 1, 2, 3))
    assert event.prediction is not None
    assert event.prediction.shape == (4, 5)


def test_waiting_for_nothing_still_moves_the_clock() -> None:
    clock, crew = make_crew()
    assert crew.wait(0.0) == []
    assert clock.now > 0


def test_what_is_loaded_is_not_loaded_again_and_another_fit_costs_only_its_weights() -> None:
    _, crew = make_crew()
    loads = []
    for number, (member, fit) in enumerate([("m", "a"), ("m", "a"), ("m", "b"), ("other", "b"), ("m", "b")]):
        crew.send(0, order(range(1), number, member, fit))
        loads.append(next_event(crew).load_s)
    assert loads == [5.0, 0.0, 3.0, 5.0, 5.0]
    crew.dismiss(0)
    crew.send(0, order(range(1), 9, "m", "b"))
    assert next_event(crew).load_s == 5.0


def test_retrieval_takes_the_member_s_place() -> None:
    clock, crew = make_crew(fetch_s={"k": 0.5, "broken": float("inf")})
    crew.send(0, order(range(1)))
    next_event(crew)
    begun = clock.now
    crew.send(0, Fetch(2, "k", (1, 2, 3)))
    assert (next_event(crew).kind, clock.now - begun) == ("fetched", 1.5)
    crew.send(0, Fetch(3, "broken", (1,)))
    assert next_event(crew).kind == "failed"
    crew.send(0, order(range(1), 4))
    assert next_event(crew).load_s == 5.0


def test_speed_changes_while_an_order_runs() -> None:
    assert Speed().end(2.0, 3.0) == 5.0
    assert Speed((4.0,), (2.0, 0.5)).end(0.0, 4.0) == 2.0
    assert Speed((4.0,), (2.0, 0.5)).end(0.0, 10.0) == 4.0 + 2.0 / 0.5
    assert Speed((4.0, 6.0), (1.0, 0.0001, 1.0)).end(3.0, 3.0) == pytest.approx(8.0, abs=0.01)


def test_slots_work_at_the_same_time_and_beat() -> None:
    clock, crew = make_crew(slots=("cuda:0", "cuda:1"), beat_s=1.0)
    crew.send(0, order(range(3), 1))
    crew.send(1, order(range(3, 6), 2))
    events: list[Event] = []
    while len([event for event in events if event.kind == "scored"]) < 2:
        events += crew.wait(100)
    assert clock.now == pytest.approx(8)
    assert {(event.slot, event.kind) for event in events} == {(0, "beat"), (1, "beat"), (0, "scored"), (1, "scored")}


def test_nothing_is_heard_of_what_was_dismissed() -> None:
    _, crew = make_crew(dismiss_s=0.0)
    crew.send(0, order(range(2)))
    crew.dismiss(0)
    assert crew.wait(100) == []
    crew.send(0, order(range(2), 2))
    crew.close()
    assert crew.wait(100) == []


@pytest.mark.parametrize(("kind", "memory"), [("dies", False), ("raises", False), ("memory", True)])
def test_faults_strike_after_their_rows(kind: str, memory: bool) -> None:
    _, crew = make_crew(Fault(kind, after=3))  # type: ignore[arg-type]
    crew.send(0, order(range(3), 1))
    assert next_event(crew).kind == "scored"
    crew.send(0, order(range(3), 2))
    event = next_event(crew)
    assert (event.kind, event.memory) == ("failed", memory)
    assert event.why


def test_a_hang_is_silent_and_nan_is_not() -> None:
    _, crew = make_crew(Fault("hangs"))
    crew.send(0, order(range(3)))
    assert crew.wait(1e6) == []
    _, crew = make_crew(Fault("nan"))
    crew.send(0, order(range(3)))
    event = next_event(crew)
    assert event.prediction is not None
    assert np.isnan(event.prediction).all()


@pytest.mark.parametrize(
    ("tokens", "view", "precision", "kind"),
    [(100, "full", "auto", "failed"), (40, "full", "auto", "scored"), (80, "full", "fp16", "scored"), (80, "short", "fp32", "scored"), (100, "short", "bf16", "scored")],
)
def test_memory_suffices_for_smaller_batches_shorter_sequences_or_lower_precision(tokens: int, view: str, precision: str, kind: str) -> None:
    _, crew = make_crew(Fault("memory", most_tokens=40))
    crew.send(0, order(range(2), view=view, tokens=tokens, precision=precision))
    assert next_event(crew).kind == kind


def test_simulated_runs_end_in_time_and_use_it_and_say_so() -> None:
    report = simulate(12, seed=3, per_world=4, processes=1)
    summary = report.summary()
    assert [run.crash for run in report.failures] == []
    assert (summary["runs"], summary["on_time"], summary["crashes"]) == (12, 1.0, 0)
    assert summary["used_median"] > 0.9
    assert 0 < summary["left_runs"] <= 12
    assert 0.4 < summary["metric_mean"] < 1
    assert summary["seconds"] > 0


def test_the_same_seed_gives_the_same_runs_in_any_number_of_processes() -> None:
    one, two = (simulate(2, seed=6, per_world=1, processes=processes) for processes in (1, 2))
    assert one.runs == two.runs
    assert one.runs[0] != one.runs[1]


def test_a_report_counts_late_and_crashed_runs_and_looks_at_use_where_work_was_left() -> None:
    good, idle, late, crashed = (
        Run(True, 100, 0.95, 0.9, True, 0.8), Run(True, 100, 0.1, 0.1, False, 0.8), Run(False, 100, 1.0, 1.0, True, 0.8), Run(False, 0, 0, 0, False, 0, "Error"),
    )  # fmt: skip
    report = Report([good, idle, late, crashed], 1.0)
    summary = report.summary()
    assert report.failures == [late, crashed]
    assert (summary["on_time"], summary["left_runs"], summary["crashes"]) == (0.5, 2, 1)
    assert summary["used_median"] == pytest.approx(0.975)
    assert summary["used_p01"] == pytest.approx(0.9505)
    assert summary["useful_median"] == pytest.approx(0.95)
