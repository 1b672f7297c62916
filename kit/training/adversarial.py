"""FGM: a second pass on input embeddings moved along their gradient. Knows no task and no loss.

Miyato, Dai & Goodfellow 2017, "Adversarial training methods for semi-supervised text classification".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kit.errors import ConfigError


@contextmanager
def fgm(embeddings: nn.Parameter, epsilon: float, *, before: torch.Tensor | None = None) -> Iterator[bool]:
    """Inside, the table is moved by `epsilon` along its gradient's direction; afterwards it is bit for bit as before.

    before: the gradient already there when this batch's backward began (accumulation); only what this batch added counts.
    The direction does not depend on a loss scale, so it is the same with and without a GradScaler, provided both losses are scaled
    alike. Yields False, and moves nothing, where the gradient is zero or not finite. Raises ConfigError for a frozen table.
    """
    if not embeddings.requires_grad:
        raise ConfigError("train.fgm needs gradients of the input embeddings, but they are frozen or quantised: set train.fgm = 0 or unfreeze them")
    if embeddings.grad is None:
        yield False
        return
    gradient = embeddings.grad if before is None else embeddings.grad - before
    norm = gradient.float().norm()
    if not torch.isfinite(norm) or norm == 0:
        yield False
        return
    kept = embeddings.detach().clone()
    try:
        embeddings.data.add_((gradient.float() * (epsilon / norm)).to(embeddings.dtype))
        yield True
    finally:
        embeddings.data.copy_(kept)
