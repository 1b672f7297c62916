"""Real fits of tiny encoders on one thread, and what an optimizer saw at each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kit import runtime
from kit.config import TrainPart
from kit.models.encoder import Encoder
from kit.tasks import Task
from kit.tasks.multiple_choice import MultipleChoice, Question
from kit.training.loop import Fit, fit
from tests import tiny

TASK = MultipleChoice(max_length=48)


class Trained(NamedTuple):
    """start: the weights before. model: as the fit left it. gradients: of each optimizer step, one vector of all parameters."""

    start: dict[str, torch.Tensor]
    model: Encoder
    fit: Fit
    gradients: list[torch.Tensor]
    folder: Path

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    @property
    def losses(self) -> list[float]:
        return [loss for loss, _ in self.fit.history.steps]


TrainOne = Callable[..., Trained]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest, and bit for bit the same, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without dropout."""
    return tiny.encoder_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def dropping_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with dropout, so that every step draws random numbers."""
    return tiny.encoder_folder(tmp_path_factory.mktemp("bert_dropout"), dropout=0.1)


@pytest.fixture
def train_one(backbone: Path, tmp_path: Path) -> TrainOne:
    """Fit a tiny encoder: train_one(train, valid, **settings of TrainPart)."""

    def run(
        train: Sequence[Question],
        valid: Sequence[Question] = (),
        *,
        source: Path = backbone,
        name: str = "fit",
        seed: int = 0,
        task: Task = TASK,
        pooling: str = "mean",
        pretrain: Sequence[Question] = (),
        pretrain_task: Task | None = None,
        **settings: Any,
    ) -> Trained:
        part = TrainPart(**{"epochs": 1, "lr": 1e-3, "precision": "fp32", "warmup": 0.0, **settings})
        model = tiny.encoder(source, pooling=pooling)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        folder = tmp_path / name
        with step_gradients() as gradients:
            result = fit(
                model, task, Encoder.tokens(source), train, valid,
                settings=part, runtime=runtime.choose(part.precision, "cpu"), accelerator=Accelerator(cpu=True), folder=folder, seed=seed,
                pretrain=pretrain, pretrain_task=pretrain_task,
            )  # fmt: skip
        return Trained(start, model, result, gradients, folder)

    return run


@contextmanager
def step_gradients() -> Iterator[list[torch.Tensor]]:
    """Gradients of all parameters, as one vector, at every optimizer step inside, but those that a scaler skips."""
    seen: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", 0):  # a fused optimizer skips the step itself
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in parameters]))

    handle = register_optimizer_step_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over all weights; 0.0 only where they are equal bit for bit."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


_CANCELLED = ("head.bias", "key.bias", f"layer.{tiny.LAYERS - 1}.output.LayerNorm.bias")


def meant(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the biases that a softmax cancels: their gradients are rounding noise, which Adam blows up to whole steps."""
    return {name: weight for name, weight in weights.items() if not name.endswith(_CANCELLED)}
