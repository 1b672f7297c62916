"""What an image already has: Python, glibc, packages with their requirements, torch's build, variables, mounts.

A profile is captured where it holds (a cell does it in a competition notebook), read from a bare freeze, or shipped with the kit.
What it cannot know it says. Assumes CPython on Linux. Does not know what is to be vendored. Tags and markers: PEP 425, 508 and 600.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Self

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kit.errors import ConfigError, DataError, nearest
from kit.manifest import write_atomically
from kit.vendor import capture

HERE = "here"
_EXAMPLE = {"python": "3.12.13", "glibc": "2.35"}
_LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # glibc 2.N → the older name of manylinux_2_N (PEP 600)
_OLDEST = {"x86_64": 5, "i686": 5}  # the first glibc that wheels were built for; elsewhere 2.17
_STATED = re.compile(r"#\s*(python|glibc)\s*[:=]?\s*([\d.]+)\s*$", re.IGNORECASE)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Package(_Part):
    """An installed package. requires: its Requires-Dist lines, None where they are not known."""

    version: str
    requires: tuple[str, ...] | None = None


class Torch(_Part):
    """torch's build. cuda: version it was built with, None for the CPU. archs: GPU architectures it has kernels for, e.g. "sm_75"."""

    version: str
    cuda: str | None = None
    archs: tuple[str, ...] = ()


