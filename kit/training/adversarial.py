"""Adversarial training: a second pass on weights that are moved along their gradient. Knows no task and no loss.

FGM moves the input embeddings: Miyato, Dai & Goodfellow 2017, "Adversarial training methods for semi-supervised text classification".
AWP moves every weight matrix: Wu, Xia & Wang 2020, "Adversarial weight perturbation helps robust generalization".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from kit.config import TrainPart
from kit.errors import ConfigError


class Attack:
    """The attack that the settings ask for in an epoch (from 0; below it while pretraining). Truthy if there is one.

    shared: the gradients are those of several processes, each with a batch of its own, so that no batch tells which rows they are of.
    """

    def __init__(self, model: Any, settings: TrainPart, epoch: int, *, shared: bool = False) -> None:
        self._fgm, self._awp = settings.fgm, settings.awp
        self._rows_read = None if shared else getattr(model, "rows_read", None)
        self._rows: torch.Tensor | None = None
        self._weights: list[nn.Parameter] = []
        if settings.fgm:
            self._weights = [model.input_embeddings]
        elif settings.awp and epoch >= settings.awp_from:
            self._weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __bool__(self) -> bool:
        return bool(self._weights)

    def gradients(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
        """Copies of the gradients that the attack looks at, to be taken before the batch's backward. batch: on the CPU, so that nothing waits for a GPU."""
        if self._fgm and self._rows_read:
            self._rows = self._rows_read(batch).to(self._weights[0].device)
        at = slice(None) if self._rows is None else self._rows
        return [None if weight.grad is None else weight.grad[at].clone() for weight in self._weights]

    def __call__(self, before: Sequence[torch.Tensor | None]) -> AbstractContextManager[bool]:
        """Inside, weights are moved, if it yields True: then the loss of the batch wants another backward. before: what `gradients` gave."""
        if self._fgm:
            return fgm(self._weights[0], self._fgm, before=before[0], rows=self._rows)
        return awp(self._weights, self._awp, before=before)


@contextmanager
def fgm(embeddings: nn.Parameter, epsilon: float, *, before: torch.Tensor | None = None, rows: torch.Tensor | None = None) -> Iterator[bool]:
    """Inside, the table is moved by `epsilon` along its gradient's direction; afterwards it is bit for bit as before.

    before: the gradient already there when this batch's backward began (accumulation); only what this batch added counts. rows: those, each once,
    outside of which the batch adds nothing, so that nothing else is read, and `before` is of these.
    The direction does not depend on a loss scale, so it is the same with and without a GradScaler, provided both losses are scaled
    alike. Yields False, and moves nothing, where the gradient is zero or not finite. Raises ConfigError for a frozen table.
    """
    if not embeddings.requires_grad:
        raise ConfigError("train.fgm needs gradients of the input embeddings, but they are frozen or quantised: set train.fgm = 0 or unfreeze them")
    if embeddings.grad is None:
        yield False
        return
    at = slice(None) if rows is None else rows
    gradient = embeddings.grad[at] if before is None else embeddings.grad[at] - before
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).float()  # in float64, so that rows that are 0 make no difference
    if not torch.isfinite(norm) or norm == 0:
        yield False
        return
    kept = embeddings.detach()[at].clone()
    try:
        embeddings.data[at] = kept + (gradient.float() * (epsilon / norm)).to(embeddings.dtype)
        yield True
    finally:
        embeddings.data[at] = kept


@contextmanager
def awp(weights: Sequence[nn.Parameter], size: float, *, before: Sequence[torch.Tensor | None]) -> Iterator[bool]:
    """Inside, each matrix is moved by `size` times its own norm along its gradient's direction; afterwards all are bit for bit as before.

    weights: all that is trained; biases and norms (fewer than two dimensions) stay where they are. before: copies of their gradients when this
    batch's backward began, which become the gradients again, so that those at the moved weights take the batch's place. Directions do not
    depend on a loss scale. Yields False, and changes nothing, where no matrix has a direction or one's gradient is not finite.
    """
    added = [None if own.grad is None else own.grad if old is None else own.grad - old for own, old in zip(weights, before, strict=True)]
    moving = [(own, gradient) for own, gradient in zip(weights, added, strict=True) if gradient is not None and own.ndim >= 2]
    norms = [gradient.float().norm() for _, gradient in moving]
    if not any(norm > 0 for norm in norms) or not all(torch.isfinite(norm) for norm in norms):
        yield False
        return
    kept = [own.detach().clone() for own, _ in moving]
    try:
        for (own, gradient), norm in zip(moving, norms, strict=True):
            if norm > 0:
                own.data.add_((gradient.float() * (size * own.detach().float().norm() / norm)).to(own.dtype))
        for own, old in zip(weights, before, strict=True):
            own.grad = old
        yield True
    finally:
        for (own, _), weight in zip(moving, kept, strict=True):
            own.data.copy_(weight)
