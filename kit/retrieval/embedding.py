"""Texts → normalised sentence embeddings by an encoder in sentence-transformers' form. Knows no corpus and no index.

The library prepares the texts (prompts, cutting) and does what follows the backbone (pooling, projections). Between the two the backbone runs packed
(kit.packing), in batches of about equal lengths, on every GPU at once, while the texts that come next are being prepared. A backbone without a packed
form is left to the library's own `encode`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from kit import packing
from kit.errors import BundleError, DependencyError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Batch = dict[str, Tensor]
_TOKENS = {"cpu": 1024}  # of a batch: what stays in a processor's cache …
_TOKENS_ELSEWHERE = 32_768  # … and what keeps a GPU busy
_Kind = Literal["query", "document"]  # what texts are to the encoder: its names of the prompt before them


class Embedder:
    """The encoder of a folder, once on each device. batch_size: texts of a batch, at most. max_length: tokens of a text (default: the encoder's own)."""

    def __init__(self, folder: Path, *, batch_size: int, max_length: int | None, devices: Sequence[str]) -> None:
        first = _open(folder, torch.device(devices[0]), max_length)
        self._encoders = [first, *(copy.deepcopy(first).to(device) for device in devices[1:])]
        self._batch_size = batch_size
        self._packs = _packs(first)
        self._tokens = _TOKENS.get(first.device.type, _TOKENS_ELSEWHERE)

    @property
    def dimensions(self) -> int:
        """Numbers of an embedding."""
        return len(self.queries(["one query"])[0])

    def queries(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 on the first device."""
        found = next(self._embedded([list(texts)], "query"))
        return torch.from_numpy(found).to(self._encoders[0].device)

    def documents(self, blocks: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        """(N, D) float32 of each block of texts."""
        return self._embedded(blocks, "document")

    def _embedded(self, blocks: Iterable[Sequence[str]], kind: _Kind) -> Iterator[np.ndarray]:
        if not self._packs:
            yield from (self._stock(block, kind) for block in blocks)
            return
        free: SimpleQueue[SentenceTransformer] = SimpleQueue()
        for encoder in self._encoders:
            free.put(encoder)

        def embed(part: Batch) -> np.ndarray:
            encoder = free.get()
            try:
                return _forward(encoder, part)
            finally:
                free.put(encoder)

        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(len(self._encoders)) as workers:
            for features in _one_ahead(ahead, self._prepared, blocks, kind):
                rows = self._batches(features["attention_mask"])
                parts = [_part(features, own) for own in rows]
                found = np.concatenate(list(workers.map(embed, parts)))
                yield found[np.argsort(np.concatenate(rows))]

    def _prepared(self, texts: Sequence[str], kind: _Kind) -> Batch:
        """The whole block as the library prepares a batch: padded on the right to its longest text."""
        encoder = self._encoders[0]
        return encoder.preprocess(list(texts), prompt=encoder.prompts[kind], task=kind)

    def _batches(self, mask: Tensor) -> list[np.ndarray]:
        """Rows of batches, long ones first."""
        lengths = mask.sum(1).numpy()
        batches: list[list[int]] = []
        for row in np.argsort(-lengths, kind="stable"):
            full = batches and (len(batches[-1]) == self._batch_size or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > self._tokens)
            if full or not batches:
                batches.append([])
            batches[-1].append(int(row))
        return [np.array(batch) for batch in batches]

    def _stock(self, texts: Sequence[str], kind: _Kind) -> np.ndarray:
        encode: Any = self._encoders[0].encode_query if kind == "query" else self._encoders[0].encode_document
        found: np.ndarray = encode(list(texts), batch_size=self._batch_size, normalize_embeddings=True, show_progress_bar=False)
        return found.astype(np.float32, copy=False)


def _one_ahead(ahead: ThreadPoolExecutor, prepare: Any, blocks: Iterable[Sequence[str]], kind: _Kind) -> Iterator[Batch]:
    """Prepared blocks; the next one is prepared by another thread meanwhile."""
    waiting = None
    for block in blocks:
        coming = ahead.submit(prepare, block, kind)
        if waiting:
            yield waiting.result()
        waiting = coming
    if waiting:
        yield waiting.result()


def _part(features: Batch, rows: np.ndarray) -> Batch:
    """Some rows of prepared texts, cut to the longest of them; what is no tensor of rows stays."""
    mask = features["attention_mask"][rows]
    longest, shape = int(mask.sum(1).max()), features["attention_mask"].shape
    return {name: value[rows, :longest] if isinstance(value, Tensor) and value.shape == shape else value for name, value in features.items()}


@torch.inference_mode()
def _forward(encoder: SentenceTransformer, part: Batch) -> np.ndarray:
    """(R, D) float32 of length 1."""
    here = {name: value.to(encoder.device) if isinstance(value, Tensor) else value for name, value in part.items()}
    first, *others = (cast(Any, module) for module in encoder.children())
    here["token_embeddings"] = packing.hidden_states(first.auto_model, here)[-1]
    for module in others:
        here = module(here)
    return normalize(here["sentence_embedding"].float(), dim=1).cpu().numpy()


def _packs(encoder: SentenceTransformer) -> bool:
    """Whether an encoder is a backbone with a packed form, and modules that take nothing but its last states and the mask."""
    from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize, Pooling, Transformer

    first, *others = encoder.children()
    if not isinstance(first, Transformer) or not all(isinstance(module, Dense | Dropout | LayerNorm | Normalize | Pooling) for module in others):
        return False
    return packing.is_packable(first.auto_model) and first.tokenizer.padding_side == "right" and encoder.truncate_dim is None


def _open(folder: Path, device: torch.device, max_length: int | None) -> SentenceTransformer:
    """The encoder in float16 on a GPU, in float32 elsewhere. A folder without sentence-transformers' files gets mean pooling."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        why = "sentence-transformers is not installed: pip install sentence-transformers, or set retrieve.retriever.kind = 'bm25'"
        raise DependencyError(why) from None
    try:
        encoder = SentenceTransformer(str(folder), device=str(device), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BundleError(f"{folder}: the encoder cannot be opened ({str(error).splitlines()[0]}): build the dense index again") from None
    if max_length is not None:
        encoder.max_seq_length = max_length
    encoder.eval()
    return encoder.half() if device.type == "cuda" else encoder  # as precise as the file; bf16 would blur near neighbours
