"""Features to scores: independent of batches and order, halving when memory runs out, narrow types that overflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kit.models.causal import Causal
from kit.models.encoder import Encoder
from kit.models.tokens import HFTokens
from kit.models.zero_shot import ZeroShot
from kit.predict import _batches, predict, stream
from kit.runtime import Runtime, choose
from kit.tasks import Batch, Feature
from kit.tasks.multiple_choice import MultipleChoice, Question
from kit.tasks.prompted import Prompted
from tests import tiny

TASK = MultipleChoice(max_length=60)
FP32 = choose("fp32", "cpu")
OPTIONS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Encoder:
    return tiny.encoder(folder, pooling="attention")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> HFTokens:
    return Encoder.tokens(folder)


@pytest.fixture(scope="module")
def features(tokens: HFTokens) -> list[Feature]:
    """17 questions whose sequences are from 9 to 60 tokens long."""
    examples = [Question(q.id, q.prompt, q.options, q.answer, " ".join([q.context] * (row % 4))) for row, q in enumerate(tiny.questions(17))]
    return TASK.encode(examples, tokens)


def tokens_of(features: list[Feature]) -> list[int]:
    return [max(len(encoding["input_ids"]) for encoding in feature.encodings) for feature in features]


def scored(model: nn.Module, features: list[Feature], tokens: HFTokens, batch_tokens: int = 2000, runtime: Runtime = FP32) -> np.ndarray:
    return np.stack(predict(model, TASK, features, tokens, runtime=runtime, batch_tokens=batch_tokens))


class Recorder(nn.Module):
    """Gives each sequence a score of its own tokens, and notes the shape of every batch; above `rows` sequences memory runs out."""

    def __init__(self, rows: int = 10**9, error: type[Exception] = torch.OutOfMemoryError, message: str = "CUDA out of memory") -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []
        self.rows, self.error, self.message = rows, error, message

    def forward(self, batch: Batch) -> Tensor:
        self.shapes.append(tuple(batch["input_ids"].shape))
        if len(batch["input_ids"]) > self.rows:
            raise self.error(self.message)
        return (batch["input_ids"] * batch["attention_mask"]).sum(1, keepdim=True).float()


def test_scores_do_not_depend_on_the_size_of_batches(model: Encoder, features: list[Feature], tokens: HFTokens) -> None:
    one_by_one = scored(model, features, tokens, 1)
    assert one_by_one.shape == (17, OPTIONS) and one_by_one.dtype == np.float32
    for batch_tokens in (300, 700, 2000, 100_000):
        np.testing.assert_allclose(scored(model, features, tokens, batch_tokens), one_by_one, atol=1e-6)


def test_scores_do_not_depend_on_the_order_of_features(model: Encoder, features: list[Feature], tokens: HFTokens) -> None:
    order = np.random.default_rng(0).permutation(len(features))
    shuffled = scored(model, [features[i] for i in order], tokens)
    np.testing.assert_allclose(shuffled, scored(model, features, tokens)[order], atol=1e-6)


def test_scores_are_those_of_the_model_in_evaluation_mode(folder: Path, features: list[Feature], tokens: HFTokens) -> None:
    model = tiny.encoder(folder, dropout=0.5).train()
    found = scored(model, features[:3], tokens)
    with torch.inference_mode():
        batch = TASK.collate(features[:3], tokens)
        np.testing.assert_allclose(found, TASK.scores(model.eval()(batch), batch).numpy(), atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 400, 1000, 3000])
def test_batches_stay_within_the_budget_and_the_longest_comes_first(features: list[Feature], tokens: HFTokens, batch_tokens: int) -> None:
    recorder = Recorder()
    scored(recorder, features, tokens, batch_tokens)
    assert sum(rows for rows, _ in recorder.shapes) == len(features) * OPTIONS
    assert all(rows * width <= batch_tokens or rows == OPTIONS for rows, width in recorder.shapes)
    widths = [width for _, width in recorder.shapes]
    assert widths == sorted(widths, reverse=True) and widths[0] == max(tokens_of(features))
    if batch_tokens == 3000:
        assert len(recorder.shapes) < len(features) / 3, "batches are filled"


def test_a_tree_fills_one_row_as_long_as_all_of_it(features: list[Feature], tokens: HFTokens) -> None:
    alone = features[0]
    longest = max(tokens_of([alone]))
    assert alone.shape == (OPTIONS, longest) and replace(alone, joined=True).shape == (1, alone.tokens) != alone.shape
    trees = [replace(feature, joined=True) for feature in features]
    sizes = [feature.tokens for feature in features]
    assert max(sizes) > OPTIONS * 50
    shapes = [(len(batch), max(sizes[index] for index in batch)) for batch in _batches(trees, 700)]
    assert all(rows * width <= 700 or rows == 1 for rows, width in shapes) and max(rows for rows, _ in shapes) > 2
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True) and shapes[0][1] == max(sizes)
    assert sorted(index for batch in _batches(trees, 700) for index in batch) == list(range(len(trees)))
    assert len(_batches(trees, max(sizes) * len(trees))) == 1


def test_a_stream_gives_every_position_once_with_its_scores(features: list[Feature], tokens: HFTokens) -> None:
    whole = scored(Recorder(), features, tokens)
    seen = []
    for indices, scores in stream(Recorder(), TASK, features, tokens, runtime=FP32, batch_tokens=900):
        np.testing.assert_array_equal(scores, whole[indices])
        seen += indices
    assert sorted(seen) == list(range(len(features)))


def test_no_features_give_no_scores(model: Encoder, tokens: HFTokens) -> None:
    assert predict(model, TASK, [], tokens, runtime=FP32, batch_tokens=100) == []


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (OPTIONS, torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (7 * OPTIONS, RuntimeError, "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        (7 * OPTIONS, RuntimeError, "DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes"),
        (7 * OPTIONS, MemoryError, ""),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    features: list[Feature], tokens: HFTokens, error: type[Exception], message: str, rows: int
) -> None:
    recorder = Recorder(rows, error, message)
    np.testing.assert_array_equal(scored(recorder, features, tokens, 100_000), scored(Recorder(), features, tokens))
    failed = [shape for shape in recorder.shapes if shape[0] > rows]
    assert recorder.shapes[0][0] == len(features) * OPTIONS and failed
    assert len(failed) <= 5, "later batches are halved with the one that failed"


def test_halving_keeps_the_stream_complete_from_longest_to_shortest(features: list[Feature], tokens: HFTokens) -> None:
    recorder = Recorder(3 * OPTIONS)
    seen = [indices for indices, _ in stream(recorder, TASK, features, tokens, runtime=FP32, batch_tokens=2000)]
    assert sorted(index for indices in seen for index in indices) == list(range(len(features)))
    longest = [max(tokens_of([features[index] for index in indices])) for indices in seen]
    assert longest == sorted(longest, reverse=True)


def test_a_single_feature_that_does_not_fit_raises(features: list[Feature], tokens: HFTokens) -> None:
    recorder = Recorder(OPTIONS - 1)
    with pytest.raises(torch.OutOfMemoryError):
        scored(recorder, features, tokens)
    assert recorder.shapes[-1][0] == OPTIONS


def test_other_errors_are_not_taken_for_a_lack_of_memory(features: list[Feature], tokens: HFTokens) -> None:
    recorder = Recorder(OPTIONS, RuntimeError, "mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        scored(recorder, features, tokens, 100_000)
    assert len(recorder.shapes) == 1


class Overflowing(nn.Module):
    """Its product is 257 in float32. bf16 makes that 256, whose distance to 256 is divided by; in fp16 its square overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.product.weight, 257.0)
        self.dtypes: list[torch.dtype] = []

    def forward(self, batch: Batch) -> Tensor:
        value = self.product(torch.ones(len(batch["input_ids"]), 1))
        self.dtypes.append(value.dtype)
        return 1 / (value - 256) + value * value


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_scores_that_overflow_in_a_narrow_type_are_computed_again_in_float32(features: list[Feature], tokens: HFTokens, precision: str) -> None:
    model = Overflowing()
    runtime = choose(precision, "cpu")
    np.testing.assert_array_equal(scored(model, features[:2], tokens, 100_000, runtime), np.full((2, OPTIONS), 257.0**2 + 1, np.float32))
    assert model.dtypes == [runtime.dtype, torch.float32]


