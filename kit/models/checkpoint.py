"""Weights ↔ folder, safetensors only, sharded over 5 GB. Does not know what the model is.

A checkpoint folder holds model.safetensors (or shards with an index); what else is in it is its model's business. A tensor that a model
has under several names (tied weights) is written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_model, save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from kit.errors import BundleError

_PATTERN = "model{suffix}.safetensors"
_SHOWN = 300  # characters of a library's error


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write all parameters and buffers of the model, tied weights under the first of their names: of the embedding, not of the head."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    later = [name for names in _tied(model) for name in names[1:]]
    save_torch_model(model, folder, filename_pattern=_PATTERN, shared_tensors_to_discard=later)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill the model from a folder that `save_weights` wrote; every name and shape must match, of tied weights one name. Raises BundleError."""
    state = _read(folder)
    try:
        model.load_state_dict(_with_tied(model, state))
    except Exception as error:  # torch raises unrelated types for what does not fit
        raise _misfit(folder, error) from None


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training can change, by name: the parameters that need gradients, and the buffers. Frozen weights are where the model came from."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    passing = {  # not asked of state_dict, which unpacks quantised weights
        f"{path}.{name}".lstrip(".") for path, module in model.named_modules() for name in module._non_persistent_buffers_set
    }
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name not in passing}


def restore_trained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put back what `trained` gave; exactly what training can change in the model must be there. Raises BundleError."""
    own = trained(model)
    if odd := sorted(own.keys() ^ values.keys()):
        lacks = "frozen or missing" if odd[0] in values else "trained"
        raise BundleError(f"{len(odd)} tensors differ, such as {odd[0]}, which is {lacks} in the model")
    if odd := sorted(name for name in own if own[name].shape != values[name].shape):
        raise BundleError(f"{odd[0]} has shape {tuple(values[odd[0]].shape)} instead of {tuple(own[odd[0]].shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(values[name])


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write what training can change, for `load_trained`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(trained(model), folder, filename_pattern=_PATTERN)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put back what `save_trained` wrote; the frozen weights stay as they are. Raises BundleError."""
    try:
        restore_trained(model, _read(folder))
    except BundleError as error:
        raise error if str(folder) in str(error) else _misfit(folder, error) from None


def _read(folder: Path) -> dict[str, Tensor]:
    folder = Path(folder)
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        raise BundleError(f"{folder}: no model*.safetensors: train the fold again, or check which folder is meant")
    try:
        return {name: tensor for path in shards for name, tensor in load_file(path).items()}
    except Exception as error:  # safetensors raises unrelated types for damaged files
        raise _misfit(folder, error) from None


def _misfit(folder: Path, error: Exception) -> BundleError:
    reason = " ".join(str(error).split())[:_SHOWN]
    return BundleError(f"{folder}: the weights do not fit the model or are damaged: {reason}")


def _with_tied(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with every name of the model's tied weights; only one of each is in a file. Raises ValueError where two differ."""
    filled = dict(state)
    for tied in _tied(model):
        there = [name for name in tied if name in state]
        if odd := [name for name in there[1:] if not torch.equal(state[name], state[there[0]])]:
            raise ValueError(f"{there[0]} and {odd[0]} are tied in the model, but differ in the file")
        filled |= {name: state[there[0]] for name in tied if there}
    return filled


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of every tensor, in the model's order; tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())
