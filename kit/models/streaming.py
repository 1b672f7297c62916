"""Decoders larger than memory: all rows go through a layer before the next layer is read. Knows no task and no prompt.

Reading: the tensors of a layer, wherever in a folder's safetensors files they lie, are read in large runs into one of two buffers (pinned for
CUDA) by a thread, while the layer in the other buffer works; weights are views of the buffer. One pass reads every byte of the model once.

Running: masks, rotary embeddings and whatever else a layer is called with come from the library's own forward, run anew for every layer and batch
with steps in the places of the layers: those below the one at work hand on what they got, that one runs the layer on the states of the batch, and
there the forward ends. So nothing is kept between layers but states, and no family's forward needs a copy here. Before any work it is tried that
the forward goes through all steps in order and brings states from one to the next untouched; families of which that is not true are refused.

Layers one by one as in AirLLM; many rows per load of a layer, and states that move to disk, as in FlexGen (Sheng et al. 2023).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import queue
import re
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from kit.errors import BundleError, ConfigError
from kit.manifest import write_atomically
from kit.models import adapters
from kit.models.causal import Causal
from kit.models.encoder import layers_of, one_line, read_config
from kit.models.prefix import check_sharing, hidden_states
from kit.models.tokens import FILE as TOKENIZER

Batch = dict[str, Tensor]
OnLayer = Callable[[int, int, float], None]
"""Told after each layer: layers done, layers in all, seconds that the other layers will take by the forecast."""

_CHUNK = 16 << 20  # bytes of one read
_ALIGNED, _PRODUCTS = 64, 16  # bytes: where runs begin, and where tensors must
_ALIGNING = "Force16BytesAlignment"  # transformers 5.0 names it among the changes of tensors, later versions do without
_PLACES = 512  # states that go through the head at one time
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BYTES = "U8"
_FOUR_BITS = re.compile(r"(.+\.weight)\.((?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__(?:nf4|fp4))")  # what belongs to a weight
_CONFIG, _WEIGHTS, _INDEX, _RUN = "config.json", "model.safetensors", "model.safetensors.index.json", "run.json"
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_OF_KIT = "backbone."  # before every name that Causal.save writes
_TEXT = ("input_ids", "position_ids", "branch")
_TOY: Batch = {
    "input_ids": torch.arange(14)[None],
    "position_ids": torch.tensor([[*range(6), *range(6, 10), *range(6, 10)]]),
    "branch": torch.tensor([[0] * 6 + [1] * 4 + [2] * 4]),
    "at": torch.arange(14),
}  # two branches behind a trunk


@dataclass
class Pace:
    """How fast a pass goes, measured while it runs. layer_bytes: mean of a layer. other_bytes: embeddings, head and the rest.

    tokens: padding included, each counted once per layer. compute_s: of the layers alone, reading not counted.
    """

    layers: int
    layer_bytes: float
    other_bytes: int
    read_bytes: int = 0
    read_s: float = 0.0
    tokens: int = 0
    compute_s: float = 0.0

    def seconds(self, tokens: int) -> float:
        """Forecast of a pass of so many tokens, padding included."""
        outside = (self.other_bytes + self.layer_bytes) * self._per_byte  # read while there is nothing to compute
        return outside + self.of_layers(self.layers, tokens)

    def of_layers(self, layers: int, tokens: int) -> float:
        """Forecast of so many layers in the middle of a pass: the slower one of reading and computing hides the other."""
        return layers * max(self.layer_bytes * self._per_byte, tokens * self.compute_s / max(1, self.tokens))

    @property
    def _per_byte(self) -> float:
        return self.read_s / max(1, self.read_bytes)


class LayerStream:
    """A causal language model in a local folder, run layer by layer. Raises BundleError for the folder, ConfigError for its family.

    devices: each holds two layers, or one and a table of words, and takes the next batch when it is done with one. dtype: of the computation; a
    layer that is stored in another is converted when its turn comes, which takes the memory of one more. Linear maps that transformers and
    bitsandbytes saved in four bits are read and held as they are. quantise: "nf4" rounds all others inside layers to four bits when their turn comes,
    for scores as a QLoRA's base gives them; no fewer bytes are read. pace: of the last pass.
    """

    def __init__(
        self,
        folder: Path,
        *,
        devices: Sequence[str | torch.device] = ("cpu",),
        dtype: torch.dtype = torch.float32,
        quantise: Literal["none", "nf4"] = "none",
    ) -> None:
        self._folder, self._dtype, self._quantise = Path(folder), dtype, quantise
        config = read_config(self._folder)
        quantisation = getattr(config, "quantization_config", None)
        if quantisation and not quantisation.get("load_in_4bit"):
            method = quantisation.get("quant_method")
            raise BundleError(f"{self._folder / _CONFIG}: the weights are quantised by {method!r}: take the folder in full precision or in bitsandbytes' four bits")
        config.dtype = dtype
        self._shells = [_Shell(config, torch.device(device), dtype, four_bits=quantise == "nf4") for device in devices]
        shell = self._shells[0]
        self._weights = _weights_of(self._folder, shell)
        _check_tokenizer(self._folder, shell.vocabulary)
        self._units = _Units.of(shell.names, self._weights)
        self._fixed = self._slot(self._units.fixed.size)
        self.pace = self._new_pace()

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self._units.layers)

    @property
    def model_bytes(self) -> int:
        """What one pass reads."""
        return self._units.size

    def score(
        self,
        batches: Sequence[Batch],
        *,
        memory: int | None = None,
        spill: Path | None = None,
        state: Path | None = None,
        on_layer: OnLayer | None = None,
    ) -> list[Tensor]:
        """Of every batch of trees (see kit.models.prefix) the log-probabilities (M,) float32 that it asks for, in one pass.

        memory: bytes that the states of all batches may take; what does not fit is kept in files below `spill`, or in `state`, in half precision.
        state: a folder where all states are saved after every layer; a call that was cut off goes on from there, if it is made again with the same
        batches and memory. It is cleared at the end. Raises ConfigError, BundleError.
        """
        self._check(batches)
        self.pace = self._new_pace()
        if not batches:
            return []
        kept = self._states(batches, memory)
        with ExitStack() as stack:
            if state is not None:
                kept.resume(Path(state), self._fingerprint(batches, memory))
            elif kept.spills:
                if spill is None:
                    raise ConfigError(f"the states of {len(batches)} batches take {kept.size} bytes, but memory = {memory}: name a folder to spill them to")
                Path(spill).mkdir(parents=True, exist_ok=True)
                kept.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=spill, prefix="states-")))
            found = self._run(batches, kept, self.layers, on_layer)
        if state is not None:
            kept.clear()
        return found

    def measure(self, batches: Sequence[Batch], *, layers: int = 2) -> Pace:
        """The pace at which these batches go through the first layers, for a forecast."""
        self._check(batches)
        self.pace = self._new_pace()
        self._run(batches, self._states(batches, None), min(layers, self.layers), None)
        return self.pace

    def _run(self, batches: Sequence[Batch], kept: _States, layers: int, on_layer: OnLayer | None) -> list[Tensor]:
        """Through the first `layers` layers, and through the head if these are all."""
        units, first = self._units, max(0, min(kept.done))
        embed, whole = min(kept.done) < 0, layers == self.layers
        self._fill(self._fixed, units.fixed)
        for shell in self._shells:
            shell.load(self._tensors(self._fixed, units.fixed, shell))
            shell.try_out()
        order = [*[units.embedding] * (embed and not units.tied), *units.layers[first:layers], *[units.head] * whole]
        with ExitStack() as stack:
            slots = self._stream(order, stack)
            if embed:
                self._embed(self._fixed if units.tied else next(slots), batches, kept)
            for number in tqdm(range(first, layers), "layers", initial=first, total=layers, disable=None):
                self._layer(number, next(slots), batches, kept)
                if on_layer is not None:
                    on_layer(number + 1, self.layers, self.pace.of_layers(self.layers - number - 1, _tokens(batches)))
            return self._head(next(slots), batches, kept) if whole else []

    def _embed(self, slot: _Slot, batches: Sequence[Batch], kept: _States) -> None:
        shell, units = self._shells[0], self._units
        name = shell.names.embedding_weight
        tensors = self._tensors(slot, units.fixed if units.tied else units.embedding, shell)
        shell.load_embedding({name: tensors[name]})
        for number, batch in enumerate(batches):
            if kept.done[number] < 0:
                kept.put(number, shell.embed(batch).cpu(), 0)
        shell.forget_embedding()

    def _layer(self, number: int, slot: _Slot, batches: Sequence[Batch], kept: _States) -> None:
        """One layer, for all batches that have not been through it."""
        began = time.perf_counter()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for which, done in enumerate(kept.done):
            if done <= number:
                waiting.put(which)
                self.pace.tokens += batches[which]["input_ids"].numel()
        built = [shell.build(number, self._tensors(slot, self._units.layers[number], shell)) for shell in self._shells]
        if number == 0:
            self._shells[0].try_sharing(built[0])

        def work(shell: _Shell, layer: nn.Module) -> None:
            for which in iter(lambda: _next(waiting), None):
                kept.put(which, shell.layer(number, layer, batches[which], kept.get(which)).cpu(), number + 1)

        _together(work, self._shells, built)
        self.pace.compute_s += time.perf_counter() - began

    def _head(self, slot: _Slot, batches: Sequence[Batch], kept: _States) -> list[Tensor]:
        shell, units = self._shells[0], self._units
        tensors = self._tensors(slot, units.head, shell)
        if units.tied:
            tensors[shell.names.head_weight] = self._tensors(self._fixed, units.fixed, shell)[shell.names.embedding_weight]
        shell.load(tensors)
        found = [shell.finish(kept.get(number).flatten(0, 1)[batch["at"]], batch["token"]) for number, batch in enumerate(batches)]
        shell.forget_head()
        return found

    def _stream(self, units: Sequence[_Unit], stack: ExitStack) -> Iterator[_Slot]:
        """Slots that hold one unit after another; what a slot holds is there until the next is asked for.

        Two take turns. A table of words that is larger than a layer gets one of its own, which goes with it.
        """
        largest = max(unit.size for unit in self._units.layers)
        turns = [self._slot(largest) for _ in range(2)]
        reader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="layers"))

        def start(number: int) -> Future[_Slot]:
            unit = units[number]
            return reader.submit(self._fill, turns[number % 2] if unit.size <= largest else self._slot(unit.size), unit)

        coming = start(0)
        for number in range(1, len(units) + 1):
            ready = coming.result()
            if number < len(units):
                coming = start(number)
            yield ready

    def _fill(self, slot: _Slot, unit: _Unit) -> _Slot:
        began = time.perf_counter()
        self.pace.read_bytes += slot.fill(unit)
        self.pace.read_s += time.perf_counter() - began
        return slot

    def _slot(self, size: int) -> _Slot:
        return _Slot(size, {shell.device for shell in self._shells})

    def _tensors(self, slot: _Slot, unit: _Unit, shell: _Shell) -> dict[str, Tensor]:
        """In the dtype of the computation, but for what weights in four bits consist of."""
        views = slot.views(unit, shell.device)
        plain = [name for name, tensor in views.items() if name in shell.shapes and tensor.is_floating_point()]
        return views | {name: views[name].to(self._dtype) for name in plain}

    def _states(self, batches: Sequence[Batch], memory: int | None) -> _States:
        width = self._shells[0].width
        return _States([batch["input_ids"].numel() * width * self._dtype.itemsize for batch in batches], self._dtype, memory)

    def _new_pace(self) -> Pace:
        inside = sum(unit.bytes for unit in self._units.layers)
        return Pace(self.layers, inside / max(1, self.layers), self._units.size - inside)

    def _check(self, batches: Sequence[Batch]) -> None:
        known = self._shells[0].vocabulary
        for batch in batches:
            highest = int(batch["input_ids"].max())
            if highest >= known:
                raise BundleError(f"{self._folder}: a text has token {highest}, but the weights know {known}: take the tokenizer that belongs to them")

    def _fingerprint(self, batches: Sequence[Batch], memory: int | None) -> str:
        """Of everything that states depend on."""
        files = sorted({stored.path for parts in self._weights.values() for stored in parts.values()})
        facts = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        digest = hashlib.sha256(json.dumps([facts, str(self._dtype), self._quantise, memory]).encode())
        digest.update((self._folder / _CONFIG).read_bytes())
        for batch in batches:
            for name in _TEXT:
                digest.update(str(tuple(batch[name].shape)).encode() + batch[name].contiguous().numpy().tobytes())
        return digest.hexdigest()


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


def _next(waiting: queue.SimpleQueue[int]) -> int | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def _together(work: Callable[[_Shell, nn.Module], None], shells: Sequence[_Shell], layers: Sequence[nn.Module]) -> None:
    """One worker per device. Raises what one of them raised."""
    if len(shells) == 1:
        work(shells[0], layers[0])
        return
    with ThreadPoolExecutor(len(shells)) as pool:
        for result in [pool.submit(work, shell, layer) for shell, layer in zip(shells, layers, strict=True)]:
            result.result()


# --- the model without its weights ---------------------------------------------------------------------------------------------------------


class _Names(NamedTuple):
    """Which tensors of the model's state dict belong where. prefixes: of each layer. tied: the head's weight is the embedding's."""

    prefixes: list[str]
    layers: list[list[str]]
    embedding_weight: str
    head_weight: str
    head: list[str]
    rest: list[str]
    tied: bool

    @classmethod
    def of(cls, backbone: Any, layers: nn.ModuleList) -> _Names:
        """Raises ConfigError where the model has no head for words."""
        paths = {id(module): path for path, module in backbone.named_modules()}
        embedding, head = backbone.get_input_embeddings(), backbone.get_output_embeddings()
        if head is None:
            raise ConfigError(f"{type(backbone).__name__} has no head for words: choose a causal language model")
        weight, top = f"{paths[id(embedding)]}.weight", f"{paths[id(head)]}."
        prefixes = [f"{paths[id(layers)]}.{number}." for number in range(len(layers))]
        names = list(backbone.state_dict())
        tied = head.weight is embedding.weight
        inside = [[name for name in names if name.startswith(prefix)] for prefix in prefixes]
        of_head = [name for name in names if name.startswith(top) and not (tied and name == f"{top}weight")]
        rest = sorted(set(names) - {name for layer in inside for name in layer} - {weight, f"{top}weight", *of_head})
        return cls(prefixes, inside, weight, f"{top}weight", of_head, rest, tied)

    @property
    def needed(self) -> list[str]:
        """All of them, a tied one once."""
        return [self.embedding_weight, *self.rest, *self.head, *(name for layer in self.layers for name in layer)]


