"""Weights to a folder and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from kit.errors import BundleError
from kit.models.checkpoint import load_trained, load_weights, restore_trained, save_trained, save_weights, trained

FILE = "model.safetensors"


class Small(nn.Module):
    """A table, a buffer of integers, and a parameter in half precision."""

    def __init__(self, rows: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 4)
        self.register_buffer("steps", torch.tensor([1, 2, 3]))
        self.scale = nn.Parameter(torch.randn(3).half())


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_saved_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved = Small()
    saved.steps += 4
    save_weights(saved, tmp_path / "new" / "folder")
    loaded = Small()
    load_weights(loaded, tmp_path / "new" / "folder")
    assert same(values(loaded), values(saved))


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    model = Small()
    save_weights(model, tmp_path / "a")
    save_weights(model, tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_shards_with_an_index_are_read_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    saved = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    save_torch_model(saved, tmp_path, filename_pattern="model{suffix}.safetensors", max_shard_size="5KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    load_weights(loaded, tmp_path)
    assert same(values(loaded), values(saved))
    shards[1].unlink()
    with pytest.raises(BundleError, match=tmp_path.name):
        load_weights(loaded, tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    torch.save(Small().state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(Small().state_dict(), tmp_path / "model.bin")
    with pytest.raises(BundleError, match=r"no model\*\.safetensors: train the fold again"):
        load_weights(Small(), tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 60, -8])
def test_truncated_weights_are_refused_in_one_line(tmp_path: Path, keep: int) -> None:
    save_weights(Small(), tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:keep])
    with pytest.raises(BundleError, match="do not fit the model or are damaged") as caught:
        load_weights(Small(), tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("other", [Small(7), nn.Linear(4, 6), nn.Sequential(Small())], ids=["another shape", "other names", "another level"])
def test_weights_of_another_model_are_refused(tmp_path: Path, other: nn.Module) -> None:
    save_weights(Small(), tmp_path)
    with pytest.raises(BundleError, match="do not fit the model") as caught:
        load_weights(other, tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_with_a_tensor_too_many_or_too_few_are_refused(tmp_path: Path) -> None:
    save_weights(nn.Linear(4, 4), tmp_path / "bias")
    save_weights(nn.Linear(4, 4, bias=False), tmp_path / "none")
    with pytest.raises(BundleError):
        load_weights(nn.Linear(4, 4, bias=False), tmp_path / "bias")
    with pytest.raises(BundleError):
        load_weights(nn.Linear(4, 4), tmp_path / "none")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: no model"):
        load_weights(Small(), tmp_path / "nowhere")


# --- tied weights ----------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A decoder's shape: the head is the embedding table, and between them stands something else."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64, bias=False)
        if tie:
            self.head.weight = self.table.weight


def sharded(model: nn.Module, folder: Path) -> None:
    save_torch_model(model, folder, filename_pattern="model{suffix}.safetensors", max_shard_size="1KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1


@pytest.mark.parametrize("save", [save_weights, sharded])
def test_tied_weights_are_written_once_and_come_back_tied(tmp_path: Path, save: Callable[[nn.Module, Path], None]) -> None:
    saved, loaded = Tied(), Tied()
    save(saved, tmp_path)
    names = [name for path in tmp_path.glob("*.safetensors") for name in load_file(path)]
    assert len(names) == 3 and len({"table.weight", "head.weight"} & {*names}) == 1
    load_weights(loaded, tmp_path)
    assert same(values(loaded), values(saved))
    assert loaded.head.weight is loaded.table.weight


def test_a_tied_tensor_is_found_under_either_name(tmp_path: Path) -> None:
    saved = Tied()
    for name in ("table.weight", "head.weight"):
        state = {key: tensor for key, tensor in values(saved).items() if key == name or key.startswith("middle")}
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / FILE)
        loaded = Tied()
        load_weights(loaded, tmp_path / name)
        assert same(values(loaded), values(saved))


@pytest.mark.parametrize("missing", ["middle.bias", "both tied"])
def test_a_missing_tensor_that_is_not_tied_to_one_that_is_there_is_refused(tmp_path: Path, missing: str) -> None:
    save_weights(Tied(), tmp_path)
    state = load_file(tmp_path / FILE)
    lost = ["middle.bias"] if missing == "middle.bias" else [name for name in state if not name.startswith("middle")]
    save_file({name: tensor for name, tensor in state.items() if name not in lost}, tmp_path / FILE)
    with pytest.raises(BundleError, match=f"do not fit the model .*Missing key.*{lost[0]}"):
        load_weights(Tied(), tmp_path)


def test_a_model_that_is_not_tied_does_not_take_a_tied_file_nor_a_tied_one_two_tables(tmp_path: Path) -> None:
    save_weights(Tied(), tmp_path / "tied")
    save_weights(Tied(tie=False), tmp_path / "untied")
    with pytest.raises(BundleError, match="Missing key"):
        load_weights(Tied(tie=False), tmp_path / "tied")
    with pytest.raises(BundleError, match=r"(table|head)\.weight and (table|head)\.weight are tied in the model, but differ in the file"):
        load_weights(Tied(), tmp_path / "untied")
    save_file({name: tensor.clone() for name, tensor in values(Tied()).items()}, tmp_path / "untied" / FILE)
    load_weights(Tied(), tmp_path / "untied")  # two equal tables are one


# --- what training can change ----------------------------------------------------------------------------------------------------


def half_frozen() -> nn.Module:
    """A frozen table, a layer that learns, a norm with a buffer that counts, and a buffer that is no part of the weights."""
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].requires_grad_(False)
    model[1].register_buffer("made_anew", torch.ones(9), persistent=False)
    return model


def test_only_what_learns_and_the_buffers_are_written(tmp_path: Path) -> None:
    model = half_frozen()
    model(torch.randint(0, 50, (8,)))  # moves the running mean
    save_trained(model, tmp_path)
    assert {*load_file(tmp_path / FILE)} == {"1.weight", "1.bias", "2.weight", "2.bias", "2.running_mean", "2.running_var", "2.num_batches_tracked"}
    other = half_frozen()
    table = other[0].weight.clone()
    load_trained(other, tmp_path)
    assert torch.equal(other[0].weight, table) and not torch.equal(table, model[0].weight)
    assert same(trained(other), trained(model)) and other[2].num_batches_tracked == 1
    assert other[1].weight.requires_grad and not other[0].weight.requires_grad


def test_a_trained_table_that_is_tied_is_written_once(tmp_path: Path) -> None:
    saved, loaded = Tied(), Tied()
    saved.middle.requires_grad_(False)
    loaded.middle.requires_grad_(False)
    save_trained(saved, tmp_path)
    assert {*load_file(tmp_path / FILE)} == {"table.weight"}
    load_trained(loaded, tmp_path)
    assert torch.equal(loaded.head.weight, saved.table.weight)


@pytest.mark.parametrize(("change", "message"), [("unfreeze", "0.weight, which is trained in the model"), ("freeze", "1.bias, which is frozen or missing")])
def test_weights_of_a_model_that_learns_elsewhere_are_refused(tmp_path: Path, change: str, message: str) -> None:
    save_trained(half_frozen(), tmp_path)
    model = half_frozen()
    model[0 if change == "unfreeze" else 1].requires_grad_(change == "unfreeze")
    with pytest.raises(BundleError, match=rf"{tmp_path}: the weights do not fit the model.*{message}"):
        load_trained(model, tmp_path)


def test_trained_weights_of_another_shape_change_nothing() -> None:
    model = half_frozen()
    before = values(model)
    wrong = {name: tensor + 1 for name, tensor in trained(model).items()} | {"2.bias": torch.zeros(5)}
    with pytest.raises(BundleError, match=r"2\.bias has shape \(5,\) instead of \(4,\)"):
        restore_trained(model, wrong)
    assert same(values(model), before)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, GPT2LMHeadModel])
def test_of_tied_weights_the_embedding_is_kept_so_that_a_model_with_another_head_can_start_from_them(kind: Any, tmp_path: Path) -> None:
    small = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
    model = kind(kind.config_class(**small))
    save_weights(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "lm_head.weight" not in names
    assert any(name.endswith(("embed_tokens.weight", "wte.weight")) for name in names)