def test_finite_scores_in_a_narrow_type_are_computed_once_and_stay_close(model: Encoder, features: list[Feature], tokens: HFTokens) -> None:
    narrow = scored(model, features, tokens, runtime=choose("bf16", "cpu"))
    exact = scored(model, features, tokens)
    assert narrow.dtype == np.float32 and not np.array_equal(narrow, exact)
    np.testing.assert_allclose(narrow, exact, atol=0.05)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_scores_not_finite_in_float32_are_given_as_they_are(features: list[Feature], tokens: HFTokens) -> None:
    class Broken(nn.Module):
        def forward(self, batch: Batch) -> Tensor:
            return torch.full((len(batch["input_ids"]), 1), torch.nan)

    assert np.isnan(scored(Broken(), features[:2], tokens, runtime=choose("bf16", "cpu"))).all()


def test_prediction_leaves_no_gradients_behind(model: Encoder, features: list[Feature], tokens: HFTokens) -> None:
    model.zero_grad(set_to_none=True)
    scored(model, features[:2], tokens)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- language models -----------------------------------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 256,
    "initializer_range": 0.3,
}  # fmt: skip
LIKELIHOOD = Prompted(max_length=96, form="likelihood")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose logits are beyond what fp16 can hold."""
    folder = tmp_path_factory.mktemp("loud")
    Causal.invent(folder, lambda: tiny.TEXTS, seed=0, config=CONFIG, vocab_size=400)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2e4
    weights["lm_head.weight"] *= 10
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def by_words(model: nn.Module, folder: Path, batch_tokens: int = 2000) -> np.ndarray:
    tokens = Causal.tokens(folder)
    return np.stack(predict(model, LIKELIHOOD, LIKELIHOOD.encode(tiny.questions(6), tokens), tokens, runtime=FP32, batch_tokens=batch_tokens))


def test_a_model_held_in_half_precision_is_computed_again_in_float32_where_it_overflows(language_model: Path) -> None:
    held = ZeroShot.create(language_model, outputs=1, precision="fp16")
    found, exact = by_words(held, language_model), by_words(Causal.create(language_model, outputs=1), language_model)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, exact, rtol=5e-3)
    assert {parameter.dtype for parameter in held.parameters()} == {torch.float16}, "afterwards it is held as before"


def test_a_model_that_streams_gets_all_batches_in_one_pass(language_model: Path) -> None:
    model, steps = ZeroShot.create(language_model, outputs=1, streaming="always"), []
    tokens = Causal.tokens(language_model)
    features = LIKELIHOOD.encode(tiny.questions(6), tokens)
    batches = list(stream(model, LIKELIHOOD, features, tokens, runtime=FP32, batch_tokens=200, on_step=lambda: steps.append(1)))
    assert len(batches) > 2
    assert len(steps) == 2, "once for every layer, whatever the number of batches"
    scores = {index: score for indices, values in batches for index, score in zip(indices, values, strict=True)}
    found = np.stack([scores[index] for index in range(len(features))])
    np.testing.assert_allclose(found, by_words(Causal.create(language_model, outputs=1), language_model), rtol=1e-5)
