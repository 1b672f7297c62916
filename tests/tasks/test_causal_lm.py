"""Documents, what is asked of a language model about them, and one that learns from them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from kit import runtime
from kit.config import TrainPart
from kit.data.tables import Table
from kit.errors import ConfigError, DataError
from kit.models.causal import Causal
from kit.models.tokens import HFTokens
from kit.predict import predict
from kit.tasks import suffices
from kit.tasks.causal_lm import CausalLM, Document
from kit.training.loop import fit
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
    assert prediction.shape == (5, 1) and prediction.dtype == np.float32
    np.testing.assert_allclose(prediction[:, 0], whole, rtol=1e-5)


def test_the_metrics_are_means_over_documents_and_better_when_larger() -> None:
    prediction = np.array([[-1.0], [-3.0]], np.float32)
    values = {name: metric(prediction, TASK.targets(documents(2))) for name, metric in TASK.metrics.items()}
    assert values == {"log_probability": -2.0, "negative_perplexity": pytest.approx(-math.exp(2))}
    partly = np.array([[-1.0], [np.nan]], np.float32)
    assert TASK.metrics["log_probability"](partly, TASK.targets(documents(2))) < -10
    assert TASK.merit(partly, TASK.targets(documents(2))).tolist() == [-1.0, -20.0]
    assert TASK.doubt(partly).tolist() == [1.0, 20.0]


def test_decode_of_nothing_is_nan(tokens: HFTokens) -> None:
    assert np.isnan(TASK.decode([], [], documents(2))).all() and TASK.decode([], [], []).shape == (0, 1)
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
    assert result.metrics["log_probability"] == pytest.approx(float(result.prediction.mean()), rel=1e-5)
    assert start.mean() < -4 and result.prediction.mean() > -1
    loaded = Causal.load(tmp_path, outputs=1)
    again = TASK.decode(predict(loaded, TASK, features, tokens, runtime=plain, batch_tokens=4096), features, own)
    np.testing.assert_allclose(again, result.prediction, atol=1e-5)
    other = TASK.encode(swapped, tokens)
    assert TASK.decode(predict(loaded, TASK, other, tokens, runtime=plain, batch_tokens=4096), other, swapped).mean() < -3
