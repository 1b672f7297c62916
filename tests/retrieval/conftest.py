"""Small corpora and a tiny sentence encoder, built in code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from kit.retrieval.corpus import Corpus

SCIENCE = (
    ("Albedo", "Albedo is the diffuse reflectivity of a surface. It is measured on a scale from zero to one."),
    ("Entropy", "Entropy measures disorder. The second law says that entropy never falls in an isolated system."),
    ("", "The speed of light in vacuum is the same for every observer."),
    ("Größe", "Die Größe der Ångström-Einheit ist 10⁻¹⁰ m. Ωμέγα 物理学 is written here too."),
    ("Enzyme", "An enzyme is a catalyst. Enzymes speed up chemical reactions in cells."),
    ("Mitosis", "Mitosis divides the nucleus of a cell. Two daughter nuclei follow."),
)


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """(title, text) pairs → Corpus, in a folder of its own."""

    def make(passages: Sequence[tuple[str, str]] = SCIENCE, name: str = "corpus") -> Corpus:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"id": f"p{i}", "title": t, "text": x}) + "\n" for i, (t, x) in enumerate(passages)), "utf-8")
        return Corpus.build(source, tmp_path / name)

    return make


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with 8 dimensions and random weights, saved as a plain transformers model: its tokens are letters and digits."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_encoder")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, initializer_range=1.0, **sizes)
    BertModel(config).save_pretrained(folder)
    (folder / "modeling_custom.py").write_text("raise RuntimeError('code of a model folder must never run')\n")
    return folder
