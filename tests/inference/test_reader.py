"""kit.inference.reader: a trained reader answers one question about a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kit.config import Recipe
from kit.errors import BundleError, ConfigError, DataError
from kit.inference.reader import Reader
from kit.models.encoder import Encoder
from kit.tasks.extractive_qa import Answer, ExtractiveQA, Reading
from tests import tiny

TASK = ExtractiveQA(max_length=48, stride=12, max_question=12)
SETTINGS = {"kind": "extractive_qa", "max_length": 48, "stride": 12, "max_question": 12}
QUESTIONS = (("What has a high albedo?", "Fresh snow"), ("What has a low one?", "dark soil"), ("What is albedo?", "the share of light that a surface sends back"))
TEXT = f"{tiny.TEXTS[1]} {tiny.TEXTS[0]} {tiny.TEXTS[3]}"


def recipe(folder: Path, **parts: object) -> Recipe:
    return tiny.recipe(folder, **{"task": SETTINGS, "model": {"pooling": "none"}} | parts)


def write_fit(folder: Path, recipe: Recipe, model: Encoder, tokens: object) -> None:
    folder.mkdir(parents=True)
    (folder.parent / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    model.save(folder)
    tokens.save(folder)  # type: ignore[attr-defined]
    (folder / "metrics.json").write_text("{}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose fit knows QUESTIONS by heart; another, which comes first by its name, knows nothing."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny.encoder(folder / "encoder", outputs=2, pooling="none")
    tokens = Encoder.tokens(folder / "encoder")
    write_fit(folder / "run" / "fold0", recipe(folder), model, tokens)
    examples = [Reading(question, question, TEXT, (Answer(answer, TEXT.index(answer)),)) for question, answer in QUESTIONS]
    batch = TASK.collate(TASK.encode(examples, tokens), tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = TASK.loss(TASK.scores(model(batch), batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write_fit(folder / "run" / "full", recipe(folder), model, tokens)
    return folder / "run"


def test_a_reader_finds_what_it_learnt_and_says_how_sure_it_is(run: Path) -> None:
    reader = Reader.open(run)
    for question, answer in QUESTIONS:
        (found,) = reader.ask(question, TEXT)
        assert found.text == answer == TEXT[found.start : found.stop]
        assert 0.5 < found.probability <= 1
    three = reader.ask(QUESTIONS[0][0], TEXT, count=3)
    assert len(three) == 3 and three[0].probability >= three[1].probability >= three[2].probability
    assert reader.ask(QUESTIONS[0][0], TEXT) == three[:1]


def test_blank_input_is_refused(run: Path) -> None:
    reader = Reader.open(run)
    with pytest.raises(DataError, match="the question is blank"):
        reader.ask(" ", TEXT)
    with pytest.raises(DataError, match="the text is blank"):
        reader.ask("Why?", "\n")


def test_what_is_no_reader_is_refused_by_its_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no recipe\.toml: give the folder of a run"):
        Reader.open(tmp_path)
    (tmp_path / "recipe.toml").write_text((run / "recipe.toml").read_text())
    with pytest.raises(BundleError, match="no finished fit"):
        Reader.open(tmp_path)
    (tmp_path / "recipe.toml").write_text(tiny.recipe(tmp_path).to_toml())
    with pytest.raises(ConfigError, match='trained for task.kind = "multiple_choice", not to read'):
        Reader.open(tmp_path)
