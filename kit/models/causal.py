"""Any Hugging Face decoder folder (Llama, Mistral, Phi-3, Qwen, Gemma, GPT-2 …) that says how likely tokens are, or scores what it has read.

Reads batches of trees (kit.models.prefix): what several texts share is computed once, and the vocabulary is looked at only where it is asked
for. Loads from local files only, never remote code. Knows no task and no prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from kit import manifest, runtime
from kit.errors import BundleError, ConfigError
from kit.models import adapters
from kit.models.checkpoint import load_weights, save_weights
from kit.models.encoder import checkpoint_activations, draw_backbone, make_config, position_limit, read_backbone, read_config, read_tokens
from kit.models.language import LanguageModel, fused
from kit.models.prefix import ATTENTION, Sharing, check_sharing, hidden_states
from kit.models.tokens import HFTokens, train_byte_level

disable_progress_bar()

Batch = dict[str, Tensor]
_CONFIG = "config.json"
_KINDS = {"words": AutoModelForCausalLM, "score": AutoModel}


class Causal(LanguageModel):
    """Decoder → what kit.models.language says of its states.

    quantise: "nf4" holds the decoder in four bits. adapter: settings of a LoRA, see kit.models.adapters; without one, all weights are trained.
    precision: the type in which a decoder that is not trained is held.
    """

    words = "next_token"
    _base: adapters.Base

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        outputs: int,
        head: str = "words",
        sharing: Sharing = "tree",
        others: bool = False,
        dropout: float = 0.0,
        quantise: Literal["none", "nf4"] = "none",
        adapter: dict[str, Any] | None = None,
        precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    ) -> None:
        if quantise != "none" and adapter is None:
            raise ConfigError(f'model.quantise = "{quantise}", but four-bit weights cannot be trained: add [model.adapter], or set model.quantise = "none"')

        def backbone() -> Any:
            with init_empty_weights() if adapter is not None else nullcontext():  # those of an adapter's base are read, never drawn
                return fused(draw_backbone(_KINDS[head], config, attn_implementation=ATTENTION))

        super().__init__(backbone, config, outputs=outputs, head=head, others=others, dropout=dropout)
        self.sharing = sharing
        self.adapter = adapter
        self._quantise, self._precision = quantise, precision
        self._checked = False

    @property
    def decoder(self) -> Any:
        """See kit.models.language.LanguageModel."""
        return self.backbone.get_decoder() if self.has_words else self.backbone

    @property
    def stacks(self) -> list[nn.Module]:
        """See kit.models.language.LanguageModel."""
        return [self.decoder]

    def states(self, batch: Batch) -> Tensor:
        """See kit.models.language.LanguageModel. Raises ConfigError for a family whose texts cannot share a prefix."""
        if not self._checked:
            check_sharing(self.decoder, batch)
            self._checked = True
        return hidden_states(self.decoder, batch, self.sharing)

    def run(self, ids: Tensor, states: Tensor) -> Any:
        """See kit.models.language.LanguageModel."""
        return self.backbone(input_ids=ids, use_cache=False)

    @classmethod
    def invent(
        cls, folder: Path, texts: Callable[[], Iterable[str]], *, seed: int, config: dict[str, Any], vocab_size: int = 8000
    ) -> None:
        """See kit.models.Model: `config` holds model_type and its settings; the tokenizer is a byte-level BPE."""
        train_byte_level(texts(), folder, vocab_size=vocab_size)
        tokens = HFTokens(folder)
        special = {"pad_token_id": tokens.pad_id, "bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id}
        made = make_config(config, vocab_size=len(tokens), **special)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            draw_backbone(AutoModelForCausalLM, made, attn_implementation=ATTENTION).save_pretrained(folder)

    @classmethod
    def create(cls, source: Path, *, outputs: int, **options: Any) -> Causal:
        """See kit.models.Model."""
        model = cls._on(source, outputs, options)
        if model.adapter is not None:
            adapters.attach(model.backbone, model.adapter, seed=torch.initial_seed() % 2**32)
        return model

    @classmethod
    def load(cls, folder: Path, *, outputs: int, base: Path | None = None, **options: Any) -> Causal:
        """See kit.models.Model."""
        if not options.get("adapter"):
            model = cls(read_config(folder), outputs=outputs, **options)
            load_weights(model.backbone if model.has_words else model, folder)
            return model
        if base is None:
            raise BundleError(f"{folder}: holds an adapter only, and its base is not known: mount the bundle that model.source names")
        model = cls.create(base, outputs=outputs, **options)
        model.reload(folder)
        return model

    def reload(self, folder: Path) -> None:
        """Put another fit's adapter, and its head, in place of its own: the base stays. Raises BundleError."""
        adapters.load_adapter(self.backbone, folder, base=self._base)
        if not self.has_words:
            load_weights(self.head, folder)

    @classmethod
    def frozen(cls, source: Path, *, sharing: Sharing, quantise: Literal["none", "nf4"], precision: str) -> Causal:
        """The decoder in a folder to be scored as it is, held in four bits or in `precision`."""
        return cls._on(source, 0, {"sharing": sharing, "quantise": quantise, "precision": precision, "adapter": {}})

    @classmethod
    def _on(cls, source: Path, outputs: int, options: dict[str, Any]) -> Causal:
        """On the weights of a folder."""
        config = read_config(source)
        model = cls(config, outputs=outputs, **options)
        if model.adapter is None and getattr(config, "quantization_config", None):
            raise ConfigError(f"{source}: its weights are quantised and cannot be trained: add [model.adapter], or take the folder in full precision")
        held: dict[str, Any] = {"dtype": torch.float32}
        if model.adapter is not None:
            chosen = runtime.choose(model._precision)
            held = adapters.quantised_loading(model._quantise, dtype=chosen.dtype, device=chosen.device)
        model.backbone = fused(read_backbone(_KINDS["words" if model.has_words else "score"], source, config, attn_implementation=ATTENTION, **held))
        if model.adapter is not None:
            adapters.guard(model.backbone)
            model._base = base_of(source)
        return model

    @classmethod
    def tokens(cls, folder: Path) -> HFTokens:
        """See kit.models.Model; sequences are limited to the positions that config.json names."""
        config = read_config(folder)
        return read_tokens(folder, config, limit=position_limit(config))

    def save(self, folder: Path) -> None:
        """Write config.json and the weights: a decoder as its library reads it, one with a new head, or an adapter (and a new head) only."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.adapter is None:
            save_weights(self.backbone if self.has_words else self, folder)
        else:
            adapters.save_adapter(self.backbone, folder, base=self._base)
            if not self.has_words:
                save_weights(self.head, folder)
        (Path(folder) / _CONFIG).write_text(self.backbone.config.to_json_string(use_diff=False), encoding="utf-8")

    def checkpoint_activations(self) -> None:
        """See kit.models.Model."""
        checkpoint_activations(self.backbone)


def base_of(source: Path) -> adapters.Base:
    """What an adapter says of the weights it belongs to: a digest of their files, from the manifest where there is one."""
    bundle = manifest.read(source) if (Path(source) / manifest.FILE).is_file() else None
    files = bundle.files if bundle else None
    hashes = [[path.name, files[path.name][0] if files else manifest.sha256(path)] for path in sorted(Path(source).glob("*.safetensors"))]
    return adapters.Base(bundle.name if bundle else Path(source).name, hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16])
