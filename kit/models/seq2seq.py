"""Any Hugging Face encoder-decoder folder (T5, Flan-T5, mT5, UL2; BART) that says how likely texts are as answers, or scores what it has decoded.

Reads batches of trees (kit.models.prefix): the trunk of a row goes through the encoder once, its branches are texts of the decoder. Where
places enter a decoder as biases of its attention (T5), all branches of a row are one text under a tree mask: what cross-attention reads is
computed once and never copied. Elsewhere each branch is a row. Loads from local files only, never remote code. Knows no task and no prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from kit.errors import BundleError, ConfigError
from kit.models.checkpoint import load_weights, save_weights
from kit.models.encoder import checkpoint_activations, draw_backbone, make_config, position_limit, read_backbone, read_config, read_tokens
from kit.models.language import LanguageModel
from kit.models.tokens import HFTokens, train_byte_level

disable_progress_bar()

Batch = dict[str, Tensor]
_CONFIG = "config.json"
_KINDS = {"words": AutoModelForSeq2SeqLM, "score": AutoModel}
_OWN_HEAD = "lm_head.weight"
_NO_LIMIT = 1 << 20  # tokens; distances have biases, places have none


class Seq2Seq(LanguageModel):
    """Encoder-decoder → what kit.models.language says of the decoder's states.

    What is asked: the place of a trunk's last token asks for the first token of an answer, the place of a branch's token for the one after it.
    """

    words = "answer_token"

    def __init__(self, config: PretrainedConfig, *, outputs: int, head: str = "words", others: bool = False, dropout: float = 0.0) -> None:
        super().__init__(lambda: _random(_KINDS[head], config), config, outputs=outputs, head=head, others=others, dropout=dropout)
        self._distances: AbstractContextManager[Any] = nullcontext()  # of the trees in the decoder

    @property
    def decoder(self) -> Any:
        """See kit.models.language.LanguageModel."""
        return self.backbone.get_decoder()

    @property
    def stacks(self) -> list[nn.Module]:
        """See kit.models.language.LanguageModel."""
        return [self.backbone.get_encoder(), self.decoder]

    @classmethod
    def invent(
        cls, folder: Path, texts: Callable[[], Iterable[str]], *, seed: int, config: dict[str, Any], vocab_size: int = 8000
    ) -> None:
        """See kit.models.Model: `config` holds model_type and its settings; the tokenizer is a byte-level BPE, answers begin with its padding token."""
        train_byte_level(texts(), folder, vocab_size=vocab_size)
        tokens = HFTokens(folder)
        special = {"pad_token_id": tokens.pad_id, "bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id}
        made = make_config(config, vocab_size=len(tokens), decoder_start_token_id=tokens.pad_id, **special)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _random(AutoModelForSeq2SeqLM, _scaled_as_asked(made, config)).save_pretrained(folder)

    @classmethod
    def create(cls, source: Path, *, outputs: int, **options: Any) -> Seq2Seq:
        """See kit.models.Model."""
        config = _settings(source)
        model = cls(config, outputs=outputs, **options)
        model.backbone = _loaded(AutoModelForSeq2SeqLM if model.has_words else AutoModel, source, config)
        return model

    @classmethod
    def load(cls, folder: Path, *, outputs: int, **options: Any) -> Seq2Seq:
        """See kit.models.Model."""
        model = cls(_settings(folder), outputs=outputs, **options)
        _untie(model.backbone, _names_in(folder))
        load_weights(model, folder)
        return model

    @classmethod
    def tokens(cls, folder: Path) -> HFTokens:
        """See kit.models.Model; trunks are limited to the positions that config.json names, less one for their end. Raises BundleError."""
        config = read_config(folder)
        return read_tokens(folder, config, limit=position_limit(config) - 1 if hasattr(config, "max_position_embeddings") else _NO_LIMIT)

    def save(self, folder: Path) -> None:
        """Write config.json and the weights of backbone and head."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_weights(self, folder)
        (Path(folder) / _CONFIG).write_text(self.backbone.config.to_json_string(use_diff=False), encoding="utf-8")

    def checkpoint_activations(self) -> None:
        """See kit.models.Model."""
        checkpoint_activations(self.backbone, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What surrounds a layer's forward (nothing more) and its recomputation, which comes when the decoder's distances are forgotten."""
        return nullcontext(), self._distances

    def states(self, batch: Batch) -> Tensor:
        """See kit.models.language.LanguageModel. Raises ConfigError for a place that no answer follows."""
        texts = _read(batch)
        config = self.backbone.config
        ids, there = _with_end(batch["input_ids"], texts.trunk, end=_first(config.eos_token_id), padding=config.pad_token_id or 0)
        encoded = self.backbone.get_encoder()(input_ids=ids, attention_mask=there)[0]  # (B, S, H)
        decode = self._in_trees if _biases(self.decoder) else self._each_alone
        return decode(batch, texts, encoded, there)

    def _in_trees(self, batch: Batch, texts: _Texts, encoded: Tensor, there: Tensor) -> Tensor:
        """A row's branches behind one start: (B, Q) tokens, the start in column 0."""
        column = texts.kept.cumsum(1)  # (B, T)
        shape = len(column), 1 + int(column[:, -1].max())
        rows, places = texts.kept.nonzero().T[0], column[texts.kept]
        ids, branch, positions = (torch.full(shape, value, device=column.device) for value in (self._start, -1, 0))
        branch[:, 0] = 0
        ids[rows, places] = batch["input_ids"][texts.kept]
        branch[rows, places] = batch["branch"][texts.kept]
        positions[rows, places] = texts.position[texts.kept]
        own = (branch[:, :, None] == branch[:, None, :]) & (branch[:, None, :] > 0) & (positions[:, :, None] >= positions[:, None, :])
        seen = own | (branch[:, None, :] == 0)  # (B, Q, Q); padding sees the start, so that no row of the softmax is empty
        dtype = self.backbone.get_input_embeddings().weight.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
        self._distances = distances = _Distances(self.decoder, positions)
        try:
            with distances:
                read = {"encoder_hidden_states": encoded, "encoder_attention_mask": there}
                states = self.decoder(input_ids=ids, attention_mask=mask, **read, use_cache=False)[0]
        finally:
            self._distances = nullcontext()
        return states[batch["at"] // column.shape[1], torch.where(texts.kept, column, 0).flatten()[batch["at"]]]

    def _each_alone(self, batch: Batch, texts: _Texts, encoded: Tensor, there: Tensor) -> Tensor:
        """Every branch a row (R, L) behind a start of its own."""
        count = batch["branch"].amax(1).clamp(min=1)
        row = (count.cumsum(0) - count)[:, None] + (batch["branch"] - 1).clamp(min=0)  # (B, T)
        column = torch.where(texts.kept, texts.position, 0)
        ids = torch.full((int(count.sum()), 1 + int(column.max())), self._start, device=column.device)
        ids[row[texts.kept], column[texts.kept]] = batch["input_ids"][texts.kept]
        owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
        read = {"encoder_hidden_states": encoded[owner], "encoder_attention_mask": there[owner]}
        states = self.decoder(input_ids=ids, **read, use_cache=False)[0]
        return states[row.flatten()[batch["at"]], column.flatten()[batch["at"]]]

    @property
    def _start(self) -> int:
        return _first(self.backbone.config.decoder_start_token_id)

    def run(self, ids: Tensor, states: Tensor) -> Any:
        """See kit.models.language.LanguageModel."""
        return self.backbone(encoder_outputs=(states[None],), decoder_input_ids=ids, use_cache=False)


class _Texts(NamedTuple):
    """Of a batch of trees (B, T): which places are trunk; which tokens the decoder reads; their places in its texts, 1 behind the start."""

    trunk: Tensor
    kept: Tensor
    position: Tensor


def _read(batch: Batch) -> _Texts:
    """Branches only as far as they are asked about. Raises ConfigError for a question about a trunk's inside."""
    branch = batch["branch"]
    trunk, width = branch == 0, branch.shape[1]
    columns = torch.arange(width, device=branch.device)
    asked = torch.zeros(branch.shape, dtype=torch.bool, device=branch.device)
    asked.view(-1)[batch["at"]] = True
    last = torch.where(trunk, columns, -1).amax(1)  # (B,)
    if (asked & (branch <= 0) & (columns != last[:, None])).any():
        raise ConfigError('model kind "seq2seq" says what follows a text, not what stands in it: use a task that asks about branches, or kind "causal"')
    until = torch.full((len(branch), 1 + max(0, int(branch.max()))), -1, device=branch.device)
    until = until.scatter_reduce(1, branch.clamp(min=0), torch.where(asked, columns, -1), "amax")  # last column asked about, per branch
    kept = (branch > 0) & (columns <= until.gather(1, branch.clamp(min=0)))
    return _Texts(trunk, kept, batch["position_ids"] - trunk.sum(1, keepdim=True) + 1)


def _with_end(ids: Tensor, trunk: Tensor, *, end: int, padding: int) -> tuple[Tensor, Tensor]:
    """The trunks (B, S) padded on the right, each with the end that an encoder's tokenizer would write where there is none, and their mask."""
    length = trunk.sum(1)
    made = torch.full((len(ids), 1 + int(length.max())), padding, device=ids.device)
    made[trunk.nonzero().T[0], trunk.cumsum(1)[trunk] - 1] = ids[trunk]
    before = length[:, None] - 1
    last = before + ((before < 0) | (made.gather(1, before.clamp(min=0)) != end)).long()
    made.scatter_(1, last, end)
    return made, (torch.arange(made.shape[1], device=ids.device) <= last).long()


def _biases(decoder: nn.Module) -> list[Any]:
    """The attentions that add a bias for distances between columns."""
    return [part for part in decoder.modules() if getattr(part, "has_relative_attention_bias", False) and hasattr(part, "compute_bias")]


class _Distances:
    """Inside, a decoder's biases are those of distances between `positions` (B, Q), not between columns. To be entered more than once."""

    def __init__(self, decoder: nn.Module, positions: Tensor) -> None:
        self._attentions = _biases(decoder)
        self._positions = positions

    def __enter__(self) -> None:
        for attention in self._attentions:
            attention.compute_bias = partial(self._bias, attention.compute_bias)

    def __exit__(self, *_: object) -> None:
        for attention in self._attentions:
            del attention.compute_bias

    def _bias(self, of_columns: Callable[..., Tensor], *_: Any, **__: Any) -> Tensor:
        """(B, heads, Q, Q), taken from the library's for columns (1, heads, P, P)."""
        longest = 1 + int(self._positions.max())
        table = of_columns(longest, longest)[0]
        return table[:, self._positions[:, :, None], self._positions[:, None, :]].transpose(0, 1)


class _Wide(nn.Linear):
    """A product that half precision cannot overflow: of each row as it is after division by a power of two, which the float32 result gets back.

    T5's feed-forward layers leave float16's range in trained models; a product in float32, as transformers keeps it, takes 8 times as long on a T4.
    """

    def forward(self, states: Tensor) -> Tensor:
        """(…, F) → (…, H), float32 where products run in float16."""
        kind = states.device.type
        runs_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        if runs_in != torch.float16:
            return super().forward(states)
        with torch.no_grad():
            largest = states.float().abs().amax(-1, keepdim=True)
            exponent = torch.frexp(largest).exponent.clamp(min=0)
            scale = torch.ldexp(torch.ones_like(largest), exponent)  # not ldexp of the states: its gradient is 0 in torch 2.13
        return super().forward((states.float() / scale).half()).float() * scale


def _widened(backbone: Any) -> Any:
    """The backbone with feed-forward layers that float16 cannot overflow; the same in float32."""
    for module in backbone.modules():
        if isinstance(getattr(module, "wo", None), nn.Linear):
            module.wo.__class__ = _Wide
            if hasattr(module, "wi_1"):  # the gate's product, too, is then one of float32
                module.wi_1.register_forward_hook(lambda _, __, out: out.float() if out.dtype == torch.float16 else out)
    return backbone


def _settings(folder: Path) -> PretrainedConfig:
    """The configuration of an encoder-decoder folder. Raises BundleError."""
    config, path = read_config(folder), Path(folder) / _CONFIG
    if not config.is_encoder_decoder:
        raise BundleError(f'{path}: model type {config.model_type!r} has no encoder and decoder: use model.kind = "causal" or "encoder"')
    for name in ("eos_token_id", "decoder_start_token_id"):
        if getattr(config, name, None) is None:
            raise BundleError(f"{path}: names no {name}: take it from the checkpoint's own config.json (T5: eos_token_id 1, decoder_start_token_id 0)")
    return _scaled_as_asked(config, json.loads(path.read_text(encoding="utf-8")))


def _scaled_as_asked(config: PretrainedConfig, values: dict[str, Any]) -> PretrainedConfig:
    """The configuration with what its values say about scaling the decoder's states: transformers 5.0 scales them in T5 1.1 and Flan-T5, too."""
    if hasattr(config, "scale_decoder_outputs"):
        config.scale_decoder_outputs = values.get("scale_decoder_outputs", values.get("tie_word_embeddings")) is not False
    return config


def _random(kind: Any, config: PretrainedConfig) -> Any:
    """The architecture a configuration describes, with random weights. Raises ConfigError."""
    return _widened(draw_backbone(kind, config))


def _loaded(kind: Any, source: Path, config: PretrainedConfig) -> Any:
    """The weights of a folder. Raises BundleError."""
    made = read_backbone(kind, source, config, dtype=torch.float32)
    for name, of in _tied(made):  # transformers 5.0 takes what a file has twice for two tensors
        if (mine := made.get_parameter(name)) is not (its := made.get_parameter(of)) and torch.equal(mine, its):
            _assign(made, name, its)
    return _widened(made)


def _tied(backbone: Any) -> list[tuple[str, str]]:
    """Parameters that the family has under two names: (name, the one it is tied to)."""
    return list(backbone.get_expanded_tied_weights_keys(all_submodels=True).items())


def _untie(backbone: Any, names: set[str]) -> None:
    """Give the vocabulary's head a tensor of its own where a saved model has one beside the embeddings (T5 1.1, Flan-T5, mT5)."""
    tied = {name for pair in _tied(backbone) for name in pair}
    there = {name for name in tied if f"backbone.{name}" in names}
    if _OWN_HEAD in there and len(there) > 1:
        _assign(backbone, _OWN_HEAD, nn.Parameter(backbone.get_parameter(_OWN_HEAD).detach().clone()))


def _assign(backbone: Any, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(backbone.get_submodule(path), last, parameter)


def _names_in(folder: Path) -> set[str]:
    """The tensors of a saved model. What cannot be read is `load_weights`' to say."""
    names: set[str] = set()
    for path in Path(folder).glob("model*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                names |= set(file.keys())
        except Exception:  # safetensors raises unrelated types for damaged files
            return set()
    return names


def _first(ids: int | list[int]) -> int:
    return ids[0] if isinstance(ids, list) else ids
