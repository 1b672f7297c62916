"""Any Hugging Face encoder folder with a pooling and a linear head. Knows no task; `gives` follows from the pooling.

Loads from local files only, never remote code. With `pooling = "none"` the head reads every token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from kit.packing import hidden_states

disable_progress_bar()  # transformers' bar for reading weights, which also fills logs

Batch = dict[str, Tensor]
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_SHOWN = 300  # characters of a library's error
_LAYERS = ("encoder.layer", "transformer.layer", "layers", "encoder.layers", "h", "block")  # where families keep their layers


class Encoder(nn.Module):
    """Backbone → pooling → dropout → linear: (R, outputs), or (R, T, outputs) without pooling."""

    def __init__(self, config: PretrainedConfig, *, outputs: int, pooling: str = "mean", dropout: float = 0.0) -> None:
        super().__init__()
        if pooling != "none" and pooling not in POOLINGS:
            raise ConfigError(f"model.pooling = {pooling!r} is unknown{nearest(pooling, [*POOLINGS, 'none'])}")
        self.backbone = draw_backbone(AutoModel, config)
        pool: Any = None if pooling == "none" else POOLINGS[pooling](config.hidden_size, config.num_hidden_layers)
        self.pool = pool
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(pool.width if pool else config.hidden_size, outputs)
        self.gives = "row" if self.pool else "token"
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
        made = make_config(config, vocab_size=len(tokens), pad_token_id=tokens.pad_id)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            draw_backbone(AutoModel, made).save_pretrained(folder)

    @classmethod
    def create(cls, source: Path, *, outputs: int, **options: Any) -> Encoder:
        """See kit.models.Model."""
        config = read_config(source)
        model = cls(config, outputs=outputs, **options)
        model.backbone = read_backbone(AutoModel, source, config, but="pooler.", dtype=torch.float32)  # a pooler is never used
        return model

    @classmethod
    def load(cls, folder: Path, *, outputs: int, **options: Any) -> Encoder:
        """See kit.models.Model."""
        model = cls(read_config(folder), outputs=outputs, **options)
        load_weights(model, folder)
        return model

    @classmethod
    def tokens(cls, folder: Path) -> HFTokens:
        """See kit.models.Model; sequences are limited to the positions that config.json names, if the model has any: DeBERTa's are distances."""
        config = read_config(folder)
        relative = config.model_type == "deberta-v2" and config.relative_attention and not config.position_biased_input
        return read_tokens(folder, config, limit=position_limit(config), stretches=relative)

    def save(self, folder: Path) -> None:
        """Write config.json and the weights of backbone, pooling and head."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_weights(self, folder)
        (Path(folder) / _CONFIG).write_text(self.backbone.config.to_json_string(use_diff=False), encoding="utf-8")

    def forward(self, batch: Batch) -> Tensor:
        """(R, T) ids → (R, outputs) or (R, T, outputs), float32."""
        if self.pool is None:
            pooled = hidden_states(self.backbone, batch)[-1]
        else:
            pooled = self.pool(hidden_states(self.backbone, batch, every=self.pool.needs_layers, first=self.pool.needs_first), batch)
        return self.head(self.dropout(pooled).to(self.head.weight.dtype)).float()

    @property
    def input_embeddings(self) -> nn.Parameter:
        """The word embeddings (V, H)."""
        return self.backbone.get_input_embeddings().weight

    def rows_read(self, batch: Batch) -> Tensor:
        """See kit.models.Model."""
        return torch.unique(batch["input_ids"])

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """[everything of the backbone outside its layers, layer 1 … L, pooling and head].

        The first group so holds the embeddings and also DeBERTa's relative-position table, encoder LayerNorm and convolution.
        """
        return layer_groups(self, [self.backbone])

    def checkpoint_activations(self) -> None:
        """See kit.models.Model."""
        checkpoint_activations(self.backbone)

    def reinit_layers(self, count: int) -> None:
        """See kit.models.Model. Raises ConfigError where there are fewer layers."""
        reinit_layers(self.backbone, [*layers_of(self.backbone)], count)


def layers_of(backbone: Any) -> nn.ModuleList:
    """The layers of an encoder or decoder, bottom → top. Raises ConfigError for a family that keeps them in an unknown place."""
    for path in _LAYERS:
        module: Any = backbone
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.ModuleList):
            return module
    raise ConfigError(f"model type {backbone.config.model_type!r} keeps its layers in an unknown place (tried {', '.join(_LAYERS)})")


def layer_groups(model: nn.Module, stacks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """[everything of the stacks outside their layers, layer 1 … L of the first stack, of the next …, the rest of the model]: all parameters, each once."""
    layers = [list(layer.parameters()) for stack in stacks for layer in layers_of(stack)]
    inside = {id(parameter) for layer in layers for parameter in layer}
    bottom = [parameter for parameter in nn.ModuleList(stacks).parameters() if id(parameter) not in inside]
    below = inside | {id(parameter) for parameter in bottom}
    return [bottom, *layers, [parameter for parameter in model.parameters() if id(parameter) not in below]]


def checkpoint_activations(backbone: Any, **options: Any) -> None:
    """Recompute activations in the backward pass. options: of torch.utils.checkpoint."""
    old_name = "gradient_checkpointing_enable"  # deprecated in transformers 5, before it the only one
    enable = getattr(backbone, "activation_checkpointing_enable", None) or getattr(backbone, old_name)
    enable({"use_reentrant": False, **options})


def reinit_layers(backbone: Any, layers: Sequence[nn.Module], count: int) -> None:
    """Draw the weights of the top `count` layers anew, as the backbone's library initialises them. Raises ConfigError where there are fewer."""
    if count > len(layers):
        raise ConfigError(f"train.reinit_layers = {count}: the model has {len(layers)} layers")
    for layer in layers[len(layers) - count :]:
        for parameter in layer.parameters():
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # else transformers keeps what it loaded
        layer.apply(backbone._init_weights)


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder. Raises BundleError; refuses remote code."""
    path = Path(folder) / _CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read: {error}: give a Hugging Face model folder") from None
    if not isinstance(values, dict):
        raise BundleError(f"{path}: holds no settings: give a Hugging Face model folder")
    if "auto_map" in values:
        raise BundleError(f"{path}: asks for remote code (auto_map), which never runs here: use a model of the transformers library")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise BundleError(f"{path}: {one_line(error)}") from None
    return config


def position_limit(config: PretrainedConfig) -> int:
    """The longest sequence the model has positions for (RoBERTa's positions start after the padding id)."""
    offset = (config.pad_token_id or 0) + 1 if config.model_type in {"roberta", "xlm-roberta", "camembert"} else 0
    return int(getattr(config, "max_position_embeddings", 512)) - offset


def read_tokens(folder: Path, config: PretrainedConfig, *, limit: int, stretches: bool = False) -> HFTokens:
    """The tokens of a model folder. Raises BundleError where they are more than the model knows."""
    tokens, known = HFTokens(folder, limit=limit, stretches=stretches), config.get_text_config().vocab_size
    if len(tokens) > known:
        raise BundleError(f"{folder}: the tokenizer has {len(tokens)} tokens and the model {known}: take both from one checkpoint")
    return tokens


def make_config(settings: Mapping[str, Any], **more: Any) -> PretrainedConfig:
    """The configuration of a model to invent, from the recipe's model.config. more: what its tokenizer decides. Raises ConfigError."""
    if "model_type" not in settings:
        raise ConfigError('model.config needs model_type, for example model_type = "deberta-v2", "llama" or "t5"')
    others = {name: value for name, value in settings.items() if name != "model_type"}
    try:
        return AutoConfig.for_model(settings["model_type"], **more, **others)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {one_line(error)}") from None


def draw_backbone(kind: Any, config: PretrainedConfig, **options: Any) -> Any:
    """The architecture a configuration describes, with random weights. kind: one of transformers' Auto classes. Raises ConfigError."""
    try:
        return kind.from_config(config, trust_remote_code=False, **options)
    except (ValueError, TypeError, KeyError) as error:  # sizes that contradict each other, or another kind of architecture
        raise ConfigError(f"model.config: model type {config.model_type!r} does not make a model of this kind: {one_line(error)}") from None


def read_backbone(kind: Any, source: Path, config: PretrainedConfig, *, but: str = "", **options: Any) -> Any:
    """The weights of a folder. kind: one of transformers' Auto classes. but: begins the names of tensors that may lack. Raises BundleError."""
    there = {path.name for path in Path(source).glob("*.safetensors")}
    if not there:
        raise BundleError(f"{source}: no .safetensors weights: convert the checkpoint first (pickled weights are never loaded)")
    if missing := sorted(_shards(Path(source) / _INDEX) - there):
        raise BundleError(f"{source}: {missing[0]} is missing, which {_INDEX} names: copy all files of the checkpoint")
    local = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        made, found = kind.from_pretrained(source, config=config, output_loading_info=True, **local, **options)
    except Exception as error:  # safetensors, json and transformers raise unrelated types for damaged files
        raise BundleError(f"{source}: the weights cannot be loaded: {one_line(error)}: copy the checkpoint again, with its own {_CONFIG}") from None
    if lacking := sorted(name for name in found["missing_keys"] if not (but and name.startswith(but))):  # transformers fills them with random numbers
        raise BundleError(f"{source}: the weights lack {len(lacking)} tensors of the model, such as {lacking[0]}: take the {_CONFIG} that belongs to them")
    return made


def _shards(index: Path) -> set[str]:
    """The files that an index names, if there is one."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{index}: cannot be read: {one_line(error)}: copy the checkpoint again") from None


def one_line(error: Exception) -> str:
    """An error's text, shortened to what a line holds."""
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
