"""Profiles: those shipped hold together, captured ones tell the truth, bare freezes say what they cannot know."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging import tags
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

from kit.errors import ConfigError, DataError
from kit.vendor import capture
from kit.vendor.profile import HERE, Package, Profile, Torch, capture_cell, shipped_profiles

ROOT = Path(__file__).parents[2]
SHIPPED = ["kaggle-py312", "kaggle-py313"]
VENDORED = {"bitsandbytes", "bm25s", "faiss-cpu"}
FACTS = json.loads('{"python": "3.12.13", "glibc": "2.35", "machine": "x86_64"}')


def profile(**packages: Package | str) -> Profile:
    """A small image; a package given as a version has no requirements. `_` in a name stands for `-`."""
    values = {name: Package(version=value, requires=()) if isinstance(value, str) else value for name, value in packages.items()}
    return Profile(name="small", source="a test", packages=values, **FACTS)


def needs(version: str, *requires: str) -> Package:
    return Package(version=version, requires=requires)


@pytest.fixture(scope="module")
def here() -> Profile:
    return Profile.capture()


# --- shipped ---------------------------------------------------------------------------------------------------------------------


def test_two_profiles_are_shipped() -> None:
    assert list(shipped_profiles()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_holds_everything_the_kit_needs_but_what_is_vendored(name: str) -> None:
    shipped = Profile.load(name)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    kit = Package(version="1", requires=tuple(dependencies))
    assert {Requirement(line.split(" needs ")[1].split(",")[0]).name for line in shipped.broken({"submission-kit": kit})} == VENDORED
    assert shipped.broken() == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_knows_every_requirement_and_the_build_of_torch(name: str) -> None:
    shipped = Profile.load(name)
    assert shipped.name == name
    assert shipped.python_tag.replace(".", "") == name[-3:]
    assert all(package.requires is not None for package in shipped.packages.values())
    assert shipped.torch is not None
    assert shipped.torch.version == shipped.packages["torch"].version
    assert {"sm_75", "sm_120"} <= set(shipped.torch.archs)
    assert any("capture a profile" in line for line in shipped.unknown())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_is_stored_as_it_would_be_saved(name: str, tmp_path: Path) -> None:
    Profile.load(name).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == shipped_profiles()[name].read_text()


def test_an_unknown_profile_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"profile 'kaggle-py31' is neither a file nor shipped with the kit \(did you mean 'kaggle-py31"):
        Profile.load("kaggle-py31")


# --- captured --------------------------------------------------------------------------------------------------------------------


def test_a_captured_profile_describes_the_interpreter_that_runs(here: Profile) -> None:
    assert here.name == HERE
    assert here.python == platform.python_version()
    assert here.packages["pydantic"].version == metadata.version("pydantic")
    assert "pydantic-core" in " ".join(here.packages["pydantic"].requires or ()).replace("_", "-")
    assert here.torch is not None
    assert here.torch.version == metadata.version("torch")
    assert here.broken() == []


def test_a_saved_profile_loads_equal(here: Profile, tmp_path: Path) -> None:
    here.save(tmp_path / "image.json")
    assert Profile.load(tmp_path / "image.json") == here
    lines = (tmp_path / "image.json").read_text().splitlines()
    assert sum('"version": ' in line and line.startswith('  "') for line in lines) >= len(here.packages)  # one line each


def test_variables_are_captured_by_name_and_never_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "the-secret-itself")
    captured = Profile.capture()
    assert "SOME_TOKEN" in captured.environment
    assert "the-secret-itself" not in captured.model_dump_json()


def test_the_capture_cell_needs_nothing_and_prints_a_profile(here: Profile, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-I", "-c", capture_cell()], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / "image.json").write_text(done.stdout)
    captured = Profile.load(tmp_path / "image.json")
    assert captured.name == "image"
    assert (captured.python, captured.glibc, captured.machine, captured.torch) == (here.python, here.glibc, here.machine, here.torch)
    assert captured.packages["numpy"] == here.packages["numpy"]


def test_the_first_package_on_the_path_wins_and_a_broken_one_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, version in (("first", "2"), ("second", "1")):
        folder = tmp_path / place / f"Some_Thing-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Some_Thing\nVersion: {version}\nRequires-Dist: numpy>=1\n")
    (tmp_path / "first" / "half-1.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
    assert capture.packages() == {"some-thing": {"version": "2", "requires": ["numpy>=1"]}}


def test_mounts_that_are_there_are_captured_with_their_free_space() -> None:
    mounts = capture.capture()["mounts"]
    assert isinstance(mounts, dict)
    assert set(mounts) == {path for path in capture.MOUNTS if os.path.isdir(path)}
    assert all(free >= 0 for free in mounts.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "cannot be read as JSON"),
        ("[1]", "holds no profile, but a list"),
        ('{"python": "3.12.1", "glibc": "2.35"}', "key 'packages' is missing"),
        ('{"python": "3.12", "glibc": "2.35", "packages": {}}', "python = '3.12'"),
        ('{"python": "3.12.1", "glibc": "2.35", "packages": {}, "torhc": null}', r"unknown key 'torhc' \(did you mean 'torch'\?\)"),
        ('{"python": "3.12.1", "glibc": "2.35", "packages": {"numpy": "2.0"}}', "packages.numpy = '2.0'"),
    ],
)
def test_a_file_that_holds_no_profile_is_refused_with_its_name_and_key(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "image.json").write_text(text)
    with pytest.raises(ConfigError, match=f"image.json: {message}"):
        Profile.load(tmp_path / "image.json")


def test_names_of_packages_are_made_canonical_and_sorted(tmp_path: Path) -> None:
    (tmp_path / "image.json").write_text('{"python": "3.12.1", "glibc": "2.35", "packages": {"Zz": {"version": "1"}, "A_a": {"version": "2"}, "y": {"version": "3"}}}')
    assert list(Profile.load(tmp_path / "image.json").packages) == ["a-a", "y", "zz"]


# --- freezes ---------------------------------------------------------------------------------------------------------------------

FREEZE = """\
# made by pip freeze
Some_Thing==1.2.3
torch==2.10.0+cu128  # a comment
wheelhouse @ https://example.com/wheelhouse-4.5-py3-none-any.whl#sha256=00
tool @ git+https://example.com/tool@abc
-e git+https://example.com/mine#egg=mine
\x20
"""


def test_a_freeze_gives_versions_and_says_what_it_does_not(tmp_path: Path) -> None:
    (tmp_path / "base.txt").write_text(FREEZE)
    bare = Profile.load(tmp_path / "base.txt", python="3.12.13", glibc="2.35")
    assert {name: package.version for name, package in bare.packages.items()} == {
        "some-thing": "1.2.3", "torch": "2.10.0+cu128", "wheelhouse": "4.5",
    }  # fmt: skip
    assert bare.name == "base"
    assert bare.unknown() == [
        "requirements of 3 packages are not known: conflicts inside the image cannot be seen",
        "torch's CUDA build and GPU architectures are not known",
        "its environment variables are not known",
        "its mounts are not known",
        "version of tool is not known (line 5 of base.txt)",
        "version of '-e git+https://example.com/mine#egg=mine' is not known (line 6 of base.txt)",
        "glibc 2.35 was told, not captured",
        "python 3.12.13 was told, not captured",
    ]


def test_a_freeze_may_say_its_python_and_glibc_itself(tmp_path: Path) -> None:
    (tmp_path / "base.txt").write_text(f"# python: 3.13.15\n# glibc 2.35\n{FREEZE}")
    assert Profile.load(tmp_path / "base.txt").python == "3.13.15"
    assert Profile.load(tmp_path / "base.txt", glibc="2.31").glibc == "2.31"


@pytest.mark.parametrize(("told", "missing"), [({}, "python"), ({"python": "3.12.13"}, "glibc")])
def test_a_freeze_without_its_python_or_glibc_is_refused(told: dict[str, str], missing: str, tmp_path: Path) -> None:
    (tmp_path / "base.txt").write_text(FREEZE)
    with pytest.raises(ConfigError, match=rf"base.txt: a freeze does not say its {missing}: give it, or add a line such as `# {missing}: "):
        Profile.load(tmp_path / "base.txt", **told)


@pytest.mark.parametrize("line", ["numpy", "numpy>=2", "numpy==2.*", "numpy==1,==2", "what is this?", "--find-links x"])
def test_a_line_that_no_freeze_has_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    (tmp_path / "base.txt").write_text(f"pandas==2.2.2\n\n{line}\n")
    with pytest.raises(DataError, match=r"base.txt, line 3: .* is no line of a freeze"):
        Profile.from_freeze(tmp_path / "base.txt", python="3.12.13", glibc="2.35")


# --- what fits -------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not capture.glibc(), reason="this C library is not glibc")
def test_tags_are_those_that_packaging_gives_for_this_interpreter(here: Profile) -> None:
    expected = [tag for tag in tags.sys_tags() if not tag.platform.startswith("linux_")]
    assert here.tags() == expected


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("faiss_cpu-1.15.1-cp310-abi3-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl", True),
        ("bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl", True),
        ("bm25s-0.3.16-py3-none-any.whl", True),
        ("old-1-cp312-cp312-manylinux1_x86_64.whl", True),
        ("young-1-cp312-cp312-manylinux_2_35_x86_64.whl", True),
        ("younger-1-cp312-cp312-manylinux_2_36_x86_64.whl", False),
        ("other-1-cp313-cp313-manylinux_2_17_x86_64.whl", False),
        ("arm-1-cp312-cp312-manylinux_2_17_aarch64.whl", False),
        ("mac-1-cp312-cp312-macosx_11_0_x86_64.whl", False),
        ("here-1-cp312-cp312-linux_x86_64.whl", False),
    ],
)
def test_a_wheel_fits_the_image_or_does_not(wheel: str, fits: bool) -> None:
    assert bool(parse_wheel_filename(wheel)[3] & set(Profile.load("kaggle-py312").tags())) == fits


def test_platforms_follow_the_machine_and_the_c_library() -> None:
    image = profile()
    assert image.platforms()[0] == "manylinux_2_35_x86_64"
    assert image.platforms()[-2:] == ["manylinux_2_5_x86_64", "manylinux1_x86_64"]
    arm = image.model_copy(update={"machine": "aarch64"})
    assert arm.platforms()[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    other = image.model_copy(update={"glibc": ""})
    assert other.platforms() == []
    assert {tag.platform for tag in other.tags()} == {"any"}
    assert "its C library is not glibc: only wheels of pure Python fit" in other.unknown()


def test_a_build_for_gpus_without_architectures_says_so() -> None:
    blind = profile(torch="2.10.0").model_copy(update={"torch": Torch(version="2.10.0", cuda="12.8")})
    assert "torch's GPU architectures are not known: it was captured without a GPU" in blind.unknown()


# --- what breaks -----------------------------------------------------------------------------------------------------------------


def test_a_change_that_breaks_a_package_of_the_image_is_named() -> None:
    image = profile(numpy="2.0.2", pandas=needs("3.1.1", "numpy>=2.0.2"))
    assert image.broken() == []
    assert image.broken({"numpy": needs("1.26.4")}) == ["pandas 3.1.1 needs numpy>=2.0.2, would have 1.26.4"]
    assert image.broken({"NumPy": needs("1.26.4")}) == ["pandas 3.1.1 needs numpy>=2.0.2, would have 1.26.4"]
    assert image.broken({"numpy": needs("2.1.0")}) == []


def test_what_is_broken_already_is_told_too() -> None:
    assert profile(a=needs("1", "b>=2"), b="1").broken() == ["a 1 needs b>=2, would have 1"]


def test_a_missing_package_counts_only_where_the_change_requires_it() -> None:
    image = profile(a=needs("1", "gone"))
    assert image.broken({"b": needs("1", "also-gone>=3")}) == ["b 1 needs also-gone>=3, would have none"]


@pytest.mark.parametrize(
    ("requirement", "holds"),
    [
        ("torch==2.10.0", True),  # the local part of 2.10.0+cu128 does not matter
        ("torch>=2.11", False),
        ('torch>=2.11; python_version < "3.12"', True),
        ('torch>=2.11; sys_platform == "linux"', False),
        ('torch>=2.11; extra == "gpu"', True),
        ("rc>=2.0.0rc1", True),
        ("odd>=5", True),
        ("torch @ https://example.com/torch.whl", True),
        ("torch (>=2.11) nonsense", True),
    ],
)
def test_a_requirement_holds_or_does_not(requirement: str, holds: bool) -> None:
    image = profile(torch="2.10.0+cu128", rc="2.0.0rc2", odd="not-a-version")
    assert (image.broken({"new": needs("1", requirement)}) == []) == holds


def test_the_requirements_of_an_extra_count_where_it_is_asked_for() -> None:
    image = profile(server=needs("1", 'fast>=2; extra == "speed"', 'deep[more]; extra == "speed"'), deep=needs("1", 'fast>=3; extra == "more"'), fast="1")
    assert image.broken({"new": needs("1", "server")}) == []
    assert image.broken({"new": needs("1", "server[speed]")}) == ["deep 1 needs fast>=3, would have 1", "server 1 needs fast>=2, would have 1"]


def test_a_package_whose_requirements_are_not_known_is_passed_over() -> None:
    assert profile(bare=Package(version="1"), numpy="1").broken() == []


def test_the_closure_holds_what_is_needed_indirectly_too() -> None:
    image = profile(a=needs("1", "B_b", 'd; python_version < "3"'), **{"b-b": needs("1", "c", "a", "gone")}, c="1", d="1")
    assert image.closure(["A"]) == {"a", "b-b", "c"}
    assert image.closure([]) == set()
    assert image.closure(["nobody"]) == set()


def test_the_digest_follows_what_decides_about_wheels() -> None:
    image = profile(numpy="2.0.2")
    assert image.digest == profile(numpy="2.0.2").model_copy(update={"name": "x", "environment": ("A",), "mounts": {"/tmp": 1}}).digest
    others = [profile(numpy="2.0.3"), profile(numpy=needs("2.0.2", "a")), image.model_copy(update={"glibc": "2.34"})]
    assert len({image.digest, *(other.digest for other in others)}) == 4
