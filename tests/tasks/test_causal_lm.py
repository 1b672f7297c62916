"""Documents, what is asked of a language model about them, and one that learns from them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kit import runtime
from kit.config import TrainPart
from kit.data.tables import Table
from kit.errors import ConfigError, DataError
from kit.models.causal import Causal
from kit.models.tokens import HFTokens
from kit.predict import predict
from kit.tasks import suffices
from kit.tasks.causal_lm import CausalLM, Document
from kit.training.loop import fit, length_grouped
from kit.training.optim import parameter_groups
from tests import tiny

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.1,
    "max_position_embeddings": 128,
}  # fmt: skip
TASK = CausalLM(max_length=24)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    Causal.invent(folder, lambda: tiny.TEXTS, seed=0, config=CONFIG, vocab_size=400)
    return folder


@pytest.fixture(scope="module")
def tokens(backbone: Path) -> HFTokens:
    return Causal.tokens(backbone)


def documents(n: int = len(tiny.TEXTS)) -> list[Document]:
    return [Document(f"d{row}", text) for row, text in enumerate(tiny.TEXTS[:n])]


def table(**columns: list[str]) -> Table:
    return Table("some.jsonl", pd.DataFrame(columns, dtype=object))


# reading


def test_read_keeps_texts_as_they_are_and_ignores_other_columns() -> None:
    assert TASK.read(table(id=["7", "x"], title=["", "t"], text=[" a\n", "b"])) == [Document("7", " a\n"), Document("x", "b")]


def test_read_refuses_what_cannot_be_learnt_from() -> None:
    with pytest.raises(DataError, match=r"some\.jsonl: column 'text' is missing \(columns: id, prompt\)"):
        TASK.read(table(id=["0"], prompt=["p"]))
    with pytest.raises(DataError, match=r"some\.jsonl: row 2 \(id '1'\), column 'text' = ' ': the text is blank"):
        TASK.read(table(id=["0", "1"], text=["a", " "]))
    with pytest.raises(ConfigError, match=r"task\.max_length = 7"):
        CausalLM(max_length=7)


def test_there_is_no_submission() -> None:
    given = table(id=["0"], prediction=["A"])
    for verb in (lambda: TASK.check(given, None), lambda: TASK.parse(given, given), lambda: TASK.rows(np.zeros((1, 1)), documents(1))):
        with pytest.raises(ConfigError, match=r'task\.kind = "causal_lm" .* has no submission: name .* model\.source'):
            verb()


# features


def test_every_token_of_every_document_is_in_one_feature_behind_the_token_that_begins_a_text(tokens: HFTokens) -> None:
    examples = documents()
    features = TASK.encode(examples, tokens)
    assert all(feature.joined and len(feature.encodings) == 1 and 2 <= feature.tokens <= 24 for feature in features)
    assert [feature.row for feature in features] == sorted(feature.row for feature in features)
    for row, document in enumerate(examples):
        parts = [feature.encodings[0]["input_ids"] for feature in features if feature.row == row]
        assert {int(part[0]) for part in parts} == {tokens.bos_id}
        ids = np.concatenate([part[1:] for part in parts])
        assert ids[-1] == tokens.eos_id
        assert ids[:-1].tolist() == tokens._tokenizer.encode(document.text, add_special_tokens=False).ids
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert len(parts) == -(-len(ids) // 23)
    assert len(features) > len(examples)


def test_a_part_is_no_longer_than_the_model_has_positions_for(backbone: Path) -> None:
    features = CausalLM(max_length=999).encode([Document("0", " ".join(tiny.TEXTS))], HFTokens(backbone, limit=50))
    assert len(features) > 3 and max(feature.tokens for feature in features) <= 50


def test_what_looks_like_a_special_token_is_text(tokens: HFTokens) -> None:
    (feature,) = TASK.encode([Document("0", "a</s>b")], tokens)
    assert feature.encodings[0]["input_ids"].tolist().count(tokens.eos_id) == 1


def test_a_batch_asks_for_every_token_but_the_first_of_each_feature(tokens: HFTokens) -> None:
    features = TASK.encode(documents(4), tokens)
    batch = TASK.collate(features, tokens)
    width = batch["input_ids"].shape[1]
    asked = [(int(at) // width, int(at) % width, int(token)) for at, token in zip(batch["at"], batch["token"], strict=True)]
    expected = [(row, k, int(following)) for row, feature in enumerate(features) for k, following in enumerate(feature.encodings[0]["input_ids"][1:])]
    assert asked == expected
    assert batch["asked"].tolist() == [feature.tokens - 1 for feature in features]
    assert batch["owner"].tolist() == [row for row, _, _ in expected]


# scores, loss, decoding


def by_hand(model: Causal, ids: np.ndarray) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, by the library's own forward."""
    with torch.inference_mode():
        logits = model.backbone(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0]


