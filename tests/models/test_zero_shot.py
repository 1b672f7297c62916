"""Decoders that are scored as they are: in memory or layer by layer, from training's out-of-fold table to a submission."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from kit import assemble, manifest, runtime
from kit.budget import Budget
from kit.config import Recipe
from kit.data.tables import read_table
from kit.errors import BundleError, ConfigError
from kit.inference.crew import Event, Order
from kit.inference.pipeline import infer
from kit.inference.scorer import Scorer, _state_of
from kit.models.causal import Causal
from kit.models.zero_shot import ZeroShot
from kit.predict import predict
from kit.training.crossval import train
from kit.vendor.bundle import pack
from tests import crews, decoders, tiny

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
TRAIN_ROWS, TEST_ROWS = 12, 6


def recipe(folder: Path, *overrides: str) -> Recipe:
    values = {
        "name": "as-it-is", "task": {"kind": "multiple_choice_prompt", "form": "likelihood", "max_length": 128},
        "model": {"kind": "zero_shot", "source": "bundle:small-lm", "streaming": "always"},
        "data": {"folder": str(folder), "folds": 2}, "train": {"epochs": 0},
    }  # fmt: skip
    return Recipe.of(values).with_overrides(overrides)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `competition` and `artifacts`, which holds the bundle of a small language model."""
    root = tmp_path_factory.mktemp("shop")
    tiny.competition(root / "competition", train=TRAIN_ROWS, test=TEST_ROWS)
    base = root / "artifacts" / "bundles" / "small-lm"
    Causal.invent(base, lambda: tiny.TEXTS, seed=0, config=CONFIG, vocab_size=400)
    manifest.write(base, "small-lm", "weights", licence="apache-2.0")
    return root


@pytest.fixture(scope="module")
def bundle(shop: Path) -> Path:
    """The member that streams its layers, packed."""
    found = train(recipe(shop / "competition"), artifacts=shop / "artifacts")
    return pack([found.folder], artifacts=shop / "artifacts")[0]


def said(shop: Path, table: str, **options: Any) -> np.ndarray:
    """What the model says in memory (N, C)."""
    own = recipe(shop / "competition")
    task, base = assemble.make_task(own), shop / "artifacts" / "bundles" / "small-lm"
    examples = task.read(read_table(shop / "competition" / table))
    tokens = Causal.tokens(base)
    features = task.encode(examples, tokens)
    model = Causal.create(base, outputs=1, **options)
    return task.decode(predict(model, task, features, tokens, runtime=runtime.choose("fp32", "cpu"), batch_tokens=4096), features, examples)


# --- the model ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    decoders.stock("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("streaming", ["always", "never"])
def test_it_says_what_the_trainable_model_says(llama: Path, streaming: str) -> None:
    trees = [decoders.trees(rows, 3, seed=rows) for rows in (2, 3)]
    reference, model = Causal.create(llama, outputs=1).eval(), ZeroShot.create(llama, outputs=1, streaming=streaming).eval()
    assert model.streams == (streaming == "always")
    with torch.no_grad():
        expected = [reference(own.batch) for own in trees]
        found = model.score_all([own.batch for own in trees]) if model.streams else [model(own.batch) for own in trees]
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)


def test_in_four_bits_it_needs_no_adapter(llama: Path) -> None:
    trees = decoders.trees(2, 3)
    model, full = ZeroShot.create(llama, outputs=1, quantise="nf4").eval(), ZeroShot.create(llama, outputs=1).eval()
    with torch.no_grad():
        rounded, exact = model(trees.batch), full(trees.batch)
    assert not model.streams
    assert 1e-4 < (rounded - exact).abs().max() < 5
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.dtype == torch.uint8)


@pytest.mark.parametrize("streaming", ["always", "never"])
def test_a_folder_that_is_stored_in_four_bits_is_scored_as_it_is(llama: Path, tmp_path: Path, streaming: str) -> None:
    stored, trees = decoders.in_four_bits(llama, tmp_path / "stored"), decoders.trees(2, 3)
    reference, model = ZeroShot.create(llama, outputs=1, quantise="nf4").eval(), ZeroShot.create(stored, outputs=1, streaming=streaming).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(trees.batch), reference(trees.batch), rtol=0, atol=1e-4)
        torch.testing.assert_close(model(trees.batch), reference(trees.batch), rtol=0, atol=1e-4)  # an evaluation forward has left the weights as they were
    with pytest.raises(ConfigError, match=r"stored: its weights are quantised and cannot be trained: add \[model\.adapter\]"):
        Causal.create(stored, outputs=1)


