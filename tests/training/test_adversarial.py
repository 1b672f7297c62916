"""kit.training.adversarial: the table moves along this batch's gradient, and comes back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kit.config import Recipe
from kit.errors import ConfigError
from kit.models.encoder import Encoder
from kit.tasks.multiple_choice import MultipleChoice
from kit.training.adversarial import fgm
from tests import tiny

EPSILON = 0.5
Loss = Callable[[], torch.Tensor]


@pytest.fixture
def model(tmp_path: Path) -> Encoder:
    return tiny.encoder(tmp_path).train()


def loss_of(model: Encoder, folder: Path, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Loss:
    """The loss of some of eight questions, as often as asked for, its products in `dtype`."""
    task, tokens = MultipleChoice(max_length=48), Encoder.tokens(folder)
    batch = task.collate(task.encode(tiny.questions(8), tokens)[rows], tokens)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(batch)
        return task.loss(task.scores(output.float(), batch), batch)

    return loss


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach().view(torch.int32), before[name].view(torch.int32)), name


@pytest.mark.parametrize("epsilon", [1e-3, 0.5, 1e4])
def test_weights_are_bit_for_bit_as_before(model: Encoder, tmp_path: Path, epsilon: float) -> None:
    loss = loss_of(model, tmp_path)
    before = bits(model)
    loss().backward()
    with fgm(model.input_embeddings, epsilon) as moved:
        loss().backward()
        assert moved and not torch.equal(model.input_embeddings, before["backbone.embeddings.word_embeddings.weight"])
    assert_same_bits(model, before)


def test_weights_come_back_also_from_an_error_inside(model: Encoder, tmp_path: Path) -> None:
    before = bits(model)
    loss_of(model, tmp_path)().backward()
    with pytest.raises(KeyboardInterrupt), fgm(model.input_embeddings, EPSILON):
        raise KeyboardInterrupt
    assert_same_bits(model, before)


def test_only_the_table_moves_and_along_its_gradient(model: Encoder, tmp_path: Path) -> None:
    before = bits(model)
    loss_of(model, tmp_path)().backward()
    gradient = model.input_embeddings.grad.clone()
    with fgm(model.input_embeddings, EPSILON):
        step = model.input_embeddings.detach() - before["backbone.embeddings.word_embeddings.weight"]
        others = {name: value for name, value in bits(model).items() if "word_embeddings" not in name}
    torch.testing.assert_close(step, EPSILON * gradient / gradient.norm(), atol=1e-6, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in others.items())


def test_the_move_raises_the_loss(model: Encoder, tmp_path: Path) -> None:
    loss = loss_of(model, tmp_path)
    first = loss()
    first.backward()
    with fgm(model.input_embeddings, EPSILON):
        assert loss() > first


def test_under_accumulation_the_direction_is_that_of_this_micro_batch(model: Encoder, tmp_path: Path) -> None:
    first, second = loss_of(model, tmp_path, slice(0, 4)), loss_of(model, tmp_path, slice(4, 8))
    (alone,) = torch.autograd.grad(second(), [model.input_embeddings])
    first().backward()
    before = model.input_embeddings.grad.clone()
    table = model.input_embeddings.detach().clone()
    second().backward()
    with fgm(model.input_embeddings, EPSILON, before=before):
        step = model.input_embeddings.detach() - table
    torch.testing.assert_close(step, EPSILON * alone / alone.norm(), atol=1e-6, rtol=1e-3)
    both = before + alone
    assert (step - EPSILON * both / both.norm()).norm() > 0.1 * EPSILON


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf"), None])
def test_nothing_moves_for_a_gradient_without_direction(value: float | None) -> None:
    table = nn.Parameter(torch.arange(6.0).view(3, 2))
    table.grad = None if value is None else torch.zeros(3, 2)
    if table.grad is not None and value is not None:
        table.grad[1, 1] = value
    with fgm(table, EPSILON) as moved:
        assert not moved
        assert torch.equal(table.detach(), torch.arange(6.0).view(3, 2))


def test_a_batch_that_adds_nothing_to_the_gradient_has_no_direction() -> None:
    table = nn.Parameter(torch.ones(3, 2))
    table.grad = torch.ones(3, 2)
    with fgm(table, EPSILON, before=torch.ones(3, 2)) as moved:
        assert not moved


def test_overflow_of_an_earlier_micro_batch_moves_nothing() -> None:
    table = nn.Parameter(torch.ones(3, 2))
    before = torch.full((3, 2), torch.inf)
    table.grad = before + 1
    with fgm(table, EPSILON, before=before) as moved:
        assert not moved


def adversarial_part(model: Encoder, loss: Loss, *, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attack adds to the gradients of a step, and the gradients without it, each as one vector, unscaled."""
    found = []
    for epsilon in (0.0, EPSILON):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        scaler.scale(loss()).backward()
        if epsilon:
            with fgm(model.input_embeddings, epsilon):
                scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    return found[1] - found[0], found[0]


@pytest.mark.parametrize(("dtype", "direction"), [(torch.float16, 5e-3), (torch.float32, 1e-5)])
def test_the_attack_changes_the_step_by_the_same_amount_with_and_without_a_scaler(
    dtype: torch.dtype, direction: float, model: Encoder, tmp_path: Path
) -> None:
    """In fp16 a last bit of the moved table rounds other activations, so single numbers agree to 5e-3 only and their norm to 1e-3."""
    loss = loss_of(model, tmp_path, dtype=dtype)
    (scaled, plain), (unscaled, _) = adversarial_part(model, loss, scaled=True), adversarial_part(model, loss, scaled=False)
    assert (scaled - plain).norm() > 0.1 * plain.norm()  # not just the same gradient once more
    assert float(scaled.norm()) == pytest.approx(float(unscaled.norm()), rel=1e-3)
    assert (scaled - unscaled).norm() < direction * unscaled.norm()


def test_a_frozen_table_is_refused(model: Encoder) -> None:
    model.input_embeddings.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"train\.fgm needs gradients of the input embeddings.*train\.fgm = 0"), fgm(model.input_embeddings, EPSILON):
        pass


@pytest.mark.parametrize("frozen", ["freeze_embeddings=true", "freeze_layers=1"])
def test_a_recipe_with_fgm_on_frozen_embeddings_is_refused(frozen: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"train\.fgm .*train\.{frozen.split('=')[0]}"):
        tiny.recipe(tmp_path, "train.fgm=0.5", f"train.{frozen}")
    assert isinstance(tiny.recipe(tmp_path, "train.fgm=0", f"train.{frozen}"), Recipe)
