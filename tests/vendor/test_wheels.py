"""kit.vendor.wheels: a wheelhouse holds what its images lack, locked by one hash each, and the kit's own wheel, the same on every build."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kit
from kit import manifest
from kit.errors import BundleError, ConfigError
from kit.vendor.profile import Package, Profile
from kit.vendor.resolve import Index
from kit.vendor.wheels import CODE, LOCK, WHEELS, Wheel, Wheelhouse, install_command, pack_code, vendor
from tests.tiny_wheels import ROOT, make_image, write_requirements, write_wheel

LOCKED = re.compile(r"([\w-]+)==(\S+?)(?: ; (.+?))? --hash=sha256:([0-9a-f]{64})")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder of tiny wheels."""
    return write_index(tmp_path / "index")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Wheelhouse:
    """For one image that lacks both; not to be changed."""
    return make(write_index(tmp_path_factory.mktemp("house") / "index"), make_image())


def write_index(folder: Path) -> Path:
    write_wheel(folder, "tiny-app", requires=["tiny-base"], metadata="License-Expression: MIT\n")
    write_wheel(folder, "tiny-base", "2.0", metadata="License: " + "a whole text " * 20 + "\nClassifier: License :: OSI Approved :: Apache Software License\n")
    return folder


def make(index: Path, *profiles: Profile, wanted: str = "tiny-app", allow: tuple[str, ...] = ()) -> Wheelhouse:
    requirements = write_requirements(index.parent / "requirements.in", *wanted.split())
    return vendor(requirements, profiles, index.parent / "out", allow=allow, index=Index((index,), no_index=True))


def lock(house: Wheelhouse) -> dict[tuple[str, str], tuple[str | None, str]]:
    """(name, version) → (marker, sha256), every line read in full."""
    lines = [LOCKED.fullmatch(line) for line in (house.folders[0] / LOCK).read_text().splitlines()]
    return {(line[1], line[2]): (line[3], line[4]) for line in lines if line} if all(lines) else {}


def files(house: Wheelhouse) -> dict[str, tuple[str, ...]]:
    """Wheel → names of profiles, of third-party ones."""
    return {wheel.file: wheel.profiles for wheel in house.wheels[:-1]}


def test_a_wheelhouse_is_two_bundles_with_a_line_and_one_hash_for_every_wheel(house: Wheelhouse) -> None:
    bundles = [manifest.verify(folder) for folder in house.folders]
    assert [(bundle.name, bundle.kind) for bundle in bundles] == [(WHEELS, "wheels"), (CODE, "code")]
    assert lock(house) == {(wheel.name, wheel.version): (None, wheel.sha256) for wheel in house.wheels[:-1]}
    assert [wheel.name for wheel in house.wheels] == ["tiny-app", "tiny-base", "submission-kit"]
    own = house.wheels[-1]
    assert (house.folders[1] / LOCK).read_text() == f"submission-kit=={kit.__version__} --hash=sha256:{own.sha256}\n"
    assert set(bundles[0].files) == {LOCK, "tiny_app-1.0-py3-none-any.whl", "tiny_base-2.0-py3-none-any.whl"}


def test_of_every_wheel_its_size_tags_licence_source_and_requirements_are_recorded(house: Wheelhouse) -> None:
    path = house.folders[0] / "tiny_app-1.0-py3-none-any.whl"
    expected = Wheel(
        "tiny-app", "1.0", path.name, path.stat().st_size, manifest.sha256(path), ("py3-none-any",), "MIT", path.name, ("tiny-base",), ("image",),
    )  # fmt: skip
    assert house.wheels[0] == expected
    assert house.wheels[1].licence == "Apache Software License" and house.wheels[2].licence == "Apache-2.0"
    meta = manifest.read(house.folders[0]).meta
    assert meta["profiles"] == {"image": make_image().digest}
    assert meta["wheels"] == [json.loads(json.dumps(vars(wheel))) for wheel in house.wheels[:-1]]
    assert str(house.folders[0].parents[1]) not in (house.folders[0] / manifest.FILE).read_text()
    assert house.mb == pytest.approx(sum(wheel.bytes for wheel in house.wheels) / 1e6)


