"""kit.training.adversarial: weights move along this batch's gradient, and come back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from kit.config import Recipe, TrainPart
from kit.errors import ConfigError
from kit.models.encoder import Encoder
from kit.tasks.multiple_choice import MultipleChoice
from kit.training.adversarial import Attack, awp, fgm
from tests import tiny
from tests.training.conftest import TrainOne

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


@pytest.mark.parametrize("accumulated", [False, True])
def test_the_rows_that_a_batch_reads_are_moved_as_the_whole_table_is(model: Encoder, tmp_path: Path, accumulated: bool) -> None:
    task, tokens, table = MultipleChoice(max_length=48), Encoder.tokens(tmp_path), model.input_embeddings
    batch = task.collate(task.encode(tiny.questions(4), tokens), tokens)
    attack, start = Attack(model, TrainPart(fgm=EPSILON), 0), table.detach().clone()
    if accumulated:
        loss_of(model, tmp_path, slice(4, 8))().backward()
    whole = [None if table.grad is None else table.grad.clone()]
    before = attack.gradients(batch)
    loss_of(model, tmp_path, slice(0, 4))().backward()
    with fgm(table, EPSILON, before=whole[0]):
        wanted = table.detach().clone()
    rows = model.rows_read(batch)
    assert not accumulated or [len(old) for old in before if old is not None] == [len(rows)], "nothing else is copied"
    assert 0 < len(rows) < len(table) and torch.equal((wanted != start).any(1).nonzero().flatten(), rows[rows != tokens.pad_id])
    with attack(before) as moved:
        assert moved and torch.equal(table, wanted)
    assert torch.equal(table, start)


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


# --- AWP ---------------------------------------------------------------------------------------------------------------------------

SIZE = 0.05


def trained_of(model: Encoder) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients_of(model: Encoder) -> list[torch.Tensor | None]:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in trained_of(model)]


@pytest.mark.parametrize("size", [1e-4, 0.05, 10.0])
def test_awp_gives_the_weights_back_bit_for_bit_also_from_an_error_inside(model: Encoder, tmp_path: Path, size: float) -> None:
    loss, before = loss_of(model, tmp_path), bits(model)
    none = gradients_of(model)
    for end in (None, KeyboardInterrupt):
        model.zero_grad()
        loss().backward()
        with suppress(KeyboardInterrupt), awp(trained_of(model), size, before=none) as moved:
            loss().backward()
            assert moved and any(not torch.equal(own, before[name]) for name, own in model.named_parameters())
            if end:
                raise end
        assert_same_bits(model, before)


def test_awp_moves_each_matrix_by_a_share_of_its_norm_and_no_bias(model: Encoder, tmp_path: Path) -> None:
    before = bits(model)
    loss_of(model, tmp_path)().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    with awp(trained_of(model), SIZE, before=[None] * len(trained_of(model))):
        steps = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    for name, step in steps.items():
        if name in found and step.ndim >= 2 and found[name].norm() > 0:
            direction = found[name] / found[name].norm()
            torch.testing.assert_close(step, SIZE * before[name].norm() * direction, atol=1e-6, rtol=1e-4)
        else:
            assert not step.any(), name


def test_awp_raises_the_loss_and_its_gradients_take_the_place_of_the_batchs_own(model: Encoder, tmp_path: Path) -> None:
    """Also under accumulation: what was there before the batch stays."""
    first, second = loss_of(model, tmp_path, slice(0, 4)), loss_of(model, tmp_path, slice(4, 8))
    first().backward()
    before = gradients_of(model)
    kept = gradients_of(model)
    loss = second()
    loss.backward()
    with awp(trained_of(model), SIZE, before=before):
        attacked = second()
        assert attacked > loss
        expected = torch.autograd.grad(second(), trained_of(model), allow_unused=True)
        attacked.backward()
    for own, old, at_moved in zip(trained_of(model), kept, expected, strict=True):
        if at_moved is not None:
            torch.testing.assert_close(own.grad, at_moved if old is None else old + at_moved)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), None])
def test_awp_changes_nothing_without_a_direction(value: float | None) -> None:
    one, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    one.grad, other.grad = (None, None) if value is None else (torch.full((3, 2), value), torch.zeros(3, 2))
    kept = one.grad
    with awp([one, other], SIZE, before=[None, None]) as moved:
        assert not moved and (one == 1).all() and one.grad is kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_awp_changes_the_step_alike_with_and_without_a_scaler(dtype: torch.dtype, model: Encoder, tmp_path: Path) -> None:
    loss, seen = loss_of(model, tmp_path, dtype=dtype), []
    for scaled in (True, False):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        scaler.scale(loss()).backward()
        with awp(trained_of(model), SIZE, before=[None] * len(trained_of(model))):
            scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    assert (seen[0] - seen[1]).norm() < (5e-3 if dtype == torch.float16 else 1e-5) * seen[1].norm()


def test_awp_begins_where_the_recipe_says_and_leaves_frozen_weights_out(model: Encoder) -> None:
    model.input_embeddings.requires_grad_(False)
    settings = TrainPart(awp=0.1, awp_from=1, epochs=2)
    assert [bool(Attack(model, settings, epoch)) for epoch in (-1, 0, 1)] == [False, False, True]
    model.input_embeddings.grad = torch.ones_like(model.input_embeddings)
    assert len(Attack(model, settings, 1).gradients({})) == len(trained_of(model))
    assert not Attack(model, TrainPart(), 0)


def test_a_fit_with_awp_steps_by_the_gradients_at_the_moved_weights(train_one: TrainOne, backbone: Path) -> None:
    """Two micro-batches of one question each, against the same written out; the first epoch is without."""
    questions, task = tiny.questions(2), MultipleChoice(max_length=48, shuffle_options=False)
    settings = {"task": task, "batch_size": 1, "accumulate": 2, "clip": 1e9, "lr": 1e-12, "epochs": 2}  # the weights stay
    plain, attacked = train_one(questions, awp=SIZE, awp_from=1, **settings).gradients
    model, tokens = tiny.encoder(backbone).train(), Encoder.tokens(backbone)
    weights = trained_of(model)
    expected = {False: torch.zeros(()), True: torch.zeros(())}
    for feature in task.encode(questions, tokens):
        batch = task.collate([feature], tokens)

        def gradient(batch: dict[str, torch.Tensor] = batch) -> list[torch.Tensor]:
            loss = task.loss(task.scores(model(batch), batch), batch)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            return [torch.zeros_like(own) if one is None else one for own, one in zip(weights, found, strict=True)]

        clean = gradient()
        moves = [SIZE * own.norm() * one / one.norm() if own.ndim >= 2 and one.norm() > 0 else 0 * own for own, one in zip(weights, clean, strict=True)]
        with torch.no_grad():
            for own, move in zip(weights, moves, strict=True):
                own += move
        moved = gradient()
        with torch.no_grad():
            for own, move in zip(weights, moves, strict=True):
                own -= move
        for key, found in ((False, clean), (True, moved)):
            expected[key] = expected[key] + torch.cat([one.flatten() for one in found]) / 2
    assert float(plain.norm()) == pytest.approx(float(expected[False].norm()), rel=1e-4)
    assert float(attacked.norm()) == pytest.approx(float(expected[True].norm()), rel=1e-4)
    assert float(attacked.norm()) != pytest.approx(float(plain.norm()), rel=1e-2)


def test_a_fit_with_awp_learns_in_half_precision_too(train_one: TrainOne) -> None:
    for precision in ("bf16", "fp16"):
        trained = train_one(tiny.questions(8), precision=precision, awp=0.01, pooling="match", epochs=6, lr=1e-2, name=precision)
        assert sum(trained.losses[-2:]) < 0.9 * sum(trained.losses[:2])