def test_loss_and_prediction_are_those_of_the_librarys_own_forward(backbone: Path, tokens: HFTokens) -> None:
    model, examples = Causal.create(backbone, outputs=TASK.outputs).eval(), documents(5)
    assert suffices(model.gives, TASK.needs)
    features = TASK.encode(examples, tokens)
    batch = TASK.collate(features, tokens)
    expected = [by_hand(model, feature.encodings[0]["input_ids"]) for feature in features]
    with torch.inference_mode():
        scores = TASK.scores(model(batch), batch)
    assert scores.shape == (len(features), 1)
    assert float(TASK.loss(scores, batch)) == pytest.approx(-float(torch.cat(expected).mean()), rel=1e-5)
    prediction = TASK.decode([*scores.numpy()], features, examples)
    whole = [torch.cat([one for one, feature in zip(expected, features, strict=True) if feature.row == row]).mean() for row in range(5)]
    assert prediction.shape == (5, 2) and prediction.dtype == np.float32
    np.testing.assert_allclose(prediction[:, 0], whole, rtol=1e-5)
    assert prediction[:, 1].tolist() == [len(tokens.branch(one.text, end=True)["input_ids"]) for one in examples]


def test_the_metric_is_the_mean_over_documents_perplexity_that_over_tokens_and_both_are_better_when_larger() -> None:
    prediction = np.array([[-1.0, 30.0], [-3.0, 10.0]], np.float32)
    values = {name: metric(prediction, TASK.targets(documents(2))) for name, metric in TASK.metrics.items()}
    assert values == {"log_probability": -2.0, "negative_perplexity": pytest.approx(-math.exp(1.5))}
    partly = np.array([[-1.0, 30.0], [np.nan, np.nan]], np.float32)
    assert TASK.metrics["log_probability"](partly, TASK.targets(documents(2))) < -10
    assert TASK.metrics["negative_perplexity"](partly, TASK.targets(documents(2))) == pytest.approx(-math.exp(10.5))
    assert TASK.metrics["negative_perplexity"](partly[1:], TASK.targets(documents(1))) == pytest.approx(-math.exp(20))
    assert TASK.merit(partly, TASK.targets(documents(2))).tolist() == [-1.0, -20.0]
    assert TASK.doubt(partly).tolist() == [1.0, 20.0]


def test_decode_of_nothing_is_nan(tokens: HFTokens) -> None:
    assert np.isnan(TASK.decode([], [], documents(2))).all() and TASK.decode([], [], []).shape == (0, 2)
    assert TASK.encode([], tokens) == []