def test_vendoring_again_gives_the_same_bundles_and_leaves_nothing_of_the_old(house: Wheelhouse, index: Path) -> None:
    old = index.parent / "out" / WHEELS
    shutil.copytree(house.folders[0], old)
    (old / "left-over.whl").write_text("old")
    again = make(index, make_image())
    assert [(folder / manifest.FILE).read_bytes() for folder in again.folders] == [(folder / manifest.FILE).read_bytes() for folder in house.folders]
    assert sorted(path.name for path in old.parent.iterdir()) == [CODE, WHEELS]
    assert manifest.verify(old) and not (old / "left-over.whl").exists()


def test_an_image_that_lacks_nothing_gets_the_kit_alone(index: Path) -> None:
    house = make(index, make_image(tiny_app="1.0", tiny_base="2.0"))
    assert [wheel.name for wheel in house.wheels] == ["submission-kit"] and (house.folders[0] / LOCK).read_text() == ""


def test_one_wheel_serves_images_with_different_pythons(index: Path) -> None:
    write_wheel(index, "tiny-abi", tag="cp310-abi3-manylinux_2_28_x86_64")
    house = make(index, make_image("old"), make_image("new", python="3.13.5"), wanted="tiny-abi")
    assert files(house) == {"tiny_abi-1.0-cp310-abi3-manylinux_2_28_x86_64.whl": ("old", "new")}
    assert [marker for marker, _ in lock(house).values()] == [None]


def test_images_get_the_same_version_where_it_fits_them_all(index: Path) -> None:
    write_wheel(index, "tiny-fast", "1.0")
    write_wheel(index, "tiny-fast", "2.0", tag="cp313-cp313-manylinux_2_28_x86_64")
    both = make(index, make_image("old"), make_image("new", python="3.13.5"), wanted="tiny-fast")
    assert files(both) == {"tiny_fast-1.0-py3-none-any.whl": ("old", "new")}


def test_markers_say_which_python_takes_which_wheel(index: Path) -> None:
    """Where the wheels differ, and where one image has the package already."""
    for python in ("312", "313"):
        write_wheel(index, "tiny-fast", "1.0", tag=f"cp{python}-cp{python}-manylinux_2_28_x86_64")
    house = make(index, make_image("old"), make_image("new", python="3.13.5", tiny_base="2.1"), wanted="tiny-app tiny-fast")
    lines = [LOCKED.fullmatch(line) for line in (house.folders[0] / LOCK).read_text().splitlines()]
    assert [(line[1], line[3]) for line in lines if line] == [
        ("tiny-app", None), ("tiny-base", 'python_version == "3.12"'),
        ("tiny-fast", 'python_version == "3.12"'), ("tiny-fast", 'python_version == "3.13"'),
    ]  # fmt: skip
    assert [wheel.profiles for wheel in house.wheels] == [("old", "new"), ("old",), ("old",), ("new",), ("old", "new")]


def test_images_that_a_marker_cannot_tell_apart_are_refused_together(index: Path) -> None:
    with pytest.raises(ConfigError, match=r"^profiles 'a' and 'b' have the same Python 3.12, but only one takes tiny_base-2.0-\S+: give each its own --out$"):
        make(index, make_image("a"), make_image("b", tiny_base="2.1"))


