"""A small competition, runs trained on it and their bundles: real ones, made once per test session in seconds."""

from __future__ import annotations

import csv
import gc
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kit.sample import write_sample

TRAIN_ROWS, TEST_ROWS, PASSAGES = 24, 10, 40
WEIGHTS = 1000  # bytes of a fit that cannot be loaded
OOF_ROWS = 90  # of members that are made to need each other: fewer than 30 say nothing about a blend
NAMES = ("plain", "reader", "second-reader")
LAYOUTS = ("{slug}", "datasets/owner/{slug}")  # below the mounts, as the site once did and does now
RECIPE = """
[task]
kind = "multiple_choice"
max_length = 64

[model]
kind = "encoder"
source = "scratch"
vocab_size = 400
pooling = "{pooling}"

[model.config]
model_type = "bert"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 32
max_position_embeddings = 128

[data]
folder = {folder}
folds = 2
{retrieve}
[train]
epochs = 1
batch_size = 4
lr = {lr}
"""
RETRIEVE = """
[retrieve]
corpus = "passages.jsonl"

[retrieve.context]
passages = 1
max_chars = 200
"""


class Workshop(NamedTuple):
    """root: a folder with recipes (*.toml), `competition` and `artifacts`. bundles: packed below artifacts/bundles."""

    root: Path

    @property
    def competition(self) -> Path:
        """train.csv, test.csv, test_answers.csv, sample_submission.csv, passages.jsonl."""
        return self.root / "competition"

    @property
    def artifacts(self) -> Path:
        """What training and packing made."""
        return self.root / "artifacts"

    @property
    def bundles(self) -> Path:
        """The folder of bundles."""
        return self.artifacts / "bundles"

    @property
    def runs(self) -> dict[str, Path]:
        """Run folders by recipe."""
        return {name: next((self.artifacts / "runs").glob(f"{name}-????????")) for name in NAMES}

    @property
    def members(self) -> dict[str, Path]:
        """Member bundles by recipe."""
        return {name: self.bundles / run.name for name, run in self.runs.items()}


@cache
def workshop() -> Workshop:
    """Three members of two folds each: `plain` reads no context, `reader` and `second-reader` share an index. Not to be changed: use `copy`."""
    from kit.config import Recipe
    from kit.training.crossval import train
    from kit.vendor.bundle import pack

    gc.freeze()  # torch and transformers are a million objects, which every fit would search for garbage
    shop = Workshop(Path(_kept.name) / "shop")
    write_competition(shop.competition)
    for name, pooling, retrieve, lr in zip(NAMES, ("mean", "match", "match"), ("", RETRIEVE, RETRIEVE), (1e-3, 1e-3, 3e-3), strict=True):
        write_recipe(shop.root / f"{name}.toml", shop.competition, pooling=pooling, retrieve=retrieve, lr=lr)
    runs = [train(Recipe.load(shop.root / f"{name}.toml"), artifacts=shop.artifacts).folder for name in NAMES]
    pack(runs, artifacts=shop.artifacts)
    return shop


def copy(folder: Path) -> Workshop:
    """The workshop in a folder of its own, to be changed or damaged."""
    made = workshop()
    shop = Workshop(folder / "shop")
    shutil.copytree(made.root, shop.root)
    for recipe in shop.root.glob("*.toml"):
        recipe.write_text(recipe.read_text(encoding="utf-8").replace(str(made.root), str(shop.root)), encoding="utf-8")
    return shop


def mount(datasets: Iterable[Path], root: Path, layout: str = LAYOUTS[0]) -> Path:
    """Staged datasets below `root` as the site mounts them: read-only, without their metadata file; gives the root."""
    for dataset in datasets:
        folder = root / layout.format(slug=dataset.name)
        shutil.copytree(dataset, folder, ignore=shutil.ignore_patterns("dataset-metadata.json"))
        for path in (*folder.iterdir(), folder):
            path.chmod(0o444 if path.is_file() else 0o555)
    return root


