"""Completes a prompt with a decoder, by transformers' own `generate`. Reads the folder of a model or of a trained run; knows no task and no recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, StoppingCriteria

from kit import runtime
from kit.errors import BundleError, ConfigError
from kit.models.encoder import position_limit, read_backbone, read_config, read_tokens
from kit.models.tokens import FILE, HFTokens

_FULL = "full"  # the fit on everything, where a run has one
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Decoding:
    """How a prompt is gone on from."""

    tokens: int = 64
    """At most so many new ones."""
    temperature: float = 0.0
    """0: greedy, always the likeliest token; else a token is drawn, the more evenly the higher this is."""
    top_p: float = 1.0
    """Drawn among the likeliest tokens that together have this share."""
    returns: int = 1
    """Completions, each drawn anew."""
    stop: tuple[str, ...] = ()
    """A completion ends before the first of these words that stands in it."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens = {self.tokens}: give at least 1")
        if self.returns < 1:
            raise ConfigError(f"returns = {self.returns}: give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature}: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: give a share above 0 and up to 1")
        if not self.temperature and self.returns > 1:
            raise ConfigError(f"returns = {self.returns}, but temperature = 0 gives the same text each time: set a temperature, or returns = 1")
        if not self.temperature and self.top_p < 1:
            raise ConfigError(f"top_p = {self.top_p}, but temperature = 0 draws nothing: set a temperature, or top_p = 1")
        if "" in self.stop:
            raise ConfigError("stop: a word is empty, and would end every text at once: leave it out")


class Completion(NamedTuple):
    """text: what follows the prompt. tokens: that were generated. ended: by "end" (the token that ends a text), "word" or "length"."""

    text: str
    tokens: int
    ended: str


def complete(folder: str | Path, prompt: str, decoding: Decoding | None = None, *, precision: str = "auto", device: str | None = None) -> list[Completion]:
    """Completions of a prompt by the model in a folder, or in a run's first fit. See `Writer`."""
    return Writer.load(folder, precision=precision, device=device).complete(prompt, decoding or Decoding())


class Writer:
    """A decoder with its tokenizer that goes on from texts."""

    def __init__(self, model: Any, tokens: HFTokens, tokenizer: Tokenizer) -> None:
        self._model, self._tokens, self._tokenizer = model, tokens, tokenizer

    @classmethod
    def load(cls, folder: str | Path, *, precision: str = "auto", device: str | None = None) -> Writer:
        """The decoder in a model folder, or in a run: its fit on everything, else its first fold. Raises BundleError, ConfigError."""
        folder = _fit_of(Path(folder))
        config = read_config(folder)
        _check(folder, config)
        tokens = read_tokens(folder, config, limit=position_limit(config))
        chosen = runtime.choose(precision, device)
        model = read_backbone(AutoModelForCausalLM, folder, config, dtype=chosen.dtype, attn_implementation="sdpa")
        return cls(model.to(chosen.device).eval(), tokens, Tokenizer.from_file(str(folder / FILE)))

    def complete(self, prompt: str, decoding: Decoding) -> list[Completion]:
        """So many completions of a prompt, the same ones for a seed. Of a prompt too long for the model the beginning goes. Raises ConfigError."""
        room = self._tokens.limit - decoding.tokens
        if room < 1:
            raise ConfigError(f"tokens = {decoding.tokens}: the model has {self._tokens.limit} positions, the prompt's among them: give fewer")
        ids = self._tokens.prompt(self._tokens.plain(prompt), (0, 0), max_length=room)["input_ids"].tolist()
        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(decoding.seed)
            given = torch.tensor([ids], device=device)
            made = self._model.generate(given, attention_mask=torch.ones_like(given), **self._settings(decoding, ids))
        return [self._completion(ids, row[len(ids) :].tolist(), decoding.stop) for row in made]

    def _settings(self, decoding: Decoding, ids: list[int]) -> dict[str, Any]:
        drawn = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.temperature else {}
        config = GenerationConfig(
            max_new_tokens=decoding.tokens, do_sample=bool(drawn), num_return_sequences=decoding.returns, **drawn,
            bos_token_id=self._tokens.bos_id, eos_token_id=self._tokens.eos_id, pad_token_id=self._pad_id,
        )  # fmt: skip
        stopping = [_AtWord(lambda new: self._text(ids, new), decoding.stop, len(ids))] if decoding.stop else []
        return {"generation_config": config, "stopping_criteria": stopping}

    @property
    def _pad_id(self) -> int:
        return self._tokens.pad_id if self._tokens.eos_id is None else self._tokens.eos_id  # so what follows a text's end is cut off with it

    def _completion(self, ids: list[int], new: list[int], stop: Sequence[str]) -> Completion:
        end = new.index(self._pad_id) if self._pad_id in new else len(new)
        text = self._text(ids, new[:end])
        if at := [text.index(word) for word in stop if word in text]:
            return Completion(text[: min(at)], end, "word")
        return Completion(text, end, "end" if end < len(new) else "length")

    def _text(self, ids: list[int], new: list[int]) -> str:
        """What the new tokens add to the text of those before them: some say of a token by itself other than in a text."""
        before, whole = (self._tokenizer.decode(part, skip_special_tokens=True) for part in (ids, [*ids, *new]))
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(new, skip_special_tokens=True)


class _AtWord(StoppingCriteria):
    """Ends a text in which one of the words stands. text: of the new tokens of a row. begin: where these begin."""

    def __init__(self, text: Any, words: Sequence[str], begin: int) -> None:
        self._text, self._words, self._begin = text, words, begin

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        texts = [self._text(row[self._begin :].tolist()) for row in input_ids]
        return torch.tensor([any(word in text for word in self._words) for text in texts], device=input_ids.device)


def _fit_of(folder: Path) -> Path:
    """The folder itself, or of a run the fit on everything, else the first one."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder: give a trained run or a model folder")
    fits = [path for path in (folder / _FULL, *sorted(folder.glob("fold*"))) if (path / "metrics.json").is_file()]
    if (folder / "config.json").is_file() or not (folder / "recipe.toml").is_file():
        return folder
    if not fits:
        raise BundleError(f"{folder}: a run without a finished fit: train it to its end, or give another")
    return fits[0]


def _check(folder: Path, config: PretrainedConfig) -> None:
    if (folder / _ADAPTER).is_file():
        raise BundleError(f"{folder}: holds an adapter only: merge it into its base, and give the folder of the merged model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{folder}: model type {config.model_type!r} goes on from no text: give a decoder, such as Llama or GPT-2")
