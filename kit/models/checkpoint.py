"""Weights ↔ folder, safetensors only, sharded over 5 GB. Does not know what the model is.

A checkpoint folder holds model.safetensors (or shards with an index); what else is in it is its model's business.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import save_torch_model
from safetensors.torch import load_file
from torch import nn

from kit.errors import BundleError

_PATTERN = "model{suffix}.safetensors"
_SHOWN = 300  # characters of a library's error


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write all parameters and buffers of the model."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_model(model, folder, filename_pattern=_PATTERN)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill the model from a folder that `save_weights` wrote; every name and shape must match. Raises BundleError."""
    folder = Path(folder)
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        raise BundleError(f"{folder}: no model*.safetensors: train the fold again, or check which folder is meant")
    try:
        state = {name: tensor for path in shards for name, tensor in load_file(path).items()}
        model.load_state_dict(state)
    except Exception as error:  # safetensors and torch raise unrelated types for damaged and mismatched files
        reason = " ".join(str(error).split())[:_SHOWN]
        raise BundleError(f"{folder}: the weights do not fit the model or are damaged: {reason}") from None
