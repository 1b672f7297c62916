"""What was staged, read back and checked before anything of it is sent: by the rules of the site and of its client, which tell late or never.

Owns the checks of a staged folder. Knows the site's names (site.py), not the site; staging is dataset.py's, sending publish.py's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import manifest
from kit.errors import BundleError, ConfigError, nearest
from kit.vendor import site


def digest(found: manifest.Manifest) -> str:
    """8 hex digits that change when a file does, or what the manifest says beside the files (which part of which whole)."""
    return _hash(found.to_json())


@dataclass(frozen=True)
class Dataset:
    """A staged folder. ref: "owner/slug". digest: of its whole manifest. names: of the files to be uploaded."""

    folder: Path
    ref: str
    digest: str
    names: frozenset[str]
    public: bool

    @classmethod
    def read(cls, folder: Path) -> Dataset:
        """Check names, sizes and metadata; contents are checked when they are sent. Raises BundleError or ConfigError naming file and value."""
        found = manifest.verify(folder, full=False)
        expected = {manifest.flat_name(name) for name in found.files} | {manifest.FILE}
        names = {path.name for path in folder.iterdir()} - {site.DATASET_METADATA}
        strange = sorted(names - expected) + sorted(name for name in names if (folder / name).is_symlink() or not (folder / name).is_file())
        if strange:
            raise BundleError(f"{folder}: {strange[0]} is no plain file listed in {manifest.FILE}: nothing else may be uploaded; stage it again")
        with _about(folder):
            for name in sorted(names):
                site.check_file_name(name)
        path = folder / site.DATASET_METADATA
        meta = _json(path)
        with _about(path):
            _check_dataset(meta, folder)
        return cls(folder.resolve(), meta["id"], digest(found), frozenset(names), meta.get("isPrivate") is False)

    @property
    def mb(self) -> float:
        """Size of all its files, in 10⁶ bytes."""
        return sum((self.folder / name).stat().st_size for name in self.names) / 1e6


@dataclass(frozen=True)
class Notebook:
    """A staged notebook. body: its JSON. metadata: kernel-metadata.json."""

    body: dict[str, Any]
    metadata: dict[str, Any]

    @classmethod
    def read(cls, kernels: Path, name: str) -> Notebook:
        """The notebook whose folder, or else whose file without .ipynb, is called `name`. Raises ConfigError."""
        by_folder = {path.parent.name: path for path in sorted(kernels.glob(f"*/{site.KERNEL_METADATA}"))}
        by_file = {Path(str(_json(path).get("code_file"))).stem: path for path in by_folder.values()}
        staged = {**by_file, **by_folder}
        if not staged:
            raise ConfigError(f"{kernels}: no staged notebook {name!r}, nor any other: run `kit vendor bundle` first, or send the datasets alone by --kernel none")
        if name not in staged:
            raise ConfigError(f"{kernels}: no staged notebook {name!r}{nearest(name, staged)}: stage it, or choose with --kernel")
        path = staged[name]
        metadata = {"dataset_sources": [], "competition_sources": [], **_json(path)}
        with _about(path):
            _check_kernel(metadata, path.parent)
        return cls(_json(path.parent / metadata["code_file"]), metadata)

    @property
    def ref(self) -> str:
        """owner/slug"""
        return str(self.metadata["id"])

    @property
    def sources(self) -> tuple[str, ...]:
        """Its datasets: owner/slug, or owner/slug/version."""
        return tuple(self.metadata["dataset_sources"])

    @property
    def mark(self) -> str:
        """`kit-<digest>` of a pinned notebook: another one when the notebook, its settings or its sources change."""
        return str(self.body["metadata"]["kit"])

    def pinned(self, sources: Sequence[str]) -> Notebook:
        """The same with these sources and with its mark, by which it is known again on the site."""
        metadata = {**self.metadata, "dataset_sources": list(sources)}
        mark = f"kit-{_hash(json.dumps([self.body, metadata], sort_keys=True))}"
        return Notebook({**self.body, "metadata": {**self.body.get("metadata", {}), "kit": mark}}, metadata)

    def write(self, folder: Path) -> None:
        """The two files that the client reads."""
        (folder / site.KERNEL_METADATA).write_text(json.dumps(self.metadata), encoding="utf-8")
        (folder / self.metadata["code_file"]).write_text(json.dumps(self.body), encoding="utf-8")


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Put the file before the complaint."""
    try:
        yield
    except (BundleError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from None
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: a value has the wrong type ({error}): stage it again") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: stage it again") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: no readable JSON object ({error}): stage it again") from None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _require(*rules: tuple[object, str]) -> None:
    for holds, complaint in rules:
        if not holds:
            raise ConfigError(complaint)


def _check_dataset(meta: dict[str, Any], folder: Path) -> None:
    title, subtitle = str(meta.get("title") or ""), str(meta.get("subtitle") or "")
    licences = [item.get("name") for item in meta.get("licenses") or ()]
    resources = [str(item.get("path")) for item in meta.get("resources") or ()]
    slug = _checked_id(meta)
    _require(
        (site.dataset_slug(slug) == slug, f"id {meta['id']!r}: the site takes slugs like {site.dataset_slug(slug)!r}, of 6 to 50 characters"),
        (6 <= len(title) <= 50, f"title {title!r} has {len(title)} characters: give it 6 to 50"),
        (title != "INSERT_TITLE_HERE", f"title {title!r} is the client's placeholder: give the dataset a title"),
        (not subtitle or 20 <= len(subtitle) <= site.LONGEST_SUBTITLE, f"subtitle {subtitle!r}: give it 20 to {site.LONGEST_SUBTITLE} characters, or none"),
        (len(licences) == 1, f"licenses {licences}: name exactly one"),
        (len(set(resources)) == len(resources), f"resources {resources}: a file is named twice"),
        *(((folder / name).is_file(), f"resources name {name!r}, which is not in the folder") for name in resources),
    )
    site.check_licence(str(licences[0]))


def _check_kernel(meta: dict[str, Any], folder: Path) -> None:
    file, title, slug = str(meta.get("code_file") or ""), str(meta.get("title") or ""), _checked_id(meta)
    site.check_title(title)
    made = manifest.slug(title)
    _require(
        (slug == made, f"title {title!r} makes the slug {made!r}, but the id is {meta['id']!r}: the site would save another notebook; make them agree"),
        (file.endswith(".ipynb") and (folder / file).is_file(), f"code_file {file!r}: no such notebook beside it"),
        (meta.get("kernel_type") == "notebook", f"kernel_type {meta.get('kernel_type')!r}: write 'notebook'"),
        (meta.get("language") == "python", f"language {meta.get('language')!r}: write 'python'"),
        (meta.get("enable_internet") is False, f"enable_internet {meta.get('enable_internet')!r}: write false (left out, the client sends true)"),
        *((re.fullmatch(r"[\w-]+/[\w-]+(/\d+)?", str(source)), f"dataset_sources: {source!r} is not owner/slug[/version]") for source in meta["dataset_sources"]),
    )
    for competition in meta["competition_sources"]:
        site.check_competition(competition)
    if meta.get("machine_shape"):
        site.check_accelerator(meta["machine_shape"])


def _checked_id(meta: dict[str, Any]) -> str:
    """The slug of `owner/slug`."""
    owner, slash, slug = str(meta.get("id") or "").partition("/")
    _require((slash and slug and "/" not in slug, f"id {meta.get('id')!r}: write owner/slug"))
    site.check_owner(owner)
    return slug
