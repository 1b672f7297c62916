"""kit.training.loop: one fit, its arithmetic, what it keeps, and what a kill costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kit import runtime
from kit.config import TrainPart
from kit.errors import BundleError, ConfigError
from kit.models.encoder import Encoder
from kit.predict import predict
from kit.tasks import Batch, Feature, Tokens
from kit.tasks.essay_regression import Essay, EssayRegression
from kit.tasks.multiple_choice import MultipleChoice, Question
from kit.training.loop import Fit, fit, length_grouped
from tests import tiny
from tests.training.conftest import TASK, TrainOne, largest_difference, meant

NO_CLIP = 1e9
LEARNS = {"epochs": 4, "lr": 3e-3, "batch_size": 4}
STANDS = {"lr": 1e-12}  # too small to change a prediction


def misled(questions: list[Question]) -> list[Question]:
    """The same questions with wrong answers: who learns the right ones gets worse on these."""
    return [replace(question, answer=(question.answer + 1) % len(question.options)) for question in questions]


def prediction_of(folder: Path, questions: list[Question], source: Path) -> np.ndarray:
    """What the model saved in `folder` says, on its own."""
    model, tokens = Encoder.load(folder, outputs=1), Encoder.tokens(source)
    features = TASK.encode(questions, tokens)
    scores = predict(model, TASK, features, tokens, runtime=runtime.choose("fp32", "cpu"), batch_tokens=4096)
    return TASK.decode(scores, features, questions)


# --- the arithmetic of a step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "steps"), [(8, 1), (16, 2), (11, 2), (9, 2)])
def test_micro_batches_give_the_gradients_and_weights_of_the_whole_batch(train_one: TrainOne, count: int, steps: int) -> None:
    """11 and 9 leave a last group of 3 (uneven micro-batches) and of 1 (empty ones)."""
    settings = {"clip": NO_CLIP, "lr": 1e-4}
    whole = train_one(tiny.questions(count), batch_size=8, accumulate=1, name="whole", **settings)
    parts = train_one(tiny.questions(count), batch_size=2, accumulate=4, name="parts", **settings)
    assert len(whole.gradients) == len(parts.gradients) == steps
    for one, other in zip(whole.gradients, parts.gradients, strict=True):
        assert (one - other).norm() < 1e-4 * one.norm()
    assert largest_difference(meant(whole.weights), meant(parts.weights)) < 1e-5
    assert largest_difference(meant(whole.start), meant(whole.weights)) > 5e-5
    assert whole.losses == pytest.approx(parts.losses, rel=1e-5)


def test_fgm_adds_to_each_micro_batch_the_gradient_at_its_own_moved_embeddings(train_one: TrainOne, backbone: Path) -> None:
    """Two micro-batches of one question each, against the same written out with autograd."""
    questions, epsilon = tiny.questions(2), 0.5
    task = MultipleChoice(max_length=48, shuffle_options=False)
    seen = train_one(questions, task=task, batch_size=1, accumulate=2, fgm=epsilon, clip=NO_CLIP, lr=1e-4).gradients
    model, tokens = tiny.encoder(backbone).train(), Encoder.tokens(backbone)
    table = model.input_embeddings
    expected: dict[str, torch.Tensor] = {}
    for feature in task.encode(questions, tokens):
        gradients = _gradients(model, task, feature, tokens)
        direction = epsilon * gradients["table"] / gradients["table"].norm()
        table.data += direction
        attacked = _gradients(model, task, feature, tokens)
        table.data -= direction
        for name, value in gradients.items():
            expected[name] = expected.get(name, 0) + (value + attacked[name]) / 2
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    assert len(seen) == 1
    assert float(seen[0].norm()) == pytest.approx(float(norm), rel=1e-4)


def _gradients(model: Encoder, task: MultipleChoice, feature: Feature, tokens: Tokens) -> dict[str, torch.Tensor]:
    batch = task.collate([feature], tokens)
    model.zero_grad()
    task.loss(task.scores(model(batch), batch), batch).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"table" if "word_embeddings" in name else name: value for name, value in found.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fgm_changes_the_step_alike_in_every_precision(train_one: TrainOne, precision: str) -> None:
    def gradient(fgm: float, precision: str) -> torch.Tensor:
        settings = {"fgm": fgm, "precision": precision, "clip": NO_CLIP, "lr": 1e-4}
        return train_one(tiny.questions(4), name=f"{precision}{fgm}{len(seen)}", **settings).gradients[0]

    seen: list[torch.Tensor] = []
    for name in (precision, "fp32"):
        plain = gradient(0.0, name)
        seen.append(gradient(0.5, name) - plain)
        assert seen[-1].norm() > 0.1 * plain.norm()
    assert (seen[0] - seen[1]).norm() < 0.1 * seen[1].norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_clipped_after_unscaling(train_one: TrainOne, precision: str) -> None:
    free = train_one(tiny.questions(4), precision=precision, clip=NO_CLIP, name="free").gradients[0]
    clipped = train_one(tiny.questions(4), precision=precision, clip=0.01, name="clipped").gradients[0]
    true = train_one(tiny.questions(4), precision="fp32", clip=NO_CLIP, name="true").gradients[0]
    assert 0.01 < float(true.norm()) < 100
    assert float(free.norm()) == pytest.approx(float(true.norm()), rel=0.02)
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped, free * (0.01 / free.norm()))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fgm", [0.0, 0.1])
def test_every_precision_learns_and_keeps_weights_in_float32(train_one: TrainOne, precision: str, fgm: float) -> None:
    trained = train_one(tiny.questions(8), precision=precision, fgm=fgm, pooling="match", epochs=6, lr=1e-2)
    assert np.mean(trained.losses[-2:]) < 0.5 * np.mean(trained.losses[:2])
    assert {weight.dtype for weight in trained.weights.values() if weight.is_floating_point()} == {torch.float32}
    saved = Encoder.load(trained.folder, outputs=1, pooling="match").state_dict()
    assert largest_difference(saved, trained.weights) == 0.0


def test_the_schedule_waits_for_a_step_that_overflows(train_one: TrainOne) -> None:
    """A head as steep as this overflows fp16 until the scaler has found its scale; no rate is spent on skipped steps."""
    trained = train_one(tiny.questions(8), precision="fp16", pooling="match", epochs=4, schedule="linear", batch_size=2, fgm=1.0)
    rates = [rate for _, rate in trained.fit.history.steps]
    skipped = len(rates) - len(trained.gradients)
    assert 0 < skipped < len(rates) / 2
    assert rates[: skipped + 1] == [rates[0]] * (skipped + 1)
    assert rates[skipped:] == pytest.approx([rates[0] * (1 - step / len(rates)) for step in range(len(trained.gradients))])


def test_gradient_checkpointing_changes_no_weight(train_one: TrainOne, dropping_backbone: Path) -> None:
    plain = train_one(tiny.questions(6), source=dropping_backbone, name="plain")
    saving = train_one(tiny.questions(6), source=dropping_backbone, gradient_checkpointing=True, name="saving")
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in plain.model.modules())
    assert largest_difference(plain.weights, saving.weights) < 1e-7 < largest_difference(plain.start, plain.weights)


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [({"freeze_embeddings": True}, ["embeddings."]), ({"freeze_layers": 1}, ["embeddings.", "layer.0."]), ({"freeze_layers": 2}, ["embeddings.", "layer."])],
)
def test_frozen_weights_stay_bit_for_bit_and_the_others_move(train_one: TrainOne, settings: dict[str, object], frozen: list[str]) -> None:
    trained = train_one(tiny.questions(6), weight_decay=0.5, **settings)
    for name, weight in trained.weights.items():
        if any(part in name for part in frozen):
            assert torch.equal(weight, trained.start[name]), name
        elif "pooler" not in name and name in meant(trained.weights):  # BERT's own pooler is not used
            assert not torch.equal(weight, trained.start[name]), name


# --- what is kept ----------------------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_kept_and_the_result_is_what_the_saved_model_predicts(train_one: TrainOne, backbone: Path) -> None:
    questions = tiny.questions(8)
    settings = {**LEARNS, "schedule": "constant"}
    best = train_one(questions, misled(questions), name="best", **settings)
    value = [epoch["map@3"] for epoch in best.fit.history.epochs]
    kept = int(np.argmax(value))
    assert kept < len(value) - 1, "the last epoch must not be the best, or this shows nothing"
    assert best.fit.metrics["map@3"] == value[kept]
    assert np.array_equal(best.fit.prediction, prediction_of(best.folder, misled(questions), backbone))
    shorter = train_one(questions, misled(questions), name="shorter", **{**settings, "epochs": kept + 1, "keep": "last"})
    assert largest_difference(best.weights, shorter.weights) == 0.0


def test_the_last_epoch_is_kept_when_asked_for(train_one: TrainOne, backbone: Path) -> None:
    questions = tiny.questions(8)
    last = train_one(questions, misled(questions), name="last", keep="last", **LEARNS)
    value = [epoch["map@3"] for epoch in last.fit.history.epochs]
    assert last.fit.metrics["map@3"] == value[-1] < max(value)
    assert np.array_equal(last.fit.prediction, prediction_of(last.folder, misled(questions), backbone))


@pytest.mark.parametrize(("patience", "epochs"), [(0, 5), (1, 2), (3, 4)])
def test_a_fit_stops_after_its_patience_without_progress(train_one: TrainOne, patience: int, epochs: int) -> None:
    trained = train_one(tiny.questions(4), tiny.questions(4), epochs=5, patience=patience, **STANDS)
    assert len(trained.fit.history.epochs) == epochs


def test_without_validation_the_last_epoch_is_kept(train_one: TrainOne) -> None:
    trained = train_one(tiny.questions(4), epochs=2)
    assert trained.fit.prediction.shape == (0, 0)
    assert trained.fit.metrics == {}
    assert largest_difference(Encoder.load(trained.folder, outputs=1).state_dict(), trained.weights) == 0.0


def test_one_example_is_enough(train_one: TrainOne) -> None:
    trained = train_one(tiny.questions(1), tiny.questions(1), batch_size=4, accumulate=2)
    assert len(trained.losses) == 1
    assert trained.fit.prediction.shape == (1, 5)


def test_history_has_a_loss_and_a_rate_per_step_and_the_metrics_per_epoch(train_one: TrainOne) -> None:
    trained = train_one(tiny.questions(10), tiny.questions(4), epochs=3, batch_size=4, lr=1e-4, head_lr=1e-2, schedule="linear")
    history = json.loads((trained.folder / "history.json").read_text())
    assert [rate for _, rate in history["steps"]] == pytest.approx([1e-2 * (1 - step / 9) for step in range(9)])
    assert [epoch["epoch"] for epoch in history["epochs"]] == [0, 1, 2]
    assert {*history["epochs"][0]} == {"epoch", "loss", "map@3", "accuracy", "accuracy@3"}
    assert history["epochs"][2]["loss"] == pytest.approx(np.mean(trained.losses[6:]))


def test_metrics_within_epochs_are_for_the_curve_and_change_nothing(train_one: TrainOne, dropping_backbone: Path) -> None:
    questions = tiny.questions(14)
    settings = {"source": dropping_backbone, "epochs": 2, "batch_size": 2, "lr": 3e-3, "ema": 0.5}
    plain = train_one(questions[:10], questions[10:], name="plain", **settings)
    watched = train_one(questions[:10], questions[10:], name="watched", eval_steps=2, **settings)
    assert largest_difference(plain.weights, watched.weights) == 0.0
    assert plain.fit.history.checks == [] and plain.fit.history.epochs == watched.fit.history.epochs
    checks = json.loads((watched.folder / "history.json").read_text())["checks"]
    assert [check["step"] for check in checks] == [2, 4, 7, 9]
    assert [check["loss"] for check in checks] == pytest.approx([np.mean(watched.losses[end - 2 : end]) for end in (2, 4, 7, 9)])
    assert {*checks[0]} == {"step", "loss", "map@3", "accuracy", "accuracy@3"}


@pytest.mark.parametrize("ema", [0.0, 0.999])
def test_the_last_check_of_an_epoch_says_what_the_epoch_says(train_one: TrainOne, ema: float) -> None:
    """With a mean of the weights it is of that, which here has learnt nothing yet."""
    trained = train_one(tiny.questions(8), tiny.questions(8), pooling="match", epochs=3, batch_size=2, lr=1e-2, eval_steps=4, ema=ema)
    names = {"map@3", "accuracy", "accuracy@3"}
    checks, epochs = ([{name: one[name] for name in names} for one in kind] for kind in (trained.fit.history.checks, trained.fit.history.epochs))
    assert checks == epochs and len(checks) == 3
    assert (checks[-1]["map@3"] > 0.9) == (not ema)


@pytest.mark.parametrize("at", [3, 4, 6], ids=str)
def test_a_fit_killed_between_checks_has_each_of_them_once(train_one: TrainOne, dropping_backbone: Path, at: int) -> None:
    questions = tiny.questions(10)
    settings = {"source": dropping_backbone, "epochs": 2, "batch_size": 2, "lr": 3e-3, "eval_steps": 1, "save_steps": 2}
    whole = train_one(questions[:8], questions[8:], name="whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train_one(questions[:8], questions[8:], name="stopped", task=Interrupted(max_length=48, at=("decode", at)), **settings)
    resumed = train_one(questions[:8], questions[8:], name="stopped", **settings)
    assert whole.fit.history == resumed.fit.history and len(whole.fit.history.checks) == 8
    assert largest_difference(whole.weights, resumed.weights) == 0.0


def test_what_the_kept_epoch_was_judged_by_is_not_computed_again(train_one: TrainOne) -> None:
    questions, watched = tiny.questions(8), Interrupted(max_length=48)
    train_one(questions, misled(questions), task=watched, **{**LEARNS, "schedule": "constant"})
    assert watched.seen.count("decode") == LEARNS["epochs"]


# --- the same again --------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_weights_bit_for_bit_and_another_one_does_not(train_one: TrainOne, dropping_backbone: Path) -> None:
    def trained(seed: int, name: str) -> dict[str, torch.Tensor]:
        return train_one(tiny.questions(8), tiny.questions(4), source=dropping_backbone, seed=seed, name=name, epochs=2).weights

    first = trained(3, "first")
    assert largest_difference(first, trained(3, "again")) == 0.0
    assert largest_difference(first, trained(4, "other")) > 1e-5
    assert largest_difference(first, trained(-3, "negative")) > 1e-5


@dataclass(frozen=True)
class InHalves(MultipleChoice):
    """Every question is two features, as windows of a long text would be."""

    def encode(self, examples: Sequence[Question], tokens: Tokens) -> list[Feature]:
        return [feature for feature in super().encode(examples, tokens) for _ in range(2)]


def test_the_schedule_is_planned_for_features_not_for_examples(train_one: TrainOne) -> None:
    rates = [rate for _, rate in train_one(tiny.questions(4), task=InHalves(max_length=48), epochs=2, batch_size=2, lr=1e-3).fit.history.steps]
    assert rates == pytest.approx([1e-3 * (1 - step / 8) for step in range(8)])


@dataclass(frozen=True)
class Interrupted(MultipleChoice):
    """Stops like Ctrl-C where options are shuffled, batches collated, predictions decoded (each once per epoch), or judged (once per epoch, once at the end)."""

    at: tuple[str, int] = ("augment", 0)
    seen: list[str] = field(default_factory=list)

    def augment(self, examples: Sequence[Question], rng: np.random.Generator) -> Sequence[Question]:
        self.note("augment")
        return super().augment(examples, rng)

    def collate(self, features: Sequence[Feature], tokens: Tokens) -> Batch:
        self.note("collate")
        return super().collate(features, tokens)

    def decode(self, scores: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Question]) -> np.ndarray:
        self.note("decode")
        return super().decode(scores, features, examples)

    def targets(self, examples: Sequence[Question]) -> np.ndarray:
        self.note("targets")
        return super().targets(examples)

    def note(self, verb: str) -> None:
        self.seen.append(verb)
        if verb == self.at[0] and self.seen.count(verb) == self.at[1]:
            raise KeyboardInterrupt


@pytest.mark.parametrize("frozen", [{"freeze_layers": 1}, {"freeze_embeddings": True}], ids=str)
@pytest.mark.parametrize("at", [("augment", 2), ("augment", 3), ("decode", 2), ("targets", 4)], ids=str)
def test_a_resumed_fit_with_frozen_layers_ends_bit_for_bit_as_an_undisturbed_one(
    train_one: TrainOne, dropping_backbone: Path, at: tuple[str, int], frozen: dict[str, object]
) -> None:
    questions = tiny.questions(12)
    settings = {"source": dropping_backbone, "epochs": 3, "batch_size": 2, "lr": 3e-3, **frozen}
    whole = train_one(questions[:8], questions[8:], name="whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train_one(questions[:8], questions[8:], name="stopped", task=Interrupted(max_length=48, at=at), **settings)
    resumed = train_one(questions[:8], questions[8:], name="stopped", **settings)
    assert len(resumed.gradients) < len(whole.gradients)
    assert largest_difference(whole.start, whole.weights) > 1e-3
    assert largest_difference(whole.weights, resumed.weights) == 0.0
    assert (whole.folder / "model.safetensors").read_bytes() == (resumed.folder / "model.safetensors").read_bytes()
    assert np.array_equal(whole.fit.prediction, resumed.fit.prediction) and whole.fit.history == resumed.fit.history


def dtypes(values: object) -> set[torch.dtype]:
    """Of all tensors in nested dictionaries."""
    if isinstance(values, dict):
        return {dtype for value in values.values() for dtype in dtypes(value)}
    return {values.dtype} if isinstance(values, torch.Tensor) else set()


@pytest.mark.parametrize("at", [("augment", 3), ("decode", 2)], ids=str)
def test_a_fit_with_moments_in_eight_bits_resumes_bit_for_bit_and_learns_as_with_the_usual_ones(train_one: TrainOne, at: tuple[str, int]) -> None:
    """The word table is large enough that its moments are kept in 8 bits."""
    questions, settings = tiny.questions(12), {"epochs": 3, "lr": 3e-3, "optimizer": "paged_adamw_8bit"}
    whole = train_one(questions[:8], questions[8:], name="whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train_one(questions[:8], questions[8:], name="stopped", task=Interrupted(max_length=48, at=at), **settings)
    state = torch.load(whole.folder / "state" / "last.pt", weights_only=True)["optimizer"]["state"]
    assert torch.uint8 in dtypes(state)
    resumed = train_one(questions[:8], questions[8:], name="stopped", **settings)
    assert len(resumed.gradients) < len(whole.gradients)
    assert largest_difference(whole.weights, resumed.weights) == 0.0
    usual = train_one(questions[:8], questions[8:], name="usual", **settings | {"optimizer": "adamw"})
    moved = largest_difference(meant(usual.start), meant(usual.weights))
    assert 0 < largest_difference(meant(whole.weights), meant(usual.weights)) < 0.7 * moved
    assert whole.losses == pytest.approx(usual.losses, rel=0.05)


def test_frozen_weights_are_in_the_model_but_in_no_file_of_the_state(train_one: TrainOne) -> None:
    """Neither in what a kill is survived by, nor in the best epoch's; so a large frozen base costs no disk."""
    sizes = {}
    for layers in (0, tiny.LAYERS):
        trained = train_one(tiny.questions(4), tiny.questions(4), freeze_layers=layers, name=f"frozen{layers}")
        frozen = {name for name, parameter in trained.model.named_parameters() if not parameter.requires_grad}
        best = load_file(trained.folder / "state" / "best" / "model.safetensors")
        last = torch.load(trained.folder / "state" / "last.pt", weights_only=True)["model"]
        assert best.keys() == last.keys() and not frozen & best.keys() and bool(frozen) == bool(layers)
        assert {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad} <= best.keys()
        saved = load_file(trained.folder / "model.safetensors")
        assert saved.keys() == trained.weights.keys() and frozen <= saved.keys()
        sizes[layers] = sum(path.stat().st_size for path in (trained.folder / "state").rglob("*") if path.is_file())
    assert sizes[tiny.LAYERS] < 0.2 * sizes[0]


