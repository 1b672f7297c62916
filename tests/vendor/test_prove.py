"""kit.vendor.prove: what is vendored installs without network into a look-alike of the image, or the faulty wheel is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from kit.errors import BundleError, RehearsalError
from kit.vendor.profile import Package, Profile
from kit.vendor.prove import find_python, prove
from kit.vendor.resolve import Index
from kit.vendor.wheels import LOCK, vendor
from tests.packed import damage
from tests.tiny_wheels import ROOT, make_image, write_house, write_requirements, write_wheel

OFFLINE = Index(no_index=True)
OTHER = "3.12" if sys.version_info[:2] != (3, 12) else "3.13"


def here(**packages: str) -> Profile:
    """An image with this Python and a few packages."""
    python = "{}.{}.{}".format(*sys.version_info)
    return Profile(name="mine", source="test", python=python, glibc="2.35", packages={name: Package(version=value) for name, value in packages.items()})


def test_vendored_wheels_are_added_and_imported_and_only_what_was_allowed_to_change_does(tmp_path: Path) -> None:
    house = write_house(tmp_path / "out", write_wheel(tmp_path, "tiny-app", code="import packaging"), write_wheel(tmp_path, "tiny-base", "2.0"))
    image = here(**{"packaging": version("packaging"), "tiny-base": "1.0"})
    proof = prove(tmp_path / "out", image, index=OFFLINE)
    assert (proof.profile, proof.level) == ("mine", "real")
    assert (proof.added, proof.changed) == ({"tiny-app": "1.0", "tiny-base": "2.0"}, {"tiny-base": ("1.0", "2.0")})
    assert (proof.imported, proof.not_imported) == (["tiny_app", "tiny_base"], {})
    assert 0 < proof.seconds < 60 and sorted(path.suffix for path in house.iterdir()) == [".json", ".lock", ".whl", ".whl"]


def test_what_vendoring_writes_is_proven_with_the_kit_itself(tmp_path: Path) -> None:
    """For this Python. The kit's own requirements have other versions here, so the proof is not of the highest level."""
    write_wheel(tmp_path / "index", "tiny-app")
    image = make_image(python="{}.{}.{}".format(*sys.version_info))
    vendor(write_requirements(tmp_path / "in", "tiny-app"), [image], tmp_path / "out", index=Index((tmp_path / "index",), no_index=True))
    proof = prove(tmp_path / "out", image, index=OFFLINE)
    assert proof.level == "interpreter" and proof.imported == ["kit", "tiny_app"]


@pytest.mark.parametrize("fault", ["tampered", "missing", "another Python", "no hash"])
def test_a_faulty_wheelhouse_is_refused_in_one_line_that_names_the_wheel(tmp_path: Path, fault: str) -> None:
    tag = "cp39-cp39-manylinux_2_17_x86_64" if fault == "another Python" else "py3-none-any"
    wheels = [write_wheel(tmp_path, "tiny-app", tag=tag), write_wheel(tmp_path, "tiny-base", "2.0")]
    house = write_house(tmp_path / "out", *wheels, hashes=fault != "no hash")
    if fault == "tampered":
        damage(house / wheels[0].name)
    if fault == "missing":
        (house / wheels[0].name).unlink()
    words = {
        "tampered": "tiny_app-1.0-py3-none-any.whl is not the wheel that was locked (its sha256 differs): vendor again",
        "missing": f"the wheel of tiny-app 1.0 is missing in {tmp_path / 'out'}: vendor again, or attach the dataset that holds it",
        "another Python": f"tiny_app-1.0-{tag}.whl does not fit its Python {here().python_tag} or its platform: vendor for this profile too",
        "no hash": f"tiny-app==1.0 has no hash in its {LOCK}: vendor again",
    }
    with pytest.raises(RehearsalError) as caught:
        prove(tmp_path / "out", here(), index=OFFLINE)
    assert str(caught.value) == f"profile 'mine': {words[fault]}" and caught.value.exit_code == 1


def test_a_wheel_that_brings_the_metadata_of_another_package_is_found_out(tmp_path: Path) -> None:
    intruder = {"packaging.egg-info/PKG-INFO": "Metadata-Version: 2.1\nName: packaging\nVersion: 0.1\n"}
    write_house(tmp_path / "out", write_wheel(tmp_path, "tiny-app", files=intruder))
    with pytest.raises(RehearsalError, match=rf"the installation changed the image's packaging {version('packaging')} to 0.1"):
        prove(tmp_path / "out", here(packaging=version("packaging")), index=OFFLINE)


