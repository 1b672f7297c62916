"""kit.models.frozen: embeddings as their encoders give them, regressions as scikit-learn's, and nothing lost on the way to a folder and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from sklearn.linear_model import Ridge
from sklearn.svm import SVR

from kit import assemble, runtime
from kit.config import Recipe, TrainPart
from kit.errors import BundleError, ConfigError
from kit.models.encoder import Encoder
from kit.models.frozen import Frozen, FrozenTokens
from kit.tasks.essay_regression import Essay, EssayRegression
from kit.training.loop import Fit, fit
from tests import tiny

TASK = EssayRegression(max_length=48, columns=("style", "spelling"), newline="")
REGRESSIONS = ("ridge", "svr")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three encoders side by side: BERT's, another one's with a vocabulary of its own, and a BERT of other weights."""
    base = tmp_path_factory.mktemp("encoders")
    return [tiny.encoder_folder(base / "bert"), tiny.encoder_folder(base / "roberta", "roberta"), tiny.encoder_folder(base / "other", seed=1)]


def essays(n: int, seed: int = 0) -> list[Essay]:
    """Graded by what they are about, so that their embeddings tell."""
    rng, found = np.random.default_rng(seed), []
    for row in range(n):
        first, second = rng.choice(len(tiny.TEXTS), 2)
        words = " ".join(f"{tiny.TEXTS[first]} {tiny.TEXTS[second]}".split()[: int(rng.integers(4, 12))])
        found.append(Essay(f"e{row}", words, (1.0 + first % 5, 1.0 + first * 4 / 9)))
    return found


