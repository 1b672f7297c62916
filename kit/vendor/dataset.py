"""Bundles and notebooks → what is uploaded: flat folders with dataset-metadata.json, and notebooks with kernel-metadata.json.

Owns how they are laid out. Does not know the site's rules (site.py), does not call the site (session.py), and does not look into files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from kit import manifest
from kit.config import Recipe
from kit.errors import BundleError
from kit.manifest import Manifest, flat_name, slug
from kit.paths import model_folder
from kit.vendor import site
from kit.vendor.bundle import pack
from kit.vendor.secrets import scan
from kit.vendor.wheels import CODE, WHEELS

_NOTEBOOKS = {"train": ("code", "wheels", "weights"), "infer": ("code", "wheels", "weights", "member", "index")}  # kinds of bundles each needs
_LISTED = 50  # files named in a description
_TIME = 315532800  # 1980-01-01, of every staged file: equal bundles give equal folders, and a file that was changed later is seen


class Prepared(NamedTuple):
    """Folders that are ready to be uploaded."""

    datasets: list[Path]
    kernels: list[Path]


def prepare(
    runs: Sequence[Path],
    *,
    owner: str,
    competition: str | None = None,
    artifacts: Path = Path("artifacts"),
    out: Path | None = None,
    kernels: Path | None = None,
    notebooks: Path = Path("notebooks"),
    accelerator: str | None = "NvidiaTeslaT4",
    licence: str = "other",
    part_mb: float = 20_000,
    public: bool = False,
) -> Prepared:
    """All that a competition needs of trained runs, ready to be uploaded. Raises ConfigError, BundleError.

    The runs are packed. They, their indexes, the weights they start from, and the kit and its wheels (which `kit vendor wheels` made) become
    datasets in `out`, by default artifacts/datasets; train.ipynb and infer.ipynb become notebooks in `kernels`, by default
    artifacts/kernels, each with the datasets it needs. Other options are those of `stage` and `stage_kernel`.
    """
    site.check_owner(owner)
    bundles = artifacts / "bundles"
    for name in (CODE, WHEELS):
        if not (bundles / name / manifest.FILE).is_file():
            raise BundleError(f"{bundles}: no bundle {name}, so the kit could not be installed offline: run `kit vendor wheels` first")
    bases = sorted({base for run in runs for base in _bases(run, bundles)})
    packed = [bundles / CODE, bundles / WHEELS, *bases, *pack(runs, artifacts=artifacts)]
    datasets = stage(packed, out or artifacts / "datasets", owner=owner, licence=licence, part_mb=part_mb, public=public)
    kernels = kernels or artifacts / "kernels"
    staged = [
        stage_kernel(
            notebooks / f"{name}.ipynb", kernels, owner=owner, title=site.kernel_title(competition, name), competition=competition,
            datasets=[folder.name for folder in datasets if manifest.read(folder).kind in kinds], accelerator=accelerator,
        )
        for name, kinds in _NOTEBOOKS.items()
    ]  # fmt: skip
    _remove_stale(kernels, staged, site.KERNEL_METADATA)
    return Prepared(datasets, staged)


def stage(
    bundles: Sequence[Path], out: Path, *, owner: str, licence: str = "other", part_mb: float = 20_000, public: bool = False
) -> list[Path]:
    """The folders out/<slug>: one for each bundle, or for each part of one larger than `part_mb` (10⁶ bytes). Raises ConfigError, BundleError.

    Copied is what the manifest lists, once all of it is verified and the bundle's folder is free of secrets; in a fixed order, with a fixed
    time. What is staged already and has not changed is left alone. A dataset in `out` of a bundle that is not among these is removed, because
    all of `out` is uploaded: stage all bundles in one call. licence: for bundles whose manifest names none.
    """
    site.check_owner(owner)
    site.check_licence(licence)
    planned = [_plan(manifest.read(bundle), owner, licence, part_mb * 1e6, public) for bundle in bundles]
    _refuse_twins(dataset for datasets in planned for dataset in datasets)
    for bundle, datasets in zip(bundles, planned, strict=True):
        if not all(dataset.is_staged(out) for dataset in datasets):
            manifest.verify(bundle)
        scan(bundle)
    staged = [dataset.stage(out) for datasets in planned for dataset in datasets]
    _remove_stale(out, staged, site.DATASET_METADATA)
    return staged


def stage_kernel(
    notebook: Path,
    out: Path,
    *,
    owner: str,
    title: str,
    competition: str | None = None,
    datasets: Iterable[str] = (),
    accelerator: str | None = "NvidiaTeslaT4",
    internet: bool = False,
) -> Path:
    """The folder out/<slug of the title> with the notebook, without outputs, and its metadata. Raises ConfigError, BundleError.

    datasets: slugs of the owner's datasets to attach. accelerator: one of site.ACCELERATORS, or None for the CPU.
    """
    site.check_owner(owner)
    site.check_title(title)
    if competition:
        site.check_competition(competition)
    if accelerator:
        site.check_accelerator(accelerator)
    folder = out / slug(title)
    is_tpu = (accelerator or "").startswith("Tpu")
    metadata = {
        "id": f"{owner}/{folder.name}", "title": title, "code_file": notebook.name, "language": "python", "kernel_type": "notebook",
        "is_private": True, "enable_gpu": bool(accelerator) and not is_tpu, "enable_tpu": is_tpu, "machine_shape": accelerator or "",
        "enable_internet": internet,  # left out, the client sends true
        "dataset_sources": [f"{owner}/{dataset}" for dataset in datasets], "competition_sources": [competition] if competition else [],
        "kernel_sources": [], "model_sources": [], "keywords": [], "docker_image_pinning_type": "original",
    }  # fmt: skip
    part = _new_part(folder)
    (part / notebook.name).write_text(_without_outputs(notebook), encoding="utf-8")
    scan(part)
    return _finish(part, folder, {site.KERNEL_METADATA: _json(metadata)})


@dataclass(frozen=True)
class _Dataset:
    """files: the part of the bundle that goes into it, with the bundle's folder as root. metadata: text of its metadata file."""

    slug: str
    files: Manifest
    metadata: str

    @property
    def texts(self) -> dict[str, str]:
        return {manifest.FILE: self.files.to_json(), site.DATASET_METADATA: self.metadata}

    def is_staged(self, out: Path) -> bool:
        """Whether out/<slug> holds exactly this, and nobody has written to it since, as the fixed time of its files tells."""
        folder = out / self.slug
        sizes = {flat_name(name): size for name, (_, size) in self.files.files.items()}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        found = {path.name: path.lstat() for path in folder.iterdir()} if folder.is_dir() else {}
        if {name: stat.st_size for name, stat in found.items()} != sizes or any(stat.st_mtime != _TIME for stat in found.values()):
            return False
        return all((folder / name).read_text(encoding="utf-8") == text for name, text in self.texts.items())

    def stage(self, out: Path) -> Path:
        """Copy the files, unless they are there; gives the folder."""
        folder = out / self.slug
        if self.is_staged(out):
            return folder
        part = _new_part(folder)
        for name in tqdm(sorted(self.files.files), desc=self.slug, unit="file", disable=None, leave=False):
            shutil.copyfile(self.files.locate(name), part / flat_name(name))
        return _finish(part, folder, self.texts)


