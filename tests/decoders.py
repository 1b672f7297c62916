"""Small real decoders of every family that the kit names, and batches of trees written by hand. Knows no test."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from kit.models.prefix import ATTENTION

VOCABULARY = 120
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "model_type": "llama"},
    "mistral": {**_GROUPED, "model_type": "mistral", "sliding_window": 6},
    "phi3": {**_SIZES, "model_type": "phi3", "num_key_value_heads": 4, "sliding_window": 7},
    "qwen2": {**_GROUPED, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**_GROUPED, "model_type": "qwen3", "head_dim": 8},
    "gemma": {**_SIZES, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {**_GROUPED, "model_type": "gemma2", "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3": {**_GROUPED, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.3,
             "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {**_SIZES, "model_type": "gpt_neox"},
    "gpt_oss": {**_GROUPED, "model_type": "gpt_oss", "head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {**_SIZES, "model_type": "granite", "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "cohere": {**_GROUPED, "model_type": "cohere", "logit_scale": 2.0},
}  # fmt: skip
"""Settings of decoder families: 32 dimensions, 3 layers; windows, shared heads, soft caps and scales where the family has them."""


def config(family: str) -> Any:
    """The configuration of a family."""
    settings = dict(FAMILIES[family])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def stock(family: str, *, seed: int = 0) -> Any:
    """The library's model with its plainest attention: what others are compared with."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(family), attn_implementation="eager").eval()


def shared(reference: Any, family: str) -> Any:
    """The same weights with the attention that knows trees."""
    made = AutoModelForCausalLM.from_config(config(family), attn_implementation=ATTENTION).eval()
    made.load_state_dict(reference.state_dict())
    return made


class Trees(NamedTuple):
    """texts: per row its trunk and branches. batch: as kit.models.prefix wants it, every token of every branch asked for."""

    texts: list[tuple[Tensor, list[Tensor]]]
    batch: dict[str, Tensor]


def trees(rows: int, branches: int, *, seed: int = 0, left: bool = False) -> Trees:
    """Random texts of unequal lengths: trunks of 5 to 20 tokens, branches of 1 to 9. left: padded on the left."""
    rng = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (int(torch.randint(low, high, (), generator=rng)),), generator=rng)

    texts = [(text(5, 21), [text(1, 10) for _ in range(branches)]) for _ in range(rows)]
    width = max(len(trunk) + sum(map(len, own)) for trunk, own in texts)
    batch = {name: torch.full((rows, width), value) for name, value in (("input_ids", 0), ("position_ids", 0), ("branch", -1))}
    at, token = [], []
    for row, (trunk, own) in enumerate(texts):
        column = width - len(trunk) - sum(map(len, own)) if left else 0
        end = column + len(trunk)
        for number, part in enumerate([trunk, *own]):
            place = slice(column, column + len(part))
            begin = len(trunk) if number else 0
            batch["input_ids"][row, place], batch["branch"][row, place] = part, number
            batch["position_ids"][row, place] = torch.arange(begin, begin + len(part))
            if number:
                before = [end - 1, *range(column, column + len(part) - 1)]
                at += [row * width + place for place in before]
                token.append(part)
            column += len(part)
    return Trees(texts, {**batch, "at": torch.tensor(at), "token": torch.cat(token)})


@torch.no_grad()
def one_by_one(model: Any, texts: list[tuple[Tensor, list[Tensor]]]) -> Tensor:
    """Log-probabilities of every token of every branch, each branch in a forward of its own."""
    found = []
    for trunk, branches in texts:
        for branch in branches:
            logits = model(input_ids=torch.cat([trunk, branch])[None], use_cache=False).logits[0].float()
            found.append(logits.log_softmax(-1)[len(trunk) - 1 : -1].gather(-1, branch[:, None])[:, 0])
    return torch.cat(found)


def in_four_bits(source: Path, folder: Path, **settings: Any) -> Path:
    """What transformers saves of a folder that it has loaded in four bits."""
    pytest.importorskip("bitsandbytes")
    asked = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32, **settings}
    model = AutoModelForCausalLM.from_pretrained(
        source, device_map={"": "cpu"}, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **asked)
    )
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder
