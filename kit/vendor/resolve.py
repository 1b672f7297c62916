"""uv and pip, told of one image: what it lacks, which wheels those are, and the wheels themselves.

uv sees the image as a folder of metadata without code, so no interpreter of the image's version is needed, and builds that are on no index
(torch 2.10.0+cu128) count as installed. Does not know bundles.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.utils import canonicalize_name, parse_wheel_filename

from kit import manifest, runtime
from kit.errors import ConfigError, DependencyError
from kit.vendor.profile import Package, Profile

GUARDED = (
    "torch", "torchvision", "torchaudio", "triton", "nvidia-*", "cuda-*", "jax*", "tensorflow*",
    "numpy", "pandas", "scipy", "pyarrow", "protobuf",
)  # fmt: skip
"""What only an image may bring: builds for its driver, and what everything else in it was compiled against. * stands for anything."""

EPOCH = "1577836800"
"""2020-01-01, in SOURCE_DATE_EPOCH: the time of every file in a wheel that is built here."""
_UV_GLIBC = (17, 28, *range(31, 41))  # uv knows the platforms manylinux_2_N of these N


@dataclass(frozen=True)
class Index:
    """Where uv and pip look. find_links: folders of wheels. no_index: nowhere else."""

    find_links: tuple[Path, ...] = ()
    no_index: bool = False

    def options(self) -> list[str]:
        """For the command lines of both tools."""
        return [*(f"--find-links={folder.resolve()}" for folder in self.find_links), *(["--no-index"] if self.no_index else [])]


@dataclass(frozen=True)
class Found:
    """A wheel that was chosen. source: its URL, or the name of a local file. bytes: None where the index does not say. built: its file, if it was built here."""

    name: str
    version: str
    sha256: str
    source: str
    bytes: int | None = None
    built: Path | None = None


@dataclass(frozen=True)
class Tools:
    """uv and pip for one image. work: an empty folder of theirs."""

    profile: Profile
    index: Index
    work: Path

    def __post_init__(self) -> None:
        self._image.mkdir(parents=True)
        for name, package in self.profile.packages.items():
            _write_metadata(self._image, name, package)

    @property
    def _image(self) -> Path:
        return self.work / "image"

    def delta(self, requirements: Path, allowed: Collection[str] = (), preferred: Mapping[str, str] | None = None) -> dict[str, str]:
        """Name → version of what the image lacks. allowed: packages that may change or be brought, see `matches`. preferred: versions to take, if they can be.

        Raises ConfigError where the image's packages forbid it, or it would bring what only an image may bring.
        """
        image = {name: package.version for name, package in self.profile.packages.items() if not matches(name, allowed)}
        done = self._resolve(requirements, {**(preferred or {}), **image})
        if done.returncode and preferred:
            done = self._resolve(requirements, image)
        if done.returncode:
            raise ConfigError(self._refusal(requirements, done.stderr))
        pins: dict[str, str] = {canonicalize_name(name): version for name, version in re.findall(r"^ \+ ([\w.-]+)==(\S+)", done.stderr, re.MULTILINE)}
        self._guard(pins, allowed)
        return pins

    def locate(self, pins: Mapping[str, str]) -> list[Found]:
        """The best wheel of every pin for this image; a package without one is built from source. Raises ConfigError."""
        exact, lock = self.work / "pins.in", self.work / "pylock.toml"
        exact.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        lock.unlink(missing_ok=True)  # uv would prefer what it lists
        done = self._uv("compile", str(exact), "--no-deps", "--no-header", "--format=pylock.toml", f"--output-file={lock}")
        if done.returncode:
            raise ConfigError(self._refusal(exact, done.stderr))
        return [self._choose(package) for package in tomllib.loads(lock.read_text(encoding="utf-8")).get("packages", [])]

    def download(self, wheels: Sequence[Found], folder: Path) -> None:
        """Bring wheels into `folder`, each checked by its sha256. Raises ConfigError."""
        for built in [wheel.built for wheel in wheels if wheel.built]:
            shutil.copyfile(built, folder / built.name)
        lines = [f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in wheels if not wheel.built]
        if not lines:
            return
        lock = self.work / "download.lock"
        lock.write_text("".join(lines))
        done = self._pip("download", "--require-hashes", f"--dest={folder}", f"--requirement={lock}", *target(self.profile))
        if done.returncode:
            raise ConfigError(f"wheels for profile {self.profile.name!r} cannot be downloaded: {last_error(done.stderr)}")

    def _resolve(self, requirements: Path, versions: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """What uv would install into the image, keeping to `versions`; from source only what has no wheel at all."""
        constraints = self.work / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
        options = ["install", "--dry-run", f"--target={self._image}", f"--requirement={requirements}", f"--constraint={constraints}"]
        done = self._uv(*options, "--only-binary=:all:")
        return self._uv(*options) if "building from source is disabled" in done.stderr else done

    def _choose(self, package: Mapping[str, Any]) -> Found:
        """package: an entry of pylock.toml (PEP 751)."""
        ranks = {tag: rank for rank, tag in enumerate(self.profile.tags())}
        fitting = {}
        for wheel in package.get("wheels", ()):
            tags = parse_wheel_filename(_file_name(wheel))[3]
            fitting.update({ranks[tag]: wheel for tag in tags if tag in ranks})
        if not fitting:
            return self._build(package)
        best = fitting[min(fitting)]
        return Found(package["name"], package["version"], best["hashes"]["sha256"], _source(best), best.get("size"))

    def _build(self, package: Mapping[str, Any]) -> Found:
        """A package without a wheel: built twice, and taken if both are the same and of pure Python. Raises ConfigError."""
        name, version = package["name"], package["version"]
        label = f"{name} {version} has no wheel for profile {self.profile.name!r}"
        built: list[Path] = []
        for number in ("1", "2"):
            folder = self.work / "built" / name / number
            done = self._pip("wheel", "--no-cache-dir", f"--no-binary={name}", f"--wheel-dir={folder}", f"{name}=={version}")
            if done.returncode:
                raise ConfigError(f"{label}, and its source cannot be built: {last_error(done.stderr)}")
            built += folder.glob("*.whl")
        if not built[0].name.endswith("-py3-none-any.whl"):
            raise ConfigError(f"{label}, and its source gives {built[0].name}, which fits this machine only: build it in a manylinux image, and give --find-links")
        digests = [manifest.sha256(path) for path in built]
        if digests[0] != digests[1]:
            raise ConfigError(f"{label}, and two builds of its source differ: build it once yourself, and give --find-links")
        return Found(name, version, digests[0], f"built from {_source(package['sdist'])}", built[0].stat().st_size, built[0])

    def _guard(self, pins: Mapping[str, str], allowed: Collection[str]) -> None:
        for name, version in sorted(pins.items()):
            had, change = self.profile.packages.get(name), f"profile {self.profile.name!r}: {name} {version} would be installed"
            if matches(name, allowed):
                continue
            if had:
                raise ConfigError(f"{change} over the image's {had.version}: --allow {name} lets it change")
            if matches(name, GUARDED):
                raise ConfigError(f"{change}, which only the image should bring: ask for less, or --allow {name}")

    def _refusal(self, requirements: Path, text: str) -> str:
        said = text.partition("hint:")[0].partition("error:")[2] or text
        reason = " ".join(re.sub(r"[×│]", " ", re.sub(r"\s*(cause:|╰─▶)", ": ", said)).split())
        way = "ask for less, or let a package of the image change by --allow NAME" if "No solution" in reason else "check the file, the network and --find-links"
        return f"{requirements.name} cannot be met on profile {self.profile.name!r} (Python {self.profile.python_tag}): {reason.rstrip('.')}: {way}"

    def _uv(self, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        oldest, *_ = _UV_GLIBC
        minor = max((known for known in _UV_GLIBC if known <= int(self.profile.glibc.partition(".")[2] or oldest)), default=oldest)
        place = [f"--python={runtime.python()}", f"--python-version={self.profile.python}", f"--python-platform={self.profile.machine}-manylinux_2_{minor}"]
        return run([*tool("uv"), "--no-progress", "pip", verb, *options, *place, *self.index.options()], network=not self.index.no_index)

    def _pip(self, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [*tool("pip"), verb, "--quiet", "--no-deps", *options, *self.index.options()]
        return run(command, network=not self.index.no_index, SOURCE_DATE_EPOCH=EPOCH)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a canonical package name is one of these, in which * stands for anything."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def target(profile: Profile) -> list[str]:
    """pip's options to choose wheels as it would in that image, whatever Python runs it."""
    abis = [f"--abi={abi}" for abi in (f"cp{profile.python_tag.replace('.', '')}", "abi3", "none")]
    platforms = [f"--platform={platform}" for platform in (*profile.platforms(), "any")]
    return ["--only-binary=:all:", f"--python-version={profile.python}", "--implementation=cp", *abis, *platforms]


