"""Requirements and image profiles → the wheels that the images lack and the kit's own, locked by hash: bundles kit-wheels and kit-code.

Owns the lock, and what is recorded of every wheel. Does not know how wheels are found (resolve.py), how an installation is proven
(prove.py), nor datasets.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.metadata import RawMetadata, parse_email
from packaging.utils import canonicalize_name, parse_wheel_filename
from tqdm import tqdm

import kit
from kit import manifest
from kit.errors import BundleError, ConfigError
from kit.vendor.profile import Package, Profile
from kit.vendor.resolve import EPOCH, Found, Index, Tools, last_error, matches, run, tool

DISTRIBUTION = "submission-kit"  # what the kit is called where it is installed
LOCK = "requirements.lock"
CODE = "kit-code"
WHEELS = "kit-wheels"


@dataclass(frozen=True)
class Wheel:
    """A vendored wheel. source: URL, or the name of a local file. requires: its Requires-Dist. profiles: names of those it serves."""

    name: str
    version: str
    file: str
    bytes: int
    sha256: str
    tags: tuple[str, ...]
    licence: str
    source: str
    requires: tuple[str, ...]
    profiles: tuple[str, ...]


@dataclass(frozen=True)
class Wheelhouse:
    """What `vendor` wrote. folders: the bundles kit-wheels and kit-code. wheels: third-party ones by name, then the kit's."""

    folders: tuple[Path, ...]
    wheels: tuple[Wheel, ...]
    seconds: float
    """Of resolution, without downloads."""
    unknown: tuple[str, ...]
    """What the profiles cannot tell, so that it could not be checked."""

    @property
    def mb(self) -> float:
        """Megabytes (10**6 bytes) of all wheels."""
        return sum(wheel.bytes for wheel in self.wheels) / 1e6


def vendor(requirements: Path, profiles: Sequence[Profile], out: Path, *, allow: Iterable[str] = (), index: Index | None = None) -> Wheelhouse:
    """Write the bundles kit-wheels and kit-code below `out`: what `requirements` ask for and an image lacks, and the kit itself.

    profiles: one wheelhouse serves them all, with the same versions where their packages let it. allow: packages that may change, or be
    brought though only an image should bring them, or break ("nvidia-*" for many). Raises ConfigError where that cannot be, BundleError, DependencyError.
    """
    if not profiles or not requirements.is_file():
        raise ConfigError(f"requirements file {requirements} is missing: give --requirements" if profiles else "no profile is given: give --profile")
    allowed = {canonicalize_name(name) for name in allow}
    with tempfile.TemporaryDirectory(prefix="kit-wheels-") as temporary:
        work = Path(temporary)
        tools = [Tools(profile, index or Index(), work / str(number)) for number, profile in enumerate(profiles)]
        begun = time.monotonic()
        deltas = _resolve(tools, requirements, allowed)
        seconds = time.monotonic() - begun
        wheels = _fetch(tools, deltas, work / WHEELS)
        code = pack_code(work)
        own = _describe(next(code.glob("*.whl")), "built from the kit's source", [profile.name for profile in profiles])
        for profile in profiles:
            _check_requirements([*wheels, own], profile, allowed)
        (work / WHEELS / LOCK).write_text(_lock(wheels, profiles), encoding="utf-8")
        digests = {profile.name: profile.digest for profile in profiles}
        manifest.write(work / WHEELS, WHEELS, "wheels", profiles=digests, wheels=[asdict(wheel) for wheel in wheels])
        folders = (_place(work / WHEELS, out), _place(code, out))
    unknown = tuple(f"{profile.name}: {line}" for profile in profiles for line in profile.unknown())
    return Wheelhouse(folders, (*wheels, own), seconds, unknown)


