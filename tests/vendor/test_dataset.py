"""kit.vendor.dataset: what is staged is what was packed, passes the client's own checks, holds no secret, and scores the same when mounted."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from kit import manifest
from kit.budget import Budget
from kit.errors import BundleError, ConfigError
from kit.inference.pipeline import infer
from kit.manifest import flat_name
from kit.paths import find_bundle, find_bundles
from kit.vendor import site
from kit.vendor.dataset import prepare, stage, stage_kernel
from tests import packed
from tests.crews import Thread
from tests.packed import Workshop

FILES = {"recipe.toml": "x = 1", "fold0/config.json": "{}", "fold0/model.safetensors": "0" * 400_000, "fold1/model.safetensors": "1" * 400_000}
HALF_MB = 0.5


def make_bundle(folder: Path, files: dict[str, str] = FILES, kind: str = "member", **meta: Any) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    manifest.write(folder, folder.name, kind, **meta)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundles" / "my-run-1a2b3c4d")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "datasets"


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """As it is after it has been run and saved."""
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Infer"]},
        {"cell_type": "code", "id": "b", "metadata": {}, "source": ["1 + 1"], "outputs": [{"output_type": "stream", "text": "2"}], "execution_count": 7},
    ]
    path = tmp_path / "infer.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"name": "python3"}, "widgets": {"state": 1}}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def snapshot(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Content, time and mode of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode) for path in files}


def read_metadata(folder: Path) -> dict[str, Any]:
    return json.loads((folder / site.DATASET_METADATA).read_text(encoding="utf-8"))


# --- datasets --------------------------------------------------------------------------------------------------------------------


def test_a_bundle_becomes_a_flat_folder_that_verifies(bundle: Path, out: Path) -> None:
    (bundle / "left-over.txt").write_text("not listed")
    assert stage([bundle], out, owner="me") == [out / "my-run-1a2b3c4d"]
    names = {path.name for path in (out / "my-run-1a2b3c4d").iterdir()}
    assert names == {*map(flat_name, FILES), manifest.FILE, site.DATASET_METADATA}
    assert manifest.verify(out / "my-run-1a2b3c4d").files == manifest.read(bundle).files
    assert (out / "my-run-1a2b3c4d" / manifest.FILE).read_bytes() == (bundle / manifest.FILE).read_bytes()


def test_a_large_bundle_becomes_parts_none_of_which_is_too_large(bundle: Path, out: Path) -> None:
    folders = stage([bundle], out, owner="me", part_mb=HALF_MB)
    assert [folder.name for folder in folders] == ["my-run-1a2b3c4d-part1", "my-run-1a2b3c4d-part2"]
    parts = [manifest.verify(folder) for folder in folders]
    assert [part.part for part in parts] == [(1, 2), (2, 2)]
    assert all(sum(size for _, size in part.files.values()) <= HALF_MB * 1e6 for part in parts)
    assert manifest.join(parts).to_json() == manifest.read(bundle).to_json()


def test_a_file_larger_than_a_part_is_refused_with_the_way_out(bundle: Path, out: Path) -> None:
    with pytest.raises(BundleError, match=r"my-run-1a2b3c4d.*fold0/model.safetensors has 0.4 MB, more than a part may have \(0.1 MB\): .*--shard-mb"):
        stage([bundle], out, owner="me", part_mb=0.1)
    assert not out.exists()


def test_the_same_bundle_gives_the_same_bytes_times_and_modes_anywhere(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / bundle.name
    shutil.copytree(bundle, copy)
    (copy / "recipe.toml").chmod(0o600)
    os.utime(copy / "recipe.toml", (0, 0))
    stage([bundle], tmp_path / "a", owner="me", part_mb=HALF_MB)
    before = os.umask(0o077)
    try:
        stage([copy], tmp_path / "b", owner="me", part_mb=HALF_MB)
    finally:
        os.umask(before)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert {(stamp, oct(mode)[-3:]) for _, stamp, mode in snapshot(tmp_path / "a").values()} == {(315532800 * 10**9, "644")}


def test_staging_again_writes_nothing_unless_something_changed(bundle: Path, out: Path) -> None:
    (folder,) = stage([bundle], out, owner="me")
    before, made = snapshot(out), folder.stat().st_ctime_ns
    time.sleep(0.01)
    stage([bundle], out, owner="me")
    assert (snapshot(out), folder.stat().st_ctime_ns) == (before, made)
    stage([bundle], out, owner="me", public=True)
    assert folder.stat().st_ctime_ns != made
    assert read_metadata(folder)["isPrivate"] is False


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "recipe.toml").write_text("x = 2"),
        lambda folder: (folder / "recipe.toml").unlink(),
        lambda folder: (folder / ".env").write_text("added"),
        lambda folder: (folder / "sub").mkdir(),
        lambda folder: (folder / site.DATASET_METADATA).write_text("{}"),
    ],
)
def test_what_was_changed_in_a_staged_folder_is_put_right(bundle: Path, out: Path, harm: Any) -> None:
    (folder,) = stage([bundle], out, owner="me")
    before = snapshot(out)
    harm(folder)
    stage([bundle], out, owner="me")
    assert snapshot(out) == before
    assert not (folder / "sub").exists()


def test_a_changed_bundle_is_staged_anew_and_no_old_part_stays(bundle: Path, out: Path) -> None:
    stage([bundle], out, owner="me", part_mb=HALF_MB)
    make_bundle(bundle, {"recipe.toml": "x = 2"})
    (folder,) = stage([bundle], out, owner="me", part_mb=100)
    assert [path.name for path in out.iterdir()] == [folder.name]
    assert manifest.verify(folder).digest == manifest.read(bundle).digest


def test_only_our_own_datasets_of_other_bundles_are_removed(bundle: Path, out: Path, tmp_path: Path) -> None:
    stage([make_bundle(tmp_path / "bundles" / "an-old-run")], out, owner="me")
    theirs = out / "somebody-elses"
    theirs.mkdir()
    (theirs / site.DATASET_METADATA).write_text("{}")
    make_bundle(out / "a-bundle-packed-here")
    (out / "notes").mkdir()
    stage([bundle], out, owner="me")
    assert sorted(path.name for path in out.iterdir()) == ["a-bundle-packed-here", bundle.name, "notes", "somebody-elses"]


def test_a_damaged_bundle_is_refused_before_anything_is_staged(bundle: Path, out: Path, tmp_path: Path) -> None:
    sound = make_bundle(tmp_path / "bundles" / "a-sound-one")
    packed.damage(bundle / "fold1" / "model.safetensors")
    with pytest.raises(BundleError, match="fold1/model.safetensors is damaged"):
        stage([sound, bundle], out, owner="me")
    assert not out.exists()


def test_two_bundles_that_would_share_a_dataset_are_refused(bundle: Path, out: Path, tmp_path: Path) -> None:
    twin = make_bundle(tmp_path / "bundles" / "My_Run.1a2b3c4d")
    with pytest.raises(BundleError, match=r"my-run-1a2b3c4d and .*My_Run.1a2b3c4d would both become dataset 'my-run-1a2b3c4d': rename one"):
        stage([bundle, twin], out, owner="me")
    with pytest.raises(BundleError, match="would both become dataset"):
        stage([bundle, bundle], out, owner="me")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a/naïve.txt": ""}, r"file a--naïve.txt: the site refuses names"),
        ({"corpus.tar.gz": ""}, r"file corpus.tar.gz: the site would unpack this archive"),
        ({"dataset-metadata.json": "{}"}, r"file dataset-metadata.json: the site's client does not upload"),
        ({"a/b": "", "a--b": ""}, r"files a--b and a/b would both be called a--b in a dataset"),
        ({"a-/b": "", "a/-b": ""}, r"files a-/b and a/-b would both be called a---b in a dataset"),
    ],
)
def test_files_that_would_not_arrive_are_refused_by_name(out: Path, tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(BundleError, match=rf"bundle 'some-bundle' at .*: {said}"):
        stage([make_bundle(tmp_path / "some-bundle", files)], out, owner="me")


def test_secrets_beside_or_inside_a_bundle_stop_the_staging(bundle: Path, out: Path, tmp_path: Path) -> None:
    (bundle / ".env").write_text("x")
    with pytest.raises(BundleError, match=r"\.env: a file of this name may hold credentials"):
        stage([bundle], out, owner="me")
    (bundle / ".env").unlink()
    (tmp_path / "kaggle.json").write_text("{}")
    (bundle / "settings.json").symlink_to(tmp_path / "kaggle.json")
    with pytest.raises(BundleError, match=r"settings.json: a link that leads out"):
        stage([make_bundle(bundle)], out, owner="me")
    (bundle / "settings.json").unlink()
    make_bundle(bundle, {"fold0/notes.txt": "hf" + "_" + "aB3" * 12})
    with pytest.raises(BundleError, match=r"fold0/notes.txt:1: holds what looks like a Hugging Face token"):
        stage([bundle], out, owner="me")
    assert not out.exists()


def test_a_secret_put_beside_a_bundle_that_is_staged_already_is_found_too(bundle: Path, out: Path) -> None:
    stage([bundle], out, owner="me")
    (bundle / "kaggle.json").touch()
    with pytest.raises(BundleError, match=r"kaggle.json: a file of this name"):
        stage([bundle], out, owner="me")


@pytest.mark.parametrize(
    ("meta", "given", "name", "described"),
    [
        ({}, "other", "other", "Licence: other."),
        ({}, "CC0-1.0", "CC0-1.0", "Licence: CC0-1.0."),
        ({"licence": "cc-by-nc-4.0"}, "CC0-1.0", "CC-BY-NC-4.0", "Licence: cc-by-nc-4.0."),
        ({"licence": "llama3"}, "CC0-1.0", "other", "Licence: llama3."),
        ({"licence": None}, "unknown", "unknown", "Licence: unknown."),
    ],
)
def test_the_bundles_own_licence_wins_and_one_the_site_lacks_is_described(
    tmp_path: Path, out: Path, meta: dict[str, str], given: str, name: str, described: str
) -> None:
    (folder,) = stage([make_bundle(tmp_path / "weights-x", **meta)], out, owner="me", licence=given)
    assert read_metadata(folder)["licenses"] == [{"name": name}]
    assert described in read_metadata(folder)["description"]


def test_metadata_says_what_is_inside_and_is_private_by_default(bundle: Path, out: Path) -> None:
    first, second = (read_metadata(folder) for folder in stage([bundle], out, owner="me", part_mb=HALF_MB))
    assert first["id"] == "me/my-run-1a2b3c4d-part1"
    assert first["isPrivate"] is True
    assert manifest.read(bundle).digest in first["description"]
    assert "* fold0/model.safetensors" in first["description"]
    assert "* fold0/model.safetensors" not in second["description"]
    assert "part 2 of 2" in second["subtitle"]


def test_a_bundle_of_many_files_is_described_in_brief(tmp_path: Path, out: Path) -> None:
    (folder,) = stage([make_bundle(tmp_path / "many-files", {f"f{number}": "" for number in range(60)})], out, owner="me")
    assert "and 10 more" in read_metadata(folder)["description"]


@pytest.mark.parametrize(("options", "said"), [({"owner": ""}, "owner ''"), ({"owner": "me", "licence": "mine"}, "licence 'mine' is unknown")])
def test_wrong_options_are_refused(bundle: Path, out: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stage([bundle], out, **options)
    assert not out.exists()


# --- the site's own client -------------------------------------------------------------------------------------------------------


class SiteReachedError(Exception):
    """The client has checked all it checks, and would call the site now."""


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real client without credentials, stopped where it would open a connection."""
    pytest.importorskip("six", reason="needs the publish extra")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    extended = pytest.importorskip("kaggle.api.kaggle_api_extended", reason="needs the publish extra")

    class Client(extended.KaggleApi):
        def build_kaggle_client(self) -> Any:
            raise SiteReachedError

    made = Client()
    made.config_values = {made.CONFIG_NAME_USER: "me"}
    return made


