"""kit.vendor.bundle: what was trained comes out of a bundle unchanged, and a bundle holds nothing that inference does not need."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kit import assemble, manifest, runtime
from kit.config import Recipe
from kit.data.tables import read_table
from kit.errors import BundleError
from kit.predict import predict
from kit.vendor.bundle import pack, pack_index, pack_run
from tests import packed
from tests.packed import Workshop


@pytest.fixture
def shop() -> Workshop:
    return packed.workshop()


@pytest.fixture
def own(tmp_path: Path) -> Workshop:
    """A workshop to be damaged."""
    return packed.copy(tmp_path)


def test_packing_gives_a_member_per_run_and_each_index_once(shop: Workshop, tmp_path: Path) -> None:
    folders = pack(shop.runs.values(), artifacts=shop.artifacts, out=tmp_path / "out")
    kinds = [(manifest.verify(folder).kind, folder.name) for folder in folders]
    index = manifest.read(shop.members["reader"]).meta["index"]
    assert kinds == [*(("member", run.name) for run in shop.runs.values()), ("index", index)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(name for _, name in kinds)


@pytest.mark.parametrize("name", ["plain", "reader"])
def test_a_packed_member_scores_its_validation_rows_as_training_did(shop: Workshop, name: str) -> None:
    """From the bundle alone: recipe, weights and tokens give the predictions that training kept."""
    bundle = shop.members[name]
    recipe = Recipe.load(manifest.verify(bundle).root / "recipe.toml")
    task = assemble.make_task(recipe)
    examples = task.read(read_table(shop.competition / "train.csv"))
    if recipe.retrieve:
        library = assemble.Library.open(shop.bundles / manifest.read(bundle).meta["index"])
        examples = assemble.add_contexts(examples, task, recipe.retrieve, library)
    inside = [examples[row] for row in np.flatnonzero(np.load(bundle / "folds.npy") == 0)]
    tokens = assemble.load_tokens(recipe, bundle / "fold0")
    features = task.encode(inside, tokens)
    model = assemble.load_model(recipe, task, bundle / "fold0")
    scores = predict(model, task, features, tokens, runtime=runtime.choose("fp32", "cpu"), batch_tokens=4096)
    assert task.decode(scores, features, inside) == pytest.approx(np.load(shop.runs[name] / "fold0" / "valid.npy"), abs=1e-6)


def test_a_member_holds_what_inference_needs_and_nothing_else(shop: Workshop) -> None:
    found = manifest.read(shop.members["reader"])
    fit = {"config.json", "tokenizer.json", "model.safetensors", "metrics.json"}
    assert set(found.files) == {"recipe.toml", "metrics.json", "oof.parquet", "folds.npy", *(f"{fold}/{name}" for fold in ("fold0", "fold1") for name in fit)}
    assert found.meta["fits"] == ["fold0", "fold1"]
    assert (found.meta["recipe"], found.meta["task"]) == ("reader", "multiple_choice")
    assert manifest.read(shop.members["plain"]).meta["index"] is None


def test_packing_twice_gives_equal_manifests(shop: Workshop, tmp_path: Path) -> None:
    first = pack(shop.runs.values(), artifacts=shop.artifacts, out=tmp_path / "a")
    second = pack(shop.runs.values(), artifacts=shop.artifacts, out=tmp_path / "b")
    for a, b in zip(first, second, strict=True):
        assert (a / manifest.FILE).read_bytes() == (b / manifest.FILE).read_bytes()
        assert manifest.read(a).digest == manifest.read(b).digest


def test_packing_again_replaces_the_old_bundle(own: Workshop) -> None:
    run, bundle = own.runs["plain"], own.members["plain"]
    before = manifest.read(bundle).digest
    (bundle / "left-over.txt").write_text("old")
    (own.bundles / f".{run.name}.part").mkdir()
    (own.bundles / f".{run.name}.part" / "of-a-killed-pack").write_text("x")
    assert pack_run(run, own.bundles, bundles=own.bundles) == bundle
    assert manifest.verify(bundle).digest == before
    assert not (bundle / "left-over.txt").exists()
    assert not (bundle / "of-a-killed-pack").exists()


def test_only_finished_fits_are_packed(own: Workshop) -> None:
    run = own.runs["plain"]
    shutil.copytree(run / "fold1", run / "full")
    shutil.copytree(run / "fold1", run / "fold2")
    (run / "fold2" / "metrics.json").unlink()
    assert manifest.read(pack_run(run, own.bundles, bundles=own.bundles)).meta["fits"] == ["fold0", "fold1", "full"]


def test_a_run_without_oof_or_without_fits_is_refused(own: Workshop) -> None:
    run = own.runs["plain"]
    (run / "oof.parquet").unlink()
    with pytest.raises(BundleError, match=rf"{run.name}: no oof.parquet, .*: train every fold first"):
        pack_run(run, own.bundles, bundles=own.bundles)
    for fold in ("fold0", "fold1"):
        (run / fold / "metrics.json").unlink()
    with pytest.raises(BundleError, match=rf"{run.name}: no finished fit .*: run `kit train` first"):
        pack_run(run, own.bundles, bundles=own.bundles)
    with pytest.raises(BundleError, match="no-such: no finished fit"):
        pack_run(own.root / "no-such", own.bundles, bundles=own.bundles)


def test_an_index_that_is_not_whole_is_refused(own: Workshop, tmp_path: Path) -> None:
    index = own.artifacts / "index" / manifest.read(own.members["reader"]).meta["index"]
    (index / "corpus" / "passages.arrow").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"corpus/passages.arrow has 5 bytes instead of"):
        pack_index(index, tmp_path)
    assert list(tmp_path.glob("passages*")) == []


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", None])
def test_a_member_carries_the_licence_of_the_weights_bundle_it_was_trained_from(own: Workshop, tmp_path: Path, licence: str | None) -> None:
    weights = own.bundles / "my-weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    manifest.write(weights, "my-weights", "weights", **({"licence": licence} if licence else {}))
    run = own.runs["plain"]
    recipe = (run / "recipe.toml").read_text(encoding="utf-8")
    (run / "recipe.toml").write_text(recipe.replace('source = "scratch"', 'source = "bundle:my-weights"'), encoding="utf-8")
    (packed_elsewhere,) = pack([run], artifacts=own.artifacts, out=tmp_path / "elsewhere")
    assert manifest.read(packed_elsewhere).meta.get("licence") == licence


def test_a_packed_bundle_that_is_damaged_is_named(own: Workshop) -> None:
    packed.damage(own.members["reader"] / "fold1" / "model.safetensors")
    with pytest.raises(BundleError, match=rf"{own.members['reader'].name}.*fold1/model.safetensors is damaged"):
        manifest.verify(own.members["reader"])
    assert manifest.verify(own.members["plain"])
