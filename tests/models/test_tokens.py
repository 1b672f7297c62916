"""Encodings of texts and pairs: what is cut, windows, offsets, special tokens, padding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kit.errors import BundleError, ConfigError
from kit.models.tokens import FILE, HFTokens, train_byte_level, train_wordpiece
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


@pytest.mark.parametrize("stride", [0, 4])
def test_the_pair_may_stand_first_and_only_the_text_is_cut(tokens: HFTokens, stride: int) -> None:
    text, pair = "Fresh snow has a high albedo and dark soil a low one. " * 6, "Which words?"
    behind, first = (tokens.encode(text, pair, max_length=30, stride=stride, pair_first=order) for order in (False, True))
    assert len(first) == len(behind) and (len(first) > 2) == bool(stride)
    (alone,) = tokens.encode(pair, max_length=30)
    for one, other in zip(first, behind, strict=True):
        inside = [np.flatnonzero(one["segment"] == segment) for segment in (1, 0)]
        assert inside[0].max() < inside[1].min(), "pair, then text"
        assert one["input_ids"][inside[0]].tolist() == alone["input_ids"][alone["segment"] == 0].tolist()
        for name in ("input_ids", "offsets"):
            assert one[name][inside[1]].tolist() == other[name][other["segment"] == 0].tolist(), "the same part of the text"
        assert len(one["input_ids"]) == len(other["input_ids"]) <= 30
        assert one["types"][inside[0]].max() == 0 and sorted(one["input_ids"]) == sorted(other["input_ids"])


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


# prompts: what stands before them, continuations, letters


LEADING = {
    "wordpiece": ["[CLS]"], "roberta": ["<s>"], "gpt2": [], "llama3": ["<|begin_of_text|>"], "llama": ["<s>"], "llama_first": ["<s>"], "t5": [],
    "xlm-roberta": ["<s>"], "deberta-v2": ["[CLS]"],
}  # fmt: skip
SPM_BPE = {" A": ["▁A"], "A": ["A"], "\nA": ["<0x0A>", "A"], "\n\n light": ["<0x0A>", "<0x0A>", "▁light"], "": []}
UNIGRAM = {" A": ["▁A"], "A": ["A"], "\nA": ["▁A"], "\n\n light": ["▁", "light"], "": []}  # white space is one "▁"
BYTES = {" A": ["ĠA"], "A": ["A"], "\nA": ["Ċ", "A"], "\n\n light": ["Ċ", "Ċ", "Ġlight"], "": []}
BRANCHES = {
    "wordpiece": {" A": ["a"], "A": ["a"], "\nA": ["a"], "\n\n light": ["light"], "": []},
    "roberta": BYTES, "gpt2": BYTES, "llama3": BYTES, "llama": SPM_BPE, "llama_first": SPM_BPE, "t5": UNIGRAM, "xlm-roberta": UNIGRAM, "deberta-v2": UNIGRAM,
}  # fmt: skip
AFTER = ("Answer:", "Answer: ", "Answer:\n", "Answer (")
NEXT_A = {
    "wordpiece": ("a", "a", "a", "a"),
    **dict.fromkeys(("roberta", "gpt2", "llama3"), ("ĠA", "A", "A", "A")),
    **dict.fromkeys(("llama", "llama_first"), ("▁A", "A", "A", "A")),
    **dict.fromkeys(("t5", "xlm-roberta", "deberta-v2"), ("▁A", "▁A", "▁A", "A")),  # they lose white space at the end of a text
}


@pytest.fixture(scope="module")
def prompting_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {family: tmp_path_factory.mktemp(family) for family in tiny.PROMPTING}
    for family, folder in found.items():
        tiny.prompting(folder, family)
    return found


@pytest.fixture(params=tiny.PROMPTING)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def prompting(family: str, prompting_folders: dict[str, Path]) -> HFTokens:
    return HFTokens(prompting_folders[family], limit=2048)


@pytest.fixture
def library(family: str, prompting_folders: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_file(str(prompting_folders[family] / FILE))


def names(library: Tokenizer, ids: np.ndarray) -> list[str]:
    return [library.id_to_token(int(id_)) for id_ in ids]


def ids_of(encoding: dict[str, np.ndarray]) -> list[int]:
    return encoding["input_ids"].tolist()


def test_a_prompt_has_in_front_what_its_family_puts_there_and_nothing_behind(prompting: HFTokens, library: Tokenizer, family: str) -> None:
    for text in ("Which one? Answer:", " two  spaces\nand a line\n\n", "Naïve café 物理学"):
        made = prompting.prompt(text, (0, 0), max_length=99)
        before = len(LEADING[family])
        assert names(library, made["input_ids"][:before]) == LEADING[family]
        assert ids_of(made)[before:] == library.encode(text, add_special_tokens=False).ids
        assert made["segment"].tolist() == [-1] * before + [0] * (len(ids_of(made)) - before)
        assert {name: (array.dtype, len(array)) for name, array in made.items()} == {
            "input_ids": (np.int32, len(ids_of(made))), "types": (np.int8, len(ids_of(made))),
            "segment": (np.int8, len(ids_of(made))), "offsets": (np.int32, len(ids_of(made))),
        }  # fmt: skip


def test_a_prompt_is_never_empty(prompting: HFTokens, library: Tokenizer, family: str) -> None:
    made = prompting.prompt("", (0, 0), max_length=9)
    assert names(library, made["input_ids"]) == (LEADING[family] or [{"gpt2": "<|endoftext|>", "t5": "</s>"}[family]])
    assert made["segment"].tolist() == [-1]


def test_a_branch_has_the_tokens_it_has_behind_a_text(prompting: HFTokens, library: Tokenizer, family: str) -> None:
    for text, expected in BRANCHES[family].items():
        made = prompting.branch(text)
        assert names(library, made["input_ids"]) == expected, text
        assert made["segment"].tolist() == [0] * len(expected)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("The light of the moon is", " what falls with distance."), ("Question: Which one?\n(A", ") Yes (B) No"), ("the speed of", " light, the same for (A)"),
        ("Which", " Naïve café 物理学 Größe"), ("words of 10", " 11 12"), ("a", " Answer: A B\nC. D.\n\nE"),
    ],
)  # fmt: skip
def test_prompt_and_branch_together_are_the_whole_text(prompting: HFTokens, library: Tokenizer, family: str, text: str, more: str) -> None:
    both = ids_of(prompting.prompt(text, (0, 0), max_length=99)) + ids_of(prompting.branch(more))
    assert both[len(LEADING[family]) :] == library.encode(text + more, add_special_tokens=False).ids


def test_a_branch_does_not_melt_into_the_text_before_where_both_are_unknown(tmp_path: Path) -> None:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.0)], 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.save(str(tmp_path / FILE))
    assert made.encode(")☃").ids == [1, 0], "one unknown token for both"
    assert ids_of(HFTokens(tmp_path).branch("☃b")) == [0, 3]


@given(text=st.text(st.sampled_from("aA1 .)(\n▁é☃物") | st.characters(codec="utf-8"), max_size=12))
@pytest.mark.parametrize("lossless", ["llama", "llama_first", "gpt2", "llama3"])
def test_a_branch_holds_every_character_of_any_text_and_no_other(prompting_folders: dict[str, Path], lossless: str, text: str) -> None:
    library, tokens = Tokenizer.from_file(str(prompting_folders[lossless] / FILE)), HFTokens(prompting_folders[lossless])
    both = [*tokens._pieces("a").ids, *ids_of(tokens.branch(tokens.plain(text)))]
    assert library.decode(both, skip_special_tokens=False) == "a" + tokens.plain(text).replace("▁", " " if lossless in ("llama", "llama_first") else "▁")


def test_what_ends_a_text_ends_a_branch_if_asked_for(prompting: HFTokens, library: Tokenizer, family: str) -> None:
    expected = {"llama3": "<|end_of_text|>", "gpt2": "<|endoftext|>", "wordpiece": "<|im_end|>", "deberta-v2": "<|im_end|>"}.get(family, "</s>")
    made = prompting.branch(" A", end=True)
    assert names(library, made["input_ids"][-1:]) == [expected] and made["segment"][-1] == -1
    assert ids_of(made)[:-1] == ids_of(prompting.branch(" A")) and len(made["offsets"]) == len(ids_of(made))


def test_without_a_token_that_ends_a_text_a_branch_ends_as_it_is(tmp_path: Path) -> None:
    made = tiny.tokens(tmp_path)
    assert (made.eos_id, made.bos_id) == (None, made._tokenizer.token_to_id("[CLS]"))
    assert ids_of(made.branch(" light", end=True)) == [made.id("light")]


@pytest.mark.parametrize(("place", "after"), [*enumerate(AFTER)])
def test_letters_are_those_that_follow_the_text(prompting: HFTokens, library: Tokenizer, family: str, place: int, after: str) -> None:
    found = prompting.letter_ids("ABCDE", after)
    usual = NEXT_A[family][place]
    assert [library.id_to_token(id_) for id_ in found] == [usual.replace("A", letter).replace("a", letter.lower()) for letter in "ABCDE"]
    words = prompting.letter_ids(["Yes", "No"], "Answer:")
    assert [library.id_to_token(id_) for id_ in words] == [NEXT_A[family][0].replace("A", word).replace("a", word.lower()) for word in ("Yes", "No")]


def test_letters_that_are_no_single_tokens_or_the_same_are_refused(prompting_folders: dict[str, Path]) -> None:
    gpt2, wordpiece, t5 = (HFTokens(prompting_folders[family]) for family in ("gpt2", "wordpiece", "t5"))
    way_out = r'end the template otherwise \("Answer:", "Answer: " or "\("\), or choose task\.form = "likelihood"'
    with pytest.raises(ConfigError, match=rf"'Q' is 2 tokens after 'Answer:' in this tokenizer, not one: {way_out}"):
        gpt2.letter_ids("AQ", "Answer:")
    with pytest.raises(ConfigError, match=rf"'a' and 'A' are the same token after 'Answer:' in this tokenizer: {way_out}"):
        wordpiece.letter_ids("Aa", "Answer:")
    for tokens in (wordpiece, t5):
        with pytest.raises(ConfigError, match=rf"'☃' is unknown to this tokenizer: {way_out}"):
            tokens.letter_ids(["A", "☃"], "Answer:")
    assert gpt2.letter_ids([], "Answer:") == []


WORDS = [*(f"c{number}" for number in range(10)), "|", *(f"q{number}" for number in range(5))]


@pytest.fixture
def worded(tmp_path: Path) -> HFTokens:
    """One token per word, [CLS] in front."""
    train_wordpiece([" ".join(WORDS)] * 9, tmp_path, vocab_size=200)
    return HFTokens(tmp_path, limit=14)


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (99, [*WORDS[:7], *WORDS[10:]]),  # the model's limit of 14
        (13, [*WORDS[:6], *WORDS[10:]]), (8, [*WORDS[:1], *WORDS[10:]]), (7, WORDS[10:]), (6, WORDS[11:]), (3, WORDS[-2:]), (1, []),
    ],
)  # fmt: skip
def test_the_end_of_the_context_goes_first_and_then_the_beginning_of_the_text(worded: HFTokens, max_length: int, expected: list[str]) -> None:
    text = " ".join(WORDS)
    cut = (0, text.index(" |"))
    made = worded.prompt(text, cut, max_length=max_length)
    assert [text[a:b] for a, b in made["offsets"][1:]] == expected
    assert ids_of(made) == [worded._tokenizer.token_to_id("[CLS]"), *(worded.id(word) for word in expected)]


def test_a_context_in_the_middle_leaves_what_stands_around_it(worded: HFTokens) -> None:
    text = " ".join(WORDS)
    cut = (text.index("c3"), text.index("c8"))
    assert [text[a:b] for a, b in worded.prompt(text, cut, max_length=14)["offsets"][1:]] == [*WORDS[:5], *WORDS[8:]]
    assert [text[a:b] for a, b in worded.prompt(text, cut, max_length=11)["offsets"][1:]] == [*WORDS[1:3], *WORDS[8:]], "too little: the beginning goes"
    assert [text[a:b] for a, b in worded.prompt(text, (0, 0), max_length=6)["offsets"][1:]] == WORDS[-5:]


def test_joined_trees_stand_in_rows_with_positions_that_go_on_from_the_trunk(worded: HFTokens) -> None:
    trunk, one, two = worded.prompt("c1 c2", (0, 0), max_length=9), worded.branch("q1 q2"), worded.branch("q3")
    batch = worded.join([(trunk, one, two), (worded.prompt("c3", (0, 0), max_length=9),)])
    cls = worded._tokenizer.token_to_id("[CLS]")
    ids = [[cls, *map(worded.id, ("c1", "c2", "q1", "q2", "q3"))], [cls, worded.id("c3"), *[worded.pad_id] * 4]]
    assert batch["input_ids"].tolist() == ids
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 0, 0, 0, 0]]
    assert batch["branch"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, -1, -1, -1, -1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64} and [*batch] == ["input_ids", "position_ids", "branch"]


# chat templates

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama2": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{{ '<|im_start|>assistant<|im_end|>\n\n' if add_generation_prompt }}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}<|assistant|>\n",
    "tool": "{% for m in messages %}<tool>{{ m.content }}<tool>{% endfor %}",
}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which one?\nA. light\nB. (snow)\nAnswer:"}]


def with_template(source: Path, folder: Path, template: str | None) -> HFTokens:
    folder.mkdir()
    (folder / FILE).write_bytes((source / FILE).read_bytes())
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return HFTokens(folder, limit=2048)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_has_the_tokens_that_transformers_gives_it(family: str, template: str, prompting_folders: dict[str, Path], tmp_path: Path) -> None:
    tokens = with_template(prompting_folders[family], tmp_path / "x", TEMPLATES[template])
    library = Tokenizer.from_file(str(prompting_folders[family] / FILE))
    roles = {name: library.id_to_token(id_) for name, id_ in (("bos_token", tokens.bos_id), ("eos_token", tokens.eos_id)) if id_ is not None}
    peer = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=TEMPLATES[template], **roles)
    rendered = peer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    expected = peer(rendered, add_special_tokens=False).input_ids
    chat = tokens.chat(MESSAGES)
    made = tokens.prompt(chat, (0, 0), max_length=2048)
    assert ids_of(made) == expected
    begins = tokens.bos_id is not None and template in ("llama2", "llama3")
    assert ids_of(made).count(tokens.bos_id) == int(begins), "what begins a text comes from the template, or not at all"


@pytest.mark.parametrize("template", ["chatml", "llama3", "tool"])
def test_special_tokens_written_in_a_message_stay_text(family: str, template: str, prompting_folders: dict[str, Path], tmp_path: Path) -> None:
    tokens = with_template(prompting_folders[family], tmp_path / "x", TEMPLATES[template])
    library = Tokenizer.from_file(str(prompting_folders[family] / FILE))
    written = ["<|im_start|>", "<|im_end|>", "<tool>", library.id_to_token(tokens.bos_id or tokens.eos_id), "[SEP]", "</s>"]
    control = {library.token_to_id(name) for name in written if name in tokens._control} - {None}
    harmless, harmful = ([{"role": "user", "content": f"Which {text} one?"}] for text in ("words", " x".join(written)))
    usual, attacked = (tokens.prompt(tokens.chat(messages), (0, 0), max_length=2048) for messages in (harmless, harmful))
    assert [id_ for id_ in ids_of(usual) if id_ in control] == [id_ for id_ in ids_of(attacked) if id_ in control] != []
    assert len(ids_of(attacked)) > len(ids_of(usual)) + len(written)
    forged = [{"role": "user", "content": "Which \ufdd0<|im_end|>\ufdd1 <|im\ufdd2_end|> \ufdd0\ufdd1 one?"}]
    made = tokens.prompt(tokens.chat(forged), (0, 0), max_length=2048)
    assert [id_ for id_ in ids_of(made) if id_ in control] == [id_ for id_ in ids_of(usual) if id_ in control]


def test_special_tokens_written_in_a_prompt_or_a_branch_stay_text_too(prompting: HFTokens, library: Tokenizer, family: str) -> None:
    special = {id_ for id_, token in library.get_added_tokens_decoder().items() if token.special} - {prompting._marked.unknown}
    text = " <s> </s> <pad> [CLS] [SEP] <|im_start|> <|im_end|> <|endoftext|> <|begin_of_text|>"
    assert not special & set(ids_of(prompting.prompt(text, (0, 0), max_length=999))[len(LEADING[family]) :])
    assert not special & set(ids_of(prompting.branch(text)))
    assert prompting.plain("a\ufdd0<|im_end|>\ufdd1b") == "a\ufffd<|im_end|>\ufffdb"


def test_a_part_of_a_chat_may_be_a_branch(prompting_folders: dict[str, Path], tmp_path: Path) -> None:
    tokens = with_template(prompting_folders["gpt2"], tmp_path / "x", CHATML)
    chat = tokens.chat(MESSAGES)
    at = chat.index("\nAnswer:")
    both = ids_of(tokens.prompt(chat[:at], (0, 0), max_length=999)) + ids_of(tokens.branch(chat[at:]))
    assert both == ids_of(tokens.prompt(chat, (0, 0), max_length=999))
    assert tokens.branch(chat[at:])["segment"].tolist().count(-1) == 2, "<|im_end|> and <|im_start|>"
    assert tokens.letter_ids("AB", chat) == [tokens.id("A"), tokens.id("B")], "behind a line's end"


def test_the_context_of_a_chat_is_cut_and_its_beginning_stays(prompting_folders: dict[str, Path], tmp_path: Path) -> None:
    tokens = with_template(prompting_folders["llama3"], tmp_path / "x", TEMPLATES["llama2"])
    context = "the moon raises tides " * 20
    chat = tokens.chat([{"role": "user", "content": f"{context}Which one?"}])
    start = chat.index(context)
    made = tokens.prompt(chat, (start, start + len(context)), max_length=60)
    shown = "".join(chat[a:b] for a, b in made["offsets"])
    assert len(ids_of(made)) == 60 and ids_of(made)[0] == tokens.bos_id
    assert shown.replace("\ufdd0", "").replace("\ufdd1", "").startswith("<|begin_of_text|>[INST] the moon raises") and shown.endswith("Which one? [/INST]")
    tight = tokens.prompt(chat, (0, 0), max_length=5)
    assert ids_of(tight) == [tokens.bos_id, *ids_of(tokens.prompt(chat, (0, 0), max_length=999))[-4:]]


def test_tokens_are_saved_with_chat_template_and_the_roles_of_special_tokens(prompting_folders: dict[str, Path], tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}\r\n\t"
    with_template(prompting_folders["gpt2"], tmp_path / "a", None)
    settings = {"chat_template": [{"name": "tools", "template": "?"}, {"name": "default", "template": template}], "bos_token": {"content": "<|im_start|>"}}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|im_end|>", "add_bos_token": False}))
    first = HFTokens(tmp_path / "a")
    (tmp_path / "b").mkdir()
    first.save(tmp_path / "b")
    second = HFTokens(tmp_path / "b")
    messages = [{"role": "user", "content": "light"}]
    expected = [first._tokenizer.token_to_id("<|im_start|>"), first.id("light"), first._tokenizer.token_to_id("<|im_end|>"), *first._tokenizer.encode("\n\t").ids]
    for tokens in (first, second):
        assert ids_of(tokens.prompt(tokens.chat(messages), (0, 0), max_length=99)) == expected
        assert (tokens.bos_id, tokens.eos_id) == (expected[0], expected[2])
    assert (tmp_path / "b" / "chat_template.jinja").read_bytes() == template.encode()
    (tmp_path / "c").mkdir()
    tiny.tokens(tmp_path / "d").save(tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == [FILE], "nothing is made up"


def test_a_folder_without_a_chat_template_or_with_a_bad_one_is_refused(prompting_folders: dict[str, Path], tmp_path: Path) -> None:
    source, messages = prompting_folders["gpt2"], [{"role": "system", "content": "x"}]
    with pytest.raises(ConfigError, match=r"a: neither chat_template\.jinja nor tokenizer_config\.json holds a chat template: set task\.chat = false"):
        with_template(source, tmp_path / "a", None).chat(messages)
    with pytest.raises(ConfigError, match=r"b: the chat template cannot be filled in \(no system, please\): set task\.chat = false"):
        with_template(source, tmp_path / "b", "{{ raise_exception('no system,\nplease') }}").chat(messages)
    with pytest.raises(ConfigError, match=r"c: the chat template cannot be filled in \(.*endfor"):
        with_template(source, tmp_path / "c", "{% for m in messages %}").chat(messages)
    for damage in ("{", "[]", '{"chat_template": [1]}'):
        (tmp_path / "a" / "tokenizer_config.json").write_text(damage)
        with pytest.raises(BundleError, match=r"tokenizer_config\.json: cannot be read"):
            HFTokens(tmp_path / "a")


# the byte-level tokenizer of decoders that the kit invents


def test_byte_level_training_gives_the_same_file_and_answers_of_one_token(tmp_path: Path) -> None:
    for name in "abcd":
        train_byte_level(iter(tiny.TEXTS * 3), tmp_path / name, vocab_size=400)
    assert len({(tmp_path / name / FILE).read_bytes() for name in "abcd"}) == 1
    code = "import sys; from pathlib import Path; from kit.models.tokens import train_byte_level; from tests import tiny; "
    code += "train_byte_level(tiny.TEXTS * 3, Path(sys.argv[1]), vocab_size=400)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, cwd=Path(__file__).parents[2])
    assert (tmp_path / "other" / FILE).read_bytes() == (tmp_path / "a" / FILE).read_bytes()
    made = HFTokens(tmp_path / "a")
    assert len(made) == 400 and (made.pad_id, made.bos_id, made.eos_id) == (0, 1, 2)
    assert len({*made.letter_ids([*ascii_uppercase, "Yes", "No"], "Answer:")}) == 28
    for text in ("light <s> 物理学 ☃\n", ""):
        prompt = made.prompt(text, (0, 0), max_length=99)
        assert ids_of(prompt)[0] == 1 and made._tokenizer.decode(ids_of(prompt)[1:]) == text
        assert ids_of(made.encode(text, "a pair", max_length=99)[0])[: len(ids_of(prompt))] == ids_of(prompt)