@pytest.mark.parametrize("name", ["a", "my-run-1a2b3c4d", "x" * 70 + "-1a2b3c4d"])
@pytest.mark.parametrize("part_mb", [100, HALF_MB])
def test_the_client_takes_every_dataset_and_uploads_every_file(client: Any, tmp_path: Path, out: Path, name: str, part_mb: float) -> None:
    for folder in stage([make_bundle(tmp_path / name, kind="a-kind-of-bundle-with-a-rather-long-name-of-its-own")], out, owner="me", part_mb=part_mb):
        with pytest.raises(SiteReachedError):
            client.dataset_create_new(str(folder), dir_mode="skip")
        sent = []
        client._upload_file_or_folder = lambda parent, file, *rest, sent=sent: sent.append(file)
        client.upload_files(None, None, str(folder), None, None)
        assert sorted(sent) == sorted(path.name for path in folder.iterdir() if path.name != site.DATASET_METADATA)


def test_the_client_does_refuse_what_breaks_a_rule(client: Any, bundle: Path, out: Path) -> None:
    """So that the tests beside this one mean something."""
    (folder,) = stage([bundle], out, owner="me")
    for key, value in (("title", "short"), ("id", "me/x"), ("licenses", []), ("subtitle", "too short")):
        (folder / site.DATASET_METADATA).write_text(json.dumps(read_metadata(folder) | {key: value}))
        with pytest.raises(ValueError):
            client.dataset_create_new(str(folder))
        stage([bundle], out, owner="me")


