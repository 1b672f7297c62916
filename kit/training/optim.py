"""Parameter groups with layer-wise learning rates, schedules, freezing. Knows no task, batch or file.

LLRD: discriminative fine-tuning, Howard & Ruder 2018 (ULMFiT).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kit.config import TrainPart
from kit.errors import ConfigError


def parameter_groups(model: Any, settings: TrainPart) -> list[dict[str, Any]]:
    """Optimizer groups covering every trainable parameter once: the rate falls by `llrd` per layer below the head.

    The top group (pooling, head) has `head_lr`, or `lr`; layer L has lr·llrd, … the bottom lr·llrd^L (with llrd = 1: lr everywhere).
    Biases and norms (fewer than two dimensions) have no weight decay.
    """
    layers = model.layer_groups()
    _check_partition(model, layers)
    groups = []
    for depth, layer in enumerate(layers):
        height = len(layers) - 1 - depth  # 0 at the head
        lr = (settings.head_lr or settings.lr) if height == 0 else settings.lr * settings.llrd**height
        trainable = [parameter for parameter in layer if parameter.requires_grad]
        for decayed in (True, False):
            parameters = [parameter for parameter in trainable if (parameter.ndim >= 2) == decayed]
            if parameters:
                groups.append({"params": parameters, "lr": lr, "weight_decay": settings.weight_decay if decayed else 0.0})
    if not groups:
        raise ConfigError("nothing is left to train: lower train.freeze_layers")
    return groups


def freeze(model: Any, *, embeddings: bool, layers: int) -> None:
    """Stop gradients of the bottom group (embeddings) and of the lowest `layers` layers (which includes the bottom). Raises ConfigError."""
    groups = model.layer_groups()
    if layers > len(groups) - 2:
        raise ConfigError(f"train.freeze_layers = {layers}: the model has {len(groups) - 2} layers")
    frozen = groups[: 1 + layers] if embeddings or layers else []
    for group in frozen:
        for parameter in group:
            parameter.requires_grad_(False)


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainPart, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate's factor per optimizer step: a linear climb over the warm-up, then the schedule's fall over the rest."""
    warmup = int(settings.warmup * steps)
    fall = SCHEDULES[settings.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return fall(min(1.0, (step - warmup) / max(1, steps - warmup)))  # a fit resumed with more processes takes more steps than planned

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# Each takes the share of the fall that is done, 0 → 1, and gives the factor of the rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
    "step": lambda done: 0.1 ** int(done * 3),  # a tenth at each third
    "exponential": lambda done: 0.01**done,
    "polynomial": lambda done: (1 - done) ** 2,
}


def _check_partition(model: nn.Module, layers: list[list[nn.Parameter]]) -> None:
    grouped = [id(parameter) for layer in layers for parameter in layer]
    own = {id(parameter) for parameter in model.parameters()}
    assert len(grouped) == len(set(grouped)) and set(grouped) == own, f"layer_groups gives {len(grouped)} parameters, the model has {len(own)}"