def test_a_requirement_that_would_break_is_refused_unless_accepted_by_name(index: Path) -> None:
    """But not one that does not hold in the image as it is: that of `odd`."""
    image = make_image(tiny_base="1.0", tiny_user=Package(version="1.0", requires=("tiny-base<2",)), odd=Package(version="1.0", requires=("tiny-base>5",)))
    write_wheel(index, "tiny-app", requires=["tiny-base>=2"])
    with pytest.raises(ConfigError, match=r"^profile 'image': tiny-user 1.0 needs tiny-base<2, would have 2.0: .* by --allow tiny-user that it breaks$"):
        make(index, image, allow=("tiny-base",))
    assert not (index.parent / "out").exists()
    assert len(make(index, image, allow=("Tiny_Base", "tiny-user")).wheels) == 3


def test_an_image_too_old_for_the_kit_is_refused(index: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile 'image': submission-kit \S+ needs pandas>=\S+, would have 1.5.3"):
        make(index, make_image(pandas="1.5.3"))


def test_a_missing_file_of_requirements_or_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"requirements file .*none.in is missing: give --requirements"):
        vendor(tmp_path / "none.in", [make_image()], tmp_path)
    with pytest.raises(ConfigError, match="no profile is given"):
        vendor(write_requirements(tmp_path / "some.in", "tiny-app"), [], tmp_path)


def test_the_kits_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    with zipfile.ZipFile(next(pack_code(tmp_path).glob("*.whl"))) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = Path(kit.__file__).parent
    assert packed == {f"kit/{path.relative_to(package)}" for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {"kit/recipes/sample_minilm.toml", "kit/sample/train.csv", "kit/vendor/profiles/kaggle-py312.json"} <= packed


def test_the_same_source_gives_the_same_wheel_whatever_the_times_and_modes_of_its_files(tmp_path: Path) -> None:
    clone = copy_source(tmp_path / "clone", "pyproject.toml", "README.md", "LICENSE")
    (clone / "kit" / "errors.py").touch()
    (clone / "kit" / "config.py").chmod(0o600)
    done = pack_elsewhere(clone, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / CODE / manifest.FILE).read_bytes() == (pack_code(tmp_path / "here") / manifest.FILE).read_bytes()


def test_a_kit_that_runs_without_its_source_tree_cannot_build_its_wheel(tmp_path: Path) -> None:
    done = pack_elsewhere(copy_source(tmp_path / "installed"), tmp_path / "out")
    assert done.stderr.splitlines()[-1].startswith("kit.errors.BundleError: ") and "run the kit from a clone" in done.stderr
    assert issubclass(BundleError, Exception) and not (tmp_path / "out").exists()


def copy_source(folder: Path, *others: str) -> Path:
    """The package and other files of the project, with new times."""
    shutil.copytree(ROOT / "kit", folder / "kit", ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copyfile)
    for name in others:
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def pack_elsewhere(clone: Path, out: Path) -> subprocess.CompletedProcess[str]:
    code = f"from pathlib import Path; from kit.vendor.wheels import pack_code; pack_code(Path({str(out)!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False)


def test_the_command_installs_from_the_folders_alone_and_checks_every_file() -> None:
    command = install_command(Path("/venv/bin/python"), [Path("a"), Path("b")])
    assert command[:5] == ["/venv/bin/python", "-m", "pip", "--isolated", "install"]
    assert {"--no-index", "--no-deps", "--no-compile", "--require-hashes"} <= set(command)
    assert command[-4:] == ["--find-links=a", "--find-links=b", "--requirement=a/requirements.lock", "--requirement=b/requirements.lock"]


@pytest.mark.network
def test_the_competition_image_lacks_three_wheels(tmp_path: Path) -> None:
    house = vendor(ROOT / "wheels" / "requirements.in", [Profile.load("kaggle-py312"), Profile.load("kaggle-py313")], tmp_path)
    assert [wheel.name for wheel in house.wheels] == ["bitsandbytes", "bm25s", "faiss-cpu", "submission-kit"]
    assert house.mb <= 65
    assert all(wheel.profiles == ("kaggle-py312", "kaggle-py313") and wheel.licence != "not stated" for wheel in house.wheels)
    assert all(wheel.source.startswith("https://") for wheel in house.wheels[:-1])
