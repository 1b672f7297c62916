"""Completions beside the library's own forward, by a decoder that knows a text by heart and by ones of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kit.errors import BundleError, ConfigError, KitError
from kit.models.causal import Causal
from kit.models.generate import Completion, Decoding, Writer, complete
from kit.models.tokens import HFTokens
from tests import tiny

PROMPT = "The speed of light"
LINE = "import numpy as np\nx = np.zeros(3)\n"
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.fixture(scope="module", params=SIZES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of random weights."""
    made = tmp_path_factory.mktemp(request.param)
    config = {"model_type": request.param, "initializer_range": 0.3, **SIZES[request.param]}
    Causal.invent(made, lambda: (*tiny.TEXTS, LINE), seed=0, config=config, vocab_size=400)
    return made


@pytest.fixture(scope="module")
def learnt(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after it has learnt LINE by heart."""
    made, tokens = tmp_path_factory.mktemp("learnt"), Causal.tokens(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[tokens.bos_id, *tokens.branch(LINE, end=True)["input_ids"].tolist()]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(made)
    tokens.save(made)
    return made


def by_hand(folder: Path, prompt: str, count: int) -> str:
    """The likeliest token, again and again, by the library's forward over the whole text."""
    tokens, model = HFTokens(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    begun = tokens.prompt(prompt, (0, 0), max_length=99)["input_ids"].tolist()
    ids = list(begun)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokens.eos_id:
                break
    return tokens._tokenizer.decode(ids[len(begun) :])


def test_greedy_is_the_likeliest_token_again_and_again(folder: Path) -> None:
    (made,) = complete(folder, PROMPT, Decoding(tokens=12), precision="fp32", device="cpu")
    assert made.text == by_hand(folder, PROMPT, 12) and len(made.text) > 5
    assert (made.tokens, made.ended) == (12, "length")


def test_what_was_learnt_is_completed_up_to_its_end(learnt: Path) -> None:
    (made,) = complete(learnt, "import num", Decoding(tokens=40))
    assert (made.text, made.ended) == ("py as np\nx = np.zeros(3)\n", "end")
    (short,) = complete(learnt, "import num", Decoding(tokens=2))
    assert made.text.startswith(short.text) and (short.tokens, short.ended) == (2, "length")


def test_a_completion_ends_before_the_first_stop_word(learnt: Path) -> None:
    assert complete(learnt, "import num", Decoding(tokens=40, stop=("zeros", "\n")))[0][::2] == ("py as np", "word")
    (made,) = complete(learnt, "import num", Decoding(tokens=40, stop=("nothing of this",)))
    assert (made.text, made.ended) == ("py as np\nx = np.zeros(3)\n", "end")
    whole = complete(learnt, "import num", Decoding(tokens=40))[0].tokens
    assert complete(learnt, "import num", Decoding(tokens=40, stop=("\n",)))[0].tokens < whole, "it generates no further"


def test_draws_are_the_same_for_a_seed_and_others_for_another(folder: Path) -> None:
    drawn = {seed: complete(folder, PROMPT, Decoding(tokens=10, temperature=1.0, returns=3, seed=seed)) for seed in (0, 1)}
    state = torch.random.get_rng_state()
    assert complete(folder, PROMPT, Decoding(tokens=10, temperature=1.0, returns=3, seed=0)) == drawn[0] != drawn[1]
    assert torch.equal(torch.random.get_rng_state(), state), "other code draws as if nothing had been"
    assert len(drawn[0]) == 3 == len({one.text for one in drawn[0]})


def test_the_smallest_share_of_tokens_and_the_lowest_temperature_are_greedy(folder: Path) -> None:
    (greedy,) = complete(folder, PROMPT, Decoding(tokens=10))
    for drawn in (Decoding(tokens=10, temperature=1.0, top_p=1e-6, returns=2), Decoding(tokens=10, temperature=1e-4, returns=2)):
        assert complete(folder, PROMPT, drawn) == [greedy, greedy]


def test_rows_end_each_at_its_own_place(learnt: Path) -> None:
    made = complete(learnt, "import num", Decoding(tokens=40, temperature=2.5, returns=8, seed=3))
    assert {one.ended for one in made} == {"end", "length"} or len({one.tokens for one in made}) > 1
    assert all("</s>" not in one.text and (one.tokens < 40 or one.ended == "length") for one in made)


def test_of_a_long_prompt_the_beginning_goes_and_of_none_everything_follows(folder: Path) -> None:
    writer = Writer.load(folder)
    tail = writer.complete("light " * 200, Decoding(tokens=8))
    assert tail == writer.complete("light " * 300, Decoding(tokens=8)) and tail[0].tokens == 8
    assert writer.complete("", Decoding(tokens=8))[0].tokens > 0


def test_what_looks_like_a_special_token_is_text(learnt: Path) -> None:
    writer = Writer.load(learnt)
    assert isinstance(writer.complete("</s>import num", Decoding(tokens=3))[0], Completion)
    ids = writer._tokens.prompt("</s>import", (0, 0), max_length=50)["input_ids"].tolist()
    assert writer._tokens.eos_id not in ids


def test_half_precision_says_nearly_the_same(learnt: Path) -> None:
    assert complete(learnt, "import num", Decoding(tokens=40), precision="bf16", device="cpu")[0].text == "py as np\nx = np.zeros(3)\n"


def test_of_a_run_the_fit_on_everything_writes_else_its_first_fold(learnt: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(BundleError, match="a run without a finished fit: train it to its end"):
        Writer.load(tmp_path)
    shutil.copytree(folder, tmp_path / "fold0")
    with pytest.raises(BundleError, match="a run without a finished fit"):
        Writer.load(tmp_path)
    (tmp_path / "fold0" / "metrics.json").write_text("{}")
    assert complete(tmp_path, "import num", Decoding(tokens=5)) == complete(folder, "import num", Decoding(tokens=5))
    shutil.copytree(learnt, tmp_path / "full")
    (tmp_path / "full" / "metrics.json").write_text("{}")
    assert complete(tmp_path, "import num", Decoding(tokens=40))[0].text.startswith("py as np")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tokens": 0}, r"tokens = 0: give at least 1"),
        ({"returns": 0}, r"returns = 0: give at least 1"),
        ({"temperature": -1.0}, r"temperature = -1\.0: give 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, r"temperature = nan"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p = 0\.0: give a share above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p = 1\.5"),
        ({"returns": 2}, r"returns = 2, but temperature = 0 gives the same text each time: set a temperature"),
        ({"top_p": 0.5}, r"top_p = 0\.5, but temperature = 0 draws nothing"),
        ({"stop": ("a", "")}, r"stop: a word is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Decoding(**settings)


def test_folders_that_do_not_write_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    t5 = tmp_path / "t5"
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=500)).save_pretrained(t5)
    adapter, empty, weights = tmp_path / "adapter", tmp_path / "empty", tmp_path / "weights"
    shutil.copytree(folder, adapter)
    (adapter / "adapter_config.json").write_text("{}")
    empty.mkdir()
    shutil.copytree(folder, weights)
    (weights / "model.safetensors").unlink()
    for place, why in (
        (tmp_path / "nowhere", "no such folder: give a trained run or a model folder"),
        (empty, r"config\.json: cannot be read"),
        (t5, "model type 't5' goes on from no text"),
        (adapter, "holds an adapter only: merge it"),
        (weights, r"no \.safetensors weights"),
        (tiny.encoder_folder(tmp_path / "bert"), "the weights lack"),
    ):
        with pytest.raises(KitError, match=why) as error:
            Writer.load(place)
        assert str(place) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="tokens = 64: the model has 64 positions"):
        complete(folder, "a", Decoding(tokens=64))
