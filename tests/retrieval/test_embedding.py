from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, DebertaV2Config

from kit import packing
from kit.retrieval import embedding
from kit.retrieval.embedding import Embedder

TEXTS = ["", "a", *(f"passage {i} tells about {'very ' * (i % 40)}{chr(97 + i % 26)}" for i in range(70))]


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and width of each batch that went through the packed form."""
    shapes: list[tuple[int, int]] = []
    plain = packing.hidden_states

    def counted(backbone: object, batch: packing.Batch) -> object:
        shapes.append(tuple(batch["input_ids"].shape))
        return plain(backbone, batch)

    monkeypatch.setattr(packing, "hidden_states", counted)
    return shapes


def embedder(folder: Path, *, batch_size: int = 128, max_length: int | None = None, devices: tuple[str, ...] = ("cpu",)) -> Embedder:
    return Embedder(folder, batch_size=batch_size, max_length=max_length, devices=devices)


def library(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def made(folder: Path, change: Callable[[SentenceTransformer], None]) -> Path:
    """The plain encoder as sentence-transformers saves it, changed."""
    encoder = library(folder)
    change(encoder)
    encoder.save(str(folder.parent / "made"), create_model_card=False)
    return folder.parent / "made"


@pytest.fixture
def encoder(encoder_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(encoder_folder, tmp_path / "encoder")


@pytest.mark.parametrize("batch_size", [1, 3, 128])
@pytest.mark.parametrize("tokens", [8, 1024])
def test_embeddings_are_the_library_s(encoder: Path, monkeypatch: pytest.MonkeyPatch, packed_calls: list[tuple[int, int]], batch_size: int, tokens: int) -> None:
    monkeypatch.setitem(embedding._TOKENS, "cpu", tokens)
    found = list(embedder(encoder, batch_size=batch_size).documents([TEXTS[:50], TEXTS[50:51], TEXTS[51:]]))
    assert [len(block) for block in found] == [50, 1, len(TEXTS) - 51] and found[0].dtype == np.float32
    np.testing.assert_allclose(np.concatenate(found), library(encoder).encode(TEXTS, normalize_embeddings=True), atol=1e-6)
    assert sum(rows for rows, _ in packed_calls) == len(TEXTS) and max(rows for rows, _ in packed_calls) <= batch_size
    assert all(rows == 1 or rows * width <= tokens for rows, width in packed_calls)


def test_several_devices_share_the_batches(encoder: Path) -> None:
    (alone,), (shared,) = (list(embedder(encoder, batch_size=4, devices=devices).documents([TEXTS])) for devices in (("cpu",), ("cpu", "cpu", "cpu")))
    assert (alone == shared).all()


def test_prompts_stand_before_queries_and_documents(encoder: Path, packed_calls: list[tuple[int, int]]) -> None:
    def prompted(one: SentenceTransformer) -> None:
        one.prompts = {"query": "ask for it ", "document": "it is said "}

    folder = made(encoder, prompted)
    peer = library(folder)
    ours = embedder(folder)
    queries, documents = ours.queries(TEXTS).numpy(), next(ours.documents([TEXTS]))
    np.testing.assert_allclose(queries, peer.encode_query(TEXTS, normalize_embeddings=True), atol=1e-6)
    np.testing.assert_allclose(documents, peer.encode_document(TEXTS, normalize_embeddings=True), atol=1e-6)
    assert np.abs(queries - documents).max() > 1e-3 and packed_calls


def test_a_prompt_that_the_pooling_leaves_out(encoder: Path, packed_calls: list[tuple[int, int]]) -> None:
    def prompted(one: SentenceTransformer) -> None:
        one.prompts = {"document": "it is said "}
        one.set_pooling_include_prompt(False)

    folder = made(encoder, prompted)
    np.testing.assert_allclose(next(embedder(folder).documents([TEXTS])), library(folder).encode_document(TEXTS, normalize_embeddings=True), atol=1e-6)
    assert packed_calls


def test_a_projection_behind_the_pooling(encoder: Path, packed_calls: list[tuple[int, int]]) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense

    folder = made(encoder, lambda one: one.append(Dense(8, 5)))
    ours = embedder(folder)
    assert ours.dimensions == 5
    np.testing.assert_allclose(next(ours.documents([TEXTS])), library(folder).encode(TEXTS, normalize_embeddings=True), atol=1e-6)
    assert packed_calls


def test_a_backbone_without_a_packed_form_is_left_to_the_library(encoder: Path, packed_calls: list[tuple[int, int]]) -> None:
    size = json.loads((encoder / "config.json").read_text())["vocab_size"]
    config = DebertaV2Config(
        vocab_size=size, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, relative_attention=False, type_vocab_size=0
    )
    AutoModel.from_config(config).save_pretrained(encoder)
    encoder = made(encoder, lambda one: one.prompts.update(query="ask for it ", document="it is said "))
    ours, peer = embedder(encoder, max_length=16), library(encoder)
    peer.max_seq_length = 16
    np.testing.assert_allclose(next(ours.documents([TEXTS])), peer.encode_document(TEXTS, normalize_embeddings=True), atol=1e-6)
    np.testing.assert_allclose(ours.queries(TEXTS).numpy(), peer.encode_query(TEXTS, normalize_embeddings=True), atol=1e-6)
    assert not packed_calls


@pytest.mark.parametrize("unusual", ["a shorter embedding", "padding on the left", "words without a backbone"])
def test_what_is_unusual_is_left_to_the_library(encoder: Path, packed_calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, unusual: str) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    def opened(folder: str, **options: object) -> SentenceTransformer:
        one = SentenceTransformer(folder, **options)
        if unusual == "a shorter embedding":
            one.truncate_dim = 3
        elif unusual == "padding on the left":
            one[0].tokenizer.padding_side = "left"
        else:
            torch.manual_seed(0)
            one = SentenceTransformer(modules=[StaticEmbedding(one[0].tokenizer, embedding_dim=4)], device="cpu")
        return one

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", opened)
    found = next(embedder(encoder, batch_size=32).documents([TEXTS]))  # the library's own size: padding on the left moves a BERT's positions
    np.testing.assert_allclose(found, opened(str(encoder), device="cpu").encode(TEXTS, normalize_embeddings=True), atol=1e-6)
    assert not packed_calls


def test_max_length_cuts_texts(encoder: Path) -> None:
    ours = embedder(encoder, max_length=4).queries(["abc", "abc d", "abd"])
    peer = library(encoder)
    peer.max_seq_length = 4
    np.testing.assert_allclose(ours.numpy(), peer.encode(["abc", "abc d", "abd"], normalize_embeddings=True), atol=1e-6)
