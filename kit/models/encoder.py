"""Any Hugging Face encoder folder with a pooling and a linear head. Knows no task; `gives` follows from the pooling.

Loads from local files only, never remote code. With `pooling = "none"` the head reads every token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from kit.errors import BundleError, ConfigError, nearest
from kit.models.checkpoint import load_weights, save_weights
from kit.models.pooling import POOLINGS
from kit.models.tokens import HFTokens, train_wordpiece

disable_progress_bar()  # transformers' bar for reading weights, which also fills logs

Batch = dict[str, Tensor]
_CONFIG = "config.json"
_SHOWN = 300  # characters of a library's error
_LAYERS = ("encoder.layer", "transformer.layer", "layers", "encoder.layers")  # where encoder families keep their layers


class Encoder(nn.Module):
    """Backbone → pooling → dropout → linear: (R, outputs), or (R, T, outputs) without pooling."""

    def __init__(self, config: PretrainedConfig, *, outputs: int, pooling: str = "mean", dropout: float = 0.0) -> None:
        super().__init__()
        if pooling != "none" and pooling not in POOLINGS:
            raise ConfigError(f"model.pooling = {pooling!r} is unknown{nearest(pooling, [*POOLINGS, 'none'])}")
        self.backbone = _random_backbone(config)
        pool: Any = None if pooling == "none" else POOLINGS[pooling](config.hidden_size)
        self.pool = pool
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(pool.width if pool else config.hidden_size, outputs)
        self.gives = "row" if self.pool else "token"
        self._takes_types = getattr(config, "type_vocab_size", 0) > 1
        if hasattr(pool, "init_head"):
            pool.init_head(self.head)
        else:
            nn.init.normal_(self.head.weight, std=getattr(config, "initializer_range", 0.02))
            nn.init.zeros_(self.head.bias)

    @classmethod
    def invent(
        cls, folder: Path, texts: Callable[[], Iterable[str]], *, seed: int, config: dict[str, Any], vocab_size: int = 8000
    ) -> None:
        """See kit.models.Model: `config` holds model_type and its settings; the tokenizer is an uncased WordPiece."""
        train_wordpiece(texts(), folder, vocab_size=vocab_size)
        tokens = HFTokens(folder)
        settings = dict(config)
        kind = settings.pop("model_type", None)
        if kind is None:
            raise ConfigError('model.config needs model_type, for example model_type = "deberta-v2"')
        try:
            made = AutoConfig.for_model(kind, vocab_size=len(tokens), pad_token_id=tokens.pad_id, **settings)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ConfigError(f"model.config: {_one_line(error)}") from None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            backbone = _random_backbone(made)
        backbone.save_pretrained(folder)

    @classmethod
    def create(cls, source: Path, *, outputs: int, **options: Any) -> Encoder:
        """See kit.models.Model."""
        config = read_config(source)
        model = cls(config, outputs=outputs, **options)
        if not any(Path(source).glob("*.safetensors")):
            raise BundleError(f"{source}: no .safetensors weights: convert the checkpoint first (pickled weights are never loaded)")
        try:
            model.backbone, found = AutoModel.from_pretrained(
                source, config=config, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # safetensors, json and transformers raise unrelated types for damaged files
            raise BundleError(f"{source}: the backbone's weights cannot be loaded: {_one_line(error)}") from None
        missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))  # a pooler is never used
        if missing:  # transformers fills them with random numbers
            raise BundleError(f"{source}: the weights lack {len(missing)} tensors of the backbone, such as {missing[0]}: take the config.json that belongs to them")
        return model

    @classmethod
    def load(cls, folder: Path, *, outputs: int, **options: Any) -> Encoder:
        """See kit.models.Model."""
        model = cls(read_config(folder), outputs=outputs, **options)
        load_weights(model, folder)
        return model

    @classmethod
    def tokens(cls, folder: Path) -> HFTokens:
        """See kit.models.Model; sequences are limited to the positions that config.json names, where it is there."""
        return HFTokens(folder, limit=position_limit(read_config(folder)))

    def save(self, folder: Path) -> None:
        """Write config.json and the weights of backbone, pooling and head."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_weights(self, folder)
        (Path(folder) / _CONFIG).write_text(self.backbone.config.to_json_string(use_diff=False), encoding="utf-8")

    def forward(self, batch: Batch) -> Tensor:
        """(R, T) ids → (R, outputs) or (R, T, outputs), float32."""
        types = {"token_type_ids": batch["token_type_ids"]} if self._takes_types else {}
        hidden = self.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **types).last_hidden_state
        pooled = self.pool(hidden, batch) if self.pool else hidden
        return self.head(self.dropout(pooled).to(self.head.weight.dtype)).float()

    @property
    def input_embeddings(self) -> nn.Parameter:
        """The word embeddings (V, H)."""
        return self.backbone.get_input_embeddings().weight

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """[everything of the backbone outside its layers, layer 1 … L, pooling and head].

        The first group so holds the embeddings and also DeBERTa's relative-position table, encoder LayerNorm and convolution.
        """
        layers = [list(layer.parameters()) for layer in self._layers()]
        inside = {id(parameter) for layer in layers for parameter in layer}
        bottom = [parameter for parameter in self.backbone.parameters() if id(parameter) not in inside]
        top = [parameter for name, parameter in self.named_parameters() if not name.startswith("backbone.")]
        return [bottom, *layers, top]

    def checkpoint_activations(self) -> None:
        """See kit.models.Model."""
        old_name = "gradient_checkpointing_enable"  # deprecated in transformers 5, before it the only one
        enable = getattr(self.backbone, "activation_checkpointing_enable", None) or getattr(self.backbone, old_name)
        enable({"use_reentrant": False})

    def reinit_layers(self, count: int) -> None:
        """See kit.models.Model. Raises ConfigError where there are fewer layers."""
        layers = self._layers()
        if count > len(layers):
            raise ConfigError(f"train.reinit_layers = {count}: the encoder has {len(layers)} layers")
        for layer in layers[len(layers) - count :]:
            for parameter in layer.parameters():
                parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # else transformers keeps what it loaded
            layer.apply(self.backbone._init_weights)

    def _layers(self) -> nn.ModuleList:
        for path in _LAYERS:
            module: Any = self.backbone
            for name in path.split("."):
                module = getattr(module, name, None)
            if isinstance(module, nn.ModuleList):
                return module
        raise ConfigError(f"model type {self.backbone.config.model_type!r} keeps its layers in an unknown place (tried {', '.join(_LAYERS)})")


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder. Raises BundleError; refuses remote code."""
    path = Path(folder) / _CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read: {error}: give a Hugging Face encoder folder") from None
    if not isinstance(values, dict):
        raise BundleError(f"{path}: holds no settings: give a Hugging Face encoder folder")
    if "auto_map" in values:
        raise BundleError(f"{path}: asks for remote code (auto_map), which never runs here: use a model of the transformers library")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise BundleError(f"{path}: {_one_line(error)}") from None
    return config


def position_limit(config: PretrainedConfig) -> int:
    """The longest sequence the model has positions for (RoBERTa's positions start after the padding id)."""
    offset = (config.pad_token_id or 0) + 1 if config.model_type in {"roberta", "xlm-roberta", "camembert"} else 0
    return int(getattr(config, "max_position_embeddings", 512)) - offset


def _random_backbone(config: PretrainedConfig) -> Any:
    """The architecture a configuration describes. Raises ConfigError where its sizes contradict each other."""
    try:
        return AutoModel.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.config of a {config.model_type!r} model: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """The error's text, shortened to what a line holds."""
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
