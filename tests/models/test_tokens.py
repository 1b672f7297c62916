"""Encodings of texts and pairs: what is cut, windows, offsets, special tokens, padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from kit.errors import BundleError, ConfigError
from kit.models.tokens import FILE, HFTokens, train_wordpiece
from kit.vendor.tokenizer import DIFFICULT, convert
from tests import tiny

KINDS = ("wordpiece", "byte_level")
SPECIAL = {"wordpiece": (1, 1, 1), "byte_level": (1, 2, 1)}  # before the text, between, after the pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in found.items():
        tiny.tokens(folder, byte_level=kind == "byte_level")
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens(kind: str, folders: dict[str, Path]) -> HFTokens:
    return HFTokens(folders[kind], limit=tiny.POSITIONS)


@pytest.fixture
def plain(kind: str, folders: dict[str, Path]) -> Tokenizer:
    """The library's own tokenizer of the same folder."""
    return Tokenizer.from_file(str(folders[kind] / FILE))


def same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> bool:
    return len(one) == len(other) and all((a[name] == b[name]).all() for a, b in zip(one, other, strict=True) for name in a)


def test_uncut_sequences_are_those_of_the_tokenizers_library(tokens: HFTokens, plain: Tokenizer) -> None:
    for text, pair in (("Entropy never falls", "which words?"), ("Naïve café 物理学", ""), ("", "light"), ("", "")):
        (ours,), theirs = tokens.encode(text, pair, max_length=64), plain.encode(text, pair)
        assert ours["input_ids"].tolist() == theirs.ids and ours["types"].tolist() == theirs.type_ids
        assert [tuple(span) for span in ours["offsets"].tolist()] == theirs.offsets
        (alone,) = tokens.encode(text, max_length=64)
        assert alone["input_ids"].tolist() == plain.encode(text).ids


def test_segments_tell_text_pair_and_special_tokens_apart(tokens: HFTokens, kind: str, plain: Tokenizer) -> None:
    before, between, after = SPECIAL[kind]
    text, pair = "light and snow", "dark soil"
    n, m = (len(plain.encode(part, add_special_tokens=False)) for part in (text, pair))
    (encoding,) = tokens.encode(text, pair, max_length=64)
    assert encoding["segment"].tolist() == [-1] * before + [0] * n + [-1] * between + [1] * m + [-1] * after
    (alone,) = tokens.encode(text, max_length=64)
    assert alone["segment"].tolist() == [-1] + [0] * n + [-1]
    assert (encoding["input_ids"].dtype, encoding["segment"].dtype, encoding["offsets"].dtype) == (np.int32, np.int8, np.int32)


@pytest.mark.parametrize("written", ["[SEP]", "[CLS]", "[PAD]", "[MASK]", "</s>", "<s>", "<pad>"])
def test_special_tokens_written_inside_a_text_stay_text(tokens: HFTokens, plain: Tokenizer, written: str) -> None:
    special = [id_ for id_ in (plain.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "<s>", "</s>", "<pad>")) if id_ is not None]
    (encoding,) = tokens.encode(f"light {written} snow", f"soil {written}", max_length=64)
    inside = encoding["segment"] >= 0
    assert not np.isin(encoding["input_ids"][inside], special).any()
    assert np.isin(encoding["input_ids"][~inside], special).all()
    covered = [f"light {written} snow"[a:b].strip() for a, b in encoding["offsets"][encoding["segment"] == 0]]
    assert "".join(covered) == f"light{written}snow"


@pytest.mark.parametrize("family", ["deberta-v2", "t5", "xlm-roberta"])
def test_special_tokens_written_inside_a_text_are_what_sentencepiece_makes_of_them(family: str, tmp_path: Path) -> None:
    """A Unigram model has them as pieces, which tokenizers takes and sentencepiece does not."""
    model = tiny.sentencepiece_model(tmp_path / tiny.SENTENCEPIECE[family][1], family)
    made = convert(tmp_path, model_type=family).tokenizer
    made.save(str(tmp_path / FILE))
    peer = SentencePieceProcessor(model_file=str(model))
    shift, unknown = (1, 3) if family == "xlm-roberta" else (0, peer.unk_id())
    for text in (*DIFFICULT, "light [CLS] snow", "</s>x[PAD]", "<pad>", "<unk> [UNK]", "x[MASK]y[CLS][SEP]"):
        expected = [unknown if id_ == peer.unk_id() else id_ + shift for id_ in peer.encode(text)]
        (encoding,) = HFTokens(tmp_path, limit=256).encode(text, max_length=256)
        assert encoding["input_ids"][encoding["segment"] == 0].tolist() == expected, text
    HFTokens(tmp_path).save(tmp_path)
    assert Tokenizer.from_file(str(tmp_path / FILE)).get_vocab() == made.get_vocab(), "what is saved is as it was"


