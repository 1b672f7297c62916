"""Dense: search by the inner product of normalised sentence embeddings. Does not know where models come from.

A folder holds `embeddings.f16` (N, D), the encoder with which queries are embedded, and `settings.json`, written last. Exact search
streams the embeddings in chunks and is the default: for a batch of queries it is faster than an approximate index is to build.
faiss is needed for "ivf" and "hnsw" only; their ties are in faiss' order where they straddle the k-th place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kit import manifest, runtime
from kit.errors import BundleError, ConfigError, DataError, DependencyError, nearest
from kit.retrieval import Hits
from kit.retrieval.corpus import Corpus
from kit.retrieval.embedding import Embedder

SETTINGS = "settings.json"
PROGRESS = "progress.json"
EMBEDDINGS = "embeddings.f16"
ENCODER = "encoder"
INDEXES = ("exact", "ivf", "hnsw")
_ENCODER_FILES = (".safetensors", ".json", ".txt", ".model")
_BLOCK = 2048  # passages embedded between two notes of progress
_CHUNK = 65_536  # embeddings multiplied at a time
_QUERIES = 512  # queries multiplied at a time: (512, 65,536) float32 products are 128 MiB
_TRAIN_PER_LIST = 256  # what k-means of faiss uses at most …
_ROWS_PER_LIST = 39  # … and what it asks for at least
_LINKS = 32


@dataclass(frozen=True)
class _Settings:
    """What `build` was given, and what it was built from."""

    index: str
    batch_size: int
    max_length: int | None
    lists: int
    nprobe: int
    ef: int
    corpus: str
    encoder: str
    passages: int
    dimensions: int

    @property
    def embedded(self) -> dict[str, Any]:
        """The part that decides the embeddings."""
        return {name: getattr(self, name) for name in ("corpus", "encoder", "max_length", "passages", "dimensions")}


class Dense:
    """Embeddings of a corpus, memory-mapped, and the encoder of the queries."""

    def __init__(self, encoder: Embedder, embeddings: np.ndarray, settings: _Settings, index: Any = None) -> None:
        self._encoder = encoder
        self._embeddings = embeddings
        self._settings = settings
        self._index = index

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        folder: Path,
        *,
        model: str,
        index: str = "exact",
        batch_size: int = 128,
        max_length: int | None = None,
        lists: int = 0,
        nprobe: int = 32,
        ef: int = 128,
    ) -> Self:
        """Embed the corpus into `folder` with the encoder in the folder `model`; after an interruption, go on where it stopped.

        batch_size: texts embedded at once, at most. max_length: tokens kept of a passage (default: the model's own).
        lists: cells of "ivf" (0: 4 √N, at least 39 passages each); nprobe: cells searched per query; ef: candidates per query of "hnsw".
        Raises ConfigError, BundleError, DependencyError.
        """
        if index not in INDEXES:
            raise ConfigError(f"dense.index = {index!r} is unknown{nearest(index, INDEXES)}")
        if index != "exact":
            _faiss()  # before hours of embedding
        folder = Path(folder)
        digest = _copy_encoder(Path(model), folder / ENCODER)
        encoder = Embedder(folder / ENCODER, batch_size=batch_size, max_length=max_length, devices=runtime.devices())
        settings = _Settings(index, batch_size, max_length, lists, nprobe, ef, corpus.digest, digest, len(corpus), encoder.dimensions)
        if not (folder / SETTINGS).is_file() or _read_settings(folder) != settings:
            for stale in (folder / SETTINGS, *folder.glob("*.faiss")):
                stale.unlink(missing_ok=True)
            _embed(corpus, encoder, folder, settings)
            if index != "exact":
                _build_index(_open_embeddings(folder, settings), folder, settings)
            manifest.write_atomically(folder / SETTINGS, json.dumps(asdict(settings), indent=1) + "\n")
        return cls._open(folder, encoder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open built embeddings with their encoder. Raises BundleError naming what is missing or damaged, and DependencyError."""
        folder = Path(folder)
        settings, device = _read_settings(folder), str(runtime.choose().device)
        return cls._open(folder, Embedder(folder / ENCODER, batch_size=settings.batch_size, max_length=settings.max_length, devices=[device]))

    @classmethod
    def _open(cls, folder: Path, encoder: Embedder) -> Self:
        settings = _read_settings(folder)
        index = None if settings.index == "exact" else _open_index(folder, settings)
        return cls(encoder, _open_embeddings(folder, settings), settings, index)

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The k passages whose embedding has the largest inner product with each query's."""
        if not queries:
            return Hits(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
        vectors = self._encoder.queries(queries)
        width = min(k, len(self._embeddings))
        if self._index is None:
            scores, ids = exact_search(self._embeddings, vectors, width)
        else:
            scores, ids = _ordered(*self._index.search(vectors.cpu().numpy(), width))
        padding = ((0, 0), (0, k - width))
        return Hits(np.pad(ids, padding, constant_values=-1), np.pad(scores, padding, constant_values=-np.inf))


def exact_search(embeddings: np.ndarray, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """scores (Q, k) float32 and ids (Q, k) int64 of the k ≤ N largest inner products, ties by the lower id.

    embeddings: (N, D), possibly memory-mapped, read once, chunk by chunk. queries: (Q, D) float32 on the device that computes.
    """
    blocks = [queries[i : i + _QUERIES] for i in range(0, len(queries), _QUERIES)]
    best: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        for start, chunk in _chunks(embeddings, queries.device):
            found = [_top(block @ chunk.T, k) for block in blocks]
            found = [(scores, ids + start) for scores, ids in found]
            best = [_merge(old, new, k) for old, new in zip(best, found, strict=True)] if best else found
    return torch.cat([scores for scores, _ in best]).cpu().numpy(), torch.cat([ids for _, ids in best]).cpu().numpy()


def _chunks(embeddings: np.ndarray, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    with tqdm(total=len(embeddings), desc="dense search", unit="", disable=None) as bar:
        for start in range(0, len(embeddings), _CHUNK):
            chunk = torch.from_numpy(np.array(embeddings[start : start + _CHUNK])).to(device).float()
            yield start, chunk
            bar.update(len(chunk))


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns (Q, min(k, n)) of the largest in each row of (Q, n), equal values by the lower column."""
    values, columns = scores.topk(min(k, scores.shape[1]))
    edge = values[:, -1:]
    torn = (scores == edge).sum(1) > (values == edge).sum(1)  # topk takes any of equal values at the edge
    for row in torn.nonzero().flatten().tolist():
        values[row], columns[row] = (part[: values.shape[1]] for part in scores[row].sort(descending=True, stable=True))
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _merge(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The best of two ordered results, where all ids of `old` are lower than those of `new`."""
    values, order = torch.cat([old[0], new[0]], 1).sort(dim=1, descending=True, stable=True)
    return values[:, :k], torch.cat([old[1], new[1]], 1).gather(1, order)[:, :k]


def _ordered(scores: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same hits by falling score, then rising id; -inf where faiss found none."""
    scores = np.where(ids < 0, -np.inf, scores).astype(np.float32)
    order = np.lexsort((ids, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def _copy_encoder(model: Path, folder: Path) -> str:
    """Copy what inference needs of a model folder, never code; the digest of it."""
    if not (model / "config.json").is_file():
        raise BundleError(f"dense.model = {str(model)!r} is no folder with a config.json: name a folder that holds an encoder")
    names = sorted(path.relative_to(model) for path in model.rglob("*") if path.is_file() and path.suffix in _ENCODER_FILES)
    if not any(name.suffix == ".safetensors" for name in names):
        raise BundleError(f"dense.model = {str(model)!r} has no .safetensors weights: convert the model first")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_file() or manifest.sha256(folder / name) != manifest.sha256(model / name):
            shutil.copyfile(model / name, folder / name)
    return hashlib.sha256("".join(f"{name.as_posix()} {manifest.sha256(folder / name)}\n" for name in names).encode()).hexdigest()


def _embed(corpus: Corpus, encoder: Embedder, folder: Path, settings: _Settings) -> None:
    """Write the embeddings that are not there yet, noting the progress after each block."""
    done = _rows_done(folder, settings)
    mode: Literal["r+", "w+"] = "r+" if done else "w+"
    embeddings = np.memmap(folder / EMBEDDINGS, np.float16, mode, shape=(settings.passages, settings.dimensions))
    with tqdm(total=len(corpus), initial=done, desc="dense", unit="", disable=None) as bar:
        spans = [(start, min(start + _BLOCK, len(corpus))) for start in range(done, len(corpus), _BLOCK)]
        blocks = encoder.documents(corpus.texts(*span) for span in spans)
        for (start, stop), block in zip(spans, blocks, strict=True):
            if not np.isfinite(block).all():
                why = f"the encoder gives no finite embedding of a passage in [{start}, {stop}): use another dense.model"
                raise DataError(f"{corpus.folder}: {why}")
            embeddings[start:stop] = block
            embeddings.flush()
            manifest.write_atomically(folder / PROGRESS, json.dumps({"rows": stop, "of": settings.embedded}) + "\n")
            bar.update(stop - start)


def _rows_done(folder: Path, settings: _Settings) -> int:
    """Rows that an earlier build with the same corpus, encoder and length has embedded."""
    try:
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        rows = int(progress["rows"])
        fits = progress["of"] == settings.embedded and 0 <= rows <= settings.passages
        return rows if fits and (folder / EMBEDDINGS).stat().st_size == _size(settings) else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _size(settings: _Settings) -> int:
    return settings.passages * settings.dimensions * 2


def _open_embeddings(folder: Path, settings: _Settings) -> np.ndarray:
    path = folder / EMBEDDINGS
    if not path.is_file() or path.stat().st_size != _size(settings):
        raise BundleError(f"{path}: is missing or has not {_size(settings)} bytes: build the dense index again")
    return np.memmap(path, np.float16, "r", shape=(settings.passages, settings.dimensions))


def _read_settings(folder: Path) -> _Settings:
    try:
        return _Settings(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BundleError(f"{folder}: no {SETTINGS}, so this is no dense index, or an unfinished one: build it again") from None
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{folder / SETTINGS}: is damaged ({error}): build the dense index again") from None


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise DependencyError('faiss is not installed: pip install faiss-cpu, or set retrieve.retriever.index = "exact"') from None
    return faiss


def _index_file(folder: Path, settings: _Settings) -> Path:
    return folder / f"{settings.index}.faiss"


def _build_index(embeddings: np.ndarray, folder: Path, settings: _Settings) -> None:
    faiss = _faiss()
    index = _new_ivf(embeddings, settings.lists) if settings.index == "ivf" else _new_hnsw(embeddings.shape[1])
    with tqdm(total=len(embeddings), desc=settings.index, unit="", disable=None) as bar:
        for start in range(0, len(embeddings), _BLOCK):
            block = embeddings[start : start + _BLOCK].astype(np.float32)
            index.add(block)
            bar.update(len(block))
    path = _index_file(folder, settings)
    part = path.with_suffix(".part")
    faiss.write_index(index, str(part))
    os.replace(part, path)


def _new_ivf(embeddings: np.ndarray, lists: int) -> Any:
    """A trained, empty index with as many lists as asked for, but never fewer than 39 passages for each."""
    faiss = _faiss()
    total, dimensions = embeddings.shape
    lists = max(1, min(lists or round(4 * total**0.5), total // _ROWS_PER_LIST))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # a corpus below 39 passages has one list all the same
    sample = np.linspace(0, total - 1, min(total, lists * _TRAIN_PER_LIST)).astype(np.int64)
    index.train(embeddings[sample].astype(np.float32))
    return index


def _new_hnsw(dimensions: int) -> Any:
    faiss = _faiss()
    return faiss.IndexHNSWFlat(dimensions, _LINKS, faiss.METRIC_INNER_PRODUCT)


def _open_index(folder: Path, settings: _Settings) -> Any:
    faiss = _faiss()
    path = _index_file(folder, settings)
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise BundleError(f"{path}: cannot be opened ({str(error).splitlines()[0]}): build the dense index again") from None
    if settings.index == "ivf":
        index.nprobe = settings.nprobe
    else:
        index.hnsw.efSearch = settings.ef
    return index