@pytest.mark.parametrize("accelerator", [None, *site.ACCELERATORS])
def test_the_client_takes_the_notebook_without_a_word(
    client: Any, notebook: Path, tmp_path: Path, accelerator: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stage_kernel(notebook, tmp_path / "k", owner="me", title="My exam infer", competition="my-exam", datasets=["kit-code"], accelerator=accelerator)
    capsys.readouterr()
    with pytest.raises(SiteReachedError):
        client.kernels_push(str(folder))
    assert capsys.readouterr().out == ""


# --- notebooks -------------------------------------------------------------------------------------------------------------------


def test_a_notebook_is_staged_without_what_a_run_left_in_it(notebook: Path, tmp_path: Path) -> None:
    folder = stage_kernel(notebook, tmp_path / "k", owner="me", title="My exam infer", competition="my-exam", datasets=["kit-code", "kit-wheels"])
    assert folder == tmp_path / "k" / "my-exam-infer"
    assert sorted(path.name for path in folder.iterdir()) == ["infer.ipynb", site.KERNEL_METADATA]
    staged = json.loads((folder / "infer.ipynb").read_text())
    assert staged["cells"][1]["outputs"] == []
    assert staged["cells"][1]["execution_count"] is None
    assert staged["metadata"] == {"kernelspec": {"name": "python3"}}
    assert [cell["source"] for cell in staged["cells"]] == [["# Infer"], ["1 + 1"]]
    assert json.loads((folder / site.KERNEL_METADATA).read_text()) == {
        "id": "me/my-exam-infer", "title": "My exam infer", "code_file": "infer.ipynb", "language": "python", "kernel_type": "notebook",
        "is_private": True, "enable_gpu": True, "enable_tpu": False, "enable_internet": False, "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": ["me/kit-code", "me/kit-wheels"], "competition_sources": ["my-exam"], "kernel_sources": [], "model_sources": [],
        "keywords": [], "docker_image_pinning_type": "original",
    }  # fmt: skip


@pytest.mark.parametrize(("accelerator", "gpu", "tpu", "shape"), [(None, False, False, ""), ("TpuV5E8", False, True, "TpuV5E8"), ("NvidiaL4", True, False, "NvidiaL4")])
def test_the_accelerator_decides_gpu_and_tpu(notebook: Path, tmp_path: Path, accelerator: str | None, gpu: bool, tpu: bool, shape: str) -> None:
    folder = stage_kernel(notebook, tmp_path / "k", owner="me", title="On any machine", accelerator=accelerator)
    metadata = json.loads((folder / site.KERNEL_METADATA).read_text())
    assert (metadata["enable_gpu"], metadata["enable_tpu"], metadata["machine_shape"]) == (gpu, tpu, shape)
    assert (metadata["competition_sources"], metadata["dataset_sources"]) == ([], [])


def test_staging_a_notebook_twice_gives_the_same_folder(notebook: Path, tmp_path: Path) -> None:
    folder = stage_kernel(notebook, tmp_path / "k", owner="me", title="My exam infer")
    before = snapshot(folder)
    assert snapshot(stage_kernel(notebook, tmp_path / "k", owner="me", title="My exam infer")) == before


def test_a_token_in_a_notebook_stops_the_staging(notebook: Path, tmp_path: Path) -> None:
    notebook.write_text(notebook.read_text().replace("1 + 1", "login('hf" + "_" + "aB3" * 12 + "')"))
    with pytest.raises(BundleError, match=r"infer.ipynb:\d+: holds what looks like a Hugging Face token"):
        stage_kernel(notebook, tmp_path / "k", owner="me", title="My exam infer")
    assert not (tmp_path / "k" / "my-exam-infer").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"owner": "a b"}, "owner 'a b'"),
        ({"title": "é-title"}, "title 'é-title'"),
        ({"competition": "My Exam"}, "competition 'My Exam' is no slug"),
        ({"accelerator": "NvidiaTeslaP100"}, "is retired: use NvidiaTeslaT4"),
    ],
)
def test_wrong_options_of_a_notebook_are_refused(notebook: Path, tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stage_kernel(notebook, tmp_path / "k", **{"owner": "me", "title": "My exam infer", **options})


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"metadata": {}, "cells": [{}]}'])
def test_a_notebook_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "train.ipynb"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BundleError, match=r"train.ipynb: is no readable notebook .*: give the folder that holds train.ipynb and infer.ipynb"):
        stage_kernel(path, tmp_path / "k", owner="me", title="My exam train")


