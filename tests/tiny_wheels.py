"""Wheels, source distributions and an image of a few lines, written in code: an index for tests that have no network."""

from __future__ import annotations

import io
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kit import manifest
from kit.vendor.profile import Package, Profile

ROOT = Path(__file__).parents[1]
BACKEND = '''
import os, time, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    stem, version, tag, is_stable = {values!r}
    info = f"{{stem}}-{{version}}.dist-info"
    files = {{
        f"{{stem}}/__init__.py": "" if is_stable else f"made = {{time.time_ns()}}",
        f"{{info}}/METADATA": f"Metadata-Version: 2.1\\nName: {{stem}}\\nVersion: {{version}}\\n",
        f"{{info}}/WHEEL": f"Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: {{tag}}\\n",
    }}
    files[f"{{info}}/RECORD"] = "".join(f"{{name}},,\\n" for name in [*files, f"{{info}}/RECORD"])
    when = time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]) if "SOURCE_DATE_EPOCH" in os.environ else time.time())[:6]
    name = f"{{stem}}-{{version}}-{{tag}}.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as archive:
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path, when), text)
    return name
'''


def write_wheel(
    folder: Path, name: str, version: str = "1.0", *, tag: str = "py3-none-any", requires: Iterable[str] = (), code: str = "",
    metadata: str = "", files: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """A wheel with one package of the same name. metadata: further lines of METADATA. files: more files, path → text."""
    stem = name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {text}\n" for text in requires)
    contents = {
        f"{stem}/__init__.py": code,
        **(files or {}),
        f"{info}/METADATA": f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{needs}{metadata}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{stem}-{version}-{tag}.whl", "w") as archive:
        for path, text in contents.items():
            archive.writestr(zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0)), text)
    return folder / f"{stem}-{version}-{tag}.whl"


def write_sdist(folder: Path, name: str, version: str = "1.0", *, tag: str = "py3-none-any", is_stable: bool = True) -> Path:
    """A source distribution that needs nothing to be built. tag: of the wheel it builds to. is_stable: every build gives the same."""
    stem = name.replace("-", "_")
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    texts = {
        "pyproject.toml": project,
        "backend.py": BACKEND.format(values=(stem, version, tag, is_stable)),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file, text in texts.items():
            entry = tarfile.TarInfo(f"{stem}-{version}/{file}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def write_requirements(path: Path, *lines: str) -> Path:
    """A requirements.in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_house(folder: Path, *wheels: Path, hashes: bool = True) -> Path:
    """A bundle kit-wheels below `folder`, as vendoring writes it: the wheels are copied into it."""
    house = folder / "kit-wheels"
    house.mkdir(parents=True)
    lines, records = [], []
    for wheel in wheels:
        (house / wheel.name).write_bytes(wheel.read_bytes())
        name, version = wheel.name.split("-")[:2]
        lines.append(f"{name.replace('_', '-')}=={version}" + (f" --hash=sha256:{manifest.sha256(wheel)}" if hashes else "") + "\n")
        records.append({"name": name.replace("_", "-"), "requires": requires_of(wheel)})
    (house / "requirements.lock").write_text("".join(lines), encoding="utf-8")
    manifest.write(house, "kit-wheels", "wheels", profiles={}, wheels=records)
    return house


def requires_of(wheel: Path) -> list[str]:
    """Its Requires-Dist."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    return [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Requires-Dist: ")]


def make_image(name: str = "image", python: str = "3.12.13", glibc: str = "2.35", without: Iterable[str] = (), **versions: str | Package) -> Profile:
    """An image that has what the kit requires, less `without`, and more packages: tiny_base="1.0"."""
    needed = [Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]]
    packages = {canonicalize_name(need.name): Package(version=min(part.version for part in need.specifier), requires=()) for need in needed}
    more = {canonicalize_name(key): Package(version=value) if isinstance(value, str) else value for key, value in versions.items()}
    packages = {key: package for key, package in {**packages, **more}.items() if key not in set(without)}
    return Profile(name=name, source="written for a test", python=python, glibc=glibc, packages=packages)