class Profile(_Part):
    """What one image has."""

    name: str
    source: str
    """Where the values come from, in words."""
    python: str = Field(pattern=r"^3\.\d+\.\d+[\w+]*$")
    glibc: str = Field(pattern=r"^(2\.\d+)?$")
    """Empty where the C library is another: then no compiled wheel fits."""
    machine: str = "x86_64"
    torch: Torch | None = None
    environment: tuple[str, ...] = ()
    """Names of the variables that are set there; never their values."""
    mounts: dict[str, int | None] = {}
    """Folder → free bytes, None where they are not known."""
    gaps: tuple[str, ...] = ()
    """What its source did not tell, one line each."""
    packages: dict[str, Package]
    """By canonical name."""

    @field_validator("packages")
    @classmethod
    def _canonical(cls, packages: dict[str, Package]) -> dict[str, Package]:
        canonical: dict[str, Package] = {canonicalize_name(name): package for name, package in packages.items()}
        return {name: canonical[name] for name in sorted(canonical)}

    @classmethod
    def load(cls, name_or_path: str | Path, *, python: str | None = None, glibc: str | None = None) -> Self:
        """The profile of a name shipped with the kit, of this interpreter ("here"), of a JSON file, or of a bare freeze (.txt).

        python, glibc: of a freeze; needed unless it says them itself. Raises ConfigError, and DataError for a line of a freeze.
        """
        if str(name_or_path) == HERE:
            return cls.capture()
        path = _find(name_or_path)
        return cls.from_freeze(path, python=python, glibc=glibc) if path.suffix == ".txt" else cls._read(path)

    @classmethod
    def capture(cls, name: str = HERE) -> Self:
        """The profile of the interpreter that runs this."""
        return cls.model_validate({"name": name, "source": "captured from the interpreter that was running", **capture.capture()})

    @classmethod
    def from_freeze(cls, path: Path, *, name: str | None = None, python: str | None = None, glibc: str | None = None) -> Self:
        """The profile of a `pip freeze`: versions only. name: by default the file's.

        python and glibc may stand in the file: `# python: 3.12.13`, `# glibc: 2.35`. Raises ConfigError, and DataError naming the line.
        """
        lines = _text(path).splitlines()
        told = {match[1].lower(): match[2] for line in lines if (match := _STATED.match(line))}
        told |= {key: value for key, value in (("python", python), ("glibc", glibc)) if value}
        for key in ("python", "glibc"):
            if key not in told:
                raise ConfigError(f"{path}: a freeze does not say its {key}: give it, or add a line such as `# {key}: {_EXAMPLE[key]}`")
        versions, odd = _read_freeze(path, lines)
        gaps = [*odd, *(f"{key} {value} was told, not captured" for key, value in sorted(told.items()))]
        return cls._of({"name": name or path.stem, "source": f"freeze {path.name}", **told, "packages": versions, "gaps": gaps}, path)

    @classmethod
    def _read(cls, path: Path) -> Self:
        try:
            values = json.loads(_text(path))
        except ValueError as error:
            raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds no profile, but a {type(values).__name__}: capture it again")
        return cls._of({"name": path.stem, "source": "captured there", **values}, path)  # the cell knows no name

    @classmethod
    def _of(cls, values: Mapping[str, Any], path: Path) -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{path}: {_explain(error)}: capture the profile again, or mend the file") from None

    def save(self, path: Path) -> None:
        """Write it as JSON, one package per line, atomically."""
        values = self.model_dump(mode="json")
        packages = [f"  {json.dumps(name)}: {json.dumps(package)}" for name, package in values.pop("packages").items()]
        head = json.dumps(values, indent=1).removesuffix("\n}")
        write_atomically(path, f'{head},\n "packages": {{\n' + ",\n".join(packages) + "\n }\n}\n")

    @property
    def python_tag(self) -> str:
        """Major and minor version of its Python, e.g. "3.12"."""
        return ".".join(self.python.split(".")[:2])

    @property
    def digest(self) -> str:
        """8 hex digits that change with what decides about wheels: Python, glibc, machine, packages, torch."""
        body = self.model_dump(mode="json", include={"python", "glibc", "machine", "packages", "torch"})
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:8]

    def unknown(self) -> list[str]:
        """What this profile cannot tell, one line each."""
        bare = sum(package.requires is None for package in self.packages.values())
        lines = {
            f"requirements of {bare} packages are not known: conflicts inside the image cannot be seen": bare > 0,
            "torch's CUDA build and GPU architectures are not known": self.torch is None and "torch" in self.packages,
            "torch's GPU architectures are not known: it was captured without a GPU": self.torch and self.torch.cuda and not self.torch.archs,
            "its C library is not glibc: only wheels of pure Python fit": not self.glibc,
            "its environment variables are not known": not self.environment,
            "its mounts are not known": not self.mounts,
        }
        return [*(line for line, holds in lines.items() if holds), *self.gaps]

    def markers(self) -> dict[str, str]:
        """What environment markers are evaluated with (PEP 508), no extra chosen."""
        return {
            "implementation_name": "cpython", "implementation_version": self.python, "os_name": "posix", "platform_machine": self.machine,
            "platform_python_implementation": "CPython", "platform_release": "", "platform_system": "Linux", "platform_version": "",
            "python_full_version": self.python, "python_version": self.python_tag, "sys_platform": "linux", "extra": "",
        }  # fmt: skip

    def platforms(self) -> list[str]:
        """Platform tags of the wheels that run there, best first: manylinux_2_35_x86_64 … manylinux1_x86_64. linux_* is for no index."""
        found = []
        newest = int(self.glibc.split(".")[1]) if self.glibc else -1
        for minor in range(newest, _OLDEST.get(self.machine, 17) - 1, -1):
            found.append(f"manylinux_2_{minor}_{self.machine}")
            if minor in _LEGACY:
                found.append(f"{_LEGACY[minor]}_{self.machine}")
        return found

    def tags(self) -> list[Tag]:
        """Every tag of a wheel that runs there, best first."""
        major, minor = self.python_tag.split(".")
        interpreter, version, platforms = f"cp{major}{minor}", (int(major), int(minor)), self.platforms()
        every = [*cpython_tags(version, [interpreter], platforms), *compatible_tags(version, interpreter, platforms)]
        return [tag for tag in every if tag.platform in {*platforms, "any"}]  # packaging takes an empty list as this machine's platforms

    def broken(self, changed: Mapping[str, Package] | None = None) -> list[str]:
        """Requirements that do not hold once `changed` is added, e.g. "pandas 3.1.1 needs numpy>=2.0.2, would have 1.26.4"; sorted.

        A requirement on a package that is not there at all counts only where the one that requires it is in `changed`: a profile may be a closure.
        """
        changed = {canonicalize_name(name): package for name, package in (changed or {}).items()}
        after = {**self.packages, **changed}
        lines = set()
        for name, requirement in _needed(after, after, self.markers()):
            needed = after.get(canonicalize_name(requirement.name))
            if needed is None and name not in changed or needed and _holds(requirement.specifier, needed.version):
                continue
            have = needed.version if needed else "none"
            lines.add(f"{name} {after[name].version} needs {requirement.name}{requirement.specifier}, would have {have}")
        return sorted(lines)

    def closure(self, roots: Iterable[str]) -> set[str]:
        """Canonical names of the packages it has that `roots` need, directly or not, the roots included."""
        start: set[str] = {canonicalize_name(name) for name in roots}
        needed = {canonicalize_name(requirement.name) for _, requirement in _needed(self.packages, start, self.markers())}
        return (start | needed) & set(self.packages)


