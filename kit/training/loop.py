"""Fit one model on one split. The one loop for every task and model; knows the names of neither.

Mixed precision is done here (autocast, GradScaler) so that it is the same on CPU and CUDA; processes come from accelerate.
A kill costs at most the epoch under way, or train.save_steps of its steps: the state is written after each, and each epoch's randomness
follows from seed and epoch. Epochs are numbered from 0; those on pseudo-labels, which come before, are negative.
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
from kit.errors import BundleError, ConfigError, KitError
from kit.manifest import write_atomically
from kit.models.adapters import make_optimizer
from kit.models.checkpoint import load_trained, restore_trained, save_trained, trained
from kit.predict import collate_all, predict
from kit.runtime import Runtime, seed_everything
from kit.tasks import Feature, Task, Tokens
from kit.training.adversarial import Attack
from kit.training.averaging import Average
from kit.training.memory import kept_memory
from kit.training.optim import freeze, make_schedule, parameter_groups

_PREDICTION = "prediction.npy"  # of the validation rows, by the weights in `best`


class DivergedError(KitError):
    """Training broke down; what earlier epochs and fits gave is kept."""


class Fit(NamedTuple):
    """prediction: of the validation examples (Nv, C), empty without them. metrics: of the kept epoch. history: one dict per epoch and step log."""

    prediction: np.ndarray
    metrics: dict[str, float]
    history: History


@dataclass
class History:
    """What the curves are drawn from: per step (loss, rate of the head group), per epoch the metrics; of pretraining the steps only.

    checks: the metrics within epochs, train.eval_steps apart.
    """

    steps: list[tuple[float, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    checks: list[dict[str, float]] = field(default_factory=list)


@dataclass
class _State:
    """What a resumed fit continues from, besides weights and optimizer. steps: (loss, rate) of those of the epoch under way."""

    epoch: int = 0
    best: float = -np.inf
    best_epoch: int = -1
    history: History = field(default_factory=History)
    steps: list[tuple[float, float]] = field(default_factory=list)


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
    pretrain: Sequence[Any] = (),
    pretrain_task: Task | None = None,
    batch_tokens: int = 4096,
    label: str = "fit",
) -> Fit:
    """Train on `train`, choose the epoch on `valid` (the last where there is none), and save the model into `folder`.

    pretrain: examples that are learnt before, for train.pretrain_epochs, with the loss of `pretrain_task` (default: `task`). With 0 epochs the
    model stays as it is; one with `fit_at_once` is fitted by that. Resumes from the last finished epoch, or the last saved step, when `folder`
    holds an interrupted fit; what that takes stays in `folder`/state until the caller has stored the result.
    """
    fitting = _Fitting(
        model, task, tokens, train, valid, settings, runtime, accelerator, Path(folder), seed, pretrain, pretrain_task or task, batch_tokens, label
    )  # fmt: skip
    with kept_memory():
        return fitting.run()


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
    pretrain: Sequence[Any]
    pretrain_task: Task
    batch_tokens: int
    label: str

    def run(self) -> Fit:
        if not self.settings.epochs:
            self.model.to(self.runtime.device)
            return self._finish(History())
        if hasattr(self.model, "fit_at_once"):
            self._fit_at_once()
            return self._finish(History())
        self._prepare()
        state = self._resume()
        while state.epoch < self.settings.epochs and not self._has_lost_patience(state):
            self._epoch(state)
            self.average.after_epoch(state.epoch)
            with self.average.in_use():
                self._judge(state)
            state.epoch += 1
            state.history.steps += state.steps
            state.steps = []
            if state.epoch == 0:  # pretraining is over
                self._begin_at(state)
            self._save_state(state)
        self.accelerator.wait_for_everyone()
        load_trained(self.model, self.folder / "state" / "best")
        return self._finish(state.history, self.folder / "state" / _PREDICTION)

    def _fit_at_once(self) -> None:
        """For models that are not trained by gradient: all batches and what the model should give for their rows, in one call."""
        if self.settings.epochs > 1 or self.pretrain:
            key = f"train.epochs = {self.settings.epochs}" if self.settings.epochs > 1 else "data.pretrain"
            raise ConfigError(f"{key} is for models that learn step by step, and this one is fitted at once: set train.epochs = 1 and no data.pretrain")
        targets = np.asarray(self.task.targets(self.train))
        if targets.dtype.kind != "f" or targets.shape != (len(self.train), self.task.outputs):
            found = f"{targets.dtype} {targets.shape} of {len(self.train)} examples and {self.task.outputs} outputs"
            raise ConfigError(f"a model that is fitted at once learns a row of numbers per example, and the task's targets are {found}: set another model.kind")
        seed_everything(self.seed)
        self.model.to(self.runtime.device)
        features = self.task.encode(self.train, self.tokens)
        batches, wanted = [], []
        for indices, collated in collate_all(self.task, features, self.tokens, batch_tokens=self.batch_tokens):
            nothing = torch.zeros(len(indices), self.task.outputs)
            low, high = (self.task.scores(output, collated).numpy() for output in (nothing, nothing + 1))
            wanted.append((targets[[features[index].row for index in indices]] - low) / (high - low))  # scores go in a line with what a model gives
            batches.append({name: tensor.to(self.runtime.device) for name, tensor in collated.items()})
        with torch.no_grad(), torch.autocast(self.runtime.device.type, self.runtime.dtype, enabled=self.runtime.autocasts):
            self.model.fit_at_once(batches, np.concatenate(wanted))

    def _prepare(self) -> None:
        seed_everything(self.seed)
        freeze(self.model, embeddings=self.settings.freeze_embeddings, layers=self.settings.freeze_layers)
        if self.settings.gradient_checkpointing:
            self.model.checkpoint_activations()
        self.model.to(self.runtime.device)
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.dtype == torch.float16)
        self.average = Average(self.model, self.settings)
        self.wrapped = self.accelerator.prepare_model(self.model)

    def _begin(self, task: Task, examples: Sequence[Any], first: int, epochs: int) -> None:
        """A new optimizer and schedule, for so many epochs on the examples, the first of which has this number."""
        self.learning = task, examples
        self.optimizer = make_optimizer(parameter_groups(self.model, self.settings), self.settings.optimizer)
        per_step = self.settings.batch_size * self.settings.accumulate * self.accelerator.num_processes
        self.prepared = first, self._features(first)
        features = len(self.prepared[1][0])  # an example may have several, or several one
        self.schedule = make_schedule(self.optimizer, self.settings, -(-features // per_step) * epochs)

    def _features(self, epoch: int) -> tuple[list[Feature], np.random.Generator]:
        """What an epoch learns from, and its random numbers from there on."""
        task, examples = self.learning
        rng = np.random.default_rng([self.seed % 2**32, epoch % 2**32])
        return task.encode(task.augment(examples, rng), self.tokens), rng

    def _epoch(self, state: _State) -> None:
        """One pass, or the rest of one: appends (loss, rate) of each optimizer step to `state.steps`."""
        features, rng = self.prepared[1] if self.prepared[0] == state.epoch else self._features(state.epoch)
        self.prepared = state.epoch, ([], rng)  # used up
        torch.manual_seed((self.seed * 1000 + state.epoch) * 1000 + self.accelerator.process_index)
        slots = self.accelerator.num_processes * self.settings.accumulate
        groups = length_grouped([feature.tokens for feature in features], self.settings.batch_size * slots, rng)
        self.attack = Attack(self.model, self.settings, state.epoch, shared=self.accelerator.num_processes > 1)
        if state.steps:
            self._set_randomness()
        self.wrapped.train()
        name = f"{self.label} epoch {state.epoch + 1}/{self.settings.epochs}"
        with tqdm(total=len(groups), initial=len(state.steps), desc=name, unit="step", disable=self._quiet(), leave=False) as bar:
            for group in groups[len(state.steps) :]:
                loss, rate = self._step([features[index] for index in group], slots), self.optimizer.param_groups[-1]["lr"]
                state.steps.append((self._advance(loss), rate))
                bar.set_postfix(loss=f"{state.steps[-1][0]:.3f}", refresh=False)
                bar.update()
                if self._is_due(self.settings.eval_steps, state) and state.epoch >= 0 and self.valid:
                    self._check(state)
                if self._is_due(self.settings.save_steps, state):
                    self._save_state(state)

    def _is_due(self, every: int, state: _State) -> bool:
        return every > 0 and len(state.steps) % every == 0

    def _check(self, state: _State) -> None:
        """Within an epoch: the metrics of now, for the curve; nothing is decided by them."""
        with self.average.in_use():
            found = evaluate(self.task, self._predict(), self.valid)
        self.wrapped.train()
        step, lately = len(state.history.steps) + len(state.steps), state.steps[-self.settings.eval_steps :]
        metrics = {"step": step, "loss": float(np.mean([loss for loss, _ in lately]))} | found
        state.history.checks.append(metrics)
        self.accelerator.log({f"{self.label}/{name}": value for name, value in metrics.items()}, step=step)

    def _judge(self, state: _State) -> None:
        """After an epoch: its metrics, and whether it is the one to keep."""
        metrics = {"epoch": state.epoch, "loss": float(np.mean([loss for loss, _ in state.steps]))}
        if state.epoch >= 0:
            prediction = self._predict()
            metrics |= evaluate(self.task, prediction, self.valid) if self.valid else {}
            state.history.epochs.append(metrics)
            self._keep_if_best(state, metrics, prediction)
        step = len(state.history.steps) + len(state.steps)
        self.accelerator.log({f"{self.label}/{name}": value for name, value in metrics.items()}, step=step)

    def _step(self, group: list[Feature], slots: int) -> torch.Tensor:
        """Gradients of the mean loss over the examples of one optimizer step, over all processes and micro-batches."""
        mine = np.array_split(np.arange(len(group)), slots)[self.accelerator.process_index :: self.accelerator.num_processes]
        total = torch.zeros((), device=self.runtime.device)
        for number, part in enumerate(mine):
            last = number == len(mine) - 1
            features = [group[index] for index in part] or group[:1]  # a process without examples still joins, with weight 0
            weight = len(part) / len(group) * self.accelerator.num_processes
            with nullcontext() if last or self.attack else self.accelerator.no_sync(self.wrapped):
                total += self._backward(features, weight)
        return self.accelerator.reduce(total, "mean")

    def _backward(self, features: list[Feature], weight: float) -> torch.Tensor:
        task, _ = self.learning
        collated = task.collate(features, self.tokens)
        batch = {name: tensor.to(self.runtime.device) for name, tensor in collated.items()}
        before = self.attack.gradients(collated)
        loss = self._loss(batch) * weight
        self.scaler.scale(loss).backward()
        if self.attack:
            with self.attack(before) as moved:
                if moved:
                    self.scaler.scale(self._loss(batch) * weight).backward()
        return loss.detach()

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.runtime.device.type, self.runtime.dtype, enabled=self.runtime.autocasts):
            output = self.wrapped(batch)
        task, _ = self.learning
        return task.loss(task.scores(output.float(), batch), batch)

    def _advance(self, loss: torch.Tensor) -> float:
        """Unscale, clip, step; where the scaler skips a step (overflow), the schedule waits too. The loss as a number: the only wait for the device."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        value, length = torch.stack([loss, norm.to(loss.device, loss.dtype)]).tolist()
        if not self.scaler.is_enabled() and not np.isfinite(length):
            raise DivergedError(f"{self.label}: the gradient is not finite: lower train.lr, or set train.precision = \"fp32\"")
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() >= scale:
            self.schedule.step()
            self.average.after_step()
        return float(value)

    def _predict(self) -> np.ndarray:
        """Predictions of the validation part (Nv, C), empty without one."""
        if not self.valid:
            return np.empty((0, 0), np.float32)
        return predict_together(
            self.model, self.task, self.valid, self.tokens,
            runtime=self.runtime, accelerator=self.accelerator, batch_tokens=self.batch_tokens, label=f"{self.label} validation",
        )  # fmt: skip

    def _keep_if_best(self, state: _State, metrics: dict[str, float], prediction: np.ndarray) -> None:
        if self.settings.swa and not self.average:  # too early for what the fit ends with
            return
        value = metrics[next(iter(self.task.metrics))] if self.valid and self.settings.keep == "best" else float(state.epoch)
        if state.best_epoch < 0 or value > state.best:
            state.best, state.best_epoch = value, state.epoch
            if self.accelerator.is_main_process:
                save_trained(self.model, self.folder / "state" / "best")
                np.save(self.folder / "state" / _PREDICTION, prediction)

    def _has_lost_patience(self, state: _State) -> bool:
        return 0 < self.settings.patience < state.epoch - state.best_epoch

    def _save_state(self, state: _State) -> None:
        """What training changed and the optimizer in one file, replaced atomically. Frozen weights are created, not kept."""
        randomness = gather_object([_randomness(self.runtime.device)])
        if self.accelerator.is_main_process:
            path = self.folder / "state" / "last.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            values = {"model": trained(self.model), "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
            values |= {"scaler": self.scaler.state_dict(), "average": self.average.state_dict(), "randomness": randomness}
            torch.save(values | {"state": json.dumps(asdict(state))}, part)
            part.replace(path)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> _State:
        """Begin what comes next, with all that an interrupted fit left of it."""
        path = self.folder / "state" / "last.pt"
        if not path.is_file():
            state = _State(-self.settings.pretrain_epochs if self.pretrain else 0)
            self._begin_at(state)
            return state
        try:
            values = torch.load(path, map_location=self.runtime.device, weights_only=True)
            state = _State(**json.loads(values["state"]))
            state.steps = [(loss, rate) for loss, rate in state.steps]
            state.history = History(**state.history)  # type: ignore[arg-type]  # a dictionary of its fields
            state.history.steps = [(loss, rate) for loss, rate in state.history.steps]
            restore_trained(self.model, values["model"])
            self._begin_at(state)
            self.optimizer.load_state_dict(values["optimizer"])
            self.schedule.load_state_dict(values["schedule"])
            self.scaler.load_state_dict(values["scaler"])
            self.average.load_state_dict(values["average"])
            self.randomness = values["randomness"]
        except Exception as error:  # torch and pickle raise unrelated types for a damaged file, some without a text
            why = str(error) if isinstance(error, BundleError) else type(error).__name__
            raise BundleError(f"{path}: the interrupted fit cannot be read ({why}): delete {path.parent} to begin this fold again") from None
        if state.steps and len(self.randomness) != self.accelerator.num_processes:
            was = f"stopped within an epoch of {len(self.randomness)} processes, and there are {self.accelerator.num_processes} now"
            raise BundleError(f"{path}: {was}: start as many, or delete {path.parent} to begin this fold again")
        return state

    def _begin_at(self, state: _State) -> None:
        if state.epoch < 0:
            self._begin(self.pretrain_task, self.pretrain, -self.settings.pretrain_epochs, self.settings.pretrain_epochs)
        else:
            self._begin(self.task, self.train, 0, self.settings.epochs)

    def _set_randomness(self) -> None:
        """As it was when the state was saved that this fit goes on from."""
        own = self.randomness[self.accelerator.process_index]
        torch.set_rng_state(own[0].cpu())
        if len(own) > 1:
            torch.cuda.set_rng_state(own[1].cpu(), self.runtime.device)

    def _finish(self, history: History, known: Path | None = None) -> Fit:
        """Save the model as the fold's, with what it says of the validation rows. known: where that was written when the epoch was judged."""
        prediction = np.load(known) if known and known.is_file() else self._predict()
        metrics = evaluate(self.task, prediction, self.valid) if self.valid else {}
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.model.save(self.folder)
            write_atomically(self.folder / "history.json", json.dumps(asdict(history)))
        self.accelerator.wait_for_everyone()
        return Fit(prediction, metrics, history)

    def _quiet(self) -> bool | None:
        return None if self.accelerator.is_main_process else True


def _randomness(device: torch.device) -> list[torch.Tensor]:
    """Where torch's random numbers stand: of the CPU, and of the GPU that is used."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


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
