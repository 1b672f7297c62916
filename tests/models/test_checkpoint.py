"""Weights to a folder and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_model
from torch import nn

from kit.errors import BundleError
from kit.models.checkpoint import load_weights, save_weights

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
