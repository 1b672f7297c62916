"""kit.manifest: what is written is read and verified again, and each damage is named."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import manifest
from kit.errors import BundleError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    (root / "sub").mkdir(parents=True)
    (root / "weights.bin").write_bytes(bytes(range(256)) * 8192)  # 2 MiB: more than one chunk
    (root / "sub" / "naïve name.txt").write_text("text\n", encoding="utf-8")
    (root / "empty").touch()
    return root


def test_a_written_manifest_is_read_and_verified_equal(folder: Path) -> None:
    written = manifest.write(folder, "my-bundle", "member", score=0.9, members=["a"])
    assert manifest.read(folder) == written == manifest.verify(folder)
    assert (written.name, written.kind, written.meta) == ("my-bundle", "member", {"score": 0.9, "members": ["a"]})


def test_every_file_is_listed_with_its_sha256_and_size_but_not_the_manifest(folder: Path) -> None:
    manifest.write(folder, "b", "member")
    files = manifest.write(folder, "b", "member").files
    assert list(files) == ["empty", "sub/naïve name.txt", "weights.bin"]
    assert files["sub/naïve name.txt"] == (hashlib.sha256(b"text\n").hexdigest(), 5)
    assert files["weights.bin"] == (hashlib.sha256(bytes(range(256)) * 8192).hexdigest(), 2 << 20)


def test_python_caches_are_not_listed(folder: Path) -> None:
    (folder / "sub" / "__pycache__").mkdir()
    (folder / "sub" / "__pycache__" / "x.pyc").touch()
    assert not any("pycache" in name for name in manifest.write(folder, "b", "code").files)


def test_writing_twice_gives_the_same_bytes_and_leaves_no_part(folder: Path) -> None:
    manifest.write(folder, "b", "member")
    first = (folder / manifest.FILE).read_bytes()
    manifest.write(folder, "b", "member")
    assert (folder / manifest.FILE).read_bytes() == first
    assert not list(folder.glob(".*"))


def test_the_digest_changes_with_a_file_and_not_with_name_or_meta(folder: Path) -> None:
    digest = manifest.write(folder, "b", "member").digest
    assert len(digest) == 8
    assert manifest.write(folder, "c", "index", more=1).digest == digest
    (folder / "empty").write_text("x")
    assert manifest.write(folder, "b", "member").digest != digest


def test_a_missing_file_is_named(folder: Path) -> None:
    manifest.write(folder, "my-bundle", "member")
    (folder / "sub" / "naïve name.txt").unlink()
    with pytest.raises(BundleError, match=r"'my-bundle' at .*: file sub/naïve name.txt is missing"):
        manifest.verify(folder)


def test_a_cut_file_is_named_with_both_sizes(folder: Path) -> None:
    manifest.write(folder, "my-bundle", "member")
    (folder / "weights.bin").write_bytes(b"123")
    with pytest.raises(BundleError, match="file weights.bin has 3 bytes instead of 2097152"):
        manifest.verify(folder, full=False)


def test_a_changed_byte_is_named_when_verified_in_full(folder: Path) -> None:
    manifest.write(folder, "my-bundle", "member")
    (folder / "sub" / "naïve name.txt").write_text("tExt\n", encoding="utf-8")
    manifest.verify(folder, full=False)
    with pytest.raises(BundleError, match="naïve name.txt is damaged"):
        manifest.verify(folder)


def test_a_file_that_became_a_folder_is_missing(folder: Path) -> None:
    manifest.write(folder, "my-bundle", "member")
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(BundleError, match="file empty is missing"):
        manifest.verify(folder)


def test_files_that_were_added_later_do_no_harm(folder: Path) -> None:
    manifest.write(folder, "b", "member")
    (folder / "dataset-metadata.json").write_text("{}")
    manifest.verify(folder)


@pytest.mark.parametrize("where", ["folder", "nowhere"])
def test_a_folder_without_manifest_is_no_bundle(folder: Path, where: str) -> None:
    root = folder if where == "folder" else folder / "nowhere"
    with pytest.raises(BundleError, match="no MANIFEST.json, so this is no bundle"):
        manifest.read(root)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"name": "b", "kind": "k", "meta": {}, "files": []}',
        '{"name": "b", "kind": "k", "meta": {}, "files": {"a": 1}}',
        '{"name": "b", "kind": "k", "meta": {}, "files": {"a": {"sha256": "0", "bytes": "many"}}}',
        '{"name": "b", "kind": "k", "files": {}}',
        '{"name": "b", "kind": "k", "files": {}, "meta": {"part": 1}}',
        '{"name": "b", "kind": "k", "files": {}, "meta": {"part": [1]}}',
        '{"name": "b", "kind": "k", "files": {}, "meta": {"part": [3, 2]}}',
        '{"name": "b", "kind": "k", "files": {"../a": {"sha256": "0", "bytes": 1}}, "meta": {}}',
        '{"name": "b", "kind": "k", "files": {"/etc/a": {"sha256": "0", "bytes": 1}}, "meta": {}}',
    ],
)
def test_an_unreadable_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / manifest.FILE).write_text(text)
    with pytest.raises(BundleError, match="MANIFEST.json: unreadable manifest"):
        manifest.read(tmp_path)


def test_a_manifest_that_is_not_utf8_or_no_file_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / manifest.FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="unreadable manifest"):
        manifest.read(tmp_path)
    with pytest.raises(BundleError, match="unreadable manifest"):
        manifest.read(tmp_path / manifest.FILE)


def test_a_manifest_may_be_read_with_any_key_order(folder: Path) -> None:
    written = manifest.write(folder, "b", "member")
    body = json.loads((folder / manifest.FILE).read_text(encoding="utf-8"))
    (folder / manifest.FILE).write_text(json.dumps(dict(reversed(body.items()))), encoding="utf-8")
    assert manifest.read(folder) == written


@pytest.mark.parametrize("content", ["naïve", b"\x00\xff", ""])
def test_writing_atomically_makes_folders_and_replaces(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "a" / "b" / "file"
    manifest.write_atomically(path, "old")
    manifest.write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_keeps_the_old_file_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    manifest.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        manifest.write_atomically(path, "\ud800")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(OSError):
        manifest.write_atomically(tmp_path / "folder", "cannot replace a folder")
    assert path.read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def flatten(folder: Path) -> Path:
    """The folder's files under their flat names, in a folder of its own."""
    flat = folder.with_name(f"{folder.name}-flat")
    flat.mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copyfile(path, flat / manifest.flat_name(path.relative_to(folder).as_posix()))
    return flat