@given(n=st.integers(0, 90), pair=st.integers(0, 20) | st.none(), max_length=st.integers(26, 90), stride=st.integers(0, 40))
def test_windows_cover_every_token_and_overlap_by_the_stride(folders: dict[str, Path], n: int, pair: int | None, max_length: int, stride: int) -> None:
    tokens = HFTokens(folders["wordpiece"], limit=tiny.POSITIONS)
    text = " ".join(["light", "snow", "soil", "text", "of", "share"][i % 6] for i in range(n))
    question = None if pair is None else "share " * pair
    room = min(max_length, tiny.POSITIONS) - (2 if pair is None else 3 + pair)
    if stride >= room and n > room:
        with pytest.raises(ConfigError, match=rf"stride of {stride} tokens leaves no step in windows of {room}"):
            tokens.encode(text, question, max_length=max_length, stride=stride)
        return
    windows = tokens.encode(text, question, max_length=max_length, stride=stride)
    spans = [[text[a:b] for a, b in window["offsets"][window["segment"] == 0]] for window in windows]
    words = text.split()
    if not stride:
        assert spans == [words[:room]]
        return
    joined = spans[0]
    for span in spans[1:]:
        assert span[:stride] == joined[-stride:], "overlap"
        joined = joined + span[stride:]
    assert joined == words and all(len(span) == room for span in spans[:-1])
    for window in windows:
        assert len(window["input_ids"]) <= min(max_length, tiny.POSITIONS)
        assert (window["segment"] == 1).sum() == (pair or 0), "the pair stands whole in every window"


def test_offsets_point_to_the_characters_of_the_text_in_every_window(tokens: HFTokens) -> None:
    text = "Albedo is the share of light that a naïve café sends back, 物理学 and Ωμέγα too. " * 4
    windows = tokens.encode(text, "light", max_length=30, stride=5)
    assert len(windows) > 3
    covered = np.zeros(len(text), bool)
    starts = []
    for window in windows:
        for start, stop in window["offsets"][window["segment"] == 0]:
            covered[start:stop] = True
        starts.append(int(window["offsets"][window["segment"] == 0][0, 0]))
    assert [character for character, seen in zip(text, covered, strict=True) if not seen and character != " "] == []
    assert starts == sorted(set(starts))

def test_encoding_twice_gives_the_same_whatever_was_cut_before(tokens: HFTokens, kind: str, folders: dict[str, Path]) -> None:
    text, pair = " ".join(tiny.TEXTS), "light " * 90
    settings = [(20, 0, "snow"), (30, 7, "snow"), (64, 0, "snow"), (64, 0, pair), (64, 5, None), (12, 0, None)]
    first = [tokens.encode(text, other, max_length=length, stride=stride) for length, stride, other in settings]
    second = [tokens.encode(text, other, max_length=length, stride=stride) for length, stride, other in reversed(settings)][::-1]
    fresh = [HFTokens(folders[kind], limit=64).encode(text, other, max_length=length, stride=stride) for length, stride, other in settings]
    assert all(same(a, b) and same(a, c) for a, b, c in zip(first, second, fresh, strict=True))


def test_a_pair_longer_than_the_length_stays_whole_up_to_the_models_positions(tokens: HFTokens, kind: str, plain: Tokenizer) -> None:
    special = sum(SPECIAL[kind])
    pair = "snow" + " light" * 30
    size = len(plain.encode(pair, add_special_tokens=False))
    (encoding,) = tokens.encode("entropy", pair, max_length=16)
    assert (encoding["segment"] == 1).sum() == size and (encoding["segment"] == 0).sum() == 0
    (beyond,) = tokens.encode("entropy", pair * 3, max_length=16)
    assert len(beyond["input_ids"]) == tiny.POSITIONS
    kept = beyond["input_ids"][beyond["segment"] == 1].tolist()
    assert kept == plain.encode(pair * 3, add_special_tokens=False).ids[-(tiny.POSITIONS - special) :], "the end stays"