def shipped_profiles() -> dict[str, Path]:
    """Profiles that come with the kit: name → file."""
    folder = Path(str(resources.files("kit.vendor") / "profiles"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def capture_cell() -> str:
    """A cell that prints the profile of the notebook it is pasted into; its output, saved as a .json file, can be loaded."""
    return Path(capture.__file__).read_text(encoding="utf-8") + "\n\nimport json\n\nprint(json.dumps(capture()))\n"


def _find(name_or_path: str | Path) -> Path:
    path, shipped = Path(name_or_path), shipped_profiles()
    if path.is_file():
        return path
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    raise ConfigError(f"profile {str(name_or_path)!r} is neither a file nor shipped with the kit{nearest(str(name_or_path), [*shipped, HERE])}")


def _needed(packages: Mapping[str, Package], roots: Iterable[str], markers: Mapping[str, str]) -> Iterator[tuple[str, Requirement]]:
    """Who needs what: every requirement that is active there, of the roots and of what they need, extras that are asked for included."""
    todo = [(name, "") for name in roots]
    seen = set(todo)
    while todo:
        name, extra = todo.pop()
        package = packages.get(name)
        for text in package.requires or () if package else ():
            requirement = _requirement(text)
            if requirement is None or requirement.marker and not requirement.marker.evaluate({**markers, "extra": extra}):
                continue
            yield name, requirement
            other = canonicalize_name(requirement.name)
            new = {(other, asked) for asked in ("", *requirement.extras)} - seen
            seen |= new
            todo += new


def _requirement(text: str) -> Requirement | None:
    """None for what older tools wrote and the standard forbids."""
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _holds(specifier: SpecifierSet, version: str) -> bool:
    try:
        return specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return True  # not a version by the standard: nothing can be said


def _read_freeze(path: Path, lines: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Packages with a version, and one line for each without."""
    versions: dict[str, dict[str, str]] = {}
    odd = []
    for number, line in enumerate(lines, start=1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if not text:
            continue
        if re.match(r"-e\s|--editable\b", text):
            odd.append(f"version of {text!r} is not known (line {number} of {path.name})")
            continue
        requirement = _requirement(text)
        version = _frozen_version(requirement) if requirement else None
        if requirement is None or version is None and not requirement.url:
            raise DataError(f"{path}, line {number}: {line.strip()[:80]!r} is no line of a freeze: expected name==version")
        if version is None:
            odd.append(f"version of {requirement.name} is not known (line {number} of {path.name})")
        else:
            versions[canonicalize_name(requirement.name)] = {"version": version}
    return versions, odd


def _frozen_version(requirement: Requirement) -> str | None:
    """From name==version, or from the name of the wheel that name @ URL gives."""
    if requirement.url:
        try:
            return str(parse_wheel_filename(requirement.url.partition("#")[0].rpartition("/")[2])[1])
        except (InvalidWheelFilename, InvalidVersion):
            return None
    pinned = [part.version for part in requirement.specifier if part.operator in ("==", "===") and "*" not in part.version]
    return pinned[0] if len(pinned) == len(requirement.specifier) == 1 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {path}: cannot be read: {error}") from None


def _explain(error: ValidationError) -> str:
    """One line from pydantic's report: the key, what is wrong, the nearest known key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, Profile.model_fields)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