def fitted(source: Path, folder: Path, examples: Sequence[Essay], **options: Any) -> tuple[Frozen, Fit]:
    model = Frozen.create(source, outputs=2, **options)
    done = fit(
        model, TASK, Frozen.tokens(source), examples[: len(examples) // 2], examples[len(examples) // 2 :], settings=TrainPart(epochs=1, precision="fp32"),
        runtime=runtime.choose("fp32", "cpu"), accelerator=Accelerator(cpu=True), folder=folder, seed=0, batch_tokens=300,
    )  # fmt: skip
    return model, done


def embedded(source: Path, texts: Sequence[str]) -> np.ndarray:
    """One text at a time, written out."""
    model, tokens = tiny.encoder(source), Encoder.tokens(source)
    rows = []
    for text in texts:
        batch = tokens.pad(tokens.encode(text, max_length=tokens.limit))
        names = ("input_ids", "attention_mask", *(["token_type_ids"] if model.backbone.config.model_type == "bert" else []))
        with torch.no_grad():
            mean = model.eval().backbone(**{name: batch[name] for name in names}).last_hidden_state[0].double().mean(0)
        rows.append((mean / mean.norm()).numpy())
    return np.array(rows)


@pytest.mark.parametrize("regression", REGRESSIONS)
@pytest.mark.parametrize("also", [[], ["roberta", "other"]], ids=["one", "three"])
def test_the_fit_is_that_of_scikit_learn_on_the_embeddings_side_by_side(folders: list[Path], tmp_path: Path, regression: str, also: list[str]) -> None:
    examples = essays(40)
    _, done = fitted(folders[0], tmp_path, examples, also=also, regression=regression, penalty=0.5)
    texts = [essay.text for essay in examples]
    x = np.concatenate([embedded(folder, texts) for folder in folders if folder.name in ("bert", *also)], 1)
    y = (TASK.targets(examples) - 3.0) / 1.0  # what the head gives for the middle of the scale is 0, and 1 a quarter of it higher
    if regression == "ridge":
        expected = Ridge(alpha=0.5).fit(x[:20], y[:20]).predict(x[20:])
    else:
        expected = np.stack([SVR(C=2.0, gamma="scale").fit(x[:20], column).predict(x[20:]) for column in y[:20].T], 1)
    assert done.prediction == pytest.approx(expected + 3.0, abs=1e-3)  # SVR stops within 1e-3 of its end, wherever the last digits of an embedding lead it
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("regression", REGRESSIONS)
def test_a_saved_model_says_the_same_without_the_folders_it_came_from_and_holds_no_pickle(folders: list[Path], tmp_path: Path, regression: str) -> None:
    examples = essays(24)
    options = {"also": [str(folders[1])], "regression": regression}
    model, done = fitted(folders[0], tmp_path / "fit", examples, **options)
    Frozen.tokens(folders[0]).save(tmp_path / "fit")
    moved = (tmp_path / "fit").rename(tmp_path / "moved")
    loaded, tokens = Frozen.load(moved, outputs=2, **options), Frozen.tokens(moved)
    features = TASK.encode(examples[12:], tokens)
    batch = TASK.collate(features, tokens)
    assert TASK.scores(loaded(batch), batch).numpy() == pytest.approx(done.prediction, abs=1e-5)
    assert torch.equal(loaded(batch), model(batch))
    assert {path.suffix for path in moved.rglob("*") if path.is_file()} <= {".json", ".safetensors"}
    with safe_open(moved / "regression.safetensors", "pt") as file:
        assert set(file.keys()) == ({"weight", "bias"} if regression == "ridge" else {"supports", "duals", "bias", "gamma"})


def test_embeddings_of_every_encoder_have_length_1_and_do_not_depend_on_the_batch(folders: list[Path]) -> None:
    model, tokens = Frozen.create(folders[0], outputs=2, also=["roberta"]), Frozen.tokens(folders[0])
    texts = [essay.text for essay in essays(5)]
    encodings = [tokens.encode(text, max_length=48)[0] for text in texts]
    together = model.embed(tokens.pad(encodings))
    alone = torch.cat([model.embed(tokens.pad([encoding])) for encoding in encodings])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert together.shape == (5, 2 * tiny.HIDDEN) and together.view(5, 2, -1).norm(dim=-1) == pytest.approx(torch.ones(5, 2), abs=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("text", "pair", "length", "held"),
    [
        ("Snow is naïve 物理.", None, 48, "Snow is naïve 物理."),
        ("snow soil light", None, 4, "snow soil"),
        ("snow soil light", "dark", 6, "snow soil\ndark"),
        ("", None, 8, ""),
    ],
)
def test_the_text_that_further_encoders_read_is_what_the_first_one_keeps(folders: list[Path], text: str, pair: str | None, length: int, held: str) -> None:
    (encoding,) = Frozen.tokens(folders[0]).encode(text, pair, max_length=length)
    assert "".join(map(chr, encoding["characters"])) == held


def test_a_batch_is_that_of_the_first_encoder_with_the_characters(folders: list[Path]) -> None:
    tokens, own = Frozen.tokens(folders[0]), Encoder.tokens(folders[0])
    batch = tokens.pad([tokens.encode(text, max_length=48)[0] for text in ("snow", "dark soil")])
    plain = own.pad([own.encode(text, max_length=48)[0] for text in ("snow", "dark soil")])
    assert isinstance(tokens, FrozenTokens) and tokens.id("snow") == own.id("snow")
    assert all(torch.equal(batch[name], plain[name]) for name in plain) and batch.keys() - plain.keys() == {"characters"}
    assert batch["characters"].tolist()[0] == [*map(ord, "snow"), *[-1] * 5]


def test_equal_grades_need_no_support_vector(folders: list[Path], tmp_path: Path) -> None:
    examples = [Essay(f"e{row}", tiny.TEXTS[row], (2.0, 4.0)) for row in range(8)]
    _, done = fitted(folders[0], tmp_path, examples)
    assert done.prediction == pytest.approx(np.tile([2.0, 4.0], (4, 1)), abs=1e-6)
    assert Frozen.load(tmp_path, outputs=2)._fitted["supports"].shape == (0, tiny.HIDDEN)


@pytest.mark.parametrize("damage", ["missing", "text", "other regression", "other encoders"])
def test_a_damaged_regression_is_named_with_the_way_out(folders: list[Path], tmp_path: Path, damage: str) -> None:
    fitted(folders[0], tmp_path, essays(8), also=["other"])
    path = tmp_path / "regression.safetensors"
    if damage in ("missing", "text"):
        path.unlink()
    if damage == "text":
        path.write_text("no tensors")
    options = {"regression": "ridge" if damage == "other regression" else "svr", "also": [] if damage == "other encoders" else ["other"]}
    with pytest.raises(BundleError, match=rf"{path}: not what model.regression learns from these encoders .*train the fold again"):
        Frozen.load(tmp_path, outputs=2, **options)


@pytest.mark.parametrize("options", [{"regression": "lasso"}, {"penalty": 0.0}], ids=str)
def test_a_wrong_setting_is_refused(folders: list[Path], options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.regression = .*model\.penalty = .*: give one of ridge, svr and a number above 0"):
        Frozen.create(folders[0], outputs=2, **options)


def test_a_missing_encoder_is_named(folders: list[Path]) -> None:
    with pytest.raises(BundleError, match=r"model folder .*nowhere is missing"):
        Frozen.create(folders[0], outputs=2, also=["nowhere"])


def test_layers_are_not_drawn_anew(folders: list[Path]) -> None:
    model = Frozen.create(folders[0], outputs=2)
    model.reinit_layers(0)
    with pytest.raises(ConfigError, match=r"train.reinit_layers = 1.*set train.reinit_layers = 0"):
        model.reinit_layers(1)


def test_a_recipe_may_ask_for_it(tmp_path: Path) -> None:
    tiny.competition(tmp_path)
    options = {"kind": "frozen", "source": "encoder", "also": ["other"], "regression": "ridge", "penalty": 2.0}
    values = tiny.recipe(tmp_path).model_dump(exclude_none=True) | {"task": {"kind": "essay_regression", "max_length": 48}}
    assemble.check(Recipe.of(values | {"model": options}))
    with pytest.raises(ConfigError, match=r"model\.penalty = 'much'"):
        assemble.check(Recipe.of(values | {"model": options | {"penalty": "much"}}))
