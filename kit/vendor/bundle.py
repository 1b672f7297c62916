"""Run, index and code → bundles: clean folders with a manifest, to be uploaded as datasets. Knows no tensor and no clock."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import kit
from kit import manifest
from kit.config import Recipe
from kit.errors import BundleError

CODE = "kit-code"
_FIT_FILES = ("config.json", "tokenizer.json", "metrics.json", "model*.safetensors", "model*.safetensors.index.json")
_RUN_FILES = ("recipe.toml", "metrics.json", "oof.parquet", "folds.npy")
_CODE_FILES = ("**/*.py", "recipes/*.toml", "sample/*")


def pack(runs: Iterable[Path], *, artifacts: Path = Path("artifacts"), out: Path | None = None) -> list[Path]:
    """The bundles that inference needs: the code, a member per run, and every index the members use. Raises BundleError.

    out: where they go, by default `bundles` below `artifacts`.
    """
    out = out or artifacts / "bundles"
    members = [pack_run(Path(run), out) for run in runs]
    indexes = sorted({index for member in members if (index := manifest.read(member).meta["index"])})
    return [pack_code(out), *members, *(pack_index(artifacts / "index" / index, out) for index in indexes)]


def pack_run(run: Path, out: Path) -> Path:
    """The member bundle of a run: its finished fits, OOF and recipe, and in the manifest the name of the index it uses.

    Raises BundleError where the run has no finished fit or no OOF predictions yet.
    """
    fits = sorted(path.parent.name for path in run.glob("*/metrics.json"))
    if not fits:
        raise BundleError(f"{run}: no finished fit (a folder with metrics.json): run `kit train` first")
    if not (run / "oof.parquet").is_file():
        raise BundleError(f"{run}: no oof.parquet, so the blend could not weigh this member: train every fold first")
    recipe = Recipe.load(run / "recipe.toml")
    index = json.loads((run / "inputs.json").read_text())["index"]
    files = [path for name in _RUN_FILES for path in run.glob(name)]
    files += [path for fit in fits for name in _FIT_FILES for path in sorted((run / fit).glob(name))]
    name = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")
    return _copy(run, files, out / name, kind="member", recipe=recipe.name, task=recipe.task.kind, fits=fits, index=index)


def pack_index(index: Path, out: Path) -> Path:
    """The index bundle: as it was built."""
    built = manifest.verify(index, full=False)
    return _copy(index, [index / name for name in built.files], out / built.name, kind="index", **built.meta)


def pack_code(out: Path) -> Path:
    """The kit's own source, importable from the bundle's folder without installation."""
    package = Path(kit.__file__).parent
    files = sorted({path for pattern in _CODE_FILES for path in package.glob(pattern) if path.is_file() and "__pycache__" not in path.parts})
    return _copy(package.parent, files, out / CODE, kind="code", version=kit.__version__)


def _copy(root: Path, files: Iterable[Path], folder: Path, *, kind: str, **meta: object) -> Path:
    """Copy files to the same places below `folder`, by way of a temporary folder, and write the manifest."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for path in files:
        target = part / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    manifest.write(part, folder.name, kind, **meta)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    return folder
