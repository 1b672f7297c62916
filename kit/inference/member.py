"""Member bundles: opened, and weighed by their OOF. Knows no process, planner or clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from kit import assemble, manifest, paths
from kit.config import Recipe
from kit.errors import BundleError
from kit.inference.blend import Blend
from kit.inference.planner import FULL, Pass
from kit.metrics import bootstrap
from kit.tasks import Task

_OOF_ROWS = 4000  # more would only make blending slower
_PREDICTION = r"^p\d+"


@dataclass(frozen=True)
class Member:
    """One member bundle: a recipe and its trained fits. base: the folder of the weights they are built on, where they do not hold their own."""

    folder: Path
    name: str
    recipe: Recipe
    fits: tuple[str, ...]
    index: str | None
    digest: str
    base: Path | None = None

    @classmethod
    def open(cls, bundle: manifest.Manifest) -> Member:
        """The member of a bundle, its recipe read. Raises BundleError and ConfigError."""
        recipe = Recipe.load(bundle.root / "recipe.toml")
        if missing := {"fits", "index"} - set(bundle.meta):  # nobody hashes a manifest
            raise BundleError(f"{bundle.root / manifest.FILE}: unreadable manifest (it has no {min(missing)}): pack the bundle again")
        return cls(bundle.root, bundle.name, recipe, tuple(bundle.meta["fits"]), bundle.meta["index"], bundle.digest)

    def with_base(self, mounts: Path) -> Member:
        """The member, its base found below `mounts` if it needs one; what is there is checked, but not hashed. Raises BundleError."""
        name = assemble.base_name(self.recipe)
        if name is None:
            return self
        return replace(self, base=manifest.verify(paths.find_bundle(name, mounts), full=False).root)  # tens of gigabytes take minutes to hash

    @cached_property
    def task(self) -> Task:
        """The member's task."""
        return assemble.make_task(self.recipe)

    @cached_property
    def oof(self) -> pd.DataFrame:
        """OOF predictions p0 … (and p0@view …), targets t0 … and hints, by id. Raises BundleError."""
        try:
            return pd.read_parquet(self.folder / "oof.parquet").set_index("id")
        except Exception as error:  # pyarrow and pandas raise unrelated types for damaged files
            raise BundleError(f"{self.folder / 'oof.parquet'}: cannot be read ({error}): pack the run again") from None

    @property
    def views(self) -> dict[str, Task]:
        """The task in every view whose OOF predictions are known, the full one first."""
        others = {name: view.task for name, view in self.task.views().items() if f"p0@{name}" in self.oof}
        return {FULL: self.task, **others}

    @property
    def bytes(self) -> int:
        """Size of the weights of one fit, with those it is built on: what stands for its cost before any is measured."""
        own = sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors")) // max(len(self.fits), 1)
        return own + sum(path.stat().st_size for path in self.base.glob("*.safetensors")) if self.base else own
    @property
    def parameters(self) -> float:
        """How many a fit has, as far as the size tells."""
        return parameters(self.bytes, self.recipe)

    @property
    def key(self) -> str | None:
        """What tells apart the contexts it reads; None if it reads none."""
        if self.index is None or self.recipe.retrieve is None:
            return None
        return assemble.digest([self.index, self.recipe.retrieve.model_dump(mode="json")])


@dataclass(frozen=True)
class Weighed:
    """A blend of members, the OOF targets (n, …) it was fitted on, and the first metric of each member and of the blend there."""

    blend: Blend
    targets: np.ndarray
    oof: dict[str, dict[str, float]]


def parameters(weight_bytes: float, recipe: Recipe) -> float:
    """How many parameters so many bytes are: pretrained language models come in 16 bits, fits of the kit in 32."""
    return weight_bytes / (2 if assemble.on_base(recipe) else 4)


def weigh(members: Sequence[Member], method: str = "auto") -> Weighed:
    """Blend the members on the OOF rows that they share. Raises BundleError where they share none, or do not mean the same rows by their ids."""
    shared = members[0].oof.index
    for member in members[1:]:
        shared = shared.intersection(member.oof.index, sort=False)
    if not len(shared):
        raise BundleError(f"the members {', '.join(member.name for member in members)} have no OOF row in common: train them on one table")
    shared = shared[np.sort(np.random.default_rng(0).permutation(len(shared))[:_OOF_ROWS])]
    task, first = members[0].task, members[0].oof.loc[shared]
    for member in members[1:]:
        _check_same(members[0].name, first, member.name, member.oof.loc[shared])
    sources = {Pass(member.name, "", view).source: _columns(member.oof.loc[shared], view) for member in members for view in member.views}
    targets = first.filter(regex=r"^t\d+$").to_numpy()
    targets = targets[:, 0] if targets.shape[1] == 1 else targets
    hints = _hints(first, next(iter(sources.values())).shape[1])
    whole = [member.name for member in members]
    blend = Blend.fit(sources, targets, task.merit, kind=task.blends, method=method, hints=hints, complete=whole)
    honest = blend.oof(whole)  # leaving out what has no weight, below, has seen every row
    useful = [name for name, weight in blend.weights(whole).items() if weight]
    if len(useful) < len(whole):
        blend = Blend.fit(sources, targets, task.merit, kind=task.blends, method=method, hints=hints, complete=useful)
    name, metric = next(iter(task.metrics.items()))
    estimates = {who: bootstrap(metric, values, targets) for who, values in {**{m: sources[m] for m in whole}, "blend": honest}.items()}
    return Weighed(blend, targets, {who: {name: estimate.value, "se": estimate.se} for who, estimate in estimates.items()})


def _check_same(one: str, first: pd.DataFrame, other: str, second: pd.DataFrame) -> None:
    """Raise BundleError where two members' OOF rows of the same ids have other answers or another number of options: they were trained on two tables."""
    columns = [list(frame.filter(regex=rf"{_PREDICTION}$|^t\d+$")) for frame in (first, second)]
    if columns[0] != columns[1]:
        raise BundleError(f"members {one} and {other} were trained on tables of different shape ({columns[0]} and {columns[1]}): train them on one table")
    answers = first.filter(regex=r"^t\d+$")
    if (differing := (answers != second[answers.columns]).any(axis=1)).any():
        row = first.index[differing.to_numpy().argmax()]
        raise BundleError(f"members {one} and {other} disagree on the answer of id {row!r} ({int(differing.sum())} such ids): train them on one table")


def _columns(frame: pd.DataFrame, view: str) -> np.ndarray:
    """Predictions (n, C) of a view."""
    end = "" if view == FULL else f"@{view}"
    return frame.filter(regex=rf"{_PREDICTION}{end}$").to_numpy(np.float32)


def _hints(frame: pd.DataFrame, width: int) -> dict[str, np.ndarray]:
    """Hints (n, C) by name: columns like overlap0 … that are no predictions and no targets."""
    names = {str(column)[:-1] for column in frame.columns if str(column).endswith("0")} - {"t", "p"}
    return {name: frame[[f"{name}{k}" for k in range(width)]].to_numpy(np.float32) for name in sorted(names) if f"{name}{width - 1}" in frame}