def _plan(bundle: Manifest, owner: str, licence: str, part_bytes: float, public: bool) -> list[_Dataset]:
    """The datasets that a bundle becomes. Raises BundleError for a file that cannot be uploaded."""
    flat: dict[str, str] = {}
    try:
        for name in sorted(bundle.files):
            site.check_file_name(flat_name(name))
            if (other := flat.setdefault(flat_name(name), name)) != name:
                raise BundleError(f"files {other} and {name} would both be called {flat_name(name)} in a dataset: rename one and pack again")
        parts = manifest.divide(bundle, _shares(bundle, part_bytes))
    except BundleError as error:
        raise BundleError(f"bundle {bundle.name!r} at {bundle.root}: {error}") from None
    slugs = [site.dataset_slug(bundle.name, part.part) for part in parts]
    return [_Dataset(name, part, _metadata(part, f"{owner}/{name}", licence, public)) for name, part in zip(slugs, parts, strict=True)]


def _shares(bundle: Manifest, part_bytes: float) -> list[list[str]]:
    """Names of all files in order, divided so that no share is larger than `part_bytes`. Raises BundleError for a file that is."""
    shares: list[list[str]] = [[]]
    filled = 0
    for name, (_, size) in sorted(bundle.files.items()):
        if size > part_bytes:
            limit = f"more than a part may have ({part_bytes / 1e6:,.1f} MB)"
            raise BundleError(f"file {name} has {size / 1e6:,.1f} MB, {limit}: shard the weights (kit vendor weights --shard-mb), or raise --part-mb")
        if filled + size > part_bytes:
            shares.append([])
            filled = 0
        shares[-1].append(name)
        filled += size
    return shares


