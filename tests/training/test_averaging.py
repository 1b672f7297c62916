"""kit.training.averaging: means of weights as they are defined, in the fit and over a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kit.config import TrainPart
from kit.models.encoder import Encoder
from kit.training.averaging import Average
from tests import tiny
from tests.training.conftest import TrainOne, largest_difference
from tests.training.test_loop import Interrupted, prediction_of

EMA, SWA = {"ema": 0.8}, {"swa": 2}


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def shown(average: Average, model: nn.Module) -> float:
    """The one number that all weights are, while the average is in use."""
    with average.in_use():
        values = torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])
    assert (values == values[0]).all()
    return float(values[0])


def move(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(value)


def test_ema_is_the_recursion_over_steps() -> None:
    model = model_of(0.0)
    average, expected = Average(model, TrainPart(ema=0.9)), 1.0
    for step, value in enumerate((1.0, 3.0, -2.0, 5.0)):
        move(model, value)
        average.after_step()
        average.after_epoch(step)
        expected = value if step == 0 else 0.9 * expected + 0.1 * value
    assert shown(average, model) == pytest.approx(expected)


def test_swa_is_the_mean_over_the_last_epochs() -> None:
    model = model_of(0.0)
    average = Average(model, TrainPart(epochs=5, swa=3))
    for epoch, value in enumerate((10.0, 20.0, 1.0, 2.0, 6.0)):
        move(model, value)
        average.after_step()
        average.after_epoch(epoch)
        assert bool(average) == (epoch >= 2)
    assert shown(average, model) == pytest.approx(3.0)


@pytest.mark.parametrize("settings", [EMA, SWA], ids=str)
def test_weights_are_bit_for_bit_as_before_and_frozen_ones_are_not_copied(settings: dict[str, float]) -> None:
    model = model_of(0.1)
    model.bias.requires_grad_(False)
    average = Average(model, TrainPart(epochs=2, **settings))
    for epoch, value in enumerate((1 / 3, 2 / 3)):
        move(model, value)
        average.after_step()
        average.after_epoch(epoch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), average.in_use():
        assert (model.weight != before["weight"]).all() and torch.equal(model.bias, before["bias"])
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(value.numel() for name, value in average.state_dict().items() if name != "n_averaged") == model.weight.numel()


def test_without_either_nothing_is_kept_or_changed() -> None:
    model = model_of(1.0)
    average = Average(model, TrainPart())
    average.after_step()
    average.after_epoch(2)
    assert not average and average.state_dict() == {} and shown(average, model) == 1.0


def test_a_state_goes_on_where_it_stood() -> None:
    models = [model_of(1.0), model_of(1.0)]
    one, other = (Average(model, TrainPart(ema=0.5)) for model in models)
    one.after_step()
    other.load_state_dict(one.state_dict())
    for model, average in zip(models, (one, other), strict=True):
        move(model, 3.0)
        average.after_step()
        assert shown(average, model) == 2.0


@pytest.mark.parametrize("settings", [EMA, SWA], ids=str)
def test_a_fit_validates_and_keeps_the_average_of_what_an_unaveraged_fit_went_through(
    train_one: TrainOne, backbone: Path, settings: dict[str, float]
) -> None:
    """The optimizer's way is the same with and without averaging, so that the average can be written out from fits of fewer epochs."""
    questions, common = tiny.questions(8), {"lr": 3e-3, "schedule": "constant", "keep": "last", "batch_size": 8}
    passed = [train_one(questions, epochs=epochs, name=f"after{epochs}", **common).weights for epochs in (1, 2, 3)]  # one step an epoch
    averaged = train_one(questions, questions, epochs=3, name="averaged", **common, **settings)
    expected = dict(passed[0])
    for weights in passed[1:]:
        for name, weight in weights.items():
            expected[name] = (0.8 * expected[name] + 0.2 * weight) if "ema" in settings else (passed[1][name] + passed[2][name]) / 2
    assert largest_difference(expected, averaged.weights) < 1e-6 < largest_difference(passed[2], averaged.weights)
    assert largest_difference(Encoder.load(averaged.folder, outputs=1).state_dict(), averaged.weights) == 0.0
    assert np.array_equal(averaged.fit.prediction, prediction_of(averaged.folder, questions, backbone))
    assert {name: averaged.fit.history.epochs[-1][name] for name in averaged.fit.metrics} == averaged.fit.metrics


def test_an_epoch_before_the_average_is_not_kept_however_good(train_one: TrainOne) -> None:
    questions = tiny.questions(8)
    settings = {"epochs": 3, "lr": 1e-12, "batch_size": 8}  # nothing moves: the first epoch is as good as any
    averaged = train_one(questions, questions, name="averaged", swa=1, **settings)
    state = torch.load(averaged.folder / "state" / "last.pt", weights_only=True)
    assert '"best_epoch": 2' in state["state"] and int(state["average"]["n_averaged"]) == 1


@pytest.mark.parametrize("settings", [EMA, SWA], ids=str)
@pytest.mark.parametrize("at", [("augment", 3), ("decode", 2), ("targets", 4)], ids=str)
def test_a_resumed_fit_has_the_average_of_an_undisturbed_one(
    train_one: TrainOne, dropping_backbone: Path, at: tuple[str, int], settings: dict[str, float]
) -> None:
    questions = tiny.questions(12)
    common = {"source": dropping_backbone, "epochs": 3, "batch_size": 4, "lr": 3e-3, "keep": "last", **settings}
    whole = train_one(questions[:8], questions[8:], name="whole", **common)
    with pytest.raises(KeyboardInterrupt):
        train_one(questions[:8], questions[8:], name="stopped", task=Interrupted(max_length=48, at=at), **common)
    resumed = train_one(questions[:8], questions[8:], name="stopped", **common)
    assert len(resumed.gradients) < len(whole.gradients)
    assert largest_difference(whole.weights, resumed.weights) == 0.0
    assert np.array_equal(whole.fit.prediction, resumed.fit.prediction) and whole.fit.history == resumed.fit.history
