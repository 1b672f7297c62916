"""What the benchmarks of task families share: how long ways take in turns, and fits of ours and of the library's Trainer, kept for a run that goes on."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from kit import assemble, manifest, runtime
from kit.config import Recipe, TrainPart
from kit.data.tables import Table, read_table
from kit.metrics import bootstrap
from kit.predict import predict
from kit.training.loop import fit


def in_turns(ways: dict[str, Callable[[], Any]], turns: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """What every way says its work took, in seconds, `turns` times in turns, and what it gave last. A way gives (seconds, what it gives)."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    given = {}
    for turn in range(turns + 1):
        for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
            took, given[name] = way()
            seconds[name] += [took] * (turn > 0)
    return seconds, given


def clock(device: torch.device) -> float:
    """CPU time of this process; on CUDA the time of day, when all is done that was begun."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def ratio(seconds: dict[str, list[float]], peer: str, own: str) -> float:
    """How many times faster than the peer: the median over turns."""
    return statistics.median(a / b for a, b in zip(seconds[peer], seconds[own], strict=True))


def peak_flops(chosen: runtime.Runtime, size: int = 1024) -> float:
    """Operations a second of the largest product of matrices that the device does well, of ten: what a model's use is measured against."""
    size = size if chosen.device.type == "cpu" else 8 * size
    one, other = (torch.randn(size, size, device=chosen.device, dtype=chosen.dtype) for _ in range(2))
    took = []
    for _ in range(10):
        begun = clock(chosen.device)
        one @ other
        took.append(clock(chosen.device) - begun)
    return 2 * size**3 / min(took)


def emptied(folder: Path) -> Path:
    """The folder without what an earlier turn left, which a fit would go on from."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    return folder


def real_table(name: str, ids: str) -> Table:
    """A table of the folder that KIT_DATA names (default ../shared/data). Ends the program where it is missing."""
    path = Path(os.environ.get("KIT_DATA", "../shared/data")) / name
    if not path.is_file():
        sys.exit(f"{path} is missing: set KIT_DATA to the folder that has it, or try --quick, which needs none")
    return read_table(path, ids=ids)


# --- fits --------------------------------------------------------------------------------------------------------------------------------------


class Fitted(NamedTuple):
    """seconds: what training took, as `clock` has it. prediction: of the held-out rows (N, C) float32."""

    seconds: float
    prediction: np.ndarray


def kept(folder: Path, name: str, settings: Any, make: Callable[[Path], Fitted]) -> Fitted:
    """What `make` gives, or gave before with these settings (JSON values). make: takes a folder for what an interrupted fit goes on from."""
    path = folder / f"{name}-{assemble.digest(settings)}.npz"
    if not path.is_file():
        made = make(path.with_suffix(""))
        part = path.with_suffix(".part.npz")
        np.savez(part, **made._asdict())
        part.replace(path)
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        print(f"{name}: {made.seconds / 60:.1f} minutes", flush=True)
    with np.load(path) as there:
        return Fitted(float(there["seconds"]), there["prediction"])


def kept_values(folder: Path, name: str, settings: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The same of JSON values."""
    path = folder / f"{name}-{assemble.digest(settings)}.json"
    if not path.is_file():
        manifest.write_atomically(path, json.dumps(make()))
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def trained(recipe: Recipe, backbone: Path, examples: Sequence[Any], folder: Path, *, seed: int = 0) -> tuple[float, Any]:
    """Seconds from examples to a trained model on disk, and the model. Goes on from what an interrupted fit left in the folder."""
    task, chosen = assemble.make_task(recipe), runtime.choose()
    (folder / "state").mkdir(parents=True, exist_ok=True)
    begun = clock(chosen.device)
    runtime.seed_everything(seed)
    model = assemble.create_model(recipe, task, backbone)
    fit(
        model, task, assemble.load_tokens(recipe, backbone), examples, [], settings=recipe.train, runtime=chosen,
        accelerator=Accelerator(cpu=chosen.device.type == "cpu"), folder=folder, seed=seed,
    )  # fmt: skip
    return clock(chosen.device) - begun, model


def read(model: Any, recipe: Recipe, backbone: Path, examples: Sequence[Any]) -> tuple[float, np.ndarray]:
    """Seconds from examples to predictions, and these (N, C)."""
    task, chosen = assemble.make_task(recipe), runtime.choose()
    tokens = assemble.load_tokens(recipe, backbone)
    begun = clock(chosen.device)
    features = task.encode(examples, tokens)
    scores = predict(model, task, features, tokens, runtime=chosen, batch_tokens=recipe.infer.batch_tokens)
    prediction = task.decode(scores, features, examples)
    return clock(chosen.device) - begun, prediction


def fitted(recipe: Recipe, backbone: Path, train: Sequence[Any], held: Sequence[Any], folder: Path, *, seed: int = 0) -> Fitted:
    """The recipe fitted on `train`, and what it says of `held`, which has no say in the fit."""
    seconds, model = trained(recipe, backbone, train, folder, seed=seed)
    return Fitted(seconds, read(model, recipe, backbone, held)[1])


def without_dropout(backbone: Path, folder: Path) -> Path:
    """A copy of a backbone that drops nothing in training."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in backbone.iterdir():
        if path.is_file() and path.name != "config.json" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((backbone / "config.json").read_text())
    settings = {name: 0.0 if name in ("hidden_dropout_prob", "attention_probs_dropout_prob") else value for name, value in config.items()}
    manifest.write_atomically(folder / "config.json", json.dumps(settings, indent=1))
    return folder


def trainer_arguments(settings: TrainPart, folder: Path, **more: Any) -> TrainingArguments:
    """The recipe's settings as far as the Trainer has them: one rate for all layers."""
    chosen = runtime.choose()
    torch.use_deterministic_algorithms(False)  # which a fit of ours asks for
    given = {
        "num_train_epochs": settings.epochs, "per_device_train_batch_size": settings.batch_size, "per_device_eval_batch_size": settings.batch_size,
        "learning_rate": settings.lr, "weight_decay": settings.weight_decay, "lr_scheduler_type": settings.schedule, "warmup_steps": settings.warmup,
        "max_grad_norm": settings.clip, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "use_cpu": chosen.device.type == "cpu", "bf16": chosen.dtype == torch.bfloat16, "fp16": chosen.dtype == torch.float16, "seed": 0,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(given | more))


# --- figures -----------------------------------------------------------------------------------------------------------------------------------


def estimated(metric: Callable[..., float], prediction: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """A metric with its 95 % interval over rows."""
    found = bootstrap(metric, prediction, targets)
    return {"value": found.value, "ci95": [found.low, found.high]}


def speeds(training: dict[str, list[float]], rows: int, reading: dict[str, list[float]], read_rows: int) -> dict[str, Any]:
    """Rows a second of every way, and by how much ours is faster than each of the others; seconds are CPU time on a CPU."""
    values: dict[str, Any] = {"turns": len(next(iter(training.values()))), "rows_in_turn": {"training": rows, "reading": read_rows}}
    for name, seconds, count in (("training", training, rows), ("reading", reading, read_rows)):
        values[f"{name}_rows_s"] = {way: count / statistics.median(took) for way, took in seconds.items()}
        values[f"{name}_speed_ratio"] = {way: ratio(seconds, way, "own") for way in seconds if way != "own"}
    return values | {"seconds": {"training": training, "reading": reading}}
