"""Fit one model on one split. The one loop for every task and model; knows the names of neither.

Mixed precision is done here (autocast, GradScaler) so that it is the same on CPU and CUDA; processes come from accelerate.
A kill costs at most the epoch under way: the state is written after each, and each epoch's randomness follows from seed and epoch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from kit.config import TrainPart
from kit.errors import BundleError, KitError
from kit.manifest import write_atomically
from kit.models.adapters import make_optimizer
from kit.models.checkpoint import load_trained, restore_trained, save_trained, trained
from kit.predict import predict
from kit.runtime import Runtime, seed_everything
from kit.tasks import Feature, Task, Tokens
from kit.training.adversarial import fgm
from kit.training.optim import freeze, make_schedule, parameter_groups


class DivergedError(KitError):
    """Training broke down; what earlier epochs and fits gave is kept."""


class Fit(NamedTuple):
    """prediction: of the validation examples (Nv, C), empty without them. metrics: of the kept epoch. history: one dict per epoch and step log."""

    prediction: np.ndarray
    metrics: dict[str, float]
    history: History


@dataclass
class History:
    """What the curves are drawn from: per step (loss, rate of the head group), per epoch the metrics."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)


@dataclass
class _State:
    """What a resumed fit continues from, besides weights and optimizer."""

    epoch: int = 0
    best: float = -np.inf
    best_epoch: int = -1
    history: History = field(default_factory=History)


def fit(
    model: Any,
    task: Task,
    tokens: Tokens,
    train: Sequence[Any],
    valid: Sequence[Any],
    *,
    settings: TrainPart,
    runtime: Runtime,
    accelerator: Accelerator,
    folder: Path,
    seed: int,
    batch_tokens: int = 4096,
    label: str = "fit",
) -> Fit:
    """Train on `train`, choose the epoch on `valid` (the last where there is none), and save the model into `folder`.

    With 0 epochs the model stays as it is. Resumes from the last finished epoch when `folder` holds an interrupted fit; what that takes
    stays in `folder`/state until the caller has stored the result.
    """
    return _Fitting(model, task, tokens, train, valid, settings, runtime, accelerator, Path(folder), seed, batch_tokens, label).run()