# --- from trained runs to a mounted submission -----------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Workshop:
    """A workshop with bundles kit-code and kit-wheels, and weights that no run uses."""
    shop = packed.copy(tmp_path)
    make_bundle(shop.bundles / "kit-code", {"requirements.lock": "", "submission_kit-0.1.0-py3-none-any.whl": "x"}, kind="code")
    make_bundle(shop.bundles / "kit-wheels", {"requirements.lock": "", "bm25s-0.3.16-py3-none-any.whl": "x"}, kind="wheels")
    make_bundle(shop.bundles / "unused-weights", {"config.json": "{}"}, kind="weights")
    return shop


@pytest.mark.parametrize(("layout", "part_mb"), list(zip(packed.LAYOUTS, (20_000, 0.06), strict=True)))
def test_mounted_datasets_score_as_the_bundles_they_were_made_of(tmp_path: Path, layout: str, part_mb: float) -> None:
    shop = packed.copy(tmp_path)
    packed.complement([*shop.members.values()])  # so that the blend uses them all
    bundles = [path for path in shop.bundles.iterdir() if (path / manifest.FILE).is_file()]
    datasets = stage(bundles, tmp_path / "datasets", owner="me", part_mb=part_mb)
    assert (len(datasets) > len(bundles)) == (part_mb < 1)
    root = packed.mount(datasets, tmp_path / "input", layout)
    test = shop.competition / "test.csv"
    mounted = infer(test=test, root=root, out=tmp_path / "mounted.csv", budget=Budget(3600, 60, 0), open_crew=Thread)
    nested = infer(sorted(shop.members.values()), test=test, root=shop.bundles, out=tmp_path / "nested.csv", budget=Budget(3600, 60, 0), open_crew=Thread)
    assert mounted.finished
    assert set(mounted.predictions) == set(nested.predictions) == {run.name for run in shop.runs.values()}
    for name, prediction in nested.predictions.items():
        assert mounted.predictions[name] == pytest.approx(prediction, abs=1e-6)
    assert (tmp_path / "mounted.csv").read_bytes() == (tmp_path / "nested.csv").read_bytes()


