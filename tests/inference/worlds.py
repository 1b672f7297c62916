"""Small made-up competitions for the tests of planner and dispatch: members with known skill and cost, scored by simulated processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kit.budget import Budget, Cost
from kit.inference.blend import Blend
from kit.inference.dispatch import Dispatch, Settings
from kit.inference.planner import Pass, Planner, Player
from kit.inference.simulate import Actor, Clock, Fault, Law, Silent, SimulatedCrew, Speed, score
from kit.tasks.multiple_choice import MultipleChoice

TASK = MultipleChoice()
BATCH_TOKENS = 4096
TOKENS = {"full": 100.0, "short": 50.0, "flipped": 100.0}  # of every row


@dataclass
class World:
    """A run that is ready to go. heard: what the listener was told."""

    planner: Planner
    crew: SimulatedCrew
    budget: Budget
    dispatch: Dispatch
    listener: Silent
    clock: Clock
    truth: dict[str, dict[tuple[str, str], np.ndarray]]
    targets: np.ndarray
    heard: list[str] = field(default_factory=list)

    @property
    def merit(self) -> float:
        return float(TASK.merit(np.nan_to_num(self.planner.prediction(), nan=0.2), self.targets).mean())


def make_world(
    laws: Sequence[Law],
    *,
    rows: int = 120,
    total_s: float = 10_000.0,
    slots: Sequence[str] = ("cuda:0",),
    speeds: Sequence[Speed] | None = None,
    faults: Mapping[str, Fault] | None = None,
    fetch_s: float = 0.02,
    patience_s: float = 60.0,
    spread: float = 1.5,
    precision: str = "auto",
    seed: int = 0,
    read_s: Mapping[str, float] | None = None,
) -> World:
    """A budget without reserve; costs as expected, within `spread`. read_s: of members that may stream their layers; 0: this one turns out not to."""
    reads = read_s or {}
    rng = np.random.default_rng(seed)
    oof, oof_targets = score(laws, 250, rng, fits=1)
    truth, targets = score(laws, rows, rng, fits=5)
    sources = {Pass(name, "", view).source: values for name, passes in oof.items() for (_, view), values in passes.items()}
    blend = Blend.fit(sources, oof_targets, TASK.merit, method="pool")
    sizes = {law.name: {view: np.full(rows, TOKENS[view]) for view in law.skills} for law in laws}
    players = [
        Player(
            law.name, law.fits, sizes[law.name], Cost(law.load_s + law.start_s, spread), Cost(law.row_s / 100, spread),
            frozenset({"flipped"}) & law.skills.keys(), law.key, Cost(reads[law.name] or 10.0, spread) if law.name in reads else None,
        )
        for law in laws
    ]  # fmt: skip
    actors = {
        law.name: Actor(truth[law.name], sizes[law.name], law.row_s / 100, law.load_s, law.start_s, (faults or {}).get(law.name), reads.get(law.name, 0.0))
        for law in laws
    }
    clock, listener = Clock(), Silent()
    crew = SimulatedCrew(clock, actors, slots, speeds=speeds, fetch_s={law.key: fetch_s for law in laws if law.key})
    budget = Budget(total_s, 0.0, used_s=0, clock=clock)
    planner = Planner(players, blend, oof_targets, TASK.merit, TASK.doubt, TASK.regret, rows, 5, on_decision=listener.decided)
    dispatch = Dispatch(planner, crew, budget, {law.name: Settings(BATCH_TOKENS, precision) for law in laws}, listener, patience_s)
    return World(planner, crew, budget, dispatch, listener, clock, truth, targets)


def rows_of(world: World, member: str, view: str = "full", *, fit: str | None = None) -> np.ndarray:
    """Rows that were scored, each as often as it was."""
    spans = [span for span in world.dispatch.spans if (span.name, span.view, span.state) == (member, view, "done") and fit in (None, span.fit)]
    return np.concatenate([span.rows for span in spans]) if spans else np.array([], int)
