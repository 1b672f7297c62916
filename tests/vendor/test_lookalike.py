"""The look-alike environment: shows what it should, hides the rest, takes installations, and never changes the environment it is made of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from kit.errors import ConfigError, DependencyError
from kit.vendor.lookalike import Lookalike
from kit.vendor.profile import Package, Profile

FACTS = {"name": "image", "source": "a test", "python": "3.12.13", "glibc": "2.35"}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder of the interpreter that runs the tests, empty at first."""
    folder = tmp_path / "host"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def install(site: Path, name: str, version: str = "1", *, files: dict[str, str] | None = None, requires: tuple[str, ...] = (), origin: str = "") -> None:
    """Install a package as pip does: files, METADATA, RECORD, and direct_url.json for an editable one."""
    info = f"{name}-{version}.dist-info"
    files = files if files is not None else {f"{name}.py": f"version = {version!r}\n"}
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    every = {**files, f"{info}/METADATA": "\n".join(lines) + "\n"}
    if origin:
        every[f"{info}/direct_url.json"] = json.dumps({"url": origin, "dir_info": {"editable": True}})
    for path, text in every.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    (site / info / "RECORD").write_text("".join(f"{path},,\n" for path in [*every, f"{info}/RECORD", "../../../bin/script", "__pycache__/x.pyc"]))


