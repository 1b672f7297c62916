"""Weights of any known layout → safetensors files, none above a size. Owns torch's pickles: read without running what is in them. Knows no model.

Files are mapped into memory, and written one shard after the other, so that a conversion holds about one shard.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from kit.errors import BundleError, ConfigError
from kit.manifest import write_atomically
from kit.vendor.tokenizer import read_json

if TYPE_CHECKING:
    import torch

MODEL, ADAPTER = "model", "adapter_model"
_SAFE = ".safetensors"
_LAYOUTS = {
    MODEL: (("model", _SAFE), ("pytorch_model", ".bin"), ("model", ".bin"), ("pytorch_model", ".pt"), ("model", ".pt")),
    ADAPTER: (("adapter_model", _SAFE), ("adapter_model", ".bin"), ("adapter_model", ".pt")),
}  # (stem, suffix), the first that is there wins
_FOREIGN = {
    ".h5": "TensorFlow: load it with an older transformers and save_pretrained",
    ".msgpack": "Flax: load it with an older transformers and save_pretrained",
    ".gguf": "llama.cpp: take the checkpoint it was made from",
    ".onnx": "ONNX: take the checkpoint it was made from",
    ".ckpt": "a pickle of a training run: load it where it came from and save_pretrained",
    ".pth": "a pickle: load it where it came from and save_pretrained",
    ".pkl": "a pickle: load it where it came from and save_pretrained",
    ".pickle": "a pickle: load it where it came from and save_pretrained",
    ".joblib": "a pickle: load it where it came from and save_pretrained",
}
_NO_PICKLE = ("Unsupported operand", "invalid load key")  # how torch words that a file is no pickle at all
_LFS = b"version https://git-lfs"
_HEADER = 256  # bytes of a file's header for each tensor, beside its name
_MB = 1_000_000


class Weights(NamedTuple):
    """files: of one checkpoint, in order. listing: the index that says which tensor is in which, where there are several."""

    files: tuple[Path, ...]
    listing: Path | None

    @property
    def is_safe(self) -> bool:
        """Whether they are safetensors, so that nothing has to be unpickled."""
        return self.files[0].suffix == _SAFE


class Summary(NamedTuple):
    """parameters: number of values. dtype: the type that most of them have, as safetensors names it."""

    parameters: int
    dtype: str


def find(folder: Path, name: str = MODEL) -> Weights | None:
    """The weights in a folder, safetensors if there are any; none if there are none of any format.

    Raises BundleError where shards and index do not agree, and where there are weights of other formats only.
    """
    for stem, suffix in _LAYOUTS[name]:
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        shards = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
        if single.is_file():
            return _fetched(Weights((single,), None))
        if index.is_file():
            return _fetched(_indexed(index, shards))
        if shards:
            raise BundleError(f"{shards[0]}: a shard, but {index.name} is missing: copy the whole folder again")
    foreign = next((path for path in sorted(folder.iterdir()) if path.suffix in _FOREIGN), None)
    if foreign:
        raise BundleError(f"{foreign}: weights of this kind are not vendored ({_FOREIGN[foreign.suffix]})")
    return None


def vendor(weights: Weights, out: Path, *, name: str = MODEL, shard_mb: int, tied: bool = False) -> list[str]:
    """Write the weights into `out` as safetensors of at most `shard_mb` MB each, and tell what was changed; unchanged files are equal to the byte.

    tied: leave out tensors that are the same memory as an earlier one, for a model that ties them again. Raises BundleError, ConfigError.
    """
    if weights.is_safe:
        _check_safe(weights)
        if all(path.stat().st_size <= shard_mb * _MB for path in weights.files):
            for path in tqdm([*weights.files, *([weights.listing] if weights.listing else [])], desc="weights", unit="file", disable=None):
                shutil.copyfile(path, out / path.name)
            return []
    state = _load(weights)
    dropped = _drop_aliases(state) if tied else []
    written = _write(state, out, name, shard_mb)
    kept = f", without the tied {', '.join(dropped)}" if dropped else ""
    source = weights.listing.name if weights.listing else weights.files[0].name
    return [f"{source} to {len(written)} file{'s' * (len(written) > 1)} of safetensors{kept}"]


def summary(folder: Path) -> Summary:
    """Size and type of the safetensors in a folder, read from their headers."""
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob(f"*{_SAFE}")):
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                view = file.get_slice(key)
                counts[str(view.get_dtype())] += prod(view.get_shape())
    return Summary(counts.total(), counts.most_common(1)[0][0] if counts else "")


# --- what is there ----------------------------------------------------------------------------------------------------------------


def _fetched(weights: Weights) -> Weights:
    """The weights, unless a file is what git leaves in place of a large one."""
    for path in weights.files:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise BundleError(f"{path}: only git-lfs's pointer to the weights: run git lfs pull where it was cloned")
    return weights


def _indexed(index: Path, shards: list[Path]) -> Weights:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise BundleError(f"{index}: has no weight_map: copy the whole folder again")
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise BundleError(f"{index}: names {name!r}, which is not in the folder: copy the whole folder again")
    lost = next((path for path in shards if path.name not in names), None)
    if lost:
        raise BundleError(f"{lost}: a shard that {index.name} does not name: copy the whole folder again")
    return Weights(tuple(index.parent / name for name in names), index)


def _check_safe(weights: Weights) -> None:
    """Every file is whole, and holds the tensors that the index says it does."""
    held = {}
    for path in weights.files:
        with _opened(path) as file:
            held[path.name] = set(file.keys())
    _check_index(weights, held)


def _check_index(weights: Weights, held: Mapping[str, Iterable[str]]) -> None:
    if weights.listing is None:
        return
    for key, name in read_json(weights.listing)["weight_map"].items():
        if key not in held[name]:
            raise BundleError(f"{weights.listing.parent / name}: lacks {key}, which {weights.listing.name} says it holds: copy the whole folder again")


# --- reading and writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose tensors are views of the mapped file. Raises BundleError."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: damaged, or no safetensors file ({_short(error)}): copy it again from where it came") from None


def _load(weights: Weights) -> dict[str, torch.Tensor]:
    """name → tensor, mapped into memory where the format allows."""
    state: dict[str, torch.Tensor] = {}
    held = {}
    for path in tqdm(weights.files, desc="reading weights", unit="file", disable=None):
        part = _read_safe(path) if weights.is_safe else _unpickle(path)
        held[path.name] = set(part)
        state = {**part, **state}
    _check_index(weights, held)
    return state


def _read_safe(path: Path) -> dict[str, torch.Tensor]:
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a torch file, read without running code that may be in it. Raises BundleError."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a protocol that it may not know: what it cannot read is refused below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if not _is_newer_pickle(path) and any(words in str(error) for words in _NO_PICKLE):
            raise BundleError(f"{path}: damaged, or no torch file ({_short(error)}): copy it again from where it came") from None
        raise BundleError(f"{path}: needs arbitrary code to be read (torch's weights_only refuses it): convert it to safetensors where it came from") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise BundleError(f"{path}: damaged, or no torch file ({_short(error)}): copy it again from where it came") from None
    if not isinstance(state, dict) or not state:
        raise BundleError(f"{path}: holds a {type(state).__name__} instead of a state dict: save it with save_pretrained where it came from")
    other = next((key for key, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise BundleError(f"{path}: {other!r} is a {type(state[other]).__name__} and no tensor, so this is no state dict: save it with save_pretrained")
    return dict(state)


def _is_newer_pickle(path: Path) -> bool:
    """Whether it is a pickle of a protocol that torch neither writes nor reads."""
    with open(path, "rb") as file:
        return file.read(2) in (b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _drop_aliases(state: dict[str, torch.Tensor]) -> list[str]:
    """Take out, and name, the tensors that are exactly the memory of an earlier one."""
    first: dict[tuple[object, ...], str] = {}
    dropped = []
    for name, tensor in list(state.items()):
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(place, name) != name:
            dropped.append(name)
            del state[name]
    return dropped


def _write(state: dict[str, torch.Tensor], out: Path, name: str, shard_mb: int) -> list[str]:
    """Write the tensors shard by shard, with the index that transformers reads where there is more than one. Returns the files' names."""
    room = shard_mb * _MB - sum(len(key) + _HEADER for key in state)
    largest = max(state, key=lambda key: state[key].nbytes)
    if state[largest].nbytes > room:
        raise ConfigError(f"--shard-mb {shard_mb} has no room for {largest} of {state[largest].nbytes / _MB:.1f} MB and the header: raise it")
    pattern = name + "{suffix}" + _SAFE
    plan = split_state_dict_into_shards_factory(state, get_storage_size=lambda tensor: tensor.nbytes, filename_pattern=pattern, max_shard_size=room)
    from safetensors.torch import save_file

    for file, keys in tqdm(plan.filename_to_tensors.items(), desc="writing weights", unit="file", disable=None):
        save_file(_apart({key: state[key] for key in keys}), out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": {"total_size": plan.metadata["total_size"]}, "weight_map": plan.tensor_to_filename}
        write_atomically(out / f"{name}{_SAFE}.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    return list(plan.filename_to_tensors)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, contiguous, and copied where they would share memory with an earlier one."""
    end: dict[int, int] = {}
    made = {}
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        whole = tensor.contiguous()
        storage = whole.untyped_storage().data_ptr()
        made[key] = whole.clone() if whole.data_ptr() < end.get(storage, 0) else whole
        end[storage] = max(end.get(storage, 0), whole.data_ptr() + whole.nbytes)
    return made


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:150]
