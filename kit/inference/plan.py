"""The predicted timeline of a run that has not begun: real planner and dispatch, a stated machine, costs by size. Knows no process and no test set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kit import assemble, paths
from kit.budget import NINE_HOURS_S, Budget
from kit.config import Recipe
from kit.errors import BundleError, ConfigError
from kit.inference import cost
from kit.inference.blend import Blend
from kit.inference.dispatch import Dispatch, Settings, Span
from kit.inference.member import Member, parameters, weigh
from kit.inference.planner import FULL, Pass, Planner, Player
from kit.inference.simulate import Actor, Clock, Law, Silent, SimulatedCrew, score

STANDARD_SKILL = 1.0
"""Of a member that has no OOF yet: a made-up one that is right first about three times in four; a view that sees half scores a tenth worse."""
_STANDARD_VIEW = 0.9
_OOF_ROWS = 300
_OPTIONS = 5  # of a row, where no OOF tells
_LENGTH = 512  # tokens of a sequence, where the task has no max_length
_FITS = ("*/*.safetensors", "*/base.json")  # what a fit holds: weights, or whose they are
_BYTES = 4  # of a parameter
_BASE_BYTES = 2  # of one of a pretrained language model
_BILLIONS = re.compile(r"(\d+(?:\.\d+)?)b(?![a-z0-9])", re.IGNORECASE)  # the size in names such as mistral-7b
_NF4, _ROOM = 4.5 / 16, 0.8  # of the stored bytes, in four bits; share of the memory that weights may take


@dataclass(frozen=True)
class Plan:
    """What a run would do. seconds: until it ends. members: name, load_s, token_us, seconds, fits, and read_s of those that stream.

    timeline: slot, member, fit, view, rows, start, end. left_out: rows x fits of the final blend, by member, for which there is no time.
    assumed: members whose skill is STANDARD_SKILL, for want of OOF.
    """

    rows: int
    device: str
    budget_s: float
    fits_in_time: bool
    seconds: float
    members: list[dict[str, Any]]
    timeline: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    assumed: list[str]

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Planned:
    """A member to be, or one that is there."""

    name: str
    recipe: Recipe
    fits: tuple[str, ...]
    bytes: int
    trained: Member | None = None

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of a sequence by view, the full one first."""
        task = assemble.make_task(self.recipe)
        tasks = self.trained.views if self.trained else {FULL: task, **{name: view.task for name, view in task.views().items()}}
        return {view: int(getattr(each, "max_length", _LENGTH)) for view, each in tasks.items()}

    def sequences(self, options: int) -> int:
        """Sequences of a row: one per option, unless the options share one."""
        return options if assemble.make_task(self.recipe).needs == "row" else 1

    def streams(self, device: str) -> bool:
        """Whether its weights, as they are held there, are larger than the device's memory."""
        settings = self.recipe.model.options
        held = self.bytes * (_NF4 if settings.get("quantise") == "nf4" else 1)
        return assemble.may_stream(self.recipe) and (settings.get("streaming") == "always" or held > _ROOM * cost.memory(device))

    @property
    def key(self) -> str | None:
        """What tells apart the contexts it reads."""
        retrieve = self.recipe.retrieve
        return assemble.digest(retrieve.model_dump(mode="json")) if retrieve else None


def plan(
    members: Sequence[str | Path], rows: int, device: str = "t4x2", *, budget_s: float = NINE_HOURS_S, artifacts: Path = Path("artifacts")
) -> Plan:
    """The timeline for so many rows. members: recipes (files or shipped names), run folders, member bundles.

    Every sequence is taken to be as long as its task allows, so that the truth is rather shorter. Raises ConfigError, BundleError.
    """
    if rows < 1:
        raise ConfigError(f"{rows} rows: give at least 1")
    slots, planned = cost.machine(device), [_open(member, artifacts) for member in members]
    if len({one.name for one in planned}) < len(planned):
        raise ConfigError(f"members {', '.join(one.name for one in planned)}: each needs a name of its own")
    blend, targets, sources = _believed(planned)
    clock, listener, task = Clock(), Silent(), assemble.make_task(planned[0].recipe)
    width = next(iter(sources.values())).shape[1]
    players = [_player(one, rows, width, slots[0]) for one in planned]
    sample = np.random.default_rng(0).integers(0, len(targets), rows)
    actors = {player.name: _actor(player, {view: sources[Pass(player.name, "", view).source][sample] for view in player.sizes}) for player in players}
    crew = SimulatedCrew(clock, actors, slots, fetch_s={player.key: cost.FETCH_S for player in players if player.key})
    budget = Budget(budget_s, used_s=0, clock=clock)
    planner = Planner(players, blend, targets, task.merit, task.doubt, task.regret, rows, width, on_decision=listener.decided)
    settings = {one.name: Settings(one.recipe.infer.batch_tokens, one.recipe.infer.precision) for one in planned}
    dispatch = Dispatch(planner, crew, budget, settings, listener)
    dispatch.run()
    left = planner.left()
    return Plan(
        rows=rows, device=device, budget_s=budget_s, fits_in_time=not left, seconds=round(budget.elapsed(), 1),
        members=[_costs(player, dispatch.spans) for player in players],
        timeline=_merged(dispatch.spans),
        left_out=[{"member": name, "rows": count} for name, count in left.items()],
        assumed=[] if _all_trained(planned) else [one.name for one in planned],
    )  # fmt: skip


# --- what is planned -----------------------------------------------------------------------------------------------------------------


