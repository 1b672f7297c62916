"""kit.vendor.staged: what the site or its client would refuse, skip or take wrongly is refused here, by file and value."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from kit import manifest
from kit.errors import BundleError, ConfigError
from kit.vendor.site import DATASET_METADATA, KERNEL_METADATA
from kit.vendor.staged import Dataset, Notebook, digest
from tests.staging import change_json, stage_dataset, stage_notebook

REF = "tester/kit-wheels"
NOTEBOOK = "tester/kit-infer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stage_dataset(tmp_path / "datasets", REF, a__whl=b"wheel" * 100, requirements__lock=b"lock")


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    stage_notebook(tmp_path / "kernels", NOTEBOOK, dataset_sources=[REF])
    return tmp_path / "kernels"


def test_a_dataset_is_its_files_and_its_manifest(folder: Path) -> None:
    dataset = Dataset.read(folder)
    assert (dataset.ref, dataset.names, dataset.public) == (REF, {"a.whl", "requirements.lock", manifest.FILE}, False)
    assert dataset.mb == pytest.approx((504 + (folder / manifest.FILE).stat().st_size) / 1e6)


def test_a_dataset_of_sub_folders_lies_flat(folder: Path) -> None:
    """As staging leaves it: the manifest keeps the paths."""
    found = manifest.read(folder)
    (folder / "a.whl").rename(folder / "sub--a.whl")
    files = {name.replace("a.whl", "sub/a.whl"): entry for name, entry in found.files.items()}
    (folder / manifest.FILE).write_text(manifest.Manifest(folder, found.name, found.kind, files, {}).to_json())
    assert "sub--a.whl" in Dataset.read(folder).names


def test_the_digest_changes_with_any_file_and_with_what_the_manifest_says(folder: Path, tmp_path: Path) -> None:
    """A part of a bundle must be sent again when it becomes a part of another whole, though its own files are the same."""
    made = {Dataset.read(folder).digest, Dataset.read(stage_dataset(tmp_path / "other", REF, a__whl=b"x")).digest}
    found = manifest.read(folder)
    made.add(digest(manifest.Manifest(folder, found.name, found.kind, found.files, {"whole": "0123abcd"})))
    assert len(made) == 3
    assert Dataset.read(Path(shutil.copytree(folder, tmp_path / "copy"))).digest in made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"title": "short"}, "title 'short' has 5 characters: give it 6 to 50"),
        ({"title": "t" * 51}, "has 51 characters"),
        ({"title": "INSERT_TITLE_HERE"}, "placeholder"),
        ({"title": None}, "title '' has 0 characters"),
        ({"id": "tester/kit_wheels"}, "id 'tester/kit_wheels': the site takes slugs like 'kit-wheels'"),
        ({"id": "tester/INSERT_SLUG_HERE"}, "slugs like 'insert-slug-here'"),
        ({"id": "kit-wheels"}, "write owner/slug"),
        ({"id": "tester/kit-wheels/2"}, "write owner/slug"),
        ({"id": None}, "id None: write owner/slug"),
        ({"id": "a b/kit-wheels"}, "owner 'a b' is no user name"),
        ({"id": "tester/kit"}, "of 6 to 50 characters"),
        ({"licenses": []}, "name exactly one"),
        ({"licenses": [{"name": "a"}, {"name": "b"}]}, "name exactly one"),
        ({"licenses": [{"name": "nope"}]}, "licence 'nope' is unknown"),
        ({"licenses": ["other"]}, "a value has the wrong type"),
        ({"subtitle": "too short"}, "subtitle 'too short': give it 20 to 80 characters"),
        ({"resources": [{"path": "none.csv"}]}, "resources name 'none.csv', which is not in the folder"),
        ({"resources": [{"path": "a.whl"}] * 2}, "a file is named twice"),
    ],
)
def test_metadata_that_the_client_or_the_site_would_refuse(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_json(folder / DATASET_METADATA, **changes)
    with pytest.raises(ConfigError, match=words) as error:
        Dataset.read(folder)
    assert str(error.value).startswith(str(folder / DATASET_METADATA))


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_metadata_that_is_no_object(folder: Path, text: str) -> None:
    (folder / DATASET_METADATA).write_text(text)
    if text == "[]":
        (folder / DATASET_METADATA).write_text("[1]")
    with pytest.raises(ConfigError, match="dataset-metadata.json: no readable JSON object"):
        Dataset.read(folder)


def test_missing_metadata(folder: Path) -> None:
    (folder / DATASET_METADATA).unlink()
    with pytest.raises(ConfigError, match="dataset-metadata.json is missing: stage it again"):
        Dataset.read(folder)


def test_a_folder_that_the_client_would_skip(folder: Path) -> None:
    (folder / "more").mkdir()
    with pytest.raises(BundleError, match="more is no plain file listed in MANIFEST.json"):
        Dataset.read(folder)


def test_a_file_that_nobody_staged(folder: Path) -> None:
    (folder / ".env").write_text("SECRET=1")
    with pytest.raises(BundleError, match=".env is no plain file listed in MANIFEST.json"):
        Dataset.read(folder)


def test_a_link_that_the_client_would_follow(folder: Path, tmp_path: Path) -> None:
    (folder / "a.whl").rename(tmp_path / "a.whl")
    (folder / "a.whl").symlink_to(tmp_path / "a.whl")
    with pytest.raises(BundleError, match="a.whl is no plain file"):
        Dataset.read(folder)


@pytest.mark.parametrize("name", ["a.whl", "requirements.lock"])
def test_a_missing_file_and_one_of_another_size(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(BundleError, match=f"{name} has 0 bytes"):
        Dataset.read(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Dataset.read(folder)


@pytest.mark.parametrize("name", ["a@b", "a.zip", "datapackage.json"])
def test_a_file_name_that_the_site_refuses_or_the_client_never_uploads(tmp_path: Path, name: str) -> None:
    folder = stage_dataset(tmp_path, REF, **{name: b"x"})
    with pytest.raises(BundleError, match=f"kit-wheels: file {name}"):
        Dataset.read(folder)


@pytest.mark.parametrize("name", ["infer", "kit-infer"])
def test_a_notebook_goes_by_its_file_or_its_folder(kernels: Path, name: str) -> None:
    notebook = Notebook.read(kernels, name)
    assert (notebook.ref, notebook.sources) == (NOTEBOOK, (REF,))


def test_a_notebook_that_is_not_staged_is_refused_with_the_nearest(kernels: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no staged notebook 'infre' .did you mean 'infer'"):
        Notebook.read(kernels, "infre")
    with pytest.raises(ConfigError, match="no staged notebook 'infer'"):
        Notebook.read(tmp_path / "nowhere", "infer")


def test_the_mark_of_a_pinned_notebook_changes_with_code_settings_and_sources(kernels: Path) -> None:
    notebook = Notebook.read(kernels, "infer")
    marks = {notebook.pinned([f"{REF}/1"]).mark, notebook.pinned([f"{REF}/2"]).mark}
    marks.add(Notebook({**notebook.body, "cells": []}, notebook.metadata).pinned([f"{REF}/1"]).mark)
    marks.add(Notebook(notebook.body, {**notebook.metadata, "enable_gpu": False}).pinned([f"{REF}/1"]).mark)
    assert len(marks) == 4
    assert notebook.pinned([f"{REF}/1"]).mark in marks


def test_a_pinned_notebook_is_written_as_it_was_but_for_sources_and_mark(kernels: Path, tmp_path: Path) -> None:
    notebook = Notebook.read(kernels, "infer")
    pinned = notebook.pinned([f"{REF}/3"])
    (tmp_path / "out" / "kit-infer").mkdir(parents=True)
    pinned.write(tmp_path / "out" / "kit-infer")
    written = Notebook.read(tmp_path / "out", "infer")
    assert written.sources == (f"{REF}/3",)
    assert written.body == {**notebook.body, "metadata": {"kit": pinned.mark}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"title": "Another title"}, "title 'Another title' makes the slug 'another-title', but the id is 'tester/kit-infer'"),
        ({"title": "Kit", "id": "tester/kit"}, "title 'Kit' has 3 characters"),
        ({"id": f"{NOTEBOOK}/3"}, "write owner/slug"),
        ({"enable_internet": True}, "enable_internet True: write false"),
        ({"enable_internet": None}, "enable_internet None: write false .left out, the client sends true"),
        ({"code_file": "none.ipynb"}, "code_file 'none.ipynb': no such notebook"),
        ({"code_file": None}, "code_file '': no such notebook"),
        ({"kernel_type": "script"}, "kernel_type 'script'"),
        ({"language": "r"}, "language 'r'"),
        ({"dataset_sources": ["kit-wheels"]}, "'kit-wheels' is not owner/slug"),
        ({"competition_sources": ["LLM Exam"]}, "competition 'LLM Exam' is no slug"),
        ({"machine_shape": "NvidiaTeslaP100"}, "accelerator 'NvidiaTeslaP100' is retired"),
    ],
)
def test_notebook_metadata_that_would_go_wrong_silently(kernels: Path, changes: dict[str, Any], words: str) -> None:
    path = kernels / "kit-infer" / KERNEL_METADATA
    change_json(path, **changes)
    with pytest.raises(ConfigError, match=words) as error:
        Notebook.read(kernels, "kit-infer")
    assert str(error.value).startswith(str(path))
