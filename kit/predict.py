"""Features → scores: batches by token budget, dtype, halving when memory runs out. Used for OOF and for inference.

Knows no name of a task or a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from kit.runtime import Runtime, free_memory, tells_of_memory
from kit.tasks import Feature, Task, Tokens


def predict(
    model: nn.Module, task: Task, features: Sequence[Feature], tokens: Tokens, *, runtime: Runtime, batch_tokens: int, label: str = "scoring"
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
    model: nn.Module, task: Task, features: Sequence[Feature], tokens: Tokens, *, runtime: Runtime, batch_tokens: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Batches as they are scored: positions in `features`, and their scores (B, …). Long ones first, so that memory runs out early or never.

    A batch that does not fit into memory is halved, and with it the budget of those that follow. Scores that are not finite are
    computed again in float32.
    """
    model.to(runtime.device).eval()
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


def _score(model: nn.Module, task: Task, features: list[Feature], tokens: Tokens, runtime: Runtime) -> np.ndarray:
    batch = {name: tensor.to(runtime.device) for name, tensor in task.collate(features, tokens).items()}
    with torch.inference_mode():
        with torch.autocast(runtime.device.type, runtime.dtype, enabled=runtime.autocasts):
            scores = task.scores(model(batch), batch).float()
        if runtime.autocasts and not torch.isfinite(scores).all():
            scores = task.scores(model(batch), batch).float()
    return scores.cpu().numpy()


def _batches(features: Sequence[Feature], batch_tokens: int) -> list[list[int]]:
    """Positions grouped so that sequences × longest sequence stays within the budget (a feature alone may exceed it)."""
    longest = [max(len(encoding["input_ids"]) for encoding in feature.encodings) for feature in features]
    batches: list[list[int]] = []
    rows = width = 0
    for index in sorted(range(len(features)), key=lambda index: -longest[index]):
        count = len(features[index].encodings)
        if not batches or (rows + count) * width > batch_tokens:
            batches.append([])
            rows, width = 0, longest[index]
        batches[-1].append(index)
        rows += count
    return batches


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or tells_of_memory(str(error))
