"""kit.paths under every layout in which the site has mounted things."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit import manifest
from kit.errors import BundleError, DataError
from kit.paths import find_bundle, find_bundles, find_competition

LAYOUTS = [
    "my-bundle",
    "datasets/owner/my-bundle",
    "models/owner/my-model/pytorch/base/1",
    "my-bundle/my-bundle",
    "datasets/owner/my-bundle/unzipped",
    "models/owner/my-model/pytorch/base/1/unzipped",
]


def pack(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_text(name)
    manifest.write(folder, name, "member")
    return folder


def competition(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "test.csv").write_text("id\n1\n")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bundle_is_found_under_every_known_layout(tmp_path: Path, layout: str) -> None:
    folder = pack(tmp_path / layout, "my-bundle")
    pack(tmp_path / "another", "other")
    assert find_bundle("my-bundle", tmp_path) == folder


def test_the_name_in_the_manifest_counts_not_that_of_the_folder(tmp_path: Path) -> None:
    folder = pack(tmp_path / "renamed-by-the-site", "my-bundle")
    assert find_bundles(tmp_path) == {"my-bundle": folder}
    with pytest.raises(BundleError):
        find_bundle("renamed-by-the-site", tmp_path)


def test_a_folder_with_a_manifest_may_be_given_itself(tmp_path: Path) -> None:
    folder = pack(tmp_path / "elsewhere", "my-bundle")
    assert find_bundle(folder, tmp_path / "input") == folder == find_bundle(str(folder), tmp_path / "input")


def test_the_shallowest_of_two_bundles_of_one_name_wins(tmp_path: Path) -> None:
    pack(tmp_path / "a" / "deep", "my-bundle")
    shallow = pack(tmp_path / "z", "my-bundle")
    assert find_bundle("my-bundle", tmp_path) == shallow


def test_bundles_behind_links_are_found_and_a_link_to_itself_ends(tmp_path: Path) -> None:
    pack(tmp_path / "outside", "my-bundle")
    root = tmp_path / "input"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root)
    assert find_bundle("my-bundle", root) == root / "linked"


def test_a_missing_bundle_lists_what_is_mounted(tmp_path: Path) -> None:
    pack(tmp_path / "datasets" / "owner" / "other", "other-bundle")
    competition(tmp_path / "llm-science-exam")
    with pytest.raises(BundleError, match=r"'my-bundle' is neither .* bundles \[other-bundle\], folders \[datasets, llm-science-exam\]$"):
        find_bundle("my-bundle", tmp_path)


def test_a_missing_root_lists_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"bundles \[\], folders \[\]"):
        find_bundle("my-bundle", tmp_path / "nowhere")
    assert find_bundles(tmp_path / "nowhere") == {}


def test_anothers_manifest_does_not_hide_a_bundle_and_is_named_when_one_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a-strange-dataset").mkdir()
    (tmp_path / "a-strange-dataset" / manifest.FILE).write_text("[]")
    folder = pack(tmp_path / "my-bundle", "my-bundle")
    assert find_bundle("my-bundle", tmp_path) == folder
    with pytest.raises(BundleError, match=r"unreadable manifests in \[a-strange-dataset\]"):
        find_bundle("other", tmp_path)


@pytest.mark.parametrize("layout", ["llm-science-exam", "competitions/llm-science-exam", "llm-science-exam/unzipped"])
def test_the_competition_is_found_beside_bundles(tmp_path: Path, layout: str) -> None:
    folder = competition(tmp_path / layout)
    pack(tmp_path / "a-bundle", "a-bundle")
    assert find_competition(tmp_path) == folder


def test_a_test_table_inside_a_bundle_is_not_the_competition(tmp_path: Path) -> None:
    competition(tmp_path / "a-bundle" / "sample")
    competition(tmp_path / "b-bundle")
    for name in ("a-bundle", "b-bundle"):
        manifest.write(tmp_path / name, name, "code")
    with pytest.raises(DataError, match=r"test.csv is not below .* bundles \[a-bundle, b-bundle\].* attach the competition's data"):
        find_competition(tmp_path)
    folder = competition(tmp_path / "competitions" / "llm-science-exam" / "files")
    assert find_competition(tmp_path) == folder


def test_a_manifest_above_the_root_does_not_hide_the_competition(tmp_path: Path) -> None:
    folder = competition(tmp_path / "input" / "exam")
    manifest.write(tmp_path, "around-everything", "code")
    assert find_competition(tmp_path / "input") == folder


def test_the_wanted_file_decides(tmp_path: Path) -> None:
    competition(tmp_path / "a")
    (competition(tmp_path / "b") / "train.csv").touch()
    assert find_competition(tmp_path, "train.csv") == tmp_path / "b"