def _open(member: str | Path, artifacts: Path) -> _Planned:
    """A member by its folder, or the one that a recipe would make. Raises ConfigError, BundleError."""
    folder = Path(member)
    if not folder.is_dir():
        recipe = Recipe.load(member)
        seeds = len(recipe.train.seeds)
        fits = tuple(f"fold{fold}" + f"-seed{seed}" * (seeds > 1) for seed in recipe.train.seeds for fold in range(recipe.data.folds))
        if not recipe.train.epochs:
            fits = (FULL,)
        return _Planned(recipe.name, recipe, fits, _bytes_of_recipe(recipe, artifacts))
    recipe = Recipe.load(folder / "recipe.toml")
    folders = sorted({path.parent for pattern in _FITS for path in folder.glob(pattern)})
    weights = {fit.name: sum(path.stat().st_size for path in fit.glob("*.safetensors")) for fit in folders}
    if not weights:
        raise BundleError(f"{folder}: no fit with weights in it: train the run, or give its recipe")
    trained = Member(folder, folder.name, recipe, tuple(weights), None, "") if (folder / "oof.parquet").is_file() else None
    base = _bytes_of_recipe(recipe, artifacts) if assemble.on_base(recipe) else 0
    return _Planned(folder.name, recipe, tuple(weights), base + sum(weights.values()) // len(weights), trained)


def _bytes_of_recipe(recipe: Recipe, artifacts: Path) -> int:
    """Size of the weights of one fit: the backbone's, or for one from scratch what a transformer of its config has."""
    source, config = recipe.model.options.get("source"), recipe.model.options.get("config", {})
    if source is None:
        raise ConfigError(f'recipe {recipe.name!r}: model.source is missing: give a model folder, package:NAME, or "{assemble.SCRATCH}"')
    if source != assemble.SCRATCH:
        try:
            folder = paths.model_folder(source, Path(recipe.data.folder), artifacts / "bundles")
        except BundleError:
            if named := _BILLIONS.search(source):  # not here, but its name says how large it is
                return int(float(named[1]) * 1e9 * _BASE_BYTES)
            raise
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    hidden, layers = int(config.get("hidden_size", 0)), int(config.get("num_hidden_layers", 0))
    inner, words = int(config.get("intermediate_size", 4 * hidden)), int(recipe.model.options.get("vocab_size", 0))
    return _BYTES * (words * hidden + layers * (4 * hidden**2 + 2 * hidden * inner))  # embeddings; attention and feed-forward of each layer


def _all_trained(planned: Sequence[_Planned]) -> bool:
    return all(one.trained for one in planned)


def _believed(planned: Sequence[_Planned]) -> tuple[Blend, np.ndarray, dict[str, np.ndarray]]:
    """The blend, its OOF targets, and OOF predictions (n, C) by source: real ones where all have them, else made up with the standard skill."""
    if _all_trained(planned):
        weighed = weigh([one.trained for one in planned if one.trained], "pool")
        return weighed.blend, weighed.targets, {source: weighed.blend.oof([source]) for source in weighed.blend.names}
    laws = [Law(one.name, {view: STANDARD_SKILL * (1.0 if view == FULL else _STANDARD_VIEW) for view in one.lengths}) for one in planned]
    oof, targets = score(laws, _OOF_ROWS, np.random.default_rng(0), fits=1)
    sources = {Pass(name, "", view).source: values for name, passes in oof.items() for (_, view), values in passes.items()}
    return Blend.fit(sources, targets, assemble.make_task(planned[0].recipe).merit, method="pool"), targets, sources


def _player(one: _Planned, rows: int, width: int, device: str) -> Player:
    sizes = {view: np.full(rows, float(length * one.sequences(width))) for view, length in one.lengths.items()}
    more = frozenset(name for name, view in assemble.make_task(one.recipe).views().items() if view.more)
    token, streams = cost.token_cost(parameters(one.bytes, one.recipe), device), one.streams(device)
    load = cost.load_cost(0 if streams else one.bytes)
    return Player(one.name, one.fits, sizes, load, token, more, one.key, cost.read_cost(one.bytes) if streams else None)


def _actor(player: Player, predictions: dict[str, np.ndarray]) -> Actor:
    """A member that costs what is expected. predictions: (N, C) by view, the same of every fit."""
    every = {(fit, view): values for fit in player.fits for view, values in predictions.items()}
    read = player.read.forecast().mid if player.read else 0.0
    return Actor(every, player.sizes, player.token.forecast().mid, player.load.forecast().mid, read_s=read)


# --- what came out -------------------------------------------------------------------------------------------------------------------


def _costs(player: Player, spans: Sequence[Span]) -> dict[str, Any]:
    seconds = sum(span.end - span.start for span in spans if span.name == player.name)
    load, token = player.load.forecast().mid, player.token.forecast().mid
    read = {"read_s": round(player.read.forecast().mid, 1)} if player.read else {}
    return {"name": player.name, **read, "load_s": round(load, 2), "token_us": round(token * 1e6, 4), "seconds": round(seconds, 1), "fits": len(player.fits)}


def _merged(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Consecutive orders of a slot for the same pass as one, in order of their start."""
    merged: list[dict[str, Any]] = []
    last: dict[int, dict[str, Any]] = {}
    for span in sorted(spans, key=lambda span: span.start):
        what = {"slot": span.slot, "member": span.name, "fit": span.fit, "view": span.view}
        before = last.get(span.slot)
        if before is None or any(before[name] != value for name, value in what.items()):
            last[span.slot] = before = {**what, "rows": 0, "start": round(span.start, 1), "end": 0.0}
            merged.append(before)
        before["rows"] += len(span.rows) if span.state == "done" else 0
        before["end"] = round(span.end, 1)
    return merged
