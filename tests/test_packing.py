"""Packed states are the library's own, of every family, on ragged batches, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from kit.models.encoder import checkpoint_activations
from kit.packing import hidden_states, is_packable
from kit.tasks import Batch
from tests import tiny

PACKABLE = sorted(tiny.FAMILIES.keys() - {"deberta_conv"})
RAGGED = {
    "of many lengths": [40, 1, 17, 17, 2, 33, 40],
    "one row": [23],
    "one token": [1, 1],
    "of the longest": [tiny.POSITIONS] * 2,
    "a thousand rows": [1 + 7 * row % 40 for row in range(1000)],
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folders = {family: tiny.encoder_folder(tmp_path_factory.mktemp(family), family) for family in tiny.FAMILIES}
    return {family: AutoModel.from_pretrained(folder).eval() for family, folder in folders.items()}


@pytest.fixture(params=PACKABLE)
def backbone(request: pytest.FixtureRequest, backbones: dict[str, Any]) -> Any:
    return backbones[request.param]


@pytest.fixture(params=[False, True], ids=["on end", "together"])
def together(request: pytest.FixtureRequest) -> bool:
    return request.param


def batch_of(backbone: Any, lengths: list[int]) -> Batch:
    """Random tokens of two types, padded on the right."""
    dice = torch.Generator().manual_seed(len(lengths))
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 400, mask.shape, generator=dice).masked_fill(mask == 0, backbone.config.pad_token_id or 0)
    types = torch.randint(0, 2, mask.shape, generator=dice) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def stock(backbone: Any, batch: Batch) -> tuple[Tensor, ...]:
    """What the library's own code says of the tokens, 0 where there is padding."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if getattr(backbone.config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = batch["token_type_ids"]
    return tuple(states * batch["attention_mask"][..., None] for states in backbone(**given, output_hidden_states=True).hidden_states)


def equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-6)


def gradients(backbone: Any, say: Callable[[], Tensor], batch: Batch) -> dict[str, Tensor]:
    """Of a sum of what is said of the tokens, each number with a weight of its own."""
    backbone.zero_grad()
    said = say()
    weights = torch.randn(said.shape, generator=torch.Generator().manual_seed(1)) * batch["attention_mask"][..., None][:, : said.shape[1]]
    (said * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in backbone.named_parameters() if parameter.grad is not None}


def same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and all(found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-6, msg=lambda why, name=name: f"{name}: {why}")


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_every_state_is_the_library_s(backbone: Any, lengths: list[int], together: bool) -> None:
    batch = batch_of(backbone, lengths)
    with torch.inference_mode():
        wanted = stock(backbone, batch)
        equal(hidden_states(backbone, batch, every=True, together=together), wanted)
        equal(hidden_states(backbone, batch, together=together), wanted[-1:])


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_the_first_tokens_alone_are_those_of_all(backbone: Any, lengths: list[int], together: bool) -> None:
    batch = batch_of(backbone, lengths)
    with torch.inference_mode():
        equal(hidden_states(backbone, batch, first=True, together=together), (stock(backbone, batch)[-1][:, :1],))


@pytest.mark.parametrize("first", [False, True], ids=["all tokens", "first tokens"])
def test_gradients_are_the_library_s(backbone: Any, together: bool, first: bool) -> None:
    batch = batch_of(backbone, RAGGED["of many lengths"])
    wanted = gradients(backbone, lambda: stock(backbone, batch)[-1][:, : 1 if first else None], batch)
    same_gradients(gradients(backbone, lambda: hidden_states(backbone, batch, first=first, together=together)[-1], batch), wanted)


