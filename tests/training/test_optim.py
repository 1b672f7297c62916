"""kit.training.optim: every parameter at its own rate, exactly once."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from kit.config import TrainPart
from kit.errors import ConfigError
from kit.models.adapters import OPTIMIZERS, make_optimizer
from kit.models.encoder import Encoder
from kit.training.optim import SCHEDULES, freeze, make_schedule, parameter_groups
from tests import tiny

TOP = tiny.LAYERS + 1  # height of the embeddings: above them the layers, then the head


def heights(model: Encoder) -> dict[str, int]:
    """Name of each parameter → groups above its own, read off the names: 0 for the head, TOP for what is outside of layers."""
    found = {}
    for name, _ in model.named_parameters():
        layer = re.search(r"\blayer\.(\d+)\.", name)
        found[name] = 0 if not name.startswith("backbone.") else tiny.LAYERS - int(layer[1]) if layer else TOP
    return found


def by_name(model: nn.Module, groups: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    """Name of each parameter → its optimizer group; fails where one is in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    assert len({name for name, _ in listed}) == len(listed)
    return dict(listed)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_every_parameter_is_in_one_group_with_the_rate_of_its_height(family: str, pooling: str, tmp_path: Path) -> None:
    model = tiny.encoder(tmp_path, family, pooling=pooling)
    groups = by_name(model, parameter_groups(model, TrainPart(lr=1e-3, llrd=0.5)))
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx({n: 1e-3 * 0.5**h for n, h in heights(model).items()})
    assert {*heights(model).values()} == {*range(TOP + 1)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_biases_and_norms_have_no_weight_decay_and_matrices_have(family: str, tmp_path: Path) -> None:
    model = tiny.encoder(tmp_path, family)
    groups = by_name(model, parameter_groups(model, TrainPart(weight_decay=0.3)))
    plain = {name for name in groups if name.endswith("bias") or re.search("layer_?norm", name.lower())}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {name: 0.0 if name in plain else 0.3 for name in groups}
    assert plain and plain != groups.keys()


def test_the_head_can_have_a_rate_of_its_own(tmp_path: Path) -> None:
    model = tiny.encoder(tmp_path, pooling="attention")
    groups = by_name(model, parameter_groups(model, TrainPart(lr=1e-3, llrd=0.5, head_lr=0.1)))
    for name, height in heights(model).items():
        assert groups[name]["lr"] == pytest.approx(0.1 if height == 0 else 1e-3 * 0.5**height), name


def test_without_decay_every_rate_is_the_same(tmp_path: Path) -> None:
    assert {group["lr"] for group in parameter_groups(tiny.encoder(tmp_path), TrainPart(lr=3e-4))} == {3e-4}


@pytest.mark.parametrize(("embeddings", "layers", "frozen"), [(True, 0, {TOP}), (False, 1, {TOP, 2}), (True, 2, {TOP, 2, 1}), (False, 0, set())])
@pytest.mark.parametrize("family", ["bert", "deberta_conv", "distilbert"])
def test_frozen_groups_need_no_gradient_and_are_not_optimised(family: str, embeddings: bool, layers: int, frozen: set[int], tmp_path: Path) -> None:
    model = tiny.encoder(tmp_path, family)
    freeze(model, embeddings=embeddings, layers=layers)
    expected = {name for name, height in heights(model).items() if height not in frozen}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    assert by_name(model, parameter_groups(model, TrainPart(llrd=0.9))).keys() == expected


def test_rates_of_what_is_left_do_not_depend_on_what_is_frozen(tmp_path: Path) -> None:
    model, settings = tiny.encoder(tmp_path), TrainPart(lr=1e-3, llrd=0.5)
    before = by_name(model, parameter_groups(model, settings))
    freeze(model, embeddings=True, layers=1)
    after = by_name(model, parameter_groups(model, settings))
    assert {name: group["lr"] for name, group in after.items()} == {name: before[name]["lr"] for name in after}


def test_freezing_more_layers_than_there_are_is_refused(tmp_path: Path) -> None:
    model = tiny.encoder(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.freeze_layers = 3: the model has 2 layers"):
        freeze(model, embeddings=False, layers=3)


def test_a_model_without_anything_to_train_is_refused(tmp_path: Path) -> None:
    model = tiny.encoder(tmp_path).requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing is left to train"):
        parameter_groups(model, TrainPart())


class Overlapping(nn.Module):
    """A model whose groups name one parameter twice, or leave one out."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.one, self.two, self.twice = nn.Linear(2, 2), nn.Linear(2, 2), twice

    def layer_groups(self) -> list[list[nn.Parameter]]:
        return [[*self.one.parameters()], [*self.two.parameters(), self.one.weight]] if self.twice else [[*self.one.parameters()], [self.two.weight]]


@pytest.mark.parametrize("twice", [True, False])
def test_groups_that_are_no_partition_are_refused(twice: bool) -> None:
    with pytest.raises(AssertionError, match="layer_groups gives"):
        parameter_groups(Overlapping(twice), TrainPart())


def rates(schedule: str, steps: int, warmup: float, beyond: int = 0) -> list[float]:
    """The rate of each step for a base rate of 1, and the one after the last step (and `beyond` it)."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 1.0}])
    scheduler = make_schedule(optimizer, TrainPart(schedule=schedule, warmup=warmup), steps)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps + beyond):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_every_optimizer_of_the_recipe_is_made_and_no_other() -> None:
    known = get_args(TrainPart.model_fields["optimizer"].annotation)
    assert known == OPTIMIZERS
    groups = [{"params": [nn.Parameter(torch.ones(4))], "lr": 0.5, "weight_decay": 0.25}]
    for kind in known:
        (made,) = make_optimizer(groups, kind).param_groups
        assert (made["lr"], made["weight_decay"]) == (0.5, 0.25)


SHAPES = {  # at half of the fall, and at its end
    "linear": (0.5, 0.0),
    "cosine": (0.5, 0.0),
    "constant": (1.0, 1.0),
    "step": (0.1, 0.001),
    "exponential": (0.1, 0.01),
    "polynomial": (0.25, 0.0),
}


def test_every_schedule_has_its_values_here() -> None:
    assert SHAPES.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_climbs_to_the_full_rate_and_falls_to_its_end(schedule: str) -> None:
    found = rates(schedule, 24, 4 / 24)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert (found[14], found[24]) == pytest.approx(SHAPES[schedule])
    assert all(later <= earlier for earlier, later in pairwise(found[4:]))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.5), (7, 0.1), (30, 0.99)])
def test_no_rate_is_negative_or_above_the_full_one(schedule: str, steps: int, warmup: float) -> None:
    assert all(0 <= rate <= 1 for rate in rates(schedule, steps, warmup))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_beyond_the_planned_ones_keep_the_last_rate(schedule: str) -> None:
    """A fit that goes on with more processes than it began with counts fewer steps than are already done."""
    found = rates(schedule, 10, 0.0, beyond=5)
    assert found[10:] == pytest.approx([SHAPES[schedule][1]] * 6)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rates("linear", 10, 0.0)[0] == 1.0


def test_a_schedule_keeps_the_proportions_of_the_groups(tmp_path: Path) -> None:
    model = tiny.encoder(tmp_path)
    optimizer = torch.optim.SGD(parameter_groups(model, TrainPart(lr=1e-2, llrd=0.5)))
    full = [group["lr"] for group in optimizer.param_groups]
    scheduler = make_schedule(optimizer, TrainPart(warmup=0.0), 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 2 for rate in full])
