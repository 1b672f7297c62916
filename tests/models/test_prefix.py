"""Texts that begin alike: every way to share what they begin with gives what each text gives alone."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kit.errors import ConfigError
from kit.models.prefix import ATTENTION, Sharing, check_sharing, hidden_states
from tests import decoders

WAYS = get_args(Sharing)


@pytest.fixture(scope="module", params=sorted(decoders.FAMILIES))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The library's model, and its decoder with our attention."""
    reference = decoders.stock(request.param)
    return reference, decoders.shared(reference, request.param)


def states_alone(model: Any, trees: decoders.Trees) -> torch.Tensor:
    """States (M, H) at the places that are asked for, each branch in a forward of its own."""
    found = []
    with torch.no_grad():
        for trunk, branches in trees.texts:
            for branch in branches:
                states = model.get_decoder()(input_ids=torch.cat([trunk, branch])[None], use_cache=False)[0][0]
                found.append(states[len(trunk) - 1 : -1])
    return torch.cat(found)


@pytest.mark.parametrize("sharing", WAYS)
@pytest.mark.parametrize(("rows", "branches", "left"), [(1, 5, False), (4, 3, False), (4, 3, True), (3, 1, False)])
def test_every_way_gives_what_each_text_gives_alone(pair: tuple[Any, Any], sharing: Sharing, rows: int, branches: int, left: bool) -> None:
    reference, ours = pair
    trees = decoders.trees(rows, branches, left=left)
    with torch.no_grad():
        states = hidden_states(ours.get_decoder(), trees.batch, sharing)
    torch.testing.assert_close(states, states_alone(reference, trees), rtol=0, atol=1e-4)


def test_rows_may_have_different_numbers_of_branches(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    trees = decoders.trees(2, 3)
    last = trees.batch["branch"][0] == 3
    trees.batch["branch"][0][last] = -1
    width = trees.batch["branch"].shape[1]
    kept = ~torch.isin(trees.batch["at"], last.nonzero()[:, 0])
    trees.batch["at"] = trees.batch["at"][kept]
    with torch.no_grad():
        one, *others = (hidden_states(ours.get_decoder(), trees.batch, sharing) for sharing in WAYS)
    assert trees.batch["at"].max() >= width
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sharing", WAYS)
def test_a_trunk_without_branches_is_a_plain_text(pair: tuple[Any, Any], sharing: Sharing) -> None:
    reference, ours = pair
    ids = torch.arange(3, 17)[None]
    batch = {"input_ids": ids, "position_ids": torch.arange(14)[None], "branch": torch.zeros_like(ids), "at": torch.arange(14)}
    with torch.no_grad():
        states = hidden_states(ours.get_decoder(), batch, sharing)
        expected = reference.get_decoder()(input_ids=ids, use_cache=False)[0][0]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("left", [False, True])
def test_texts_without_branches_are_what_each_is_alone_whatever_pads_them(pair: tuple[Any, Any], left: bool) -> None:
    """Padded on the right they take the library's own way, on the left that of trees."""
    reference, ours = pair
    texts = [trunk for trunk, _ in decoders.trees(4, 1).texts]
    width = max(map(len, texts))
    batch = {name: torch.full((4, width), value) for name, value in (("input_ids", 0), ("position_ids", 0), ("branch", -1))}
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(len(text))
        batch["input_ids"][row, place], batch["branch"][row, place] = text, 0
        batch["position_ids"][row, place] = torch.arange(len(text))
    batch["at"] = (batch["branch"].flatten() == 0).nonzero()[:, 0]
    with torch.no_grad():
        expected = torch.cat([reference.get_decoder()(input_ids=text[None], use_cache=False)[0][0] for text in texts])
        torch.testing.assert_close(hidden_states(ours.get_decoder(), batch, "tree"), expected, rtol=0, atol=1e-4)


def test_texts_without_branches_are_attended_to_at_once_and_without_a_mask() -> None:
    ours = decoders.shared(decoders.stock("gpt2"), "gpt2").get_decoder()
    ids = torch.arange(3, 43).view(2, 20)
    batch = {"input_ids": ids, "position_ids": torch.arange(20).expand(2, 20), "branch": torch.zeros_like(ids), "at": torch.arange(40)}
    batch["branch"][1, 15:] = -1
    with torch.no_grad(), torch.profiler.profile() as profile:
        hidden_states(ours, batch, "tree")
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::scaled_dot_product_attention"] == 3, "one a layer"
    assert "aten::tril" not in calls and "aten::bitwise_and" not in calls


def test_a_family_that_scores_by_column_may_learn_from_texts_without_branches() -> None:
    sizes = {"vocab_size": 120, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    config = AutoConfig.for_model("bloom", **sizes)
    reference, ours = (AutoModelForCausalLM.from_config(config, attn_implementation=name).eval() for name in ("eager", ATTENTION))
    ours.load_state_dict(reference.state_dict())
    ids = torch.arange(3, 17)[None]
    batch = {"input_ids": ids, "position_ids": torch.arange(14)[None], "branch": torch.zeros_like(ids), "at": torch.arange(14)}
    with torch.no_grad():
        expected = reference.get_decoder()(input_ids=ids, use_cache=False)[0][0]
        torch.testing.assert_close(hidden_states(ours.get_decoder(), batch, "tree"), expected, rtol=0, atol=1e-4)


def test_gradients_are_those_of_the_texts_alone() -> None:
    reference = decoders.stock("mistral")
    ours = decoders.shared(reference, "mistral")
    trees = decoders.trees(2, 3)
    weights = torch.randn(len(trees.batch["at"]), 32, generator=torch.Generator().manual_seed(1))
    (hidden_states(ours.get_decoder(), trees.batch, "tree") * weights).sum().backward()
    begin = 0
    for trunk, branches in trees.texts:
        for branch in branches:
            states = reference.get_decoder()(input_ids=torch.cat([trunk, branch])[None], use_cache=False)[0][0, len(trunk) - 1 : -1]
            (states * weights[begin : begin + len(branch)]).sum().backward()
            begin += len(branch)
    for mine, its in zip(ours.get_decoder().parameters(), reference.get_decoder().parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-3)


def test_a_plain_forward_of_the_same_model_is_the_librarys(pair: tuple[Any, Any]) -> None:
    reference, ours = pair
    ids = torch.arange(3, 43).view(2, 20)
    there = torch.ones_like(ids)
    there[1, 12:] = 0
    with torch.no_grad():
        mine, its = (model(input_ids=ids, attention_mask=there).logits for model in (ours, reference))
    torch.testing.assert_close(mine[there.bool()], its[there.bool()], rtol=0, atol=1e-4)


def test_what_was_read_is_trusted_once_it_was_tried(pair: tuple[Any, Any]) -> None:
    check_sharing(pair[1].get_decoder(), decoders.trees(2, 3).batch)


def test_a_family_that_scores_by_column_is_refused() -> None:
    sizes = {"vocab_size": 120, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes), attn_implementation=ATTENTION).eval()
    with pytest.raises(ConfigError, match="BloomModel .*: choose a model of another family"):
        check_sharing(model.get_decoder(), decoders.trees(1, 3).batch)