def test_a_module_that_cannot_be_imported_is_named_with_the_reason(tmp_path: Path) -> None:
    """Not even the kit of this clone is there to be imported."""
    write_house(tmp_path / "out", write_wheel(tmp_path, "tiny-app", code="import kit"))
    with pytest.raises(RehearsalError, match="module tiny_app is installed, but cannot be imported: ModuleNotFoundError: No module named 'kit'"):
        prove(tmp_path / "out", here(), index=OFFLINE)


@pytest.mark.skipif(not shutil.which("unshare") or subprocess.run(["unshare", "--user", "--net", "true"], check=False).returncode != 0, reason="needs namespaces")
def test_there_is_no_network_while_it_is_proven(tmp_path: Path) -> None:
    code = "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))  # sends nothing: asks for a route"
    write_house(tmp_path / "out", write_wheel(tmp_path, "tiny-app", code=code))
    with pytest.raises(RehearsalError, match="tiny_app is installed, but cannot be imported: OSError.*unreachable"):
        prove(tmp_path / "out", here(), index=OFFLINE)


@pytest.mark.skipif(find_python(OTHER) is None, reason=f"needs a Python {OTHER} beside the running one")
def test_another_python_imports_what_can_be_fetched_and_says_what_cannot(tmp_path: Path) -> None:
    write_wheel(tmp_path / "index", "tiny-base", "2.0", code="import sys")
    write_wheel(tmp_path / "index", "tiny-base", "3.0", code="raise RuntimeError('not the image version')")
    house = [
        write_wheel(tmp_path, "tiny-app", requires=["tiny-base", 'tiny-extra; extra == "more"'], code="import tiny_base"),
        write_wheel(tmp_path, "tiny-gpu", requires=["torch>=2"], code="import torch"),
    ]
    write_house(tmp_path / "out", *house)
    image = Profile(
        name="other", source="test", python=f"{OTHER}.1", glibc="2.35",
        packages={"tiny-base": Package(version="2.0+local", requires=()), "torch": Package(version="2.10.0+cu128", requires=()), "tiny-extra": Package(version="1.0")},
    )  # fmt: skip
    proof = prove(tmp_path / "out", image, index=Index((tmp_path / "index",), no_index=True))
    assert proof.level == "interpreter" and proof.added == {"tiny-app": "1.0", "tiny-gpu": "1.0"}
    assert (proof.imported, proof.not_imported) == (["tiny_app"], {"tiny_gpu": "torch is in the image, but only as metadata here"})


def test_without_such_a_python_tags_and_hashes_are_proven(tmp_path: Path) -> None:
    wheels = [write_wheel(tmp_path, "tiny-app", tag=f"cp3{minor}-cp3{minor}-manylinux_2_28_x86_64") for minor in (98, 99)]
    house = write_house(tmp_path / "out", *wheels)
    lines = [line.replace(" --hash", f' ; python_version == "3.{minor}" --hash') for line, minor in zip((house / LOCK).read_text().splitlines(), (98, 99), strict=True)]
    (house / LOCK).write_text("\n".join(lines))
    image = Profile(name="future", source="test", python="3.99.0", glibc="2.35", packages={})
    proof = prove(tmp_path / "out", image, index=OFFLINE)
    assert (proof.level, proof.added, proof.imported) == ("tags", {"tiny-app": "1.0"}, [])
    assert proof.not_imported == {"tiny_app": "no Python 3.99 was found here"}
    damage(house / wheels[1].name)
    with pytest.raises(RehearsalError, match=f"{wheels[1].name} is not the wheel that was locked"):
        prove(tmp_path / "out", image, index=OFFLINE)


def test_a_folder_without_a_lock_or_with_a_senseless_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no requirements.lock in it or below: run `kit vendor wheels`"):
        prove(tmp_path, here())
    (tmp_path / LOCK).write_text("what is this\n")
    with pytest.raises(BundleError, match=r"line 'what is this' is no requirement"):
        prove(tmp_path, here())


def test_the_running_python_is_found_and_one_that_is_nowhere_is_not() -> None:
    assert find_python("{}.{}".format(*sys.version_info)) == Path(sys.executable)
    assert find_python("3.99") is None


@pytest.mark.network
def test_the_wheels_of_the_competition_image_are_proven(tmp_path: Path) -> None:
    image = Profile.load("kaggle-py312")
    vendor(ROOT / "wheels" / "requirements.in", [image], tmp_path)
    proof = prove(tmp_path, image)
    assert set(proof.added) == {"bitsandbytes", "bm25s", "faiss-cpu", "submission-kit"} and proof.changed == {}
    if proof.level != "tags":
        assert {"bm25s", "faiss", "kit"} <= set(proof.imported)