@pytest.fixture(scope="module")
def long_backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """DeBERTa whose rows are longer than what is computed at once, and than its buckets tell apart one by one."""
    folder = tiny.encoder_folder(tmp_path_factory.mktemp("long"), "deberta", max_position_embeddings=600, position_buckets=32)
    return AutoModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("kinds", [["p2c", "c2p"], ["c2p"], ["p2c"], []], ids=["both", "c2p", "p2c", "neither"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own projections"])
def test_distances_beyond_a_block_are_computed_in_parts(tmp_path: Path, together: bool, kinds: list[str], shared: bool) -> None:
    changes = {"max_position_embeddings": 600, "position_buckets": 32, "pos_att_type": kinds, "share_att_key": shared}
    backbone = AutoModel.from_pretrained(tiny.encoder_folder(tmp_path, "deberta", **changes)).eval()
    batch = batch_of(backbone, [600, 300, 300, 129, 128])
    with torch.inference_mode():
        equal(hidden_states(backbone, batch, every=True, together=together), stock(backbone, batch))


def test_gradients_of_distances_beyond_a_block_are_the_library_s(long_backbone: Any, together: bool) -> None:
    batch = batch_of(long_backbone, [300, 300, 129, 128])
    wanted = gradients(long_backbone, lambda: stock(long_backbone, batch)[-1], batch)
    same_gradients(gradients(long_backbone, lambda: hidden_states(long_backbone, batch, together=together)[-1], batch), wanted)


def test_rows_may_be_longer_than_the_positions_that_a_relative_model_was_trained_with(long_backbone: Any) -> None:
    batch = batch_of(long_backbone, [700, 20])
    with torch.inference_mode():
        equal(hidden_states(long_backbone, batch, every=True), stock(long_backbone, batch))


def test_a_family_without_a_packed_form_is_asked_by_the_library_s_code(backbones: dict[str, Any]) -> None:
    backbone = backbones["deberta_conv"]
    batch = batch_of(backbone, RAGGED["of many lengths"])
    assert not is_packable(backbone) and all(is_packable(backbones[family]) for family in PACKABLE)
    with torch.inference_mode():
        found, wanted = hidden_states(backbone, batch, every=True), stock(backbone, batch)
        equal(tuple(states * batch["attention_mask"][..., None] for states in found), wanted)
        equal(hidden_states(backbone, batch, first=True), (wanted[-1][:, :1],))


@pytest.mark.parametrize("family", PACKABLE)
def test_dropout_drops_in_training_alone(tmp_path: Path, family: str, together: bool) -> None:
    backbone = AutoModel.from_pretrained(tiny.encoder_folder(tmp_path, family, dropout=0.3))
    batch = batch_of(backbone, [20, 9])

    def say(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return hidden_states(backbone, batch, together=together)[-1].detach()

    backbone.train()
    assert torch.equal(say(1), say(1)) and not torch.allclose(say(1), say(2), atol=1e-2)
    backbone.eval()
    assert torch.equal(say(1), say(2))


@pytest.mark.parametrize("which", ["hidden", "attention"])
def test_each_dropout_is_where_the_library_has_it(tmp_path: Path, which: str) -> None:
    """The mean of many passes tells how much is dropped: equal to the library's within what chance allows."""
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | {"hidden_dropout_prob" if which == "hidden" else "attention_probs_dropout_prob": 0.4}
    backbone = AutoModel.from_pretrained(tiny.encoder_folder(tmp_path, "bert", **changes)).train()
    batch = batch_of(backbone, [12] * 400)
    batch = {name: tensor[:1].expand_as(tensor) for name, tensor in batch.items()}  # the same row many times
    torch.manual_seed(0)
    with torch.no_grad():
        own, wanted = (say[-1].flatten(0, 0).std(0) for say in (hidden_states(backbone, batch), stock(backbone, batch)))
    assert float(wanted.mean()) > 0.05
    torch.testing.assert_close(own.mean(), wanted.mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_layers_that_are_recomputed_give_the_same_gradients(backbones: dict[str, Any], tmp_path: Path, family: str) -> None:
    backbone = AutoModel.from_pretrained(tiny.encoder_folder(tmp_path, family)).train()
    batch = batch_of(backbone, RAGGED["of many lengths"])
    wanted = gradients(backbone, lambda: hidden_states(backbone, batch)[-1], batch)
    checkpoint_activations(backbone)
    passes = []
    backbone.encoder.layer[0].output.dense.register_forward_hook(lambda *_: passes.append(1))
    same_gradients(gradients(backbone, lambda: hidden_states(backbone, batch)[-1], batch), wanted)
    assert len(passes) == 2


def test_half_precision_is_as_near_as_the_library_s(backbone: Any, together: bool) -> None:
    batch = batch_of(backbone, RAGGED["of many lengths"])
    with torch.inference_mode():
        exact = stock(backbone, batch)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            found, usual = (say[-1].float() for say in (hidden_states(backbone, batch, together=together), stock(backbone, batch)))
    assert torch.isfinite(found).all() and float((found - exact).abs().mean()) < 1.5 * float((usual - exact).abs().mean()) + 1e-3
