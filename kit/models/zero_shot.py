"""A decoder that is scored as it is, never trained: in memory, or layer by layer where it is larger than that. Knows no task and no prompt.

A fit of it holds no weights, only the name and the digest of the folder that has them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from kit import manifest, runtime
from kit.errors import BundleError, ConfigError
from kit.models.adapters import Base
from kit.models.causal import Causal, base_of
from kit.models.encoder import read_config
from kit.models.prefix import Sharing
from kit.models.streaming import LayerStream, stored_in
from kit.models.tokens import HFTokens

Batch = dict[str, Tensor]
_BASE, _CONFIG = "base.json", "config.json"
_ROOM = 0.8  # share of the free memory that weights may take: the rest is for activations
_STATES = 0.25  # share of the memory that the states between two layers may take
_SPACE, _STATE_BYTES = 2, 4  # free space on disk for each byte of states that are kept to go on from; bytes of a number there
_NF4 = 4.5 / 8  # bytes of a number in four bits, with what scales it


class Costs(NamedTuple):
    """Seconds of a pass over all layers: to compute, and to read them; they overlap."""

    compute: float
    read: float


class ZeroShot(nn.Module):
    """Decoder in a folder → log-probabilities (M,) of the tokens a batch asks for.

    quantise: "nf4" holds its linear maps in four bits. streaming: "auto" streams layers from disk where the weights take more than
    the free memory of the device. streams: whether it does; then all batches should be given to `score_all`, since each call reads all weights.
    last_pass: what the last such call cost.
    """

    gives = "next_token"

    def __init__(
        self,
        source: Path,
        *,
        outputs: int,
        sharing: Sharing = "tree",
        quantise: Literal["none", "nf4"] = "none",
        precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
        streaming: Literal["auto", "always", "never"] = "auto",
    ) -> None:
        super().__init__()
        self._source = Path(source)
        self._hidden = read_config(self._source).get_text_config().hidden_size
        self.last_pass: Costs | None = None
        chosen = runtime.choose(precision)
        self.streams = streaming == "always"
        if streaming == "auto":
            each = _NF4 if quantise == "nf4" else chosen.dtype.itemsize
            self.streams = _held(self._source, each) > _ROOM * runtime.free_bytes(chosen.device)
        if self.streams:
            self._stream = LayerStream(self._source, devices=[chosen.device], dtype=chosen.dtype, quantise=quantise)
        else:
            self.decoder = Causal.frozen(self._source, sharing=sharing, quantise=quantise, precision=precision)

    def forward(self, batch: Batch) -> Tensor:
        """A batch of trees → (M,) float32; see kit.models.prefix."""
        return self.score_all([batch])[0] if self.streams else self.decoder(batch)

    def score_all(self, batches: Sequence[Batch], *, state: Path | None = None, on_step: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Of every batch (M,) float32, in one pass over the layers.

        state: a folder where a pass that is cut off is kept, to go on from, if the disk has room. on_step: called after each layer.
        """
        self.last_pass = None
        memory = int(_STATES * psutil.virtual_memory().total)  # not what is free now: a pass that goes on must keep the same states in files
        numbers = sum(batch["input_ids"].numel() for batch in batches) * self._hidden
        if state is not None and shutil.disk_usage(state).free < _SPACE * _STATE_BYTES * numbers:
            state = None
        with tempfile.TemporaryDirectory(prefix="kit-states-") as spill:
            found = self._stream.score(batches, memory=memory, spill=Path(spill), state=state, on_layer=lambda *_: on_step())
        self.last_pass = self._costs(batches)
        return found

    def measure(self, batches: Sequence[Batch]) -> Costs:
        """What `score_all` would take for these batches, by the first layers."""
        self._stream.measure(batches)
        return self._costs(batches)

    def _costs(self, batches: Sequence[Batch]) -> Costs:
        """By what was measured when batches were last streamed."""
        pace = self._stream.pace
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        return Costs(pace.layers * tokens * pace.compute_s / max(1, pace.tokens), pace.seconds(0))

    @classmethod
    def invent(cls, folder: Path, texts: Any, *, seed: int) -> None:
        """Raises ConfigError: there is nothing to score with random weights."""
        raise ConfigError('model.kind = "zero_shot" has nothing to say with random weights: give model.source as a folder or bundle:NAME')

    @classmethod
    def create(cls, source: Path, *, outputs: int, **options: Any) -> ZeroShot:
        """See kit.models.Model."""
        return cls(source, outputs=outputs, **options)

    @classmethod
    def load(cls, folder: Path, *, outputs: int, base: Path, **options: Any) -> ZeroShot:
        """See kit.models.Model. Raises BundleError where `base` holds other weights than the folder names."""
        path = Path(folder) / _BASE
        try:
            wanted = Base(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BundleError(f"{path}: cannot be read ({error}): score and pack the run again") from None
        if (found := base_of(base)).digest != wanted.digest:
            raise BundleError(f"{base}: holds other weights ({found.digest}) than {path} was made with ({wanted.digest}): mount {wanted.name} as it was")
        return cls(base, outputs=outputs, **options)

    @classmethod
    def tokens(cls, folder: Path) -> HFTokens:
        """See kit.models.Model."""
        return Causal.tokens(folder)

    def save(self, folder: Path) -> None:
        """Write whose weights these are, and their config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        manifest.write_atomically(Path(folder) / _BASE, json.dumps(base_of(self._source)._asdict()))
        shutil.copyfile(self._source / _CONFIG, Path(folder) / _CONFIG)


def _held(folder: Path, each: float) -> float:
    """Bytes that a folder's weights take in memory. each: bytes of a number that is not stored in four bits already."""
    return sum(own.size if own.dtype == torch.uint8 else prod(own.shape) * each for own in stored_in(folder).values())