def test_weights_larger_than_memory_are_streamed(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    wide = decoders.config("llama")
    wide.update({"hidden_size": 65536, "intermediate_size": 131072, "num_hidden_layers": 4, "num_attention_heads": 512, "num_key_value_heads": 512})
    wide.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in decoders.AutoModelForCausalLM.from_config(wide).state_dict().items()}
    write_sparse(folder / "model.safetensors", shapes)
    assert ZeroShot.create(folder, outputs=1, precision="bf16").streams


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of bf16 tensors, all zero, that takes no room on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_a_fit_names_its_weights_and_holds_none(llama: Path, tmp_path: Path) -> None:
    ZeroShot.create(llama, outputs=1).save(tmp_path / "fit")
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == ["base.json", "config.json"]
    trees = decoders.trees(1, 3)
    with torch.no_grad():
        loaded, made = (model.eval()(trees.batch) for model in (ZeroShot.load(tmp_path / "fit", outputs=1, base=llama), ZeroShot.create(llama, outputs=1)))
    assert torch.equal(loaded, made)


def test_other_weights_than_those_named_are_refused(llama: Path, tmp_path: Path) -> None:
    ZeroShot.create(llama, outputs=1).save(tmp_path / "fit")
    decoders.stock("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(BundleError, match=r"other: holds other weights .*base\.json was made with .*: mount llama as it was"):
        ZeroShot.load(tmp_path / "fit", outputs=1, base=tmp_path / "other")
    (tmp_path / "fit" / "base.json").write_text("{}")
    with pytest.raises(BundleError, match=r"base\.json: cannot be read"):
        ZeroShot.load(tmp_path / "fit", outputs=1, base=llama)


# --- training, packing, inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["train.epochs=1"], r"train\.epochs = 1, but model\.kind = 'zero_shot' is never trained: set train\.epochs = 0"),
        (["model.source=scratch"], r'"scratch" needs model\.config'),
        (["model.streaming=perhaps"], r"model\.streaming = 'perhaps'"),
        (["task.form=score"], r"form"),
    ],
)
def test_what_cannot_be_is_refused(shop: Path, overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        train(recipe(shop / "competition", *overrides), artifacts=shop / "artifacts")


def test_a_model_with_a_random_head_cannot_go_untrained(tmp_path: Path) -> None:
    tiny.competition(tmp_path)
    tiny.encoder_folder(tmp_path / "encoder")
    with pytest.raises(ConfigError, match=r"train\.epochs = 0, but model 'encoder' begins with a random head"):
        train(tiny.recipe(tmp_path, "train.epochs=0"), artifacts=tmp_path / "artifacts")


def test_one_fit_says_something_of_every_row(shop: Path, bundle: Path) -> None:
    assert manifest.read(bundle).meta["fits"] == ["full"]
    assert not list(bundle.rglob("*.safetensors"))
    table = pd.read_parquet(bundle / "oof.parquet")
    np.testing.assert_allclose(table.filter(regex=r"^p\d+$").to_numpy(), said(shop, "train.csv"), atol=1e-5)
    assert sorted(set(table["fold"])) == [0, 1]
    metrics = json.loads((bundle / "metrics.json").read_text())
    assert metrics["folds"]["full"] == metrics["oof"]


def test_it_teaches_a_model_that_is_trained(shop: Path, bundle: Path) -> None:
    tiny.encoder_folder(shop / "competition" / "encoder")
    student = tiny.recipe(shop / "competition", f'data.teacher="{bundle}"', "task.distill=0.5", "train.epochs=1", "data.fold_seed=7", "data.folds=3")
    found = train(student, artifacts=shop / "artifacts", folds=[1])
    numbers, teacher = np.load(found.folder / "folds.npy"), said(shop, "train.csv")
    np.testing.assert_allclose(np.load(found.folder / "soft" / "fold1.npy"), teacher[numbers != 1], atol=1e-5)


def test_without_its_bundle_it_is_not_packed(shop: Path, tmp_path: Path) -> None:
    source = shop / "artifacts" / "bundles" / "small-lm"
    found = train(recipe(shop / "competition", f'model.source="{source}"', "name=elsewhere"), artifacts=tmp_path)
    with pytest.raises(BundleError, match=r"is packed without its base, and model\.source = .* is no bundle"):
        pack([found.folder], artifacts=tmp_path)


def submit(shop: Path, bundle: Path, out: Path) -> Any:
    return infer(
        [bundle], test=shop / "competition" / "test.csv", out=out / "submission.csv", budget=Budget(3600, 60, 0),
        root=shop / "artifacts" / "bundles", open_crew=crews.Thread,
    )  # fmt: skip


def test_it_is_tried_and_then_gets_all_rows_in_one_pass(shop: Path, bundle: Path, tmp_path: Path) -> None:
    outcome = submit(shop, bundle, tmp_path)
    assert not outcome.failures
    np.testing.assert_allclose(outcome.predictions[bundle.name], said(shop, "test.csv"), atol=1e-5)
    spans = json.loads((outcome.run / "timeline.json").read_text())["spans"]
    full = [span for span in spans if span["view"] == "full"]
    assert [span["tokens"] > 0 for span in full] == [False, True], "a trial, then one pass"
    assert full[1]["rows"] == TEST_ROWS
    assert not list((outcome.run / "passes").iterdir())


def test_a_missing_base_is_named(shop: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"bundle 'small-lm' is neither"):
        infer([bundle], test=shop / "competition" / "test.csv", out=tmp_path / "submission.csv", budget=Budget(3600, 60, 0), root=tmp_path, open_crew=crews.Thread)
    assert (tmp_path / "submission.csv").is_file()


# --- a pass that is cut off --------------------------------------------------------------------------------------------------------------


class CutError(Exception):
    """What ends a process."""


@pytest.fixture
def scorer(shop: Path, bundle: Path, tmp_path: Path) -> Scorer:
    place = {"folder": str(bundle), "base": str(bundle.parent / "small-lm"), "key": None}
    setup = {"test": str(shop / "competition" / "test.csv"), "members": {"m": place}}
    (tmp_path / "setup.json").write_text(json.dumps(setup))
    return Scorer(tmp_path, "m", "cpu")


def order(*rows: int, batch_tokens: int = 4096) -> Order:
    return Order(1, "m", "full", "full", rows, batch_tokens, "fp32")


def cut_after(steps: int) -> Any:
    """A beat that ends everything after so many."""
    count = iter(range(steps))

    def beat() -> None:
        if next(count, None) is None:
            raise CutError

    return beat


def finished(scorer: Scorer, asked: Order) -> tuple[Event, int]:
    """The event, and how many beats it took."""
    beats: list[int] = []
    return scorer.work(asked, lambda: beats.append(1)), len(beats)


def test_a_pass_that_was_cut_off_goes_on_with_its_own_rows(scorer: Scorer, shop: Path) -> None:
    whole, steps = finished(scorer, order(0, 3, 5))
    with pytest.raises(CutError):
        scorer.work(order(0, 3, 5), cut_after(3))  # encoding, two layers
    resumed, rest = finished(scorer, order(1, 2))
    assert resumed.rows == (0, 3, 5)
    assert rest < steps
    assert resumed.prediction is not None and whole.prediction is not None
    np.testing.assert_array_equal(resumed.prediction, whole.prediction)
    after, _ = finished(scorer, order(1, 2))
    assert after.rows == (1, 2)
    np.testing.assert_allclose(after.prediction, said(shop, "test.csv")[[1, 2]], atol=1e-5)


def test_a_pass_whose_states_are_of_other_texts_begins_anew(scorer: Scorer, shop: Path, tmp_path: Path) -> None:
    with pytest.raises(CutError):
        scorer.work(order(0, 3, 5), cut_after(3))
    (kept,) = tmp_path.glob("passes/*/run.json")
    kept.write_text(json.dumps({"fingerprint": "another"}))
    event, _ = finished(scorer, order(1, 2))
    assert event.rows == (1, 2)
    np.testing.assert_allclose(event.prediction, said(shop, "test.csv")[[1, 2]], atol=1e-5)


def test_two_devices_never_share_the_states_of_a_pass(tmp_path: Path) -> None:
    folders = {_state_of(tmp_path, order(0), device) for device in ("cuda:0", "cuda:1")}
    assert len(folders) == 2 and folders == {_state_of(tmp_path, order(1, 2), device) for device in ("cuda:0", "cuda:1")}


def test_a_pass_in_other_batches_begins_anew(scorer: Scorer) -> None:
    with pytest.raises(CutError):
        scorer.work(order(0, 3, 5), cut_after(3))
    event, _ = finished(scorer, order(1, 2, batch_tokens=64))
    assert event.rows == (1, 2)
