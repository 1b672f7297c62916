"""Run and index → bundles: clean folders with a manifest, to be uploaded as datasets. Knows no tensor and no clock."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from kit import manifest
from kit.config import Recipe
from kit.errors import BundleError
from kit.paths import model_folder

_KINDS = (".json", ".jinja", ".safetensors")  # of files that models and tokens save: no pickles
_NOT_PACKED = ("history.json", "state")  # of training only
_ON_BASE = ("adapter_config.json", "base.json")  # what a fit has that holds no weights of its own
_RUN_FILES = ("recipe.toml", "metrics.json", "oof.parquet", "folds.npy")


def pack(runs: Iterable[Path], *, artifacts: Path = Path("artifacts"), out: Path | None = None) -> list[Path]:
    """The bundles that were trained: a member per run, and every index the members use. Raises BundleError.

    out: where they go, by default `bundles` below `artifacts`.
    """
    out = out or artifacts / "bundles"
    members = [pack_run(Path(run), out, bundles=artifacts / "bundles") for run in runs]
    indexes = sorted({index for member in members if (index := manifest.read(member).meta["index"])})
    return [*members, *(pack_index(artifacts / "index" / index, out) for index in indexes)]


def pack_run(run: Path, out: Path, *, bundles: Path) -> Path:
    """The member bundle of a run: its finished fits, OOF and recipe, and in the manifest the name of the index it uses.

    bundles: where the weights it started from were packed, if its recipe names them as bundle:NAME. Raises BundleError where the run has no
    finished fit or no OOF predictions yet.
    """
    fits = sorted(path.parent.name for path in run.glob("*/metrics.json"))
    if not fits:
        raise BundleError(f"{run}: no finished fit (a folder with metrics.json): run `kit train` first")
    if not (run / "oof.parquet").is_file():
        raise BundleError(f"{run}: no oof.parquet, so the blend could not weigh this member: train every fold first")
    recipe = Recipe.load(run / "recipe.toml")
    source = str(recipe.model.options["source"])
    if any((run / fit / name).is_file() for fit in fits for name in _ON_BASE) and not source.startswith("bundle:"):
        raise BundleError(f'{run}: is packed without its base, and model.source = "{source}" is no bundle: kit vendor weights, then bundle:NAME, and train again')
    inputs = json.loads((run / "inputs.json").read_text())
    if not inputs.get("submits", True):
        why = f'task.kind = "{recipe.task.kind}" predicts nothing that is handed in, so that it is no member'
        raise BundleError(f"{run}: {why}: kit generate uses the run, and kit vendor weights {run / fits[0]} makes a base of it for others to start from")
    files = [path for name in _RUN_FILES for path in run.glob(name)]
    files += [path for fit in fits for path in fit_files(run / fit)]
    meta = {"recipe": recipe.name, "task": recipe.task.kind, "fits": fits, "index": inputs["index"], **_licence(recipe, bundles)}
    return _copy(run, files, out / manifest.slug(run.name), kind="member", **meta)


def fit_files(fit: Path) -> list[Path]:
    """What inference needs of a fit's folder."""
    found = (path for path in sorted(fit.rglob("*")) if path.suffix in _KINDS and path.relative_to(fit).parts[0] not in _NOT_PACKED)
    return [path for path in found if path.is_file()]


def pack_index(index: Path, out: Path) -> Path:
    """The index bundle: as it was built."""
    built = manifest.verify(index, full=False)
    return _copy(index, [index / name for name in built.files], out / built.name, kind="index", **built.meta)


def _licence(recipe: Recipe, bundles: Path) -> dict[str, str]:
    """The licence of the weights bundle that a run started from, if it names one: it holds for what was trained from it."""
    source = str(recipe.model.options["source"])
    meta = manifest.read(model_folder(source, Path(), bundles)).meta if source.startswith("bundle:") else {}
    return {"licence": meta["licence"]} if meta.get("licence") else {}


def _copy(root: Path, files: Iterable[Path], folder: Path, *, kind: str, **meta: object) -> Path:
    """Copy files to the same places below `folder`, by way of a temporary folder, and write the manifest. Raises BundleError for a link that leads out."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for path in files:
        if not path.resolve().is_relative_to(root.resolve()):
            raise BundleError(f"{path}: a link that leads out of its folder, to {path.resolve()}: replace it by a file that may be uploaded")
        target = part / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    manifest.write(part, folder.name, kind, **meta)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    return folder
