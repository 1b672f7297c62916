"""Which sources are worth having, decided by playing the run through."""

from __future__ import annotations

import numpy as np

from kit.inference.blend import Blend
from kit.inference.gains import Gains, Pattern
from kit.inference.lookahead import Step, insurance, together, worth_having
from kit.inference.planner import Pass
from kit.inference.simulate import Law, score
from kit.tasks.multiple_choice import MultipleChoice

TASK = MultipleChoice()
LAWS = (Law("cheap", {"full": 0.7}), Law("dear", {"full": 2.0, "short": 1.6}))
CORE = frozenset({"cheap", "dear"})


def make_gains(laws: tuple[Law, ...] = LAWS) -> Gains:
    oof, targets = score(laws, 300, np.random.default_rng(0), fits=1)
    sources = {Pass(name, "", view).source: values for name, passes in oof.items() for (_, view), values in passes.items()}
    return Gains(Blend.fit(sources, targets, TASK.merit, method="pool"), targets, TASK.merit, TASK.doubt)


def effective(pattern: Pattern) -> Pattern:
    """The full view instead of the short one."""
    return pattern - {"dear@short"} if "dear" in pattern else pattern


STEPS = {"cheap": Step(0.01, 0.1), "dear": Step(0.1, 1.0), "dear@short": Step(0.1, 0.5)}


def test_with_time_for_everything_exactly_the_final_blend_is_worth_having() -> None:
    assert worth_having(make_gains(), STEPS, CORE, effective, 100.0) == CORE
    assert worth_having(make_gains(), STEPS, frozenset({"dear"}), effective, 100.0) == {"dear"}


def test_with_half_the_time_the_cheaper_view_takes_the_place_of_the_full_one() -> None:
    steps = {"dear": Step(0.0, 1.0), "dear@short": Step(0.0, 0.3)}
    gains = make_gains()
    assert worth_having(gains, steps, frozenset({"dear"}), effective, 1.1) == {"dear"}
    assert "dear@short" in worth_having(gains, steps, frozenset({"dear"}), effective, 0.35)


def test_a_source_that_cannot_be_loaded_in_time_stands_in_nobody_s_way() -> None:
    steps = {**STEPS, "dear": Step(50.0, 1.0), "dear@short": Step(50.0, 0.5)}
    assert "cheap" in worth_having(make_gains(), steps, CORE, effective, 5.0)


def test_where_there_is_time_to_load_one_only_the_best_one_is_worth_having() -> None:
    """Leaving out either of the others alone makes it worse."""
    gains = make_gains((Law("a", {"full": 0.9}), Law("b", {"full": 1.6}), Law("c", {"full": 1.0})))
    steps = {"a": Step(0.6, 0.3), "b": Step(0.6, 1.0), "c": Step(0.6, 0.3)}
    assert worth_having(gains, steps, frozenset("abc"), lambda pattern: pattern, 1.6) == {"b"}


def test_a_source_that_only_takes_the_others_time_is_left_out() -> None:
    gains = make_gains((Law("a", {"full": 0.9}), Law("b", {"full": 1.6}), Law("c", {"full": 1.0})))
    steps = {"a": Step(0.0, 0.3), "b": Step(0.0, 1.0), "c": Step(0.2, 0.2)}
    assert worth_having(gains, steps, frozenset("abc"), lambda pattern: pattern, 0.9) == {"b", "c"}


def test_no_time_and_no_sources_are_no_trouble() -> None:
    assert worth_having(make_gains(), STEPS, CORE, effective, 0.0) <= set(STEPS)
    assert worth_having(make_gains(), {}, frozenset(), effective, 10.0) == frozenset()


def test_contexts_that_are_shared_are_paid_once() -> None:
    assert together([Step(1, 2, "k", 3), Step(1, 2, "k", 3), Step(1, 2)]) == 12
    steps = {"cheap": Step(0.0, 0.1, "k", 1.0), "dear": Step(0.0, 1.0, "k", 1.0), "dear@short": Step(0.0, 0.3, "k", 1.0)}
    assert worth_having(make_gains(), steps, CORE, effective, 1.95) == CORE, "2.1 s are as good as in time, 3.1 s would not be"
    assert "dear@short" in worth_having(make_gains(), steps, CORE, effective, 1.5)


def test_the_cheapest_source_is_insurance_if_it_costs_next_to_nothing() -> None:
    assert insurance(STEPS, 10.0) == "cheap"
    assert insurance(STEPS, 1.0) is None
    assert insurance({}, 1.0) is None