def test_a_fit_lowers_the_loss_and_its_saved_model_says_what_the_result_says(backbone: Path, tokens: HFTokens, tmp_path: Path) -> None:
    """From random weights to the corpus by heart; a text with its words in another order stays as surprising as it was."""
    settings = TrainPart(epochs=30, batch_size=4, lr=1e-2, precision="fp32", keep="last")
    own, plain = documents(), runtime.choose("fp32", "cpu")
    swapped = [Document(one.id, " ".join(reversed(one.text.split()))) for one in own]
    model = Causal.create(backbone, outputs=1)
    start = TASK.decode(predict(model, TASK, TASK.encode(own, tokens), tokens, runtime=plain, batch_tokens=512), TASK.encode(own, tokens), own)
    result = fit(model, TASK, tokens, own, own, settings=settings, runtime=plain, accelerator=Accelerator(cpu=True), folder=tmp_path, seed=0)
    features = TASK.encode(own, tokens)
    losses = [loss for loss, _ in result.history.steps]
    assert len(losses) == 30 * -(-len(features) // 4)
    assert np.mean(losses[:4]) > 4 and np.mean(losses[-4:]) < 1
    assert result.metrics["log_probability"] == pytest.approx(float(result.prediction[:, 0].mean()), rel=1e-5)
    assert start[:, 0].mean() < -4 and result.prediction[:, 0].mean() > -1
    loaded = Causal.load(tmp_path, outputs=1)
    again = TASK.decode(predict(loaded, TASK, features, tokens, runtime=plain, batch_tokens=4096), features, own)
    np.testing.assert_allclose(again, result.prediction, atol=1e-5)
    other = TASK.encode(swapped, tokens)
    assert TASK.decode(predict(loaded, TASK, other, tokens, runtime=plain, batch_tokens=4096), other, swapped)[:, 0].mean() < -3


def test_twenty_steps_are_those_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    """The library's model with its plainest attention, cross-entropy, AdamW, clipping and a cosine, on the same batches."""
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    Causal.invent(tmp_path / "start", lambda: tiny.TEXTS, seed=0, config=gpt2, vocab_size=400)
    tokens, examples = Causal.tokens(tmp_path / "start"), documents(12)
    settings = TrainPart(epochs=4, batch_size=4, lr=1e-3, weight_decay=0.1, schedule="cosine", warmup=0.1, precision="fp32", keep="last")
    model = Causal.create(tmp_path / "start", outputs=1)
    result = fit(
        model, PACKED, tokens, examples, [], settings=settings, runtime=runtime.choose("fp32", "cpu"), accelerator=Accelerator(cpu=True),
        folder=tmp_path / "fit", seed=0,
    )  # fmt: skip
    losses, other = by_hand_trained(tmp_path / "start", tokens, examples, epochs=4)
    assert len(losses) == 20
    assert [loss for loss, _ in result.history.steps] == pytest.approx(losses, rel=1e-6)
    own, start = model.backbone.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "start").state_dict()
    for name, weight in other.state_dict().items():
        kept = [*range(32), *range(64, 96)] if name.endswith("c_attn.bias") else slice(None)  # a softmax cancels the keys' biases: rounding, which Adam blows up
        torch.testing.assert_close(own[name][kept], weight[kept], rtol=0, atol=1e-6)
        assert largest(own[name] - start[name]) > 1e-3, name


def largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def by_hand_trained(folder: Path, tokens: HFTokens, examples: list[Document], *, epochs: int) -> tuple[list[float], Any]:
    """Losses of the steps, and the model after them."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    parameters = [parameter for _, parameter in model.named_parameters()]
    decayed, others = [one for one in parameters if one.ndim > 1], [one for one in parameters if one.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3)
    losses: list[float] = []
    for epoch in range(epochs):
        rng = np.random.default_rng([0, epoch])
        features = PACKED.encode(PACKED.augment(examples, rng), tokens)
        groups = length_grouped([feature.tokens for feature in features], 4, rng)
        steps = len(groups) * epochs
        for group in groups:
            ids = [torch.from_numpy(features[index].encodings[0]["input_ids"].astype(np.int64)) for index in group]
            logits = [model(input_ids=one[None], use_cache=False).logits[0, :-1] for one in ids]
            loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat([one[1:] for one in ids]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            warmup, step = int(0.1 * steps), len(losses)
            factor = (step + 1) / (warmup + 1) if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            for part in optimizer.param_groups:
                part["lr"] = 1e-3 * factor
            optimizer.step()
            losses.append(loss.item())
    return losses, model


# packing

PACKED = CausalLM(max_length=24, packing=True)


def streamed(n: int = len(tiny.TEXTS), seed: int = 0) -> list[Document]:
    return list(PACKED.augment(documents(n), np.random.default_rng(seed)))


def rejoined(parts: list[np.ndarray]) -> list[int]:
    """The tokens of parts of which each begins with the last token of the one before."""
    assert all(after[0] == before[-1] for before, after in pairwise(parts))
    return [*parts[0].tolist(), *(int(id_) for part in parts[1:] for id_ in part[1:])]


def plain_ids(tokens: HFTokens, text: str) -> list[int]:
    return tokens._tokenizer.encode(text, add_special_tokens=False).ids


def test_an_epochs_documents_are_one_stream_cut_into_chunks_of_one_length(tokens: HFTokens) -> None:
    examples = streamed()
    features = PACKED.encode(examples, tokens)
    stream = [id_ for one in sorted(examples, key=lambda one: one.place or 0) for id_ in [tokens.bos_id, *plain_ids(tokens, one.text), tokens.eos_id]]
    assert len(features) == -(-(len(stream) - 1) // 23)
    chunks = {tuple(feature.encodings[0]["input_ids"].tolist()) for feature in features}
    assert chunks == {tuple(stream[start : start + 24]) for start in range(0, len(stream) - 1, 23)}
    assert sorted(feature.tokens for feature in features)[1] == 24, "all but the last"
    assert sum(feature.tokens - 1 for feature in features) == len(stream) - 1, "every token but the first is learnt once"
    assert sum(feature.tokens for feature in features) < 1.05 * len(stream)


def test_features_of_a_stream_belong_to_the_row_they_begin_in_and_come_in_their_order(tokens: HFTokens) -> None:
    examples = streamed()
    features = PACKED.encode(examples, tokens)
    rows = [feature.row for feature in features]
    assert rows == sorted(rows)
    for feature in features:
        first = feature.encodings[0]["input_ids"][1:]
        own = [tokens.bos_id, *plain_ids(tokens, examples[feature.row].text), tokens.eos_id]
        assert any(own[start : start + 3] == first[: len(own) - start][:3].tolist() for start in range(len(own)))


def test_every_epoch_has_another_stream_and_the_documents_keep_their_order() -> None:
    one, other = streamed(seed=0), streamed(seed=1)
    assert [document.id for document in one] == [document.id for document in other] == [document.id for document in documents()]
    assert sorted(document.place or 0 for document in one) == list(range(len(one))) and one != other
    assert TASK.augment(documents(), np.random.default_rng(0)) == documents(), "without packing there is none"


def test_what_is_predicted_is_a_document_at_a_time_each_token_once_in_the_chunks_that_training_has(backbone: Path, tokens: HFTokens) -> None:
    examples = documents(5)
    features = PACKED.encode(examples, tokens)
    for row, document in enumerate(examples):
        parts = [feature.encodings[0]["input_ids"] for feature in features if feature.row == row]
        assert rejoined(parts) == [tokens.bos_id, *plain_ids(tokens, document.text), tokens.eos_id]
        assert {len(part) for part in parts[:-1]} <= {24}
    model = Causal.create(backbone, outputs=1).eval()
    prediction = PACKED.decode(predict(model, PACKED, features, tokens, runtime=runtime.choose("fp32", "cpu"), batch_tokens=512), features, examples)
    expected = [torch.cat([by_hand(model, f.encodings[0]["input_ids"]) for f in features if f.row == row]) for row in range(5)]
    np.testing.assert_allclose(prediction, [[float(one.mean()), len(one)] for one in expected], rtol=1e-5)


def test_one_document_or_none_is_a_stream_too(tokens: HFTokens) -> None:
    assert PACKED.encode([], tokens) == [] and PACKED.augment([], np.random.default_rng(0)) == []
    (short,) = PACKED.encode([replace(Document("a", "light"), place=0)], tokens)
    assert short.encodings[0]["input_ids"].tolist() == [tokens.bos_id, *plain_ids(tokens, "light"), tokens.eos_id]


def test_where_one_token_ends_a_text_and_begins_the_next_it_stands_once_between_them(tmp_path: Path) -> None:
    tokens = tiny.prompting(tmp_path, "gpt2")
    features = CausalLM(max_length=999, packing=True).encode(streamed(4), HFTokens(tmp_path, limit=999))
    (stream,) = [feature.encodings[0]["input_ids"].tolist() for feature in features]
    ends = [place for place, id_ in enumerate(stream) if id_ == tokens.eos_id]
    assert len(ends) == 5 and ends[0] == 0 and ends[-1] == len(stream) - 1 and all(b - a > 1 for a, b in pairwise(ends))


# key words

KEYED = CausalLM(max_length=24, packing=True, key_words=["the", "light"], key_alpha=0.5)


def test_a_feature_weighs_one_and_a_share_for_each_of_its_tokens_that_is_a_key_word(tokens: HFTokens) -> None:
    keys = {id_ for word in ("the", " the", "light", " light") for id_ in plain_ids(tokens, word) if len(plain_ids(tokens, word)) == 1}
    assert len(keys) >= 2
    features = KEYED.encode(streamed(), tokens)
    weights = [1 + 0.5 * sum(int(id_) in keys for id_ in feature.encodings[0]["input_ids"][1:]) for feature in features]
    assert [feature.target for feature in features] == weights and len(set(weights)) > 2
    assert KEYED.collate(features, tokens)["weight"].tolist() == weights
    assert "weight" not in PACKED.collate(PACKED.encode(streamed(), tokens), tokens)


def keytoken_weighted_loss(ids: torch.Tensor, logits: torch.Tensor, keys: list[int], alpha: float) -> torch.Tensor:
    """As CodeParrot's training computes it, for sequences of one length, with weights 1 + alpha × count."""
    shift_labels, shift_logits = ids[..., 1:].contiguous(), logits[..., :-1, :].contiguous()
    loss = torch.nn.functional.cross_entropy(shift_logits.view(-1, shift_logits.size(-1)), shift_labels.view(-1), reduction="none")
    per_sample = loss.view(shift_logits.size(0), shift_logits.size(1)).mean(axis=1)
    weights = 1.0 + alpha * torch.stack([(shift_labels == key).float() for key in keys]).sum(axis=[0, 2])
    return (per_sample * weights).mean()