def test_inference_says_which_part_is_missing_and_goes_on_with_the_others(tmp_path: Path) -> None:
    shop = packed.workshop()
    datasets = stage([shop.members["plain"], shop.members["reader"]], tmp_path / "datasets", owner="me", part_mb=0.06)
    reader = [folder for folder in datasets if manifest.read(folder).name == shop.members["reader"].name]
    root = packed.mount([folder for folder in datasets if folder != reader[0]], tmp_path / "input")
    outcome = infer(test=shop.competition / "test.csv", root=root, out=tmp_path / "submission.csv", budget=Budget(3600, 60, 0), open_crew=Thread)
    [why] = outcome.failures.values()
    assert f"bundle '{shop.members['reader'].name}': part 1 of {len(reader)} is not mounted" in why
    assert outcome.scored == {shop.members["plain"].name: packed.TEST_ROWS}
    assert manifest.verify(find_bundles(root)[shop.members["plain"].name])


def test_everything_a_competition_needs_is_prepared_in_one_go(own: Workshop, notebook: Path) -> None:
    shutil.copyfile(notebook, notebook.with_name("train.ipynb"))
    options: dict[str, Any] = {"owner": "me", "competition": "my-exam", "artifacts": own.artifacts, "notebooks": notebook.parent}
    made = prepare([own.runs["plain"], own.runs["reader"]], **options)
    index = manifest.read(own.members["reader"]).meta["index"]
    runs = [own.runs["plain"].name, own.runs["reader"].name]
    assert [folder.name for folder in made.datasets] == ["kit-code", "kit-wheels", *runs, index]
    assert [folder.name for folder in made.kernels] == ["my-exam-train", "my-exam-infer"]
    sources = [json.loads((folder / site.KERNEL_METADATA).read_text())["dataset_sources"] for folder in made.kernels]
    assert sources == [["me/kit-code", "me/kit-wheels"], [f"me/{folder.name}" for folder in made.datasets]]
    assert find_bundle("kit-code", own.artifacts / "datasets") == own.artifacts / "datasets" / "kit-code"
    again = prepare([own.runs["plain"]], **options | {"competition": "another-exam"})
    assert sorted(path.name for path in (own.artifacts / "datasets").iterdir()) == sorted(folder.name for folder in again.datasets)
    assert sorted(path.name for path in (own.artifacts / "kernels").iterdir()) == ["another-exam-infer", "another-exam-train"]


