"""The recipes that come with the kit: each can be assembled, and those for models too large for here train and score on a small one of their kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from kit import assemble, runtime
from kit.config import Recipe, shipped_recipes
from kit.inference.plan import plan
from kit.predict import predict
from kit.training.crossval import read_examples, train
from kit.vendor.weights import vendor_weights
from tests import tiny


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_can_be_assembled_and_says_what_it_is_for(name: str) -> None:
    recipe = Recipe.load(name)
    assemble.check(recipe)
    assert recipe.name == name
    assert shipped_recipes()[name].read_text(encoding="utf-8").startswith("# ")
    assert not assemble.on_base(recipe) or recipe.model.options["source"].startswith("bundle:"), "or it could not be packed"


def test_the_time_that_qlora_7b_takes_is_known_without_its_base(tmp_path: Path) -> None:
    planned = plan(["qlora_7b"], 200, "t4x2", artifacts=tmp_path)
    assert planned.fits_in_time and {span["fit"] for span in planned.timeline if span["member"] == "qlora_7b"} == {"fold0", "fold1"}
    token_s = planned.members[0]["token_us"] / 1e6
    assert 2 * 7e9 / 65e12 < token_s < 2 * 7e9 / 10e12, "two FLOP a parameter, below the T4's peak of 65e12 a second"


def small_mistral(folder: Path) -> Path:
    """Mistral's architecture with random weights: 2 layers of 64 dimensions, and a tokenizer that knows the letters."""
    tokens = tiny.prompting(folder, "llama3")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", vocab_size=len(tokens), **sizes)).save_pretrained(folder)
    return folder


def science(folder: Path, rows: int) -> Path:
    """A competition with a passages.parquet, as recipes for the LLM Science Exam expect it."""
    tiny.write_questions(folder / "train.csv", tiny.questions(rows, context=False))
    passages = {"id": [f"p{row}" for row in range(len(tiny.TEXTS))], "title": "", "text": tiny.TEXTS}
    pd.DataFrame(passages).to_parquet(folder / "passages.parquet", index=False)
    return folder


def test_qlora_7b_trains_two_steps_on_a_small_mistral_and_scores(tmp_path: Path) -> None:
    vendor_weights(small_mistral(tmp_path / "mistral"), tmp_path / "bundles", name="mistral-7b", licence="apache-2.0")
    recipe = Recipe.load("qlora_7b", [f"data.folder={science(tmp_path / 'science', 36)}", "task.max_length=300"])
    examples = read_examples(recipe, assemble.make_task(recipe), tmp_path).own
    assert all(question.context for question in examples)

    run = train(recipe, artifacts=tmp_path, folds=[0]).folder
    fit = run / "fold0"
    losses = [loss for loss, _ in json.loads((fit / "history.json").read_text())["steps"]]
    assert len(losses) == 2 and np.isfinite(losses).all()
    adapter = load_file(fit / "adapter_model.safetensors")
    maps = {name.split(".")[-3] for name in adapter}
    assert maps == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name), "they begin as zeros"

    held = [examples[row] for row in np.flatnonzero(np.load(run / "folds.npy") == 0)]
    task = assemble.make_task(recipe)
    model = assemble.load_model(recipe.with_overrides([f"model.source={tmp_path / 'bundles' / 'mistral-7b'}"]), task, fit)
    tokens = assemble.load_tokens(recipe, fit)
    features = task.encode(held, tokens)
    scores = predict(model, task, features, tokens, runtime=runtime.choose("fp32", "cpu"), batch_tokens=2048)
    prediction = task.decode(scores, features, held)
    assert prediction.shape == (18, 5)
    np.testing.assert_allclose(prediction, np.load(fit / "valid.npy"), atol=1e-5)
