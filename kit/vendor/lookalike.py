"""A Python environment that sees what an image has, as far as it is installed here, and nothing else.

Its packages are links into the environment that runs this, so it is made in a second or two and takes no space; what is installed into it
stays in it. Does not know what is tried in it. Knows CPython on POSIX.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from packaging.utils import canonicalize_name

from kit import runtime
from kit.errors import ConfigError, DependencyError
from kit.vendor import capture
from kit.vendor.profile import Package, Profile

_PTH = "0-image.pth"  # sorts before every other .pth: some import from the image
_READ_ONLY = "import sys; sys.dont_write_bytecode = True"  # byte code would be written through the links
_INSTALLER = "pip"


@dataclass(frozen=True)
class Lookalike:
    """A fresh environment in `folder`.

    python: its interpreter. site: its own site-packages, where pip installs. exposes: folders outside `folder` that it must be able to read.
    absent: packages of the profile that are not installed here. differing: (version in the profile, version here) of those it shows.
    """

    folder: Path
    python: Path
    site: Path
    exposes: tuple[Path, ...]
    absent: tuple[str, ...] = ()
    differing: dict[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def create(
        cls, folder: Path, profile: Profile | None = None, *, hide: Collection[str] = (), python: Path | None = None, phantoms: bool = False,
    ) -> Lookalike:  # fmt: skip
        """An environment with the profile's packages (without a profile: all) that are installed here, and what those need, less `hide`.

        python: another interpreter; one of another minor version shows no package from here and gets its own pip. phantoms: packages of the
        profile that it does not show have their metadata, so that a resolver takes them as installed. Raises ConfigError, DependencyError.
        """
        folder = folder.absolute()
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty, and a look-alike environment is made from nothing: name a new folder")
        interpreter = python or Path(runtime.python())
        version, base = _ask(interpreter)
        host = _installed_here() if version == sys.version_info[:2] else {}
        wanted = profile.packages if profile else {name: found.package for name, found in host.items()}
        hidden = {str(canonicalize_name(name)) for name in hide}
        shown = _closure(host, set(wanted) - hidden | {_INSTALLER}) - hidden
        missing = set(wanted) - shown - {_INSTALLER}

        _make_venv(interpreter, folder, with_pip=_INSTALLER not in shown)
        image, site = folder / "image", folder / "lib" / "python{}.{}".format(*version) / "site-packages"
        _link(list(_files(host)), image, shown)
        _write_paths(site, image, [host[name] for name in sorted(shown)])
        for name in sorted(missing - hidden) if phantoms else ():
            _write_phantom(image, name, wanted[name])

        executable = folder / "bin" / "python"
        places = {base, base.resolve(), executable.resolve().parents[1]}.union(*(host[name].places for name in shown))
        versions = {name: (wanted[name].version, host[name].package.version) for name in sorted(shown & set(wanted))}
        differing = {name: (there, here) for name, (there, here) in versions.items() if there != here}
        return cls(folder, executable, site, tuple(sorted(places)), tuple(sorted(missing - set(host))), differing)

    def installed(self) -> dict[str, str]:
        """Canonical name → version of every package that its interpreter sees."""
        code = Path(capture.__file__).read_text(encoding="utf-8")
        code += "\n\nimport json\n\nprint(json.dumps({name: package['version'] for name, package in packages().items()}))\n"
        found: dict[str, str] = json.loads(_run(self.python, "-c", code))
        return found


class _Installed(NamedTuple):
    """A package here. root: its site-packages. files: below root. source: folder of an editable one."""

    package: Package
    root: Path
    files: list[str]
    source: Path | None

    @property
    def places(self) -> set[Path]:
        return {self.root, self.source} if self.source else {self.root}


class _File(NamedTuple):
    owner: str
    root: Path
    parts: list[str]


def _installed_here() -> dict[str, _Installed]:
    """Every package that has a RECORD; what stands first on sys.path wins."""
    known = capture.packages()
    found: dict[str, _Installed] = {}
    for distribution in metadata.distributions():
        record = distribution.read_text("RECORD")
        name = str(canonicalize_name(distribution.metadata["Name"])) if "Name" in distribution.metadata else ""
        if record and name in known and name not in found:
            root = Path(str(distribution.locate_file(""))).resolve()
            files = [row[0] for row in csv.reader(record.splitlines()) if row]
            found[name] = _Installed(Package.model_validate(known[name]), root, files, _editable_source(distribution))
    return found


def _editable_source(distribution: metadata.Distribution) -> Path | None:
    """Folder of an editable installation (PEP 610)."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    is_editable = origin.get("dir_info", {}).get("editable", False)
    return Path(unquote(urlsplit(origin["url"]).path)) if is_editable else None


