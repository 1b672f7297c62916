"""Layer streaming beside accelerate's disk offload, on one made-up decoder; a part of tests.bench.lm.

All ways score the last token of the same prompts from the same weights, in turns. A model that is larger than memory is never in the page cache
when a pass over it begins, so before every pass, also before each of accelerate's forwards, its files leave the cache; "warm" is one prompt per
forward without that. Bounds: reading the files once, and computing with all weights in memory. accelerate gets one prompt per forward, as notebooks
run it, and larger batches, of which the fastest counts. Two lengths of prompts: short ones, which are read longer than computed, and long ones, with
which it is the other way round. Wall time: reading runs beside computing. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import disk_offload, init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from kit.models.streaming import LayerStream

GROUPS = (4, 10**6)  # prompts per forward that accelerate tries beside one
_CHUNK = 16 << 20


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped decoder in float32, and the prompts. tokens: of each, short and long."""

    hidden: int = 1536
    inner: int = 4096
    layers: int = 12
    heads: int = 12
    words: int = 8000
    prompts: int = 8
    tokens: tuple[int, int] = (16, 64)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.words,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=2048,
        )


SMALL = Shape(hidden=256, inner=512, layers=4, heads=4, words=500, prompts=4, tokens=(8, 16))


# --- weights, prompts, page cache ------------------------------------------------------------------------------------------------------------


def make(folder: Path, shape: Shape) -> None:
    """The model as transformers saves it, in shards; and as accelerate wants it, in `offloaded` beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape.config()).eval()
    model.save_pretrained(folder, max_shard_size="400MB")
    disk_offload(model, folder / "offloaded", execution_device=torch.device("cpu"))


def prompts(shape: Shape, tokens: int) -> Tensor:
    """(prompts, tokens)."""
    return torch.randint(5, shape.words, (shape.prompts, tokens), generator=torch.Generator().manual_seed(0))


def drop(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- variants: each gives seconds and the log-probabilities (prompts,) of the last tokens ----------------------------------------------------


def raw_read(folder: Path) -> float:
    """Seconds to read the weights' files, one after another."""
    drop(folder)
    buffer = memoryview(bytearray(_CHUNK))
    began = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def streamed(folder: Path, texts: Tensor) -> tuple[float, Tensor]:
    """The kit, all prompts in one batch, reading the configuration and the headers included."""
    drop(folder)
    began = time.perf_counter()
    stream = LayerStream(folder)
    (scores,) = stream.score([_batch(texts)])
    taken = time.perf_counter() - began
    assert stream.pace.read_bytes == stream.model_bytes
    return taken, scores


def _batch(texts: Tensor) -> dict[str, Tensor]:
    ids, last = texts[:, :-1], texts[:, -1]
    rows, width = ids.shape
    at = (torch.arange(rows) + 1) * width - 1
    return {"input_ids": ids, "position_ids": torch.arange(width).expand(rows, -1), "branch": torch.zeros_like(ids), "at": at, "token": last}


def offloaded(folder: Path, shape: Shape) -> Any:
    """A model whose weights accelerate reads from disk in every forward. It never holds them all, not even in the beginning."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(shape.config(), attn_implementation="sdpa").eval()
    disk_offload(model, folder / "offloaded", execution_device=torch.device("cpu"))
    return model


def resident(folder: Path) -> Any:
    """The model in memory, apart from its files: pages of a file that somebody has mapped do not leave the cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.inference_mode()
def forwards(model: Any, texts: Tensor, group: int, before: Callable[[], None] = lambda: None) -> tuple[float, Tensor]:
    """transformers' own forward, so many prompts at a time, the head only at the place that is asked. before: each, and not timed."""
    taken, scores = 0.0, []
    for part in texts.split(group):
        before()
        began = time.perf_counter()
        logits = model(part[:, :-1], use_cache=False, logits_to_keep=1).logits[:, -1].float()
        scores.append(logits.log_softmax(-1).gather(-1, part[:, -1:])[:, 0])
        taken += time.perf_counter() - began
    return taken, torch.cat(scores)


# --- measuring -------------------------------------------------------------------------------------------------------------------------------


