"""Averages of the weights of a fit over its steps (EMA) or last epochs (SWA), by torch.optim.swa_utils. Knows no task, loss or file.

EMA: Polyak & Juditsky 1992. SWA: Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kit.config import TrainPart


class Average:
    """The mean of what is trained of a model; frozen weights are neither copied nor touched. It begins with the first weights it is shown.

    Truthy once it holds something.
    """

    def __init__(self, model: nn.Module, settings: TrainPart) -> None:
        self._settings = settings
        self._own = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
        rule = get_ema_multi_avg_fn(settings.ema) if settings.ema else None
        self._mean = AveragedModel(self._own, multi_avg_fn=rule) if settings.ema or settings.swa else None

    def __bool__(self) -> bool:
        return self._mean is not None and bool(self._mean.n_averaged > 0)

    def after_step(self) -> None:
        """To be told of every optimizer step that moved the weights."""
        if self._mean is not None and self._settings.ema:
            self._mean.update_parameters(self._own)

    def after_epoch(self, epoch: int) -> None:
        """To be told of every epoch (from 0)."""
        if self._mean is not None and self._settings.swa and epoch >= self._settings.epochs - self._settings.swa:
            self._mean.update_parameters(self._own)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the model has the mean as its weights, if there is one; afterwards its own, bit for bit."""
        if not self:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        assert self._mean is not None, "there is nothing to swap"
        for own, mean in zip(self._own.parameters(), self._mean.module.parameters(), strict=True):
            own.data, mean.data = mean.data, own.data

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` takes; empty where nothing is averaged."""
        return {} if self._mean is None else self._mean.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave. Raises RuntimeError where it does not fit."""
        if self._mean is not None:
            self._mean.load_state_dict(state)