def _refuse_twins(datasets: Iterable[_Dataset]) -> None:
    made: dict[str, Path] = {}
    for dataset in datasets:
        if dataset.slug in made:
            both = f"{made[dataset.slug]} and {dataset.files.root}"
            raise BundleError(f"{both} would both become dataset {dataset.slug!r}: rename one, or give each bundle once")
        made[dataset.slug] = dataset.files.root


def _metadata(part: Manifest, reference: str, licence: str, public: bool) -> str:
    """The text of dataset-metadata.json. A licence that the site does not have becomes "other", with its name in the description."""
    number, total = part.part
    which = f", part {number} of {total}" if total > 1 else ""
    named = str(part.meta.get("licence") or licence)
    size = sum(size for _, size in part.files.values())
    lines = [
        f"Bundle `{part.name}` of kind {part.kind}{which}: {len(part.files)} files, {size / 1e6:.1f} MB. Digest {part.digest}, of the whole {part.whole}.",
        f"Licence: {named}.",
        f"`{manifest.FILE}` has the sha256 of every file. A file of a sub-folder is named with `--` for `/`:",
        "\n".join(f"* {name}" for name in sorted(part.files)[:_LISTED]),
        *([f"and {len(part.files) - _LISTED} more"] if len(part.files) > _LISTED else []),
    ]
    return _json({
        "title": reference.partition("/")[2], "id": reference, "subtitle": f"{part.kind} bundle of an offline submission kit{which}"[: site.LONGEST_SUBTITLE],
        "description": "\n\n".join(lines), "licenses": [{"name": site.known_licence(named)}], "keywords": [], "isPrivate": not public,
    })  # fmt: skip


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _new_part(folder: Path) -> Path:
    """An empty folder beside the one that is to be made."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def _finish(part: Path, folder: Path, texts: dict[str, str]) -> Path:
    """Write the texts, give every file the same mode and time, and put the part in its place."""
    for name, text in texts.items():
        (part / name).write_text(text, encoding="utf-8")
    for path in part.iterdir():
        path.chmod(0o644)
        os.utime(path, (_TIME, _TIME))
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    return folder


def _remove_stale(out: Path, staged: Sequence[Path], metadata: str) -> None:
    """Remove what an earlier call staged in `out` and this one did not; a manifest beside the metadata, or the metadata's time, tells that we did."""
    for path in sorted(out.glob(f"*/{metadata}")):
        ours = (path.parent / manifest.FILE).is_file() or path.stat().st_mtime == _TIME
        if ours and path.parent not in staged:
            shutil.rmtree(path.parent)


def _without_outputs(notebook: Path) -> str:
    """The notebook's text without outputs, execution counts and states of widgets. Raises BundleError."""
    try:
        body = json.loads(notebook.read_text(encoding="utf-8"))
        body["metadata"].pop("widgets", None)
        for cell in body["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{notebook}: is no readable notebook ({error}): give the folder that holds train.ipynb and infer.ipynb") from None
    return _json(body)


def _bases(run: Path, bundles: Path) -> list[Path]:
    """Folders of the weights bundles that a run's recipe names as bundle:NAME, for its model or its retriever."""
    settings = json.dumps(Recipe.load(run / "recipe.toml").model_dump(mode="json"))
    return [model_folder(source, Path(), bundles) for source in re.findall(r'"(bundle:[^"]+)"', settings)]
