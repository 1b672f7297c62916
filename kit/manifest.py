"""The sha256 list of a folder: write, verify, open. Does not know what the files mean.

A manifest makes a folder a *bundle*: it has a name, a kind, and a list of every file with size and sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import BundleError

FILE = "MANIFEST.json"
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
    body = {"name": name, "kind": kind, "meta": meta, "files": {path: {"sha256": h, "bytes": n} for path, (h, n) in files.items()}}
    write_atomically(root / FILE, json.dumps(body, indent=1, sort_keys=True) + "\n")
    return manifest


def read(root: Path) -> Manifest:
    """The manifest of a folder. Raises BundleError where it is missing or unreadable."""
    path = Path(root) / FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        files = {name: (entry["sha256"], int(entry["bytes"])) for name, entry in body["files"].items()}
        return Manifest(Path(root), body["name"], body["kind"], files, body["meta"])
    except FileNotFoundError:
        raise BundleError(f"{root}: no {FILE}, so this is no bundle: pack it again, or check which folder is meant") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: unreadable manifest ({error}): pack the bundle again") from None


def verify(root: Path, *, full: bool = True) -> Manifest:
    """Check that every listed file is there with its size and, if full, its sha256. Raises BundleError naming the first that is not."""
    manifest = read(root)
    for name, (digest, size) in manifest.files.items():
        path = manifest.root / name
        if not path.is_file():
            raise BundleError(f"bundle {manifest.name!r} at {root}: file {name} is missing: attach or pack the bundle again")
        if path.stat().st_size != size:
            raise BundleError(f"bundle {manifest.name!r} at {root}: file {name} has {path.stat().st_size} bytes instead of {size}: pack or upload it again")
        if full and sha256(path) != digest:
            raise BundleError(f"bundle {manifest.name!r} at {root}: file {name} is damaged (its sha256 differs): pack or upload it again")
    return manifest


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


def _walk(root: Path) -> Iterator[str]:
    for path in sorted(Path(root).rglob("*")):
        if path.is_file() and path.name != FILE and "__pycache__" not in path.parts:
            yield path.relative_to(root).as_posix()