def tool(name: str) -> list[str]:
    """How a tool of this environment, or of the search path, is called. Raises DependencyError."""
    if find_spec(name):
        return [runtime.python(), "-m", name]
    if found := shutil.which(name):
        return [found]
    raise DependencyError(f"{name} is not installed, which vendoring wheels needs: pip install {name}")


def run(command: Sequence[str], *, network: bool, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end in a clean environment, its output caught."""
    environment = {**runtime.clean_environment(network=network), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def last_error(text: str) -> str:
    """The line of a tool's output that says what was wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    return next((line for line in reversed(lines) if re.match(r"error\b", line, re.IGNORECASE)), lines[-1]).removeprefix("ERROR: ")


def _file_name(artifact: Mapping[str, Any]) -> str:
    """The file name of a wheel or sdist in pylock.toml."""
    return unquote(urlsplit(artifact.get("url") or artifact["path"]).path).rpartition("/")[2]


def _source(artifact: Mapping[str, Any]) -> str:
    """Its URL without credentials; of a local file, the name alone."""
    url = urlsplit(artifact.get("url", ""))
    return url._replace(netloc=url.netloc.rpartition("@")[2]).geturl() if url.scheme.startswith("http") else _file_name(artifact)


def _write_metadata(site: Path, name: str, package: Package) -> None:
    """Make uv believe that a package is installed in `site`."""
    folder = site / f"{name.replace('-', '_')}-{package.version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {package.version}", *(f"Requires-Dist: {text}" for text in package.requires or ())]
    (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "RECORD").touch()