def test_a_flat_folder_is_verified_as_the_nested_one_is(folder: Path) -> None:
    nested = manifest.write(folder, "b", "member")
    flat = manifest.verify(flatten(folder))
    assert (flat.files, flat.digest) == (nested.files, nested.digest)
    assert (flat.is_flat, nested.is_flat) == (True, False)
    assert flat.locate("sub/naïve name.txt").name == "sub--naïve name.txt"
    assert nested.locate("sub/naïve name.txt") == folder / "sub" / "naïve name.txt"


def test_damage_in_a_flat_folder_is_named_as_the_manifest_lists_it(folder: Path) -> None:
    manifest.write(folder, "b", "member")
    flat = flatten(folder)
    (flat / "sub--naïve name.txt").write_text("tExt\n")
    with pytest.raises(BundleError, match="file sub/naïve name.txt is damaged"):
        manifest.verify(flat)
    (flat / "sub--naïve name.txt").unlink()
    with pytest.raises(BundleError, match="file sub/naïve name.txt is missing"):
        manifest.verify(flat)


def test_a_bundle_without_sub_folders_is_not_called_flat(tmp_path: Path) -> None:
    (tmp_path / "a--b.txt").write_text("x")
    assert not manifest.write(tmp_path, "b", "wheels").is_flat


def test_a_bundle_that_was_joined_without_a_part_is_refused(folder: Path) -> None:
    manifest.write(folder, "my-bundle", "member", **{manifest.INCOMPLETE: "part 2 of 3 is not mounted"})
    for refuse in (manifest.verify, manifest.read_whole):
        with pytest.raises(BundleError, match="^bundle 'my-bundle': part 2 of 3 is not mounted$"):
            refuse(folder)
    assert manifest.read(folder).name == "my-bundle"


NAMES = st.lists(st.text("ab-./", min_size=1, max_size=8), min_size=1, max_size=12, unique=True)


@given(names=NAMES, cuts=st.lists(st.integers(0, 12), max_size=3), order=st.randoms())
def test_parts_in_any_order_join_to_what_was_divided(names: list[str], cuts: list[int], order) -> None:
    whole = manifest.Manifest(Path("bundle"), "b", "index", {name: (name, len(name)) for name in names}, {"retriever": "bm25"})
    borders = [0, *sorted(cuts), len(names)]
    parts = manifest.divide(whole, [names[a:b] for a, b in itertools.pairwise(borders)])
    total = len(cuts) + 1
    assert [part.part for part in parts] == [(number, total) for number in range(1, total + 1)]
    assert {part.whole for part in parts} == {whole.digest}
    order.shuffle(parts)
    joined = manifest.join(parts)
    assert joined == whole
    assert joined.to_json() == whole.to_json()


def test_a_single_part_is_the_bundle_itself(folder: Path) -> None:
    whole = manifest.write(folder, "b", "member")
    assert manifest.divide(whole, [list(whole.files)]) == [whole]
    assert whole.part == (1, 1)
    assert whole.whole == whole.digest


def test_a_part_is_written_and_read_equal_and_verified_alone(folder: Path) -> None:
    whole = manifest.write(folder, "b", "member", score=1)
    part = manifest.divide(whole, [["empty"], ["sub/naïve name.txt", "weights.bin"]])[1]
    (folder / manifest.FILE).write_text(part.to_json(), encoding="utf-8")
    (folder / "empty").unlink()
    assert manifest.verify(folder) == part
    assert part.meta == {"score": 1, "part": [2, 2], "whole": whole.digest}
    assert part.digest != whole.digest


@given(st.text())
def test_a_slug_has_only_lower_case_letters_digits_and_single_hyphens(text: str) -> None:
    slug = manifest.slug(text)
    assert slug
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert "--" not in slug
    assert not slug.startswith("-")
    assert not slug.endswith("-")
    assert manifest.slug(slug) == slug


@pytest.mark.parametrize(("text", "slug"), [("My Run_2-1a2b3c4d", "my-run-2-1a2b3c4d"), ("Ünïted", "n-ted"), ("é", "unnamed"), ("", "unnamed"), ("a", "a")])
def test_slugs_of_common_names(text: str, slug: str) -> None:
    assert manifest.slug(text) == slug