def test_a_state_in_which_other_weights_learnt_is_refused(train_one: TrainOne, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_one(tiny.questions(4), task=Interrupted(max_length=48, at=("augment", 2)), epochs=2, freeze_layers=1)
    path = tmp_path / "fit" / "state" / "last.pt"
    with pytest.raises(BundleError, match=rf"{path}: the interrupted fit cannot be read \(.*which is trained in the model\): delete {path.parent} to begin"):
        train_one(tiny.questions(4), epochs=2)


@pytest.mark.parametrize("at", [("augment", 1), ("augment", 2), ("augment", 3), ("decode", 1), ("decode", 2), ("targets", 4)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_fit_ends_bit_for_bit_as_an_undisturbed_one(
    train_one: TrainOne, dropping_backbone: Path, at: tuple[str, int], precision: str
) -> None:
    """Stopped within an epoch, before its state is written, or after all epochs while the kept one is predicted.

    With "match", fp16 overflows until the scaler has found its scale, so that the scale is part of what must be restored.
    """
    questions = tiny.questions(12)
    settings = {"source": dropping_backbone, "epochs": 3, "batch_size": 2, "accumulate": 2, "fgm": 0.2, "precision": precision, "warmup": 0.2}
    settings["pooling"] = "match"
    whole = train_one(questions[:8], questions[8:], name="whole", **settings)
    assert (len(whole.gradients) < len(whole.losses)) == (precision == "fp16")
    with pytest.raises(KeyboardInterrupt):
        train_one(questions[:8], questions[8:], name="stopped", task=Interrupted(max_length=48, at=at), **settings)
    resumed = train_one(questions[:8], questions[8:], name="stopped", **settings)
    assert precision == "fp16" or at[1] == 1 or len(resumed.gradients) < len(whole.gradients)
    assert largest_difference(whole.weights, resumed.weights) == 0.0
    assert (whole.folder / "model.safetensors").read_bytes() == (resumed.folder / "model.safetensors").read_bytes()
    assert np.array_equal(whole.fit.prediction, resumed.fit.prediction)
    assert whole.fit.metrics == resumed.fit.metrics
    assert whole.fit.history == resumed.fit.history


def test_a_fit_that_had_lost_its_patience_does_not_find_it_again_on_resuming(train_one: TrainOne) -> None:
    settings = {"epochs": 5, "patience": 1, **STANDS}
    with pytest.raises(KeyboardInterrupt):
        train_one(tiny.questions(4), tiny.questions(4), task=Interrupted(max_length=48, at=("targets", 3)), **settings)
    resumed = train_one(tiny.questions(4), tiny.questions(4), **settings)
    assert len(resumed.fit.history.epochs) == 2
    assert resumed.gradients == []


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "other model"])
def test_a_damaged_state_is_named_with_the_way_out(train_one: TrainOne, tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_one(tiny.questions(4), task=Interrupted(max_length=48, at=("augment", 2)), epochs=2)
    path = tmp_path / "fit" / "state" / "last.pt"
    content = path.read_bytes()
    pooling = "attention" if damage == "other model" else "mean"
    path.write_bytes({"empty": b"", "text": b"no state", "truncated": content[: len(content) // 2]}.get(damage, content))
    with pytest.raises(BundleError, match=rf"{path}: the interrupted fit cannot be read .*delete {path.parent} to begin") as caught:
        train_one(tiny.questions(4), epochs=2, pooling=pooling)
    assert "\n" not in str(caught.value)


# --- steps within an epoch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "left"), [(3, 8), (4, 8), (5, 6), (9, 3), (10, 1)], ids=str)
@pytest.mark.parametrize("more", [{}, {"precision": "fp16", "fgm": 0.2}, {"ema": 0.9, "awp": 0.01}], ids=str)
def test_a_fit_killed_within_an_epoch_goes_on_at_the_last_saved_step_bit_for_bit(
    train_one: TrainOne, dropping_backbone: Path, at: int, left: int, more: dict[str, object]
) -> None:
    """Batches: 4 of training and 1 of validation in each of two epochs. A state is there after steps 2 and 4."""
    questions, task = tiny.questions(10), partial(Interrupted, max_length=48)
    settings = {"source": dropping_backbone, "epochs": 2, "batch_size": 2, "lr": 3e-3, "warmup": 0.2, "save_steps": 2, **more}
    never = train_one(questions[:8], questions[8:], name="never", **settings | {"save_steps": 0})
    whole = train_one(questions[:8], questions[8:], name="whole", **settings)
    assert largest_difference(whole.weights, never.weights) == 0.0
    with pytest.raises(KeyboardInterrupt):
        train_one(questions[:8], questions[8:], name="stopped", task=task(at=("collate", at)), **settings)
    watched = task(at=("", 0))
    resumed = train_one(questions[:8], questions[8:], name="stopped", task=watched, **settings)
    assert watched.seen.count("collate") == left
    assert largest_difference(whole.weights, resumed.weights) == 0.0 < largest_difference(whole.start, whole.weights)
    assert np.array_equal(whole.fit.prediction, resumed.fit.prediction) and whole.fit.history == resumed.fit.history


def test_a_fit_stopped_within_an_epoch_wants_as_many_processes_again(train_one: TrainOne, tmp_path: Path) -> None:
    settings = {"batch_size": 2, "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train_one(tiny.questions(8), task=Interrupted(max_length=48, at=("collate", 3)), **settings)
    path = tmp_path / "fit" / "state" / "last.pt"
    values = torch.load(path, weights_only=True)
    torch.save(values | {"randomness": values["randomness"] * 2}, path)
    with pytest.raises(BundleError, match=rf"{path}: stopped within an epoch of 2 processes, and there are 1 now: start as many, or delete {path.parent}"):
        train_one(tiny.questions(8), **settings)


# --- pseudo-labels before the fit's own rows ---------------------------------------------------------------------------------------


def test_pretraining_is_a_fit_on_the_pseudo_labels_and_then_one_on_the_own_rows(train_one: TrainOne) -> None:
    """With a schedule and an optimizer of its own: the weights it begins with are all that the second one is told."""
    own, pseudo = tiny.questions(12)[:4], tiny.questions(12)[4:]
    settings = {"batch_size": 4, "lr": 1e-3, "schedule": "linear", "save_steps": 1}
    both = train_one(own, own, pretrain=pseudo, pretrain_epochs=2, epochs=3, name="both", **settings)
    alone = train_one(own, own, epochs=3, name="alone", **settings)
    assert [rate for _, rate in both.fit.history.steps] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert [epoch["epoch"] for epoch in both.fit.history.epochs] == [0, 1, 2]
    assert both.fit.prediction.shape == (4, 5)
    assert largest_difference(both.weights, alone.weights) > 1e-4
    optimizer = torch.load(both.folder / "state" / "last.pt", weights_only=True)["optimizer"]["state"]
    assert {float(state["step"]) for state in optimizer.values()} == {3.0}
    again = train_one(own, own, epochs=3, name="again", pretrain=pseudo, pretrain_epochs=2, **settings)
    assert largest_difference(both.weights, again.weights) == 0.0


def test_pretraining_learns_the_pseudo_labels_and_its_task_decides_how(train_one: TrainOne) -> None:
    questions = tiny.questions(8)
    settings = {"epochs": 1, "lr": 1e-12, "pretrain_epochs": 1}  # the rate of both: only the losses differ
    wrong = [replace(question, soft=tuple(np.eye(5)[(question.answer + 1) % 5])) for question in questions]
    task = MultipleChoice(max_length=48, shuffle_options=False)
    hard = train_one(questions, task=task, pretrain=wrong, name="hard", **settings)
    soft = train_one(questions, task=task, pretrain=wrong, pretrain_task=replace(task, distill=1.0), name="soft", **settings)
    shifted = train_one(questions, task=task, pretrain=misled(questions), name="shifted", **settings)
    assert soft.losses == pytest.approx(shifted.losses, rel=1e-5)
    assert hard.losses[:2] != pytest.approx(soft.losses[:2], rel=1e-3)
    assert hard.losses[2:] == pytest.approx(soft.losses[2:], rel=1e-5)


@pytest.mark.parametrize("at", [("augment", 2), ("augment", 3), ("collate", 2), ("collate", 4), ("collate", 6), ("decode", 1)], ids=str)
@pytest.mark.parametrize("save_steps", [0, 1])
def test_a_fit_killed_while_or_after_pretraining_ends_as_an_undisturbed_one(
    train_one: TrainOne, dropping_backbone: Path, at: tuple[str, int], save_steps: int
) -> None:
    own, pseudo = tiny.questions(12)[:4], tiny.questions(12)[4:]
    settings = {"source": dropping_backbone, "pretrain": pseudo, "pretrain_epochs": 2, "epochs": 2, "batch_size": 4, "lr": 3e-3, "save_steps": save_steps}
    whole = train_one(own, own, name="whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train_one(own, own, name="stopped", task=Interrupted(max_length=48, at=at), **settings)
    resumed = train_one(own, own, name="stopped", **settings)
    assert len(resumed.gradients) < len(whole.gradients) or not save_steps
    assert largest_difference(whole.weights, resumed.weights) == 0.0
    assert whole.fit.history == resumed.fit.history


# --- models that are fitted at once ------------------------------------------------------------------------------------------------


ESSAYS = EssayRegression(max_length=48, columns=("style", "spelling"))


def essays(n: int) -> list[Essay]:
    return [Essay(f"e{row}", " ".join(tiny.TEXTS[: 1 + row % 3]), (1.0 + row % 5, 5.0 - row % 3)) for row in range(n)]


class AtOnce(Encoder):
    """Knows by heart what it was told."""

    def fit_at_once(self, batches: Sequence[Batch], targets: np.ndarray) -> None:
        self.batches, self.targets = batches, targets
        texts = [row[mask > 0].tolist() for batch in batches for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        self.known = {tuple(text): torch.from_numpy(target) for text, target in zip(texts, targets, strict=True)}

    def forward(self, batch: Batch) -> torch.Tensor:
        return torch.stack([self.known[tuple(row[mask > 0].tolist())] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)])


def fit_at_once(backbone: Path, folder: Path, examples: Sequence[Any], task: Any = ESSAYS, **settings: Any) -> tuple[AtOnce, Fit]:
    """In batches of one text each."""
    model = AtOnce.create(backbone, outputs=task.outputs)
    part = TrainPart(**{"epochs": 1, "precision": "fp32", **settings})
    done = fit(
        model, task, Encoder.tokens(backbone), examples, examples, settings=part, runtime=runtime.choose("fp32", "cpu"),
        accelerator=Accelerator(cpu=True), folder=folder, seed=0, batch_tokens=1, pretrain=examples[: settings.get("pretrain_epochs", 0)],
    )  # fmt: skip
    return model, done


def test_a_model_that_is_fitted_at_once_is_told_of_every_row_what_scores_its_target(backbone: Path, tmp_path: Path) -> None:
    examples = [replace(essay, text=f"{row} {essay.text}") for row, essay in enumerate(essays(7))]
    model, done = fit_at_once(backbone, tmp_path, examples)
    assert len(model.batches) == 7 and (tmp_path / "model.safetensors").is_file()
    assert np.abs(model.targets).max() <= 2.0  # the scale from -2 to 2, which the task makes 1 to 5
    assert done.prediction == pytest.approx(ESSAYS.targets(examples))
    assert done.metrics["neg_mcrmse"] == pytest.approx(0, abs=1e-6) and done.history.steps == []


@pytest.mark.parametrize(("settings", "key"), [({"epochs": 3}, "train.epochs = 3"), ({"pretrain_epochs": 1}, "data.pretrain")], ids=str)
def test_what_is_for_steps_is_refused_for_a_model_that_takes_none(backbone: Path, tmp_path: Path, settings: dict[str, int], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is for models that learn step by step.*set train.epochs = 1"):
        fit_at_once(backbone, tmp_path, essays(2), **settings)


def test_options_are_no_numbers_to_be_fitted_at_once(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learns a row of numbers per example, and the task's targets are int64 \(2,\) of 2 examples and 1 outputs"):
        fit_at_once(backbone, tmp_path, tiny.questions(2), TASK)


# --- batches of similar lengths --------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 500), max_size=200), size=st.integers(1, 20), seed=st.integers(0, 99), window=st.integers(1, 5))
def test_every_position_is_in_exactly_one_batch(lengths: list[int], size: int, seed: int, window: int) -> None:
    batches = length_grouped(lengths, size, np.random.default_rng(seed), window=window)
    assert sorted(position for batch in batches for position in batch) == [*range(len(lengths))]
    assert len(batches) == -(-len(lengths) // size)
    assert all(0 < len(batch) <= size for batch in batches)
    assert sum(len(batch) < size for batch in batches) <= 1
    assert batches == length_grouped(lengths, size, np.random.default_rng(seed), window=window)


def test_similar_lengths_are_together_and_the_order_is_random() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 640).tolist()
    batches = length_grouped(lengths, 8, np.random.default_rng(1))
    spread = np.mean([max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches])
    assert spread < 20  # of 390; at random it is 300
    means = [float(np.mean([lengths[i] for i in batch])) for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3
    assert batches != length_grouped(lengths, 8, np.random.default_rng(2))