def wheel(folder: Path, name: str, version: str) -> Path:
    """A wheel with one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]))
    return path


def image(*names: str, version: str = "1") -> Profile:
    return Profile(packages={name: Package(version=version, requires=()) for name in names}, **FACTS)


def run(look: Lookalike, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    return subprocess.run([look.python, *arguments], cwd=look.folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def value(look: Lookalike, code: str) -> str:
    """What an expression gives there, or the name of what it raises."""
    done = run(look, "-c", f"import importlib\ntry: print({code})\nexcept Exception as error: print(type(error).__name__)")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_shows_the_profiles_packages_and_what_they_need_and_nothing_else(host: Path, tmp_path: Path) -> None:
    install(host, "asked", requires=("Needed_Too>=1", 'unneeded; python_version < "3"'))
    install(host, "needed_too", requires=("hidden",))
    install(host, "unneeded")
    install(host, "hidden")
    look = Lookalike.create(tmp_path / "look", image("asked", "absent"), hide={"Hidden"})
    assert set(look.installed()) == {"asked", "needed-too", "pip"}
    assert value(look, "importlib.import_module('needed_too').version") == "1"
    assert [value(look, f"importlib.import_module('{name}')") for name in ("unneeded", "hidden", "numpy")] == ["ModuleNotFoundError"] * 3
    assert look.absent == ("absent",)


def test_without_a_profile_it_shows_everything_less_what_is_hidden(host: Path, tmp_path: Path) -> None:
    install(host, "mine")
    look = Lookalike.create(tmp_path / "look", hide={"mine", "submission-kit"})
    installed = look.installed()
    assert {"numpy", "pytest", "pip"} <= set(installed)
    assert not {"mine", "submission-kit"} & set(installed)
    assert installed["numpy"] == metadata.version("numpy")
    assert (look.absent, look.differing) == ((), {})


def test_compiled_packages_find_their_libraries_through_the_links(tmp_path: Path) -> None:
    look = Lookalike.create(tmp_path / "look", image("numpy"))
    assert value(look, "(importlib.import_module('numpy').ones((3, 3)) @ [1, 2, 3]).tolist()") == "[6.0, 6.0, 6.0]"
    assert value(look, "importlib.import_module('numpy').__file__").startswith(str(look.folder))


def test_what_it_tells_does_not_depend_on_the_users_settings(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(host, "unasked")
    monkeypatch.setenv("PYTHONPATH", str(host))
    assert set(Lookalike.create(tmp_path / "look", image()).installed()) == {"pip"}


def test_versions_other_than_the_profiles_are_named(host: Path, tmp_path: Path) -> None:
    install(host, "same", "1")
    install(host, "other", "2")
    assert Lookalike.create(tmp_path / "look", image("same", "other")).differing == {"other": ("1", "2")}


def test_a_folder_shared_by_shown_and_hidden_packages_is_split(host: Path, tmp_path: Path) -> None:
    install(host, "one", files={"shared/one/__init__.py": "", "shared/deep/one.py": ""})
    install(host, "two", files={"shared/two/__init__.py": "", "shared/deep/two.py": ""})
    look = Lookalike.create(tmp_path / "look", image("one"))
    found = [value(look, f"importlib.import_module('shared.{name}').__name__") for name in ("one", "deep.one", "two", "deep.two")]
    assert found == ["shared.one", "shared.deep.one", "ModuleNotFoundError", "ModuleNotFoundError"]


def test_a_folder_that_lies_in_two_places_is_joined(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = tmp_path / "second"
    monkeypatch.syspath_prepend(str(second))
    install(host, "one", files={"shared/one.py": ""})
    install(second, "two", files={"shared/two.py": ""})
    look = Lookalike.create(tmp_path / "look", image("one", "two"))
    assert [value(look, f"importlib.import_module('shared.{name}').__name__") for name in ("one", "two")] == ["shared.one", "shared.two"]
    assert {host, second} <= set(look.exposes)


def test_an_editable_package_is_shown_by_its_source_or_not_at_all(host: Path, tmp_path: Path) -> None:
    source = tmp_path / "my source"
    source.mkdir()
    (source / "mine.py").write_text("version = 'edited'\n")
    install(host, "mine", files={"_mine.pth": f"{source}\n"}, origin=source.as_uri())
    shown, hidden = Lookalike.create(tmp_path / "shown", image("mine")), Lookalike.create(tmp_path / "hidden", image("mine"), hide={"mine"})
    assert value(shown, "importlib.import_module('mine').version") == "edited"
    assert source in shown.exposes
    assert value(hidden, "importlib.import_module('mine')") == "ModuleNotFoundError"
    assert source not in hidden.exposes
    assert "mine" not in hidden.installed()


def test_what_pip_installs_stays_in_it_and_wins(host: Path, tmp_path: Path) -> None:
    install(host, "alpha")
    install(host, "beta", files={"beta/__init__.py": "version = '1'\n"})
    before = content(host)
    look = Lookalike.create(tmp_path / "look", image("alpha", "beta"))
    wheels = [str(wheel(tmp_path, name, "2")) for name in ("alpha", "beta", "gamma")]
    done = run(look, "-m", "pip", "--isolated", "install", "--no-index", "--no-deps", *wheels)
    assert done.returncode == 0, done.stderr
    assert {name: look.installed()[name] for name in ("alpha", "beta", "gamma")} == {"alpha": "2", "beta": "2", "gamma": "2"}
    assert [value(look, f"importlib.import_module('{name}').version") for name in ("alpha", "beta", "gamma")] == ["2", "2", "2"]
    assert (look.site / "gamma.py").is_file()
    assert content(host) == before


def test_importing_writes_no_byte_code_into_the_host(host: Path, tmp_path: Path) -> None:
    install(host, "alpha", files={"alpha/__init__.py": "version = '1'\n"})
    before = content(host)
    look = Lookalike.create(tmp_path / "look", image("alpha"))
    assert value(look, "importlib.import_module('alpha').version") == "1"
    assert content(host) == before


def test_phantoms_are_metadata_of_what_is_not_shown(host: Path, tmp_path: Path) -> None:
    install(host, "here")
    profile = Profile(packages={"gone-away": Package(version="2.0+cu128", requires=("here>=1",)), "here": Package(version="1")}, **FACTS)
    look = Lookalike.create(tmp_path / "look", profile, phantoms=True)
    assert {name: look.installed()[name] for name in ("gone-away", "here")} == {"gone-away": "2.0+cu128", "here": "1"}
    assert value(look, "importlib.import_module('importlib.metadata').requires('gone-away')") == "['here>=1']"
    assert value(look, "importlib.import_module('gone_away')") == "ModuleNotFoundError"
    assert look.absent == ("gone-away",)
    done = run(look, "-m", "pip", "--isolated", "install", "--no-index", "--no-deps", str(wheel(tmp_path, "gone_away", "3")))
    assert done.returncode == 0, done.stderr
    assert look.installed()["gone-away"] == "3"
    assert not list((look.folder / "image").glob("gone_away*"))  # pip took the phantom away


def test_hidden_packages_are_no_phantoms(tmp_path: Path) -> None:
    look = Lookalike.create(tmp_path / "look", image("gone", "away"), hide={"gone"}, phantoms=True)
    assert set(look.installed()) == {"away", "pip"}


def test_it_names_the_folders_outside_that_it_reads(tmp_path: Path) -> None:
    look = Lookalike.create(tmp_path / "look", image("numpy"))
    assert Path(sys.base_prefix) in look.exposes
    assert Path(str(metadata.distribution("numpy").locate_file(""))).resolve() in look.exposes
    links = [path.resolve() for path in (look.folder / "image").iterdir()]
    assert links
    assert all(any(link.is_relative_to(place) for place in look.exposes) for link in [*links, look.python.resolve()])


def test_another_python_shows_nothing_from_here_and_has_a_pip_of_its_own(tmp_path: Path) -> None:
    other = another_python()
    look = Lookalike.create(tmp_path / "look", image("numpy", "gone"), python=other, phantoms=True)
    assert look.site.is_dir()
    assert {"numpy", "gone", "pip"} <= set(look.installed())  # the first two are phantoms
    assert value(look, "importlib.import_module('numpy')") in ("ModuleNotFoundError", "AttributeError")
    assert run(look, "-m", "pip", "--version").returncode == 0


def another_python() -> Path:
    """An interpreter of another minor version that can make environments; skips where there is none."""
    beside = Path(sys.base_prefix).parent.glob("*/bin/python3")
    on_path = filter(None, (shutil.which(f"python3.{minor}") for minor in range(11, 16)))
    code = "import ensurepip, sys, venv; print(sys.version_info[1])"
    for path in sorted({*beside, *map(Path, on_path)}):
        done = subprocess.run([path, "-Ic", code], capture_output=True, text=True, check=False)
        if done.returncode == 0 and int(done.stdout) >= 11 and int(done.stdout) != sys.version_info[1]:
            return path
    pytest.skip("no Python of another minor version is installed here")


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        Lookalike.create(tmp_path, image())
    assert (tmp_path / "precious.txt").is_file()


def test_an_interpreter_that_cannot_be_started_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match=r"nowhere/python: cannot be started \(No such file or directory\): give the path"):
        Lookalike.create(tmp_path / "look", image(), python=tmp_path / "nowhere" / "python")


def test_an_interpreter_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'something is broken' >&2\nexit 3\n")
    fake.chmod(0o755)
    with pytest.raises(DependencyError, match="python: .* failed: something is broken"):
        Lookalike.create(tmp_path / "look", image(), python=fake)


def test_a_package_with_half_of_its_metadata_is_passed_over(host: Path, tmp_path: Path) -> None:
    install(host, "whole")
    (host / "half-1.dist-info").mkdir()
    (host / "half-1.dist-info" / "RECORD").write_text("half.py,,\n")
    install(host, "unrecorded")
    os.unlink(host / "unrecorded-1.dist-info" / "RECORD")
    look = Lookalike.create(tmp_path / "look", image("whole", "unrecorded"))
    assert set(look.installed()) == {"whole", "pip"}
    assert look.absent == ("unrecorded",)


def test_it_can_be_deleted_without_touching_the_host(host: Path, tmp_path: Path) -> None:
    install(host, "alpha", files={"alpha/__init__.py": ""})
    before = content(host)
    shutil.rmtree(Lookalike.create(tmp_path / "look", image("alpha")).folder)
    assert content(host) == before