def test_padding_is_on_the_right_and_marked_everywhere(tokens: HFTokens, kind: str) -> None:
    encodings = [tokens.encode("light", "snow", max_length=64)[0], tokens.encode("light and snow and soil", "which words?", max_length=64)[0]]
    batch = tokens.pad(encodings)
    short, long = (len(encoding["input_ids"]) for encoding in encodings)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "segment"), (2, long)
    )
    assert batch["input_ids"][0, short:].eq(tokens.pad_id).all() and tokens.pad_id == {"wordpiece": 0, "byte_level": 1}[kind]
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert batch["segment"][0, short:].eq(-1).all() and batch["token_type_ids"][0, short:].eq(0).all()
    for row, encoding in enumerate(encodings):
        length = len(encoding["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == encoding["input_ids"].tolist()
        assert batch["segment"][row, :length].tolist() == encoding["segment"].tolist()
        assert batch["token_type_ids"][row, :length].tolist() == encoding["types"].tolist()
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "token_type_ids")} == {torch.int64}


def test_id_is_for_words_of_one_token(tokens: HFTokens, plain: Tokenizer) -> None:
    assert tokens.id("A") == plain.encode("A", add_special_tokens=False).ids[0]
    with pytest.raises(ConfigError, match=r"'zzyzx light' is \d+ tokens of this tokenizer, not one"):
        tokens.id("zzyzx light")
    with pytest.raises(ConfigError, match=r"'' is 0 tokens"):
        tokens.id("")


def test_saved_tokens_encode_the_same(tokens: HFTokens, tmp_path: Path) -> None:
    tokens.save(tmp_path)
    again = HFTokens(tmp_path, limit=tiny.POSITIONS)
    for text in tiny.TEXTS:
        assert same(tokens.encode(text, "[SEP] light", max_length=40, stride=3), again.encode(text, "[SEP] light", max_length=40, stride=3))
    assert len(again) == len(tokens) and again.pad_id == tokens.pad_id


def test_truncation_and_padding_written_in_the_file_are_not_used(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folders["wordpiece"] / FILE))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / FILE))
    assert same(HFTokens(tmp_path).encode("light and snow", max_length=40), HFTokens(folders["wordpiece"]).encode("light and snow", max_length=40))


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no tokenizer\.json: make one from the slow tokenizer"):
        HFTokens(tmp_path)
    for damage in ("", "{", "[]", json.dumps({"version": "1.0", "model": {"type": "Unheard"}})):
        (tmp_path / FILE).write_text(damage)
        with pytest.raises(BundleError, match=r"tokenizer\.json: not a readable tokenizer"):
            HFTokens(tmp_path)


def test_training_gives_the_same_file_for_the_same_texts_and_folds_case(tmp_path: Path) -> None:
    texts = [f"{text} {other}" for text in tiny.TEXTS for other in tiny.TEXTS]
    for name in "abcd":
        train_wordpiece(iter(texts), tmp_path / name, vocab_size=300)
    files = [(tmp_path / name / FILE).read_bytes() for name in "abcd"]
    assert len(set(files)) == 1
    made = HFTokens(tmp_path / "a")
    assert len(made) == 300 and made.id("light") == made.id("LIGHT")
    assert made.encode("[SEP]##a", max_length=20)[0]["segment"].tolist()[0] == -1


def test_a_letter_never_seen_in_training_is_unknown_and_not_lost(tmp_path: Path) -> None:
    made = tiny.tokens(tmp_path)
    (encoding,) = made.encode("light ☃ snow", max_length=20)
    unknown = Tokenizer.from_file(str(tmp_path / FILE)).token_to_id("[UNK]")
    assert encoding["input_ids"].tolist()[1:-1] == [made.id("light"), unknown, made.id("snow")]
    assert encoding["segment"].tolist() == [-1, 0, 0, 0, -1]
