"""Features → scores: batches by token budget, dtype, halving when memory runs out. Used for OOF and for inference.

Knows no name of a task or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kit.models.adapters import compute_in_float32
from kit.runtime import Runtime, free_memory, tells_of_memory
from kit.tasks import Batch, Feature, Task, Tokens

Scored = Iterator[tuple[list[int], np.ndarray]]
"""Batches as they are scored: positions in the features, and their scores (B, …)."""


def predict(
    model: Any, task: Task, features: Sequence[Feature], tokens: Tokens, *, runtime: Runtime, batch_tokens: int, label: str = "scoring"
) -> list[np.ndarray]:
    """Scores of each feature, float32, in the order of `features`."""
    scores: list[np.ndarray] = [np.empty(0)] * len(features)
    with tqdm(total=len(features), desc=label, unit="row", disable=None, leave=False) as bar:
        for indices, values in stream(model, task, features, tokens, runtime=runtime, batch_tokens=batch_tokens):
            for index, value in zip(indices, values, strict=True):
                scores[index] = value
            bar.update(len(indices))
    return scores


def stream(
    model: Any,
    task: Task,
    features: Sequence[Feature],
    tokens: Tokens,
    *,
    runtime: Runtime,
    batch_tokens: int,
    state: Path | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Scored:
    """Batches as they are scored. Long ones first, so that memory runs out early or never.

    A batch that does not fit into memory is halved, and with it the budget of those that follow. Scores that are not finite are
    computed again in float32. A model that streams its layers gets all batches at once: `state` is where it keeps a pass that may be cut
    off, and it tells `on_step` of every layer.
    """
    model.to(runtime.device).eval()
    if getattr(model, "streams", False):
        batches = collate_all(task, features, tokens, batch_tokens=batch_tokens)
        outputs = model.score_all([batch for _, batch in batches], state=state, on_step=on_step)
        for (indices, batch), output in zip(batches, outputs, strict=True):
            yield indices, task.scores(output, batch).float().numpy()
        return
    waiting = _batches(features, batch_tokens)[::-1]
    while waiting:
        indices = waiting.pop()
        try:
            yield indices, _score(model, task, [features[index] for index in indices], tokens, runtime)
        except (MemoryError, RuntimeError) as error:
            if len(indices) == 1 or not _is_out_of_memory(error):
                raise
            free_memory()
            waiting = [half for batch in [*waiting, indices] for half in (batch[len(batch) // 2 :], batch[: len(batch) // 2]) if half]


def collate_all(task: Task, features: Sequence[Feature], tokens: Tokens, *, batch_tokens: int) -> list[tuple[list[int], Batch]]:
    """All batches, and the positions of what is in them."""
    return [(indices, task.collate([features[index] for index in indices], tokens)) for indices in _batches(features, batch_tokens)]


def _score(model: Any, task: Task, features: list[Feature], tokens: Tokens, runtime: Runtime) -> np.ndarray:
    batch = {name: tensor.to(runtime.device) for name, tensor in task.collate(features, tokens).items()}
    with torch.inference_mode():
        with torch.autocast(runtime.device.type, runtime.dtype, enabled=runtime.autocasts):
            scores = _scores(model, task, batch)
        if not torch.isfinite(scores).all() and (runtime.autocasts or _is_half(model)):
            with compute_in_float32(model):
                scores = _scores(model, task, batch)
    return scores.cpu().numpy().copy()  # torch's own memory, kept for every batch, would keep the heap around it from being used again


def _scores(model: Any, task: Task, batch: Batch) -> Tensor:
    return task.scores(model(batch), batch).float()


def _is_half(model: Any) -> bool:
    return any(parameter.is_floating_point() and parameter.itemsize < 4 for parameter in model.parameters())


def _batches(features: Sequence[Feature], batch_tokens: int) -> list[list[int]]:
    """Positions grouped so that rows × longest row stays within the budget (a feature alone may exceed it)."""
    shapes = [feature.shape for feature in features]
    batches: list[list[int]] = []
    rows = width = 0
    for index in sorted(range(len(features)), key=lambda index: -shapes[index][1]):
        count, length = shapes[index]
        if not batches or (rows + count) * width > batch_tokens:
            batches.append([])
            rows, width = 0, length
        batches[-1].append(index)
        rows += count
    return batches


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or tells_of_memory(str(error))
