"""The sha256 list of a folder: write, verify, open, divide into parts and join. Does not know what the files mean.

A manifest makes a folder a *bundle*: it has a name, a kind, and a list of every file with size and sha256. As a dataset, a bundle has no
sub-folders: the manifest lists `fold0/model.safetensors`, and the file is called `fold0--model.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from kit.errors import BundleError

FILE = "MANIFEST.json"
INCOMPLETE = "incomplete"  # key of meta in a manifest that was joined without all parts: what is missing
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """root: the folder. name: its slug. kind: what it holds ("member", "index", "code" …). files: path → (sha256, bytes). meta: free values."""

    root: Path
    name: str
    kind: str
    files: dict[str, tuple[str, int]]
    meta: dict[str, Any]

    @property
    def digest(self) -> str:
        """8 hex digits that change when any file does."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def whole(self) -> str:
        """The digest of the undivided bundle: what parts that belong together have in common."""
        return str(self.meta.get("whole", self.digest))

    @property
    def part(self) -> tuple[int, int]:
        """Which part of the bundle this is, counted from 1, and how many there are; (1, 1) for an undivided one."""
        number, total = self.meta.get("part", (1, 1))
        return int(number), int(total)

    @property
    def is_flat(self) -> bool:
        """Whether files lie beside the manifest under their flat names."""
        return any("/" in name and self.locate(name) != self.root / name for name in self.files)

    def locate(self, name: str) -> Path:
        """Where a listed file is: in its folder, or under its flat name."""
        nested, flat = self.root / name, self.root / flat_name(name)
        return flat if flat.is_file() and not nested.is_file() else nested

    def to_json(self) -> str:
        """The text of the file, in a fixed order."""
        files = {name: {"sha256": digest, "bytes": size} for name, (digest, size) in self.files.items()}
        return json.dumps({"name": self.name, "kind": self.kind, "meta": self.meta, "files": files}, indent=1, sort_keys=True) + "\n"


def flat_name(path: str) -> str:
    """The name of a bundle's file where there are no sub-folders: `fold0/config.json` → `fold0--config.json`."""
    return path.replace("/", "--")


def slug(text: str) -> str:
    """Lower-case letters, digits and single hyphens, as the site's names of datasets and notebooks."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write(root: Path, name: str, kind: str, **meta: Any) -> Manifest:
    """Hash every file under `root` and write its manifest, atomically and in a fixed order."""
    files = {path: (sha256(root / path), (root / path).stat().st_size) for path in _walk(root)}
    manifest = Manifest(root, name, kind, files, meta)
    write_atomically(root / FILE, manifest.to_json())
    return manifest


def read(root: Path) -> Manifest:
    """The manifest of a folder. Raises BundleError where it is missing or unreadable."""
    path = Path(root) / FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        files = {_inside(name): (entry["sha256"], int(entry["bytes"])) for name, entry in body["files"].items()}
        manifest = Manifest(Path(root), body["name"], body["kind"], files, body["meta"])
        number, total = manifest.part
        if not 1 <= number <= total:
            raise ValueError(f"it is part {number} of {total}")
        return manifest
    except FileNotFoundError:
        raise BundleError(f"{root}: no {FILE}, so this is no bundle: pack it again, or check which folder is meant") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: unreadable manifest ({error}): pack the bundle again") from None


def read_whole(root: Path) -> Manifest:
    """`read`, but a bundle that was joined without all of its parts is refused too. Raises BundleError naming the part."""
    manifest = read(root)
    if INCOMPLETE in manifest.meta:
        raise BundleError(f"bundle {manifest.name!r}: {manifest.meta[INCOMPLETE]}")
    return manifest


def verify(root: Path, *, full: bool = True) -> Manifest:
    """Check that every listed file is there with its size and, if full, its sha256. Raises BundleError naming the first that is not."""
    manifest = read_whole(root)
    for name, (digest, size) in manifest.files.items():
        path = manifest.locate(name)
        if not path.is_file():
            raise BundleError(f"bundle {manifest.name!r} at {root}: file {name} is missing: attach or pack the bundle again")
        if path.stat().st_size != size:
            raise BundleError(f"bundle {manifest.name!r} at {root}: file {name} has {path.stat().st_size} bytes instead of {size}: pack or upload it again")
        if full and sha256(path) != digest:
            raise BundleError(f"bundle {manifest.name!r} at {root}: file {name} is damaged (its sha256 differs): pack or upload it again")
    return manifest


def divide(manifest: Manifest, shares: Sequence[Sequence[str]]) -> list[Manifest]:
    """A manifest for every share of the files (lists of names that are all files, each once); a single share is the manifest itself."""
    if len(shares) == 1:
        return [manifest]
    return [
        replace(
            manifest,
            files={name: manifest.files[name] for name in share},
            meta={**manifest.meta, "part": [number, len(shares)], "whole": manifest.digest},
        )
        for number, share in enumerate(shares, 1)
    ]


def join(parts: Sequence[Manifest]) -> Manifest:
    """One manifest of the files of all parts: with every part, the one that was divided. Its root is that of the first."""
    files = {name: entry for part in parts for name, entry in part.files.items()}
    return replace(parts[0], files=files, meta={key: value for key, value in parts[0].meta.items() if key not in ("part", "whole")})


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that whoever reads it sees the old or the new content, never a part: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError(f"it lists {name!r}, which lies outside its folder")
    return name


def _walk(root: Path) -> Iterator[str]:
    for path in sorted(Path(root).rglob("*")):
        if path.is_file() and path.name != FILE and "__pycache__" not in path.parts:
            yield path.relative_to(root).as_posix()