def _closure(host: Mapping[str, _Installed], names: Collection[str]) -> set[str]:
    packages = {name: found.package for name, found in host.items()}
    here = Profile(name="here", source="here", python="{}.{}.{}".format(*sys.version_info), glibc="", packages=packages)
    return here.closure(names)


def _files(host: Mapping[str, _Installed]) -> Iterator[_File]:
    """What packages have in their site-packages; not scripts, byte code and .pth files, which work nowhere else."""
    for name, found in host.items():
        for file in found.files:
            parts = file.split("/")
            if parts[0] not in ("", "..") and "__pycache__" not in parts and not _is_pth(file):
                yield _File(name, found.root, parts)


def _is_pth(file: str) -> bool:
    return file.endswith(".pth") and "/" not in file


def _link(files: Iterable[_File], target: Path, shown: Collection[str], depth: int = 0) -> None:
    """Link what shown packages have to `target`. A folder that they share with hidden ones, or that lies in two places, is made and gone into."""
    target.mkdir()
    groups = defaultdict(list)
    for file in files:
        groups[file.parts[depth]].append(file)
    for name, group in groups.items():
        visible = [file for file in group if file.owner in shown]
        is_whole = len(visible) == len(group) and len({file.root for file in group}) == 1
        if visible and (is_whole or len(visible[0].parts) == depth + 1):
            (target / name).symlink_to(visible[0].root.joinpath(*visible[0].parts[: depth + 1]))
        elif visible:
            _link(group, target / name, shown, depth + 1)


def _write_paths(site: Path, image: Path, packages: Iterable[_Installed]) -> None:
    """The image on sys.path, and copies of the packages' own .pth files: those of editable ones name their source."""
    (site / _PTH).write_text(f"{image}\n{_READ_ONLY}\n", encoding="utf-8")
    for package in packages:
        for file in filter(_is_pth, package.files):
            (site / file).write_bytes((package.root / file).read_bytes())


def _write_phantom(image: Path, name: str, package: Package) -> None:
    """A package that is nothing but metadata."""
    folder = f"{name.replace('-', '_')}-{package.version.replace('-', '_')}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {package.version}", *(f"Requires-Dist: {text}" for text in package.requires or ())]
    (image / folder).mkdir()
    (image / folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (image / folder / "RECORD").write_text("".join(f"{folder}/{file},,\n" for file in ("METADATA", "RECORD")), encoding="utf-8")


def _ask(interpreter: Path) -> tuple[tuple[int, int], Path]:
    """Major and minor version of an interpreter, and the folder where its standard library is installed."""
    major, minor, base = json.loads(_run(interpreter, "-c", "import json, sys; print(json.dumps([*sys.version_info[:2], sys.base_prefix]))"))
    return (major, minor), Path(base)


def _make_venv(interpreter: Path, folder: Path, *, with_pip: bool) -> None:
    _run(interpreter, "-m", "venv", *([] if with_pip else ["--without-pip"]), str(folder))


def _run(interpreter: Path, *arguments: str) -> str:
    """What an interpreter prints, isolated from this folder and the user's settings. Raises DependencyError."""
    try:
        return subprocess.run([interpreter, "-I", *arguments], check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise DependencyError(f"python {interpreter}: cannot be started ({error.strerror}): give the path of an interpreter") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout).strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        raise DependencyError(f"python {interpreter}: {' '.join(arguments[:2])} failed: {reason[0]}: install its venv module, or give another python") from None
