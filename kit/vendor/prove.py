"""Proves that what was vendored installs into an image without network, changes nothing there, and is imported.

In a fresh environment as near to the image as this machine comes: with the image's packages, with an interpreter of its version, or by
tags and hashes alone. Does not know how the wheels were chosen.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version
from tqdm import tqdm

from kit import manifest, runtime
from kit.errors import BundleError, RehearsalError
from kit.vendor.lookalike import Lookalike
from kit.vendor.profile import Profile
from kit.vendor.resolve import Index, last_error, matches, run, target, tool
from kit.vendor.wheels import LOCK, install_command

LEVELS = ("real", "interpreter", "tags")
_TOO_LARGE = ("torch", "torchvision", "torchaudio", "triton", "nvidia-*", "cuda-*", "jax*", "tensorflow*")  # to be fetched just to be imported
_SEALS = (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"])


@dataclass(frozen=True)
class Proof:
    """What was proven. level: "real" (every package of the image, at its version), "interpreter" (its Python, some packages), "tags" (no such Python).

    seconds: of the installation. added: name → version. changed: name → (image's version, vendored one), where that was allowed.
    imported, not_imported: modules of the vendored packages, the latter with the reason.
    """

    profile: str
    level: str
    seconds: float
    added: dict[str, str]
    changed: dict[str, tuple[str, str]]
    imported: list[str]
    not_imported: dict[str, str]


def prove(folder: Path, profile: Profile, *, index: Index | None = None) -> Proof:
    """Install what is locked below `folder` into a look-alike of the image, without network, and import it.

    index: where packages of the image that the vendored ones import are fetched from, if this machine has its Python but not them. Raises
    BundleError where nothing is locked there, RehearsalError naming the wheel or module where the installation or an import fails.
    """
    house = _House.open(folder, profile)
    python = find_python(profile.python_tag)
    with tempfile.TemporaryDirectory(prefix="kit-proof-") as temporary:
        work = Path(temporary)
        if python is None:
            seconds = _install(house, _command_by_tags(house, work))
            level, reasons = "tags", dict.fromkeys(house.modules(), f"no Python {profile.python_tag} was found here")
        else:
            image = _look_alike(house, python, work, index or Index())
            before = image.installed()
            seconds = _install(house, install_command(image.python, house.folders))
            _check_additions(house, before, image.installed())
            level = "interpreter" if {*image.absent, *image.differing} - set(house.locked) else "real"
            reasons = {module: _import(image, module) for module in tqdm(house.modules(), "import", disable=None)}
    missing = {module: reason for module, reason in reasons.items() if reason}
    return Proof(profile.name, level, seconds, house.locked, house.changed, [module for module in reasons if module not in missing], missing)


def find_python(version: str) -> Path | None:
    """An interpreter of that minor version ("3.12"): the running one, one on the search path, or one installed beside the running one; nothing is downloaded."""
    if version == "{}.{}".format(*sys.version_info):
        return Path(runtime.python())
    beside = sorted(Path(sys.base_prefix).parent.glob("*/bin"))
    search = os.pathsep.join([*map(str, beside), runtime.clean_environment()["PATH"]])
    done = run([*tool("uv"), "python", "find", "--system", version], network=False, PATH=search)
    return Path(done.stdout.strip()) if not done.returncode else None


@dataclass(frozen=True)
class _House:
    """Folders with a lock, read for one image. lines: what is locked for it, with pip's options."""

    profile: Profile
    folders: list[Path]
    lines: list[tuple[Requirement, str]]

    @classmethod
    def open(cls, folder: Path, profile: Profile) -> _House:
        """Raises BundleError where there is no lock, or a line of it makes no sense."""
        folders = sorted(path.parent for path in Path(folder).rglob(LOCK))
        if not folders:
            raise BundleError(f"{folder}: no {LOCK} in it or below: run `kit vendor wheels`, or give the folder that holds kit-wheels and kit-code")
        lines = []
        for text in (line for place in folders for line in (place / LOCK).read_text(encoding="utf-8").splitlines() if line.strip()):
            wanted, dashes, options = text.partition("--")
            try:
                requirement = Requirement(wanted)
            except InvalidRequirement:
                raise BundleError(f"{LOCK} below {folder}: line {text[:80]!r} is no requirement: run `kit vendor wheels` again") from None
            if not requirement.marker or requirement.marker.evaluate(profile.markers()):
                lines.append((requirement, dashes + options))
        return cls(profile, folders, lines)

    @property
    def locked(self) -> dict[str, str]:
        """Name → version."""
        return {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line, _ in self.lines}

    @property
    def changed(self) -> dict[str, tuple[str, str]]:
        """Name → (version in the image, locked version), where both are and differ."""
        both = {name: (self.profile.packages[name].version, version) for name, version in self.locked.items() if name in self.profile.packages}
        return {name: (theirs, ours) for name, (theirs, ours) in both.items() if theirs != ours}

    @cached_property
    def wheels(self) -> dict[str, Path]:
        """Name → the locked wheel that fits the image; not of those that are missing."""
        tags = set(self.profile.tags())
        found = {path: parse_wheel_filename(path.name) for folder in self.folders for path in folder.glob("*.whl")}
        return {name: path for path, (name, version, _, fits) in found.items() if self.locked.get(name) == str(version) and fits & tags}

    def modules(self) -> list[str]:
        """Top-level modules and packages of the wheels."""
        return sorted({module for path in self.wheels.values() for module in _modules(path)})

    def needed(self) -> dict[str, str]:
        """Name → version of packages of the image that the third-party wheels require, directly or not, without those that are too large."""
        records = [record for folder in self.folders for record in manifest.read(folder).meta.get("wheels", [])]
        direct = {Requirement(text).name for record in records for text in record["requires"] if "extra ==" not in text}
        small = {name: package for name, package in self.profile.packages.items() if not matches(name, _TOO_LARGE) and name not in self.locked}
        names = self.profile.model_copy(update={"packages": small}).closure(direct)
        return {name: Version(small[name].version).public for name in sorted(names)}


def _modules(wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        for first, _, rest in (name.partition("/") for name in archive.namelist()):
            module = first if rest else first.partition(".")[0]
            if module.isidentifier() and (rest or first.endswith((".py", ".so"))):
                yield module


def _look_alike(house: _House, python: Path, work: Path, index: Index) -> Lookalike:
    """The image without what is vendored; for another Python than the running one, with what the vendored import fetched, if it can be."""
    if python == Path(runtime.python()):
        return Lookalike.create(work / "image", house.profile, hide=house.locked, phantoms=True)
    needed, fetched = house.needed(), work / "fetched"
    pins = [f"{name}=={version}" for name, version in needed.items()]
    options = [f"--python={python}", f"--target={fetched}", "--no-deps", "--only-binary=:all:", *index.options()]
    is_fetched = bool(pins) and not run([*tool("uv"), "pip", "install", *options, *pins], network=not index.no_index).returncode
    image = Lookalike.create(work / "image", house.profile, hide={*house.locked, *(needed if is_fetched else ())}, python=python, phantoms=True)
    if is_fetched:
        (image.site / "1-fetched.pth").write_text(f"{fetched}\n", encoding="utf-8")
    return image


def _command_by_tags(house: _House, work: Path) -> list[str]:
    """Installs into a folder, as for the image's Python. pip would evaluate markers for its own, so the lock is given without."""
    lock = work / LOCK
    lock.write_text("".join(f"{line.name}{line.specifier} {options}\n" for line, options in house.lines))
    command = [option for option in install_command(Path(runtime.python()), house.folders) if not option.startswith("--requirement")]
    return [*command, f"--requirement={lock}", f"--target={work / 'site'}", *target(house.profile)]


def _install(house: _House, command: Sequence[str]) -> float:
    """Seconds that it took. Raises RehearsalError naming the wheel."""
    begun = time.monotonic()
    done = run([*_seal(), *command], network=False)
    if done.returncode:
        raise RehearsalError(f"profile {house.profile.name!r}: {_fault(house, done.stderr)}")
    return round(time.monotonic() - begun, 2)


@cache
def _seal() -> tuple[str, ...]:
    """What a command is started with to have no network, as far as this machine lets it."""
    possible = _SEALS if shutil.which("unshare") else ()
    works = (seal for seal in possible if not subprocess.run([*seal, "true"], capture_output=True, check=False).returncode)
    return tuple(next(works, ()))


def _fault(house: _House, text: str) -> str:
    """Why pip failed: one line that names the wheel."""
    if absent := re.search(r"No matching distribution found for ([\w.-]+)==(\S+)", text):
        name = canonicalize_name(absent[1])
        others = [path.name for folder in house.folders for path in folder.glob("*.whl") if parse_wheel_filename(path.name)[0] == name]
        if others:
            return f"{others[0]} does not fit its Python {house.profile.python_tag} or its platform: vendor for this profile too"
        return f"the wheel of {name} {absent[2]} is missing in {house.folders[0].parent}: vendor again, or attach the dataset that holds it"
    if "DO NOT MATCH THE HASHES" in text and (wheel := re.search(r"([^/\s]+\.whl)", text)):
        return f"{wheel[1]} is not the wheel that was locked (its sha256 differs): vendor again"
    if "Hashes are required" in text and (bare := re.search(r"^\s+([\w.-]+==\S+) --hash", text, re.MULTILINE)):
        return f"{bare[1]} has no hash in its {LOCK}: vendor again"
    return f"the installation failed: {last_error(text)}"


def _check_additions(house: _House, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raises RehearsalError where anything but the addition of what is locked has happened."""
    for name, version in before.items():
        if after.get(name) != version:
            raise RehearsalError(f"profile {house.profile.name!r}: the installation changed the image's {name} {version} to {after.get(name, 'nothing')}")
    for name, version in house.locked.items():
        if name not in after or Version(after[name]) != Version(version):
            raise RehearsalError(f"profile {house.profile.name!r}: {name} is {after.get(name, 'not there')} after the installation, not {version} as locked")


def _import(image: Lookalike, module: str) -> str:
    """Empty if the module is imported, or which package of the image is missing here. Raises RehearsalError where it should have worked."""
    done = run([*_seal(), str(image.python), "-I", "-c", f"import {module}"], network=False)
    if not done.returncode:
        return ""
    reason = (done.stderr.strip().splitlines() or [f"the interpreter died with exit code {done.returncode}"])[-1]
    wanted = re.match(r"ModuleNotFoundError: No module named '(\w+)", reason)
    if wanted:
        names = {canonicalize_name(name) for name in (wanted[1], *metadata.packages_distributions().get(wanted[1], ()))}
        if missing := names & set(image.absent):
            return f"{min(missing)} is in the image, but only as metadata here"
    raise RehearsalError(f"module {module} is installed, but cannot be imported: {reason}")