def test_weights_that_a_run_started_from_are_prepared_for_training(own: Workshop, notebook: Path) -> None:
    shutil.copyfile(notebook, notebook.with_name("train.ipynb"))
    make_bundle(own.bundles / "my-weights", {"config.json": "{}"}, kind="weights", licence="apache-2.0")
    recipe = own.runs["plain"] / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('source = "scratch"', 'source = "bundle:my-weights"'))
    made = prepare([own.runs["plain"]], owner="me", artifacts=own.artifacts, notebooks=notebook.parent)
    assert [folder.name for folder in made.datasets] == ["kit-code", "kit-wheels", "my-weights", own.runs["plain"].name]
    assert read_metadata(made.datasets[3])["licenses"] == [{"name": "apache-2.0"}]
    train = json.loads((own.artifacts / "kernels" / "submission-kit-train" / site.KERNEL_METADATA).read_text())
    assert train["dataset_sources"] == ["me/kit-code", "me/kit-wheels", "me/my-weights"]


@pytest.mark.parametrize("missing", ["kit-code", "kit-wheels"])
def test_without_the_kit_or_its_wheels_it_is_said_how_to_make_them(own: Workshop, missing: str) -> None:
    shutil.rmtree(own.bundles / missing)
    with pytest.raises(BundleError, match=rf"bundles: no bundle {missing}, .*: run `kit vendor wheels` first"):
        prepare([own.runs["plain"]], owner="me", artifacts=own.artifacts)