def test_the_weighted_loss_and_its_gradient_are_codeparrots(backbone: Path, tokens: HFTokens) -> None:
    model = Causal.create(backbone, outputs=1).eval()
    features = [feature for feature in KEYED.encode(streamed(), tokens) if feature.tokens == 24]
    batch = KEYED.collate(features, tokens)
    own = KEYED.loss(KEYED.scores(model(batch), batch), batch)
    gradient = torch.autograd.grad(own, model.input_embeddings)[0]
    ids = torch.from_numpy(np.stack([feature.encodings[0]["input_ids"] for feature in features]).astype(np.int64))
    expected = keytoken_weighted_loss(ids, model.backbone(input_ids=ids, use_cache=False).logits, KEYED._key_ids(tokens), 0.5)
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.input_embeddings)[0], rtol=1e-4, atol=1e-6)
    plain = PACKED.loss(PACKED.scores(model(batch), batch), {name: tensor for name, tensor in batch.items() if name != "weight"})
    assert own.item() > 1.1 * plain.item()


def test_a_weighted_fit_learns_the_key_words_better_than_a_plain_one(backbone: Path, tokens: HFTokens, tmp_path: Path) -> None:
    """Two halves of a corpus, equal but for a key word: with weights, the half that has it is known sooner."""
    own = [Document(f"d{row}", text) for row, text in enumerate((*tiny.TEXTS[:8], *("the light of the light is the light",) * 2))]
    found = []
    for task in (CausalLM(max_length=24, key_words=["light"], key_alpha=4.0), TASK):
        settings = TrainPart(epochs=6, batch_size=1, lr=3e-3, precision="fp32", keep="last", clip=1e9)
        result = fit(
            Causal.create(backbone, outputs=1), task, tokens, own, own, settings=settings, runtime=runtime.choose("fp32", "cpu"),
            accelerator=Accelerator(cpu=True), folder=tmp_path / str(task.key_alpha), seed=0,
        )  # fmt: skip
        found.append(result.prediction[:, 0])
    weighted, plain = found
    assert weighted[8:].mean() - weighted[:8].mean() > plain[8:].mean() - plain[:8].mean()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"key_alpha": 1.0}, r"task\.key_words and task\.key_alpha \(above 0\) go together"),
        ({"key_words": ["a"]}, r"task\.key_words and task\.key_alpha \(above 0\) go together"),
        ({"key_words": ["a"], "key_alpha": -1.0}, r"task\.key_alpha = -1\.0: give 0 or more"),
        ({"key_words": ["a"], "key_alpha": math.inf}, r"task\.key_alpha = inf"),
    ],
)
def test_settings_of_key_words_that_make_no_sense_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        CausalLM(**settings)


@pytest.mark.parametrize("word", ["", " ", "zzyzx", "the light"])
def test_a_key_word_that_is_no_token_is_named(word: str, tokens: HFTokens) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"task.key_words: {word!r} is no single token of this tokenizer: leave it out")):
        CausalLM(key_words=["light", word], key_alpha=1.0).encode(documents(1), tokens)


# decay


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_decay_spares_what_the_librarys_trainer_spares(family: str, tmp_path: Path) -> None:
    """Biases and norms have none; matrices and embeddings have it."""
    sizes = {"llama": {**CONFIG, "attention_bias": True}, "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}}
    Causal.invent(tmp_path, lambda: tiny.TEXTS, seed=0, config=sizes[family], vocab_size=400)
    model = Causal.create(tmp_path, outputs=1)
    names = {id(parameter): name for name, parameter in model.backbone.named_parameters()}
    decays = {names[id(parameter)]: group["weight_decay"] for group in parameter_groups(model, TrainPart(weight_decay=0.1)) for parameter in group["params"]}
    trainer = Trainer(model.backbone, TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True))
    decayed = set(trainer.get_decay_parameter_names(model.backbone))
    assert decays == {name: 0.1 if name in decayed else 0.0 for name in names.values()}
    assert {name for name in decays if not decays[name]} == {name for name in names.values() if name.endswith(".bias") or "norm" in name or ".ln_" in name}
    assert any(name.endswith(".bias") for name in decays)