class _Done(Exception):  # noqa: N818  # no error: it ends a forward whose remainder nobody needs
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _Shell:
    """A language model without weights, on one device, whose forward does what `_act` does in the places of its layers."""

    def __init__(self, config: PretrainedConfig, device: torch.device, dtype: torch.dtype, *, four_bits: bool) -> None:
        self.device, self._dtype, self._config, self._four_bits = device, dtype, config, four_bits
        with init_empty_weights():  # parameters only: buffers, such as rotary frequencies, are made as always
            self._model = Causal(config, outputs=1).eval()
        self.backbone: Any = self._model.backbone
        self.backbone.tie_weights()  # what making them empty has undone
        layers = layers_of(self._model.decoder)
        self.names = _Names.of(self.backbone, layers)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.backbone.state_dict().items()}
        self.vocabulary, self._embedded = self.shapes[self.names.embedding_weight]
        self.width = int(config.get_text_config().hidden_size)
        self._layers = list(layers)
        self.linear: dict[str, tuple[int, ...]] = {}  # weight's name → outputs, inputs
        for prefix, layer in zip(self.names.prefixes, layers, strict=True):
            for path, module in _linear_in(layer):
                shape = tuple(module.weight.shape)
                self.linear[f"{prefix}{path}.weight"] = shape[::-1] if isinstance(module, Conv1D) else shape
        self._embedding = self.backbone.get_input_embeddings()
        self._act: Callable[..., Tensor] = _hand_on
        self._last: Tensor | None = None
        self._tuples = False  # whether the forward expects a tuple from a layer
        for number, layer in enumerate(self._layers):
            layers[number] = _Step(self._step, number, layer)
        self.forget_embedding()
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these tensors, by their names, as weights outside the layers and the embedding."""
        self.backbone.load_state_dict({name: tensor for name, tensor in tensors.items() if name != self.names.embedding_weight}, strict=False, assign=True)

    def load_embedding(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this tensor as the embedding's weight."""
        embedding = copy.deepcopy(self._embedding)
        embedding.load_state_dict({"weight": tensors[self.names.embedding_weight]}, assign=True)
        self.backbone.set_input_embeddings(embedding.to(self.device))

    def forget_embedding(self) -> None:
        """Let go of its weight; states come from elsewhere."""
        self.backbone.set_input_embeddings(_Nothing(self._embedded, self._dtype))

    def forget_head(self) -> None:
        """Let go of its weight."""
        self.backbone.get_output_embeddings().to("meta")

    def build(self, number: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A layer with these weights."""
        layer: nn.Module = copy.deepcopy(self._layers[number], {id(self._config): self._config})
        prefix = self.names.prefixes[number]
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        layer.load_state_dict({name: tensor for name, tensor in own.items() if tensor.is_floating_point()}, strict=False, assign=True)
        for path, module in _linear_in(layer):
            weight = f"{path}.weight"
            if not own[weight].is_floating_point():
                beside = {name.removeprefix(f"{weight}."): tensor for name, tensor in own.items() if name.startswith(f"{weight}.")}
                layer.set_submodule(path, adapters.stored_four_bits(own[weight], beside, module.bias, dtype=self._dtype))
            elif self._four_bits:
                values = module.weight.T if isinstance(module, Conv1D) else module.weight
                layer.set_submodule(path, adapters.four_bits(values, module.bias, dtype=self._dtype))
        return layer.to(self.device)

    @torch.no_grad()
    def embed(self, batch: Batch) -> Tensor:
        """States (B, T, H) that the first layer gets."""

        def act(number: int, states: Tensor, args: Any, kwargs: Any) -> Tensor:
            raise _Done(states)

        return self._until_done(act, batch)

    @torch.no_grad()
    def layer(self, number: int, layer: nn.Module, batch: Batch, states: Tensor) -> Tensor:
        """States (B, T, H) after a layer, from those before it."""
        before = states.to(self.device)

        def act(place: int, handed: Tensor, args: Any, kwargs: Any) -> Tensor:
            if place < number:
                return before
            raise _Done(_states_in(layer(before, *args, **kwargs)))

        return self._until_done(act, batch)

    @torch.no_grad()
    def finish(self, states: Tensor, token: Tensor) -> Tensor:
        """Log-probabilities (M,) of tokens (M,) after the last layer's states (M, H): what follows the layers, and the head."""
        parts = [torch.zeros(0)]
        for begin in range(0, len(states), _PLACES):
            own = states[None, begin : begin + _PLACES].to(self.device)
            self._act = lambda number, handed, args, kwargs, own=own: handed if number else own
            nothing = torch.zeros(own.shape[:2], dtype=torch.long, device=self.device)
            texts = {"input_ids": nothing, "position_ids": nothing, "branch": nothing}
            asked = {"at": torch.arange(own.shape[1], device=self.device), "token": token[begin : begin + _PLACES].to(self.device)}
            parts.append(self._model({**texts, **asked}).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def try_out(self) -> None:
        """Learn whether the forward wants tensors or tuples from its layers. Raises ConfigError where it is not a plain way through them.

        What layers are called with must not depend on what was embedded, as it does in Gemma 3n: later forwards embed nothing.
        """
        for self._tuples in (False, True):
            calls = self._calls()
            if calls is not None:
                break
        self._embed_randomly()
        again = self._calls()
        self.forget_embedding()
        if calls is None or again is None or not all(map(_same, calls, again)):
            kind = type(self.backbone).__name__
            raise ConfigError(f"{kind} does more than go through its layers, so they cannot be streamed: choose a model of another family")

    def _calls(self) -> list[list[Any]] | None:
        """What each layer is called with, beside states, in a forward that changes none; None where the layers are not gone through in order."""
        calls: list[list[Any]] = []
        places: list[int] = []
        toy = self._on_device(_TOY)

        def act(number: int, states: Tensor, args: Any, kwargs: Any) -> Tensor:
            places.append(number)
            calls.append(tree_leaves((args, kwargs)))
            if states.ndim != toy["input_ids"].ndim + 1:
                raise ValueError("no states (B, T, H)")
            return states

        self._act = act
        try:
            states = hidden_states(self._model.decoder, toy, "tree")
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            return None
        plain = places == list(range(len(self._layers))) and states.ndim == 2
        return calls if plain else None

    @torch.no_grad()
    def try_sharing(self, first: nn.Module) -> None:
        """Raise ConfigError where what the first layer adds to a text depends on the branches before it; see kit.models.prefix.check_sharing."""

        def act(number: int, states: Tensor, args: Any, kwargs: Any) -> Tensor:
            return states if number else _states_in(first(states, *args, **kwargs)) - states

        self._act = act
        self._embed_randomly()
        check_sharing(self._model.decoder, self._on_device(_TOY))
        self.forget_embedding()

    def _embed_randomly(self) -> None:
        words = torch.randn(_TOY["input_ids"].numel(), self._embedded, generator=torch.Generator().manual_seed(0))
        self.backbone.set_input_embeddings(nn.Embedding.from_pretrained(words.to(self.device, self._dtype)))

    def _until_done(self, act: Callable[..., Tensor], batch: Batch) -> Tensor:
        self._act = act
        try:
            hidden_states(self._model.decoder, self._on_device({name: batch[name] for name in _TEXT}), "tree")
        except _Done as done:
            return done.states.cpu()
        raise AssertionError("the forward went past the layer at work")

    def _step(self, number: int, states: Tensor, args: Any, kwargs: Any) -> Tensor | tuple[Tensor]:
        """What a layer's place gives. Raises ValueError where something was done to the states between two of them."""
        if number and states is not self._last:
            raise ValueError(f"layer {number} does not get what layer {number - 1} gave")
        self._last = self._act(number, states, args, kwargs)
        return (self._last,) if self._tuples else self._last

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


class _Step(nn.Module):
    """Stands in a layer's place, and has its attributes, for some forwards ask a layer what kind of attention it has."""

    def __init__(self, act: Callable[..., Any], number: int, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(act=act, number=number, layer=layer)  # not as a module inside this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See _Shell._step."""
        return self.act(self.number, hidden_states, args, kwargs)


class _Nothing(nn.Module):
    """An embedding of zeros that take no memory."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, width)."""
        return torch.zeros(1, dtype=self._dtype, device=ids.device).expand(*ids.shape, self._width)


def _linear_in(layer: nn.Module) -> list[tuple[str, nn.Linear | Conv1D]]:
    return [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _hand_on(number: int, states: Tensor, args: Any, kwargs: Any) -> Tensor:
    return states


def _same(call: list[Any], other: list[Any]) -> bool:
    """Whether two layers are called with the same tensors."""
    pairs = zip([leaf for leaf in call if isinstance(leaf, Tensor)], [leaf for leaf in other if isinstance(leaf, Tensor)], strict=True)
    return all(one.shape == two.shape and torch.equal(one, two) for one, two in pairs)


def _states_in(output: Any) -> Tensor:
    """A layer's states; some families give them as the first of a tuple."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


# --- the weights ---------------------------------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """Where a tensor lies: bytes begin … begin + size of a file. kind: the file's word for its type."""

    path: Path
    begin: int
    size: int
    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES.get(self.kind, torch.uint8)


_Parts = dict[str, _Stored]
"""A tensor under "", and beside it what belongs to one in four bits, by the ends of its names, such as ".absmax"."""


class _Run(NamedTuple):
    """Bytes of a file that are read in one go, and where in a slot they go."""

    path: Path
    begin: int
    size: int
    place: int


class _Unit(NamedTuple):
    """Tensors that are read together: by name, and where in a slot they are. size: of the slot. bytes: of the tensors."""

    tensors: dict[str, tuple[_Stored, int]]
    runs: list[_Run]
    size: int
    bytes: int

    @classmethod
    def of(cls, stored: Mapping[str, _Stored]) -> _Unit:
        """Tensors that lie side by side become one run, as long as they also lie in memory as products want it."""
        tensors: dict[str, tuple[_Stored, int]] = {}
        runs: list[_Run] = []
        end = 0
        for name, own in sorted(stored.items(), key=lambda item: (item[1].path, item[1].begin)):
            last = runs[-1] if runs else None
            if last and (last.path, last.begin + last.size) == (own.path, own.begin) and end % _PRODUCTS == 0:
                runs[-1] = last._replace(size=last.size + own.size)
            else:
                end = -(-end // _ALIGNED) * _ALIGNED
                runs.append(_Run(own.path, own.begin, own.size, end))
            tensors[name] = (own, end)
            end += own.size
        return cls(tensors, runs, end, sum(own.size for own in stored.values()))


class _Units(NamedTuple):
    """The model in the order of a pass. fixed: what stays in memory, a tied embedding included."""

    fixed: _Unit
    embedding: _Unit
    layers: list[_Unit]
    head: _Unit
    tied: bool

    @classmethod
    def of(cls, names: _Names, weights: Mapping[str, _Parts]) -> _Units:
        def unit(own: Sequence[str]) -> _Unit:
            return _Unit.of({name + part: stored for name in own for part, stored in weights[name].items()})

        tied = names.tied
        fixed = unit([*names.rest, *[names.embedding_weight] * tied])
        return cls(fixed, unit([names.embedding_weight] * (not tied)), [unit(own) for own in names.layers], unit(names.head), tied)

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(unit.bytes for unit in (self.fixed, self.embedding, *self.layers, self.head))


class _Slot:
    """Memory for one unit: here, and on every device that is not the CPU."""

    def __init__(self, size: int, devices: set[torch.device]) -> None:
        away = [device for device in devices if device.type != "cpu"]
        self._here = torch.empty(size, dtype=torch.uint8, pin_memory=bool(away))  # pages that are never written take no memory, unless pinned
        self._there = {device: torch.empty(size, dtype=torch.uint8, device=device) for device in away}
        self._streams = {device: torch.cuda.Stream(device) for device in away}

    def fill(self, unit: _Unit) -> int:
        """Read the unit; how many bytes that were. Raises BundleError where a file is cut short."""
        here = memoryview(self._here.numpy())  # type: ignore[arg-type]
        for run in unit.runs:
            with open(run.path, "rb", buffering=0) as file:
                file.seek(run.begin)
                done = 0
                while done < run.size:
                    place, most = run.place + done, min(_CHUNK, run.size - done)
                    got = file.readinto(here[place : place + most])
                    if not got:
                        raise BundleError(f"{run.path}: ends before its tensors do: copy the file again")
                    self._send(place, place + got)
                    done += got
        for stream in self._streams.values():
            stream.synchronize()
        return sum(run.size for run in unit.runs)

    def _send(self, begin: int, end: int) -> None:
        for device, memory in self._there.items():
            with torch.cuda.stream(self._streams[device]):
                memory[begin:end].copy_(self._here[begin:end], non_blocking=True)

    def views(self, unit: _Unit, device: torch.device) -> dict[str, Tensor]:
        """The unit's tensors, without copying."""
        memory = self._there.get(device, self._here)
        return {name: memory[place : place + own.size].view(own.dtype).view(own.shape) for name, (own, place) in unit.tensors.items()}


def _weights_of(folder: Path, shell: _Shell) -> dict[str, _Parts]:
    """Every tensor that the model needs, by its name there. Raises BundleError."""
    found: dict[str, _Parts] = {}
    names, transforms = shell.names, get_model_conversion_mapping(shell.backbone)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converting = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converters = [own for own in converting if any(type(operation).__name__ != _ALIGNING for operation in own.operations)]
    for stored, tensor in sorted(stored_in(folder).items()):
        beside = _FOUR_BITS.fullmatch(stored)
        whole = (beside[1] if beside else stored).removeprefix(_OF_KIT)
        name, part = rename_source_key(whole, renamings, converters, shell.backbone.base_model_prefix, shell.shapes)
        if part is not None:
            kind = shell.backbone.config.model_type
            raise BundleError(f"{tensor.path}: {stored} is a part of a tensor of {kind!r} models, and parts cannot be streamed: choose a model of another family")
        if names.tied and name == names.head_weight:  # some files hold a tied tensor under this name only
            found.setdefault(names.embedding_weight, {"": tensor})
        else:
            found.setdefault(name, {})[f".{beside[2]}" if beside else ""] = tensor
    lacking = [name for name in names.needed if "" not in found.get(name, {})]
    if lacking:
        raise BundleError(f"{folder}: the weights lack {len(lacking)} tensors of the decoder, such as {lacking[0]}: take the config.json that belongs to them")
    return {name: _as_read(name, found[name], shell) for name in names.needed}


def _as_read(name: str, parts: _Parts, shell: _Shell) -> _Parts:
    """With a weight in four bits as bytes. Raises BundleError for a tensor that the model cannot take."""
    tensor, others = parts[""], {part: own for part, own in parts.items() if part}
    if others and name not in shell.linear:
        raise BundleError(f"{tensor.path}: {name} is stored in four bits, but is no linear map of a layer: quantise the folder again without it")
    if not others and tensor.kind not in _DTYPES:
        kinds = ", ".join(_DTYPES)
        raise BundleError(f"{tensor.path}: {name} is stored as {tensor.kind}: take the model's folder in {kinds} or in bitsandbytes' four bits")
    is_, asked = (_shape_in_four_bits(name, parts), shell.linear[name]) if others else (tensor.shape, shell.shapes[name])
    if is_ != asked:
        raise BundleError(f"{tensor.path}: {name} is {_by(is_)}, by config.json {_by(asked)}: take the config.json that belongs to the weights")
    return {"": tensor._replace(kind=_BYTES, shape=(tensor.size, 1)), **others} if others else parts


def _shape_in_four_bits(name: str, parts: _Parts) -> tuple[int, ...]:
    """What the linear map is that a weight was made of. Raises BundleError where what is beside it is not complete."""
    path, size = parts[""].path, parts[""].size
    state = next((own for part, own in parts.items() if "quant_state" in part), None)
    try:
        if state is None:
            raise ValueError("no quant_state")
        with open(state.path, "rb") as file:
            file.seek(state.begin)
            values = json.loads(file.read(state.size))
        shape = tuple(map(int, values["shape"]))
        lacking = {".absmax", ".quant_map", *[".nested_absmax", ".nested_quant_map"] * ("nested_offset" in values)} - set(parts)
        if lacking or size != -(-math.prod(shape) // 2):
            raise ValueError(f"no {', '.join(sorted(lacking))}" if lacking else f"{size} bytes for {_by(shape)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: {name} in four bits is damaged ({one_line(error)}): copy the file again") from None
    return shape


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def stored_in(folder: Path) -> dict[str, _Stored]:
    """All tensors of a folder by the names they have there. Raises BundleError."""
    found: dict[str, _Stored] = {}
    for path in _files_of(folder):
        found |= _tensors_of(path)
    return found


def _files_of(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BundleError(f"{index}: is no index of weights ({one_line(error)}): copy the file again") from None
        expected = len(names)
        there = [folder / Path(name).name for name in names]
    else:
        there = sorted(path for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.name))
        expected = max((int(_SHARD.fullmatch(path.name)[1]) for path in there), default=0)  # type: ignore[index]
    if not there:
        raise BundleError(f"{folder}: no {_WEIGHTS}: convert the checkpoint to safetensors first (pickled weights are never loaded)")
    missing = [path.name for path in there if not path.is_file()]
    if missing or len(there) < expected:
        which = missing[0] if missing else f"{expected - len(there)} of {expected} shards"
        raise BundleError(f"{folder}: {which} is missing: copy all {expected} files of the model")
    return there


def _tensors_of(path: Path) -> dict[str, _Stored]:
    """What the header of a safetensors file lists."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            start = 8 + length
            if start > path.stat().st_size:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = _Stored(path, start + begin, end - begin, str(entry["dtype"]), tuple(entry["shape"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BundleError(f"{path}: is no safetensors file or damaged ({one_line(error)}): copy the file again") from None
    if max((stored.begin + stored.size for stored in found.values()), default=0) > path.stat().st_size:
        raise BundleError(f"{path}: ends before its tensors do: copy the file again")
    return found


def _check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Raise BundleError where the folder has a tokenizer that knows more tokens than the weights."""
    path = folder / TOKENIZER
    if not path.is_file():
        return
    try:
        highest = max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values())
    except Exception as error:  # tokenizers raises Exception itself
        raise BundleError(f"{path}: cannot be read: {one_line(error)}: copy the file again") from None
    if highest >= vocabulary:
        raise BundleError(f"{path}: has tokens up to {highest}, but the weights know {vocabulary}: take the tokenizer that belongs to them")


# --- the states between two layers ---------------------------------------------------------------------------------------------------------


class _States:
    """States (B, T, H) of all batches. done: layers that each batch has been through, -1 before the embedding.

    Batches stay in memory, in order, as long as they fit; the others go to files in half precision. With `resume`, all go to files: a file is
    replaced in one step and says how many layers it has behind it, so a run that was cut off between two batches also goes on.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, memory: int | None) -> None:
        self.done = [-1] * len(sizes)
        self.size = sum(sizes)
        self.folder: Path | None = None
        self._dtype = dtype
        self._fits = [memory is None or end <= memory for end in accumulate(sizes)]
        self._here: dict[int, Tensor] = {}
        self._durable = False

    @property
    def spills(self) -> bool:
        """Whether some batch does not fit."""
        return not all(self._fits)

    def get(self, batch: int) -> Tensor:
        """States of a batch, in the dtype of the computation."""
        if batch in self._here:
            return self._here[batch]
        with safe_open(self._file(batch), "pt") as file:
            states: Tensor = file.get_tensor("states")
        return states.to(self._dtype)

    def put(self, batch: int, states: Tensor, done: int) -> None:
        """States of a batch after `done` layers."""
        if self._fits[batch]:
            self._here[batch] = states
        if self._durable or not self._fits[batch]:
            path = self._file(batch)
            part = path.with_suffix(".part")
            save_file({"states": (states if self._fits[batch] else _half(states)).contiguous()}, part, metadata={"done": str(done)})
            os.replace(part, path)
        self.done[batch] = done

    def resume(self, folder: Path, fingerprint: str) -> None:
        """Save everything from now on, and take what is there already. Raises BundleError for states of another run."""
        self.folder, self._durable = folder, True
        folder.mkdir(parents=True, exist_ok=True)
        run = folder / _RUN
        try:
            known = json.loads(run.read_text(encoding="utf-8")).get("fingerprint")
        except FileNotFoundError:
            self._remove()
            write_atomically(run, json.dumps({"fingerprint": fingerprint}))
            return
        except (ValueError, AttributeError):
            known = None
        if known != fingerprint:
            raise BundleError(f"{run}: the states there are of other batches, weights or settings: empty the folder, or name another one")
        for batch in range(len(self.done)):
            try:
                with safe_open(self._file(batch), "pt") as file:
                    self.done[batch] = int(file.metadata()["done"])
            except (OSError, SafetensorError, TypeError, KeyError, ValueError):  # not there, or cut short by a power failure
                self.done[batch] = -1

    def clear(self) -> None:
        """Remove what `resume` has saved."""
        self._remove()
        assert self.folder is not None
        (self.folder / _RUN).unlink(missing_ok=True)

    def _remove(self) -> None:
        assert self.folder is not None
        for path in [*self.folder.glob("batch-*.safetensors"), *self.folder.glob("batch-*.part")]:
            path.unlink()

    def _file(self, batch: int) -> Path:
        assert self.folder is not None
        return self.folder / f"batch-{batch:05d}.safetensors"


def _half(states: Tensor) -> Tensor:
    """Two bytes a number: float16 where its range is enough, else bfloat16, which rounds eight times as coarsely."""
    if states.dtype.itemsize <= 2:
        return states
    return states.half() if states.abs().amax() <= torch.finfo(torch.float16).max else states.bfloat16()