def bench(shape: Shape, repeats: int, root: Path) -> dict[str, Any]:
    """Ratios of seconds, medians over turns, for short and long prompts, the largest difference of scores, and memory. root: a disk to write the weights to."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name)
        make(folder, shape)
        whole, peer = resident(folder), offloaded(folder, shape)
        found: dict[str, Any] = {
            kind: _measured(folder, whole, peer, prompts(shape, tokens), repeats) for kind, tokens in zip(("short", "long"), shape.tokens, strict=True)
        }
        stream = LayerStream(folder)
        layer_mb = stream.pace.layer_bytes / 1e6
        states_mb = shape.prompts * max(shape.tokens) * shape.hidden * 4 / 1e6
        memory = {which: peak_memory(folder, shape, which) for which in ("streamed", "accelerate")}
        return found | {
            "shape": asdict(shape),
            "threads": torch.get_num_threads(),
            "layer_mb": layer_mb,
            "model_mb": stream.model_bytes / 1e6,
            "allowed_mb": 2 * layer_mb + states_mb + 300,
            "peak_mb": {which: values["peak"] - values["before"] for which, values in memory.items()},
        }


def _measured(folder: Path, whole: Any, peer: Any, texts: Tensor, repeats: int) -> dict[str, Any]:
    """One length of prompts."""
    seconds: dict[str, list[float]] = {}
    scores: dict[str, Tensor] = {}
    sizes = [1, *sorted({min(group, len(texts)) for group in GROUPS})]
    ways: dict[str, Callable[[], tuple[float, Tensor]]] = {
        "resident": lambda: forwards(whole, texts, len(texts)),
        "streamed": lambda: streamed(folder, texts),
        "accelerate_1_warm": lambda: (forwards(peer, texts, len(texts)), forwards(peer, texts, 1))[1],  # the first brings the files into the cache
    }
    ways |= {f"accelerate_{group}": lambda group=group: forwards(peer, texts, group, lambda: drop(folder)) for group in sizes}  # type: ignore[misc]
    forwards(whole, texts, len(texts))
    for turn in range(repeats):
        seconds.setdefault("raw_read", []).append(raw_read(folder))
        for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
            taken, scores[name] = way()
            seconds.setdefault(name, []).append(taken)
    best = min(sizes, key=lambda group: statistics.median(seconds[f"accelerate_{group}"]))
    bound = [max(pair) for pair in zip(seconds["raw_read"], seconds["resident"], strict=True)]
    return {
        "over_bound": _ratio(seconds["streamed"], bound),
        "bs1_ratio": _ratio(seconds["accelerate_1"], seconds["streamed"]),
        "bs1_warm_ratio": _ratio(seconds["accelerate_1_warm"], seconds["streamed"]),
        "best_ratio": _ratio(seconds[f"accelerate_{best}"], seconds["streamed"]),
        "best_group": best,
        "max_abs_diff": max(float((own - scores["resident"]).abs().max()) for own in scores.values()),
        "seconds": seconds,
    }


def _ratio(one: list[float], other: list[float]) -> float:
    """The median over turns."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def peak_memory(folder: Path, shape: Shape, which: str) -> dict[str, float]:
    """MB of a process of its own: before the first byte of a weight, and at its peak. All long prompts at once."""
    values = json.dumps([asdict(shape), str(folder), which])
    done = subprocess.run([sys.executable, "-m", "tests.bench.streaming", values], capture_output=True, text=True, check=True)
    before, peak = map(float, done.stdout.split()[-2:])
    return {"before": before, "peak": peak}


def _report_memory(values: str) -> None:
    settings, folder, which = json.loads(values)
    shape = Shape(**settings)
    texts = prompts(shape, max(shape.tokens))
    peer = offloaded(Path(folder), shape) if which == "accelerate" else None
    before = memory("VmRSS")
    if peer is None:
        streamed(Path(folder), texts)
    else:
        forwards(peer, texts, len(texts))
    print(before, memory("VmHWM"))


def memory(what: str) -> float:
    """MB, of this process only: getrusage would count the one that started it."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    _report_memory(sys.argv[1])