def write_member(folder: Path, name: str, *, fits: Sequence[str] = ("fold0", "fold1"), index: str | None = None) -> Path:
    """A member bundle `name` in a folder, with everything but a model that can be loaded. With an index, it reads contexts."""
    from kit import manifest

    root = write_recipe(folder / name / "recipe.toml", folder / "competition", retrieve=RETRIEVE if index else "").parent
    for fit in fits:
        (root / fit).mkdir()
        (root / fit / "model.safetensors").write_bytes(bytes(WEIGHTS))
    manifest.write(root, name, "member", fits=list(fits), index=index)
    complement([root])
    return root


def change_member(folder: Path, *overrides: str) -> None:
    """Change the recipe inside a member bundle: a bundle that is whole, but of other settings."""
    from kit.config import Recipe

    recipe = Recipe.load(folder / "recipe.toml", overrides)
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    seal(folder)


def seal(folder: Path, **meta: object) -> None:
    """Write a manifest that matches what is in a bundle now, with these values changed."""
    from kit import manifest

    old = manifest.read(folder)
    manifest.write(folder, old.name, old.kind, **{**old.meta, **meta})


def complement(folders: Sequence[Path], rows: int = OOF_ROWS) -> None:
    """Make members need each other: by their OOF predictions each knows the answers to its share of the rows, and guesses at the others."""
    rng = np.random.default_rng(0)
    targets = rng.integers(5, size=rows)
    for number, folder in enumerate(folders):
        prediction = rng.dirichlet(np.full(5, 20.0), size=rows)
        knows = np.arange(rows) % len(folders) == number
        prediction[knows] = 0.1 * prediction[knows] + 0.9 * np.eye(5)[targets[knows]]
        write_oof(folder, targets, prediction)


def make_heavy(folder: Path, megabytes: int = 60) -> None:
    """Make a member look as slow as one with so much in weights: with a file that nobody reads."""
    with open(folder / "fold0" / "more.safetensors", "wb") as file:
        file.truncate(megabytes << 20)
    seal(folder)


def write_oof(folder: Path, targets: np.ndarray, prediction: np.ndarray, ids: Sequence[str] | None = None, **views: np.ndarray) -> None:
    """Replace a member's OOF predictions (n, C), in further views too; without contexts."""
    rows, width = prediction.shape
    columns = {"id": list(ids or map(str, range(rows))), "fold": np.arange(rows) % 2, "t0": targets}
    columns |= {f"p{k}": prediction[:, k].astype(np.float32) for k in range(width)}
    columns |= {f"p{k}@{view}": values[:, k].astype(np.float32) for view, values in views.items() for k in range(width)}
    columns |= {f"overlap{k}": np.full(rows, np.nan, np.float32) for k in range(width)}
    columns |= {f"length{k}": np.full(rows, 9.0, np.float32) for k in range(width)}
    pd.DataFrame(columns).to_parquet(folder / "oof.parquet", index=False)
    seal(folder)


def damage(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_recipe(path: Path, competition: Path, *, pooling: str = "match", retrieve: str = "", lr: float = 1e-3) -> Path:
    """A recipe that trains in a second or two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.format(folder=json.dumps(str(competition)), pooling=pooling, retrieve=retrieve, lr=lr), encoding="utf-8")
    return path


def write_competition(folder: Path) -> Path:
    """The first rows and passages of the sample competition."""
    write_sample(folder)
    for name in ("train", "test", "test_answers", "sample_submission"):
        rows = read_rows(folder / f"{name}.csv")
        write_rows(folder / f"{name}.csv", rows[: 1 + (TRAIN_ROWS if name == "train" else TEST_ROWS)])
    lines = (folder / "passages.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "passages.jsonl").write_text("".join(lines[:PASSAGES]), encoding="utf-8")
    return folder


def read_rows(path: Path) -> list[list[str]]:
    """A CSV's rows, the header first."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def fallback(test: Path) -> str:
    """The submission of one who knows nothing of a test set."""
    return "".join(["id,prediction\n", *(f"{row[0]},A B C\n" for row in read_rows(test)[1:])])


def write_rows(path: Path, rows: Iterable[Iterable[str]]) -> Path:
    """Write rows, the header first, as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


_kept = tempfile.TemporaryDirectory(prefix="kit-tests-")  # removed when the session ends