@dataclass
class _Fitting:
    model: Any
    task: Task
    tokens: Tokens
    train: Sequence[Any]
    valid: Sequence[Any]
    settings: TrainPart
    runtime: Runtime
    accelerator: Accelerator
    folder: Path
    seed: int
    batch_tokens: int
    label: str

    def run(self) -> Fit:
        if not self.settings.epochs:
            self.model.to(self.runtime.device)
            return self._finish(History())
        self._prepare()
        state = self._resume()
        while state.epoch < self.settings.epochs and not self._has_lost_patience(state):
            epoch = state.epoch
            steps = self._epoch(epoch)
            state.history.steps += steps
            metrics = {"epoch": epoch, "loss": float(np.mean([loss for loss, _ in steps]))}
            if self.valid:
                metrics |= evaluate(self.task, self._predict(), self.valid)
            state.history.epochs.append(metrics)
            self.accelerator.log({f"{self.label}/{name}": value for name, value in metrics.items()}, step=len(state.history.steps))
            state.epoch = epoch + 1
            self._keep_if_best(state, metrics)
            self._save_state(state)
        self.accelerator.wait_for_everyone()
        load_trained(self.model, self.folder / "state" / "best")
        return self._finish(state.history)

    def _prepare(self) -> None:
        seed_everything(self.seed)
        freeze(self.model, embeddings=self.settings.freeze_embeddings, layers=self.settings.freeze_layers)
        if self.settings.gradient_checkpointing:
            self.model.checkpoint_activations()
        self.model.to(self.runtime.device)
        self.optimizer = make_optimizer(parameter_groups(self.model, self.settings), self.settings.optimizer)
        per_step = self.settings.batch_size * self.settings.accumulate * self.accelerator.num_processes
        features = len(self.task.encode(self.train, self.tokens))  # an example may have several
        total = -(-features // per_step) * self.settings.epochs
        self.schedule = make_schedule(self.optimizer, self.settings, total)
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.dtype == torch.float16)
        self.wrapped = self.accelerator.prepare_model(self.model)

    def _epoch(self, epoch: int) -> list[tuple[float, float]]:
        """One pass; gives (loss, rate) per optimizer step."""
        rng = np.random.default_rng([self.seed % 2**32, epoch])
        torch.manual_seed((self.seed * 1000 + epoch) * 1000 + self.accelerator.process_index)
        features = self.task.encode(self.task.augment(self.train, rng), self.tokens)
        slots = self.accelerator.num_processes * self.settings.accumulate
        groups = length_grouped([feature.tokens for feature in features], self.settings.batch_size * slots, rng)
        self.wrapped.train()
        steps = []
        with tqdm(groups, desc=f"{self.label} epoch {epoch + 1}/{self.settings.epochs}", unit="step", disable=self._quiet(), leave=False) as bar:
            for group in bar:
                loss = self._step([features[index] for index in group], slots)
                steps.append((loss, self.optimizer.param_groups[-1]["lr"]))
                self._advance()
                bar.set_postfix(loss=f"{loss:.3f}")
        return [(float(loss), rate) for loss, rate in steps]

    def _step(self, group: list[Feature], slots: int) -> torch.Tensor:
        """Gradients of the mean loss over the examples of one optimizer step, over all processes and micro-batches."""
        mine = np.array_split(np.arange(len(group)), slots)[self.accelerator.process_index :: self.accelerator.num_processes]
        total = torch.zeros((), device=self.runtime.device)
        for number, part in enumerate(mine):
            last = number == len(mine) - 1
            features = [group[index] for index in part] or group[:1]  # a process without examples still joins, with weight 0
            weight = len(part) / len(group) * self.accelerator.num_processes
            with nullcontext() if last or self.settings.fgm else self.accelerator.no_sync(self.wrapped):
                total += self._backward(features, weight)
        return self.accelerator.reduce(total, "mean")

    def _backward(self, features: list[Feature], weight: float) -> torch.Tensor:
        batch = {name: tensor.to(self.runtime.device) for name, tensor in self.task.collate(features, self.tokens).items()}
        embeddings = self.model.input_embeddings if self.settings.fgm else None
        before = None if embeddings is None or embeddings.grad is None else embeddings.grad.clone()
        loss = self._loss(batch) * weight
        self.scaler.scale(loss).backward()
        if embeddings is not None:
            with fgm(embeddings, self.settings.fgm, before=before) as moved:
                if moved:
                    self.scaler.scale(self._loss(batch) * weight).backward()
        return loss.detach()

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.runtime.device.type, self.runtime.dtype, enabled=self.runtime.autocasts):
            output = self.wrapped(batch)
        return self.task.loss(self.task.scores(output.float(), batch), batch)

    def _advance(self) -> None:
        """Unscale, clip, step; where the scaler skips a step (overflow), the schedule waits too."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise DivergedError(f"{self.label}: the gradient is not finite: lower train.lr, or set train.precision = \"fp32\"")
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() >= scale:
            self.schedule.step()

    def _predict(self) -> np.ndarray:
        """Predictions of the validation part (Nv, C)."""
        return predict_together(
            self.model, self.task, self.valid, self.tokens,
            runtime=self.runtime, accelerator=self.accelerator, batch_tokens=self.batch_tokens, label=f"{self.label} validation",
        )  # fmt: skip

    def _keep_if_best(self, state: _State, metrics: dict[str, float]) -> None:
        value = metrics[next(iter(self.task.metrics))] if self.valid and self.settings.keep == "best" else float(state.epoch)
        if state.best_epoch < 0 or value > state.best:
            state.best, state.best_epoch = value, state.epoch - 1
            if self.accelerator.is_main_process:
                save_trained(self.model, self.folder / "state" / "best")

    def _has_lost_patience(self, state: _State) -> bool:
        return 0 < self.settings.patience < state.epoch - state.best_epoch

    def _save_state(self, state: _State) -> None:
        """After an epoch: what training changed and the optimizer in one file, replaced atomically. Frozen weights are created, not kept."""
        if self.accelerator.is_main_process:
            path = self.folder / "state" / "last.pt"
            part = path.with_suffix(".part")
            values = {"model": trained(self.model), "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
            torch.save(values | {"scaler": self.scaler.state_dict(), "state": json.dumps(asdict(state))}, part)
            part.replace(path)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> _State:
        path = self.folder / "state" / "last.pt"
        if not path.is_file():
            return _State()
        try:
            values = torch.load(path, map_location=self.runtime.device, weights_only=True)
            saved = json.loads(values["state"])
            restore_trained(self.model, values["model"])
        except Exception as error:  # torch and pickle raise unrelated types for a damaged file, some without a text
            why = str(error) if isinstance(error, BundleError) else type(error).__name__
            raise BundleError(f"{path}: the interrupted fit cannot be read ({why}): delete {path.parent} to begin this fold again") from None
        self.optimizer.load_state_dict(values["optimizer"])
        self.schedule.load_state_dict(values["schedule"])
        self.scaler.load_state_dict(values["scaler"])
        history = History([tuple(step) for step in saved["history"]["steps"]], saved["history"]["epochs"])
        return _State(saved["epoch"], saved["best"], saved["best_epoch"], history)

    def _finish(self, history: History) -> Fit:
        """Save the model as the fold's, with what it says of the validation rows."""
        prediction = self._predict() if self.valid else np.empty((0, 0), np.float32)
        metrics = evaluate(self.task, prediction, self.valid) if self.valid else {}
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.model.save(self.folder)
            write_atomically(self.folder / "history.json", json.dumps(asdict(history)))
        self.accelerator.wait_for_everyone()
        return Fit(prediction, metrics, history)

    def _quiet(self) -> bool | None:
        return None if self.accelerator.is_main_process else True


def predict_together(
    model: Any, task: Task, examples: Sequence[Any], tokens: Tokens, *, runtime: Runtime, accelerator: Accelerator, batch_tokens: int, label: str
) -> np.ndarray:
    """Predictions of examples (N, C); each process scores its share, all get all."""
    features = task.encode(examples, tokens)
    share = list(range(accelerator.process_index, len(features), accelerator.num_processes))
    scores = predict(model, task, [features[index] for index in share], tokens, runtime=runtime, batch_tokens=batch_tokens, label=label)
    gathered = gather_object(list(zip(share, scores, strict=True)))
    ordered = [score for _, score in sorted(gathered, key=lambda pair: pair[0])]
    return task.decode(ordered, features, examples)


def evaluate(task: Task, prediction: np.ndarray, examples: Sequence[Any]) -> dict[str, float]:
    """Every metric of the task for predictions of labelled examples."""
    targets = task.targets(examples)
    return {name: metric(prediction, targets) for name, metric in task.metrics.items()}


def length_grouped(lengths: Sequence[int], size: int, rng: np.random.Generator, *, window: int = 50) -> list[list[int]]:
    """Random batches of positions with similar lengths: shuffled, sorted within windows of `window` batches, batches shuffled again."""
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), size * window):
        chunk = sorted(order[start : start + size * window].tolist(), key=lambda index: -lengths[index])
        batches += [chunk[at : at + size] for at in range(0, len(chunk), size)]
    return [batches[index] for index in rng.permutation(len(batches))]