def pack_code(out: Path) -> Path:
    """The bundle kit-code: the kit's own wheel and its lock. The same source gives the same bytes.

    Raises BundleError where the kit does not run from a clone, DependencyError without hatchling.
    """
    root = Path(kit.__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        raise BundleError(f"{root} has no pyproject.toml, so the kit's wheel cannot be built: run the kit from a clone of its repository")
    with tempfile.TemporaryDirectory(prefix="kit-code-") as temporary:
        folder = Path(temporary) / CODE
        done = run([*tool("hatchling"), "build", "--target=wheel", f"--directory={folder}"], network=False, folder=root, SOURCE_DATE_EPOCH=EPOCH)
        if done.returncode:
            raise BundleError(f"the kit's wheel cannot be built from {root}: {last_error(done.stderr)}")
        wheel = _describe(next(folder.glob("*.whl")), "built from the kit's source", ())
        (folder / LOCK).write_text(_lock([wheel], ()), encoding="utf-8")
        manifest.write(folder, CODE, "code", version=wheel.version)
        return _place(folder, out)


def install_command(python: Path, folders: Sequence[Path]) -> list[str]:
    """How `python` installs what is locked in `folders`: from there alone, every file checked, and nothing else touched."""
    options = ["--no-index", "--no-deps", "--no-compile", "--require-hashes", *(f"--find-links={folder}" for folder in folders)]
    return [str(python), "-m", "pip", "--isolated", "install", *options, *(f"--requirement={folder / LOCK}" for folder in folders)]


def _resolve(tools: Sequence[Tools], requirements: Path, allowed: Collection[str]) -> list[list[Found]]:
    """The wheels that each image lacks; the versions of an earlier one are preferred where the image has none."""
    deltas: list[list[Found]] = []
    for of_image in tqdm(tools, "resolve", disable=None):
        earlier = {found.name: found.version for delta in reversed(deltas) for found in delta}
        preferred = {name: version for name, version in earlier.items() if name not in of_image.profile.packages}
        deltas.append(of_image.locate(of_image.delta(requirements, allowed, preferred)))
    return deltas


def _fetch(tools: Sequence[Tools], deltas: Sequence[Sequence[Found]], folder: Path) -> list[Wheel]:
    """Download into `folder`; gives the wheels by name."""
    folder.mkdir()
    for of_image, delta in zip(tools, tqdm(deltas, "download", disable=None), strict=True):
        of_image.download(delta, folder)
    wheels = []
    for path in sorted(folder.glob("*.whl")):
        digest = manifest.sha256(path)
        chosen = [(of_image.profile.name, found) for of_image, delta in zip(tools, deltas, strict=True) for found in delta if found.sha256 == digest]
        wheels.append(_describe(path, chosen[0][1].source, [name for name, _ in chosen]))
    return wheels


def _check_requirements(wheels: Iterable[Wheel], profile: Profile, allowed: Collection[str]) -> None:
    """Refuse requirements that would not hold, unless they do not hold now. Raises ConfigError naming the first."""
    before = {_requirement(line) for line in profile.broken()}
    added = {wheel.name: Package(version=wheel.version, requires=wheel.requires) for wheel in wheels if profile.name in wheel.profiles}
    for line in profile.broken(added):
        name = line.partition(" ")[0]
        if _requirement(line) not in before and not matches(name, allowed):
            raise ConfigError(f"profile {profile.name!r}: {line}: ask for another version, or accept by --allow {name} that it breaks")


def _requirement(line: str) -> str:
    """Who needs what, of a line of Profile.broken, without the version that is there instead."""
    return line.rpartition(", would have ")[0]


def _lock(wheels: Iterable[Wheel], profiles: Sequence[Profile]) -> str:
    """A line per wheel, with the one hash it may have, and a marker where not every profile takes it. Raises ConfigError."""
    lines = []
    for wheel in wheels:
        takers = {profile.python_tag: profile.name for profile in profiles if profile.name in wheel.profiles}
        others = {profile.python_tag: profile.name for profile in profiles if profile.name not in wheel.profiles}
        for tag in takers.keys() & others.keys():
            raise ConfigError(f"profiles {takers[tag]!r} and {others[tag]!r} have the same Python {tag}, but only one takes {wheel.file}: give each its own --out")
        marker = " or ".join(f'python_version == "{tag}"' for tag in sorted(takers)) if others else ""
        lines.append(f"{wheel.name}=={wheel.version}{f' ; {marker}' if marker else ''} --hash=sha256:{wheel.sha256}\n")
    return "".join(lines)


def _describe(path: Path, source: str, profiles: Sequence[str]) -> Wheel:
    """What a wheel says of itself, and where it comes from."""
    name, version, _, tags = parse_wheel_filename(path.name)
    with zipfile.ZipFile(path) as archive:
        member = next(entry for entry in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry))
        raw, _ = parse_email(archive.read(member))
    return Wheel(
        name, str(version), path.name, path.stat().st_size, manifest.sha256(path), tuple(sorted(map(str, tags))),
        _licence(raw), source, tuple(raw.get("requires_dist", ())), tuple(profiles),
    )  # fmt: skip


def _licence(raw: RawMetadata) -> str:
    """The SPDX expression, else the licence field where it is a name and not a text, else the classifiers."""
    field = raw.get("license", "").strip()
    classified = ", ".join(line.rpartition(" :: ")[2] for line in raw.get("classifiers", ()) if line.startswith("License ::"))
    return raw.get("license_expression") or (field if len(field) <= 80 and "\n" not in field else "") or classified or "not stated"


def _place(bundle: Path, out: Path) -> Path:
    """Copy a finished bundle to `out`, in place of an older one."""
    part = out / f".{bundle.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(bundle, part)
    shutil.rmtree(out / bundle.name, ignore_errors=True)
    return part.rename(out / bundle.name)
