from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.errors import BundleError, ConfigError, DataError, DependencyError
from kit.retrieval import dense
from kit.retrieval.corpus import Corpus
from kit.retrieval.dense import EMBEDDINGS, ENCODER, PROGRESS, SETTINGS, Dense, exact_search

MakeCorpus = Callable[..., Corpus]


def passages(count: int) -> list[tuple[str, str]]:
    return [("", f"passage {i} tells about {chr(97 + i % 26) * (1 + i % 5)}") for i in range(count)]


def reference(embeddings: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """ids (Q, k) by full sorting."""
    return np.argsort(-(queries @ embeddings.astype(np.float32).T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_exact_search_is_a_full_sort(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(dense, "_CHUNK", chunk)
    monkeypatch.setattr(dense, "_QUERIES", 3)
    rng = np.random.default_rng(0)
    embeddings, queries = rng.standard_normal((200, 16)).astype(np.float16), rng.standard_normal((8, 16)).astype(np.float32)
    scores, ids = exact_search(embeddings, torch.from_numpy(queries), 10)
    assert (ids == reference(embeddings, queries, 10)).all()
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ embeddings.astype(np.float32).T, ids, 1), rtol=1e-5)
    assert (ids.dtype, scores.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("chunk", [3, 16, 1000])
def test_exact_search_gives_ties_by_the_lower_id(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(dense, "_CHUNK", chunk)
    values = np.array([1, 3, 2, 3, 1, 2, 3, 2, 2, 1] * 20)  # whole numbers: products are exact and tie
    embeddings, queries = values[:, None].astype(np.float16) * np.ones(4, np.float16), np.ones((1, 4), np.float32)
    for k in (1, 5, 61, 90, 200):
        assert (exact_search(embeddings, torch.from_numpy(queries), k)[1] == reference(embeddings, queries, k)).all()


def test_embeddings_are_normalised_and_those_of_the_encoder(make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    corpus = make_corpus()
    Dense.build(corpus, tmp_path / "dense", model=str(encoder_folder))
    found = np.memmap(tmp_path / "dense" / EMBEDDINGS, np.float16, "r").reshape(len(corpus), 8)
    expected = SentenceTransformer(str(encoder_folder), device="cpu").encode(corpus.texts(0, len(corpus)), normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(found.astype(np.float32), axis=1), 1, atol=2e-3)


def test_an_interrupted_build_goes_on_where_it_stopped(
    make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_BLOCK", 8)
    corpus, folder = make_corpus(passages(30)), tmp_path / "dense"
    whole = Dense.build(corpus, folder, model=str(encoder_folder)).search(["about ccc"], 5)
    (folder / SETTINGS).unlink()
    progress = json.loads((folder / PROGRESS).read_text())
    assert progress["rows"] == 30
    (folder / PROGRESS).write_text(json.dumps({**progress, "rows": 16}))
    embeddings = np.memmap(folder / EMBEDDINGS, np.float16, "r+", shape=(30, 8))
    before = embeddings.copy()
    embeddings[:16] += 1  # a mark: rows done must not be embedded again
    embeddings[16:] = 0
    embeddings.flush()
    Dense.build(corpus, folder, model=str(encoder_folder))
    assert (embeddings[:16] == before[:16] + 1).all()
    assert (embeddings[16:] == before[16:]).all()
    embeddings[:16] = before[:16]
    embeddings.flush()
    again = Dense.load(folder).search(["about ccc"], 5)
    assert (again.ids == whole.ids).all() and (again.scores == whole.scores).all()


def test_progress_of_another_corpus_or_a_torn_file_is_not_trusted(make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path) -> None:
    folder, model = tmp_path / "dense", str(encoder_folder)
    first = Dense.build(make_corpus(passages(20)), folder, model=model)
    expected = Dense.build(make_corpus(passages(20)[::-1], "other"), tmp_path / "fresh", model=model).search(["about a"], 3)
    assert (Dense.build(make_corpus(passages(20)[::-1], "other"), folder, model=model).search(["about a"], 3).ids == expected.ids).all()
    os.truncate(folder / EMBEDDINGS, 10)
    (folder / SETTINGS).unlink()
    assert (Dense.build(make_corpus(passages(20)[::-1], "other"), folder, model=model).search(["about a"], 3).ids == expected.ids).all()
    assert first.search(["about a"], 3).ids.shape == (1, 3)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_approximate_indexes_that_look_everywhere_agree_with_exact(
    make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path, index: str
) -> None:
    pytest.importorskip("faiss")
    corpus, folder, model = make_corpus(passages(200)), tmp_path / "dense", str(encoder_folder)
    queries = ["about bb", "passage 17", ""]
    exact = Dense.build(corpus, folder, model=model).search(queries, 10)
    built = (folder / EMBEDDINGS).stat().st_mtime_ns
    found = Dense.build(corpus, folder, model=model, index=index, lists=4, nprobe=4, ef=200).search(queries, 10)
    assert (folder / EMBEDDINGS).stat().st_mtime_ns == built, "another index uses the same embeddings"
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-5)
    loaded = Dense.load(folder)
    assert (loaded.search(queries, 10).ids == found.ids).all()
    if index == "ivf":
        assert loaded._index.nlist == 4
        assert Dense.build(corpus, folder, model=model, index=index, lists=1000)._index.nlist == 200 // 39
    Dense.build(corpus, folder, model=model)
    assert not list(folder.glob("*.faiss")), "an index that is not used any more must not fill the bundle"


def test_max_length_cuts_what_is_embedded(make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path) -> None:
    corpus = make_corpus([("", "abc then one end"), ("", "abc and another")])
    scores = Dense.build(corpus, tmp_path / "dense", model=str(encoder_folder), max_length=3).search(["abc"], 2).scores[0]
    assert scores[0] == scores[1], "[CLS] abc [SEP] is left of both"
    assert len(set(Dense.build(corpus, tmp_path / "dense", model=str(encoder_folder)).search(["abc"], 2).scores[0])) == 2


def test_the_folder_alone_is_enough_and_holds_no_code(make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path) -> None:
    Dense.build(make_corpus(), tmp_path / "dense", model=str(encoder_folder))
    (tmp_path / "dense").rename(tmp_path / "moved")
    assert Dense.load(tmp_path / "moved").search(["enzyme"], 1).ids.shape == (1, 1)
    suffixes = {path.suffix for path in (tmp_path / "moved" / ENCODER).rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".model"}


def test_without_faiss_the_pip_command_and_the_way_around_are_named(
    make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match='pip install faiss-cpu, or set retrieve.retriever.index = "exact"'):
        Dense.build(make_corpus(), tmp_path / "dense", model=str(encoder_folder), index="ivf")
    assert not (tmp_path / "dense").exists(), "found out before the embedding"


def test_wrong_options_and_model_folders_are_named(make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path) -> None:
    corpus = make_corpus()
    with pytest.raises(ConfigError, match=r"dense.index = 'ivv' is unknown \(did you mean 'ivf'\?\)"):
        Dense.build(corpus, tmp_path / "dense", model=str(encoder_folder), index="ivv")
    with pytest.raises(BundleError, match="no folder with a config.json"):
        Dense.build(corpus, tmp_path / "dense", model=str(tmp_path / "none"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"no \.safetensors weights"):
        Dense.build(corpus, tmp_path / "dense", model=str(tmp_path / "bare"))


def test_an_encoder_that_gives_nan_is_refused(make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path) -> None:
    model = shutil.copytree(encoder_folder, tmp_path / "nan")
    weights = load_file(model / "model.safetensors")
    save_file({name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"no finite embedding of a passage in \[0, 6\)"):
        Dense.build(make_corpus(), tmp_path / "dense", model=str(model))
    assert not (tmp_path / "dense" / SETTINGS).exists()


def test_a_missing_or_damaged_index_is_named(make_corpus: MakeCorpus, tmp_path: Path, encoder_folder: Path) -> None:
    with pytest.raises(BundleError, match=f"no {SETTINGS}, so this is no dense index"):
        Dense.load(tmp_path)
    folder = tmp_path / "dense"
    Dense.build(make_corpus(), folder, model=str(encoder_folder))
    os.truncate(folder / EMBEDDINGS, 10)
    with pytest.raises(BundleError, match=f"{EMBEDDINGS}: is missing or has not 96 bytes"):
        Dense.load(folder)
    (folder / ENCODER / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(BundleError, match="the encoder cannot be opened"):
        Dense.load(folder)
    (folder / SETTINGS).write_text('{"index": "exact"}')
    with pytest.raises(BundleError, match=f"{SETTINGS}: is damaged"):
        Dense.load(folder)
