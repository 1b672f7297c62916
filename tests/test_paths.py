"""kit.paths under every layout in which the site has mounted things, whole or in parts."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import manifest, runtime
from kit.errors import BundleError, DataError, DependencyError
from kit.paths import find_bundle, find_bundles, find_competition, model_folder

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


FILES = {"recipe.toml": "recipe", "fold0/model.safetensors": "zero", "fold1/model.safetensors": "one", "fold1/deep/config.json": "{}"}


def pack_nested(folder: Path, name: str = "my-bundle", **changed: str) -> Path:
    """A bundle with sub-folders, at folder/name."""
    for file, text in (FILES | changed).items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(text)
    manifest.write(folder / name, name, "member", fits=["fold0", "fold1"])
    return folder / name


def mount(bundle: Path, *folders: Path) -> list[Path]:
    """The bundle as datasets: flat, its files dealt out to the folders."""
    whole = manifest.read(bundle)
    shares = [list(whole.files)[number :: len(folders)] for number in range(len(folders))]
    for part, folder in zip(manifest.divide(whole, shares), folders, strict=True):
        folder.mkdir(parents=True)
        for file in part.files:
            shutil.copyfile(bundle / file, folder / manifest.flat_name(file))
        (folder / manifest.FILE).write_text(part.to_json())
    return list(folders)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of the test's own."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
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


# --- datasets: flat, and in parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("layout", ["{}", "datasets/owner/{}", "models/owner/my-model/pytorch/{}/1", "{}/unzipped"])
def test_a_mounted_dataset_looks_like_the_bundle_that_was_packed(tmp_path: Path, layout: str, parts: int) -> None:
    bundle = pack_nested(tmp_path / "packed")
    root = tmp_path / "input"
    mount(bundle, *(root / layout.format(f"my-bundle-part{number}") for number in range(parts)))
    view = find_bundle("my-bundle", root)
    assert contents(view) == contents(bundle)
    assert manifest.verify(view).to_json() == manifest.read(bundle).to_json()
    assert find_bundles(root) == {"my-bundle": view}


def test_a_bundle_without_sub_folders_is_given_as_it_is_mounted(tmp_path: Path) -> None:
    folder = pack(tmp_path / "kit-wheels", "kit-wheels")
    assert find_bundles(tmp_path) == {"kit-wheels": folder}


def test_parts_under_both_layouts_at_once_make_one_bundle(tmp_path: Path) -> None:
    bundle = pack_nested(tmp_path / "packed")
    root = tmp_path / "input"
    old = mount(bundle, root / "p1", root / "p2")
    mount(bundle, root / "datasets/owner/p1", root / "datasets/owner/p2")
    view = find_bundle("my-bundle", root)
    assert contents(view) == contents(bundle)
    assert {path.resolve().parent for path in view.rglob("*") if path.is_symlink()} == set(old)
    shutil.rmtree(root / "p1")
    assert contents(find_bundle("my-bundle", root)) == contents(bundle)


def test_a_part_that_was_mounted_with_its_sub_folders_is_joined_too(tmp_path: Path) -> None:
    bundle = pack_nested(tmp_path / "packed")
    first, second = mount(bundle, tmp_path / "input" / "p1", tmp_path / "input" / "p2")
    for path in second.glob("*--*"):
        nested = second / path.name.replace("--", "/")
        nested.parent.mkdir(parents=True, exist_ok=True)
        path.rename(nested)
    assert not list(second.glob("*--*"))
    assert list(first.glob("*--*"))
    assert contents(find_bundle("my-bundle", tmp_path / "input")) == contents(bundle)


def test_a_whole_bundle_wins_over_deeper_parts_and_over_incomplete_ones(tmp_path: Path) -> None:
    bundle = pack_nested(tmp_path / "packed")
    root = tmp_path / "input"
    mount(bundle, root / "a" / "p1", root / "a" / "p2")
    assert find_bundle("my-bundle", root).is_relative_to(tempfile.gettempdir())
    shutil.copytree(bundle, root / "whole")
    assert find_bundle("my-bundle", root) == root / "whole"
    (root / "a" / "p1").rename(root / "p1")
    shutil.rmtree(root / "a" / "p2")
    shutil.move(root / "whole", root / "b" / "c" / "whole")
    assert find_bundle("my-bundle", root) == root / "b" / "c" / "whole"


@pytest.mark.parametrize(
    ("mounted", "said"), [((1, 3), "part 2 of 3 is not mounted"), ((2,), "parts 1, 3 of 3 are not mounted"), ((1, 2), "part 3 of 3 is not mounted")]
)
def test_a_missing_part_is_named_and_does_not_hide_the_other_bundles(tmp_path: Path, mounted: tuple[int, ...], said: str) -> None:
    root = tmp_path / "input"
    parts = mount(pack_nested(tmp_path / "packed"), *(root / f"p{number}" for number in (1, 2, 3)))
    other = pack(root / "other", "other")
    for number, part in enumerate(parts, 1):
        if number not in mounted:
            shutil.rmtree(part)
    with pytest.raises(BundleError, match=rf"^bundle 'my-bundle': {said}: attach the newest datasets of all parts$"):
        find_bundle("my-bundle", root)
    found = find_bundles(root)
    assert found["other"] == other
    for refuse in (manifest.verify, lambda folder: find_bundle(folder, root)):
        with pytest.raises(BundleError, match=said):
            refuse(found["my-bundle"])
    with pytest.raises(BundleError, match=said):
        find_bundle(root / f"p{mounted[0]}", root)


def test_parts_of_two_versions_are_not_mixed(tmp_path: Path) -> None:
    root = tmp_path / "input"
    mount(pack_nested(tmp_path / "old"), root / "p1", root / "old-p2")
    mount(pack_nested(tmp_path / "new", **{"recipe.toml": "changed"}), root / "new-p1", root / "p2")
    shutil.rmtree(root / "old-p2")
    shutil.rmtree(root / "new-p1")
    with pytest.raises(BundleError, match=r"part \d of 2 is not mounted in the version of the others"):
        find_bundle("my-bundle", root)


def test_a_newer_complete_version_wins_over_an_incomplete_one(tmp_path: Path) -> None:
    root = tmp_path / "input"
    mount(pack_nested(tmp_path / "old"), root / "a-p1", root / "a-p2")
    shutil.rmtree(root / "a-p2")
    new = pack_nested(tmp_path / "new", **{"recipe.toml": "changed"})
    mount(new, root / "z-p1", root / "z-p2")
    assert contents(find_bundle("my-bundle", root)) == contents(new)


def test_one_part_given_by_its_folder_is_joined_with_the_others(tmp_path: Path) -> None:
    bundle = pack_nested(tmp_path / "packed")
    first, second = mount(bundle, tmp_path / "datasets" / "p1", tmp_path / "datasets" / "p2")
    assert find_bundle(first, tmp_path / "datasets") == find_bundle(second, tmp_path / "datasets")
    assert contents(find_bundle(first, tmp_path / "datasets")) == contents(bundle)


def test_damage_behind_a_view_is_found_and_named(tmp_path: Path) -> None:
    root = tmp_path / "input"
    mount(pack_nested(tmp_path / "packed"), root / "p1", root / "p2")
    next(root.glob("*/fold1--model.safetensors")).write_text("eno")
    with pytest.raises(BundleError, match="file fold1/model.safetensors is damaged"):
        manifest.verify(find_bundle("my-bundle", root))
    next(root.glob("*/fold1--model.safetensors")).unlink()
    with pytest.raises(BundleError, match="file fold1/model.safetensors is missing"):
        manifest.verify(find_bundle("my-bundle", root))


def test_a_view_is_made_once_and_again_when_the_mounts_or_a_manifest_change(tmp_path: Path, temporary: Path) -> None:
    root = tmp_path / "input"
    parts = mount(pack_nested(tmp_path / "packed"), root / "p1", root / "p2")
    view = find_bundle("my-bundle", root)
    made = (view / manifest.FILE).stat().st_mtime_ns
    assert find_bundle("my-bundle", root) == view
    assert (view / manifest.FILE).stat().st_mtime_ns == made
    for part in parts:
        shutil.rmtree(part)
    mount(pack_nested(tmp_path / "new", **{"recipe.toml": "changed"}), *parts)
    changed = find_bundle("my-bundle", root)
    assert changed != view
    assert (changed / "recipe.toml").read_text() == "changed"
    parts[0].rename(root / "elsewhere")
    assert find_bundle("my-bundle", root) not in (view, changed)
    assert sorted(path.name.rpartition("-")[0] for path in temporary.glob("*/*")) == ["my-bundle"] * 3


def test_a_view_of_which_some_was_cleaned_away_is_made_again(tmp_path: Path) -> None:
    bundle = pack_nested(tmp_path / "packed")
    mount(bundle, tmp_path / "input" / "p1")
    view = find_bundle("my-bundle", tmp_path / "input")
    shutil.rmtree(view / "fold1")
    assert find_bundle("my-bundle", tmp_path / "input") == view
    assert contents(view) == contents(bundle)


def test_all_who_look_at_once_share_one_view_and_never_see_it_half_made(tmp_path: Path, temporary: Path) -> None:
    bundle = pack_nested(tmp_path / "packed")
    mount(bundle, tmp_path / "input" / "p1", tmp_path / "input" / "p2")
    gate = threading.Barrier(8)

    def look(_: int) -> tuple[Path, dict[str, bytes]]:
        gate.wait()
        view = find_bundle("my-bundle", tmp_path / "input")
        return view, contents(view)

    for _ in range(10):
        with ThreadPoolExecutor(8) as pool:
            seen = list(pool.map(look, range(8)))
        view = seen[0][0]
        assert all(one == (view, contents(bundle)) for one in seen)
        assert list(temporary.glob("*/*")) == [view]
        shutil.rmtree(view)


def test_views_in_a_folder_of_somebody_else_are_not_trusted(tmp_path: Path, temporary: Path) -> None:
    mount(pack_nested(tmp_path / "packed"), tmp_path / "input" / "p1")
    (tmp_path / "theirs").mkdir()
    (temporary / f"kit-mounts-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(BundleError, match="belongs to another user, so what it holds cannot be trusted: remove it, or set TMPDIR"):
        find_bundle("my-bundle", tmp_path / "input")


PATHS = st.lists(st.lists(st.sampled_from(["a", "b-", "-c", "d.e"]), min_size=1, max_size=3).map("/".join), min_size=1, max_size=8, unique=True)


@given(paths=PATHS)
def test_any_bundle_comes_back_from_its_flat_files(paths: list[str]) -> None:
    """Unless two files would have one flat name, or one lies in the other: those are refused before."""
    names = {manifest.flat_name(path): path for path in paths}
    names = {flat: path for flat, path in names.items() if not any(other.startswith(f"{path}/") for other in names.values())}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for file in names.values():
            (root / "nested" / file).parent.mkdir(parents=True, exist_ok=True)
            (root / "nested" / file).write_text(file)
        manifest.write(root / "nested", "b", "index")
        mount(root / "nested", root / "input" / "b")
        assert contents(find_bundle("b", root / "input")) == contents(root / "nested")


# --- pretrained models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(runtime.INPUT_ROOT, str(tmp_path / "input"))
    return tmp_path / "input"


def test_a_model_named_as_a_bundle_is_found_where_it_is_mounted_else_where_it_was_packed(tmp_path: Path, mounts: Path) -> None:
    bundle = pack_nested(tmp_path / "bundles", "my-weights")
    assert model_folder("bundle:my-weights", tmp_path, tmp_path / "bundles") == bundle
    mount(bundle, mounts / "p1", mounts / "p2")
    view = model_folder("bundle:my-weights", tmp_path, tmp_path / "bundles")
    assert view != bundle
    assert contents(view) == contents(bundle)


def test_a_model_bundle_that_is_nowhere_is_said_with_what_is_there(tmp_path: Path, mounts: Path) -> None:
    pack(mounts / "x", "other-weights")
    with pytest.raises(BundleError, match=r"bundle 'my-weights' is neither .* mounted under .*input: found bundles \[other-weights\]"):
        model_folder("bundle:my-weights", tmp_path, tmp_path / "bundles")
    pack(tmp_path / "bundles" / "y", "packed-weights")
    with pytest.raises(BundleError, match=r"bundle 'my-weights' .*: found bundles \[packed-weights\]"):
        model_folder("bundle:my-weights", tmp_path, tmp_path / "bundles")


def test_a_model_is_found_by_path_and_a_missing_one_is_named_with_every_way_to_give_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert model_folder("model", tmp_path) == tmp_path / "model" == model_folder(str(tmp_path / "model"), Path("elsewhere"))
    with pytest.raises(BundleError, match="model folder .*nothing is missing: .* package:NAME, or as bundle:NAME"):
        model_folder("nothing", tmp_path)
    with pytest.raises(DependencyError, match="model package 'no_such_model' is not installed: pip install no-such-model"):
        model_folder("package:no_such_model", tmp_path)
