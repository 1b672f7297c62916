"""Words of texts with their characters; vectors from files, good and broken, and made from texts."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kit.errors import BundleError, ConfigError, DataError
from kit.models.tokens import FILE
from kit.models.words import CHARACTERS, SPECIAL, WIDTH, WordTokens, make_vectors, read_vectors, split, table_of, write_words
from tests import tiny

WORDS = ("the", "light", "of", "snow", "is", "high", ".", "?", "1,000", "do", "n't", "'s")

BLANK = re.compile(r"[^\S\x1c-\x1f]")  # what Unicode calls white space; Python adds four separators


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_words(WORDS, [*tiny.TEXTS, *tiny.TEXTS], folder)
    return folder


@pytest.fixture(scope="module")
def tokens(folder: Path) -> WordTokens:
    return WordTokens(folder)


# --- words -----------------------------------------------------------------------------------------------------------------------


def test_a_text_falls_into_words_numbers_and_marks() -> None:
    words_of = split()
    assert words_of("Don't touch Ann's 1,000.5 m² (10%—12%) of café-light; it’s 1990s.") == [
        *("do", "n't", "touch", "ann", "'s", "1,000.5", "m", "²", "(", "10", "%", "—", "12", "%", ")"),
        *("of", "café", "-", "light", ";", "it", "’s", "1990", "s", "."),
    ]
    assert words_of("") == words_of(" \n\t") == [] and words_of("物理学 10⁻¹⁰") == ["物理学", "10", "⁻", "¹⁰"]


def test_known_words_have_their_ids_in_any_case_and_others_one(tokens: WordTokens) -> None:
    (encoding,) = tokens.encode("The LIGHT of zzyzx", "is snow?", max_length=40)
    names = [*SPECIAL, *WORDS]
    assert [names[id_] for id_ in encoding["input_ids"]] == ["[CLS]", "the", "light", "of", "[UNK]", "[SEP]", "is", "snow", "?", "[SEP]"]
    assert encoding["segment"].tolist() == [-1, 0, 0, 0, 0, -1, 1, 1, 1, -1]
    assert tokens.id("snow") == names.index("snow")
    with pytest.raises(ConfigError, match="'snow light' is 2 tokens"):
        tokens.id("snow light")


def test_special_tokens_written_in_a_text_are_words(tokens: WordTokens) -> None:
    (encoding,) = tokens.encode("snow [SEP] [CLS]", "[PAD]", max_length=40)
    assert (encoding["input_ids"][encoding["segment"] >= 0] == 1).sum() == 9  # brackets and names, unknown each
    assert not np.isin(encoding["input_ids"][encoding["segment"] >= 0], [0, 2, 3]).any()


@given(text=st.text(max_size=60), pair=st.text(max_size=20) | st.none())
@example(text="İSTANBUL, Ǆ Ωμέγα 10⁻¹⁰ naïve", pair="İ" * 20)
def test_offsets_and_characters_are_those_of_the_text(tokens: WordTokens, folder: Path, text: str, pair: str | None) -> None:
    letters = json.loads((folder / CHARACTERS).read_text())["characters"]
    (encoding,) = tokens.encode(text, pair, max_length=200)
    assert encoding["characters"].shape == (len(encoding["input_ids"]), WIDTH) and encoding["characters"].dtype == np.int16
    for id_, part, (start, stop), spelled in zip(*(encoding[name] for name in ("input_ids", "segment", "offsets", "characters")), strict=True):
        word = ((text, pair or "")[part])[start:stop]
        expected = [id_] if part < 0 else [len(SPECIAL) + letters.index(letter) if letter in letters else 1 for letter in word[:WIDTH]]
        assert spelled.tolist() == [*expected, *[0] * (WIDTH - len(expected))]
        assert part < 0 or (word and not BLANK.search(word))
    covered = "".join(text[start:stop] for start, stop in encoding["offsets"][encoding["segment"] == 0])
    assert covered == BLANK.sub("", text)


@given(n=st.integers(0, 60), pair=st.integers(0, 9) | st.none(), max_length=st.integers(14, 60), stride=st.integers(0, 20))
def test_windows_cover_every_word_and_overlap_by_the_stride(tokens: WordTokens, n: int, pair: int | None, max_length: int, stride: int) -> None:
    words = [f"{WORDS[index % 5]}" for index in range(n)]
    text, question = " ".join(words), None if pair is None else " ".join(["snow"] * pair)
    room = max_length - (2 if pair is None else 3 + pair)
    if stride >= room and n > room:
        with pytest.raises(ConfigError, match=rf"stride of {stride} tokens leaves no step in windows of {room}"):
            tokens.encode(text, question, max_length=max_length, stride=stride)
        return
    windows = tokens.encode(text, question, max_length=max_length, stride=stride)
    spans = [[text[start:stop] for start, stop in window["offsets"][window["segment"] == 0]] for window in windows]
    assert all((window["segment"] == 1).sum() == (pair or 0) and len(window["characters"]) == len(window["input_ids"]) <= max_length for window in windows)
    assert spans[0] == words[:room]
    if stride and n > room:
        assert [word for number, span in enumerate(spans) for word in span[stride if number else 0 :]] == words
    else:
        assert len(spans) == 1


def test_padding_is_zero_and_on_the_right(tokens: WordTokens) -> None:
    encodings = [tokens.encode(text, "snow", max_length=40)[0] for text in ("light", "the light of snow")]
    batch = tokens.pad(encodings)
    assert batch["characters"].shape == (*batch["input_ids"].shape, WIDTH) == (2, 8, WIDTH)
    for row, encoding in enumerate(encodings):
        length = len(encoding["input_ids"])
        assert (batch["characters"][row, :length].numpy() == encoding["characters"]).all()
        assert not batch["characters"][row, length:].any() and not batch["input_ids"][row, length:].any()


def test_saved_tokens_come_back_equal_and_a_folder_without_is_a_bundle_error(tokens: WordTokens, folder: Path, tmp_path: Path) -> None:
    tokens.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((FILE, CHARACTERS))
    again = WordTokens(tmp_path)
    one, other = (made.encode(tiny.TEXTS[0], "snow?", max_length=50)[0] for made in (tokens, again))
    assert all((one[name] == other[name]).all() for name in one) and len(tokens) == len(again) and tokens.characters == again.characters
    for content in ("", "{}", '{"characters": [1]}', '{"characters": "aa"}', "[1"):
        (tmp_path / CHARACTERS).write_text(content)
        with pytest.raises(BundleError, match=rf"{CHARACTERS}: .*train the run again") as error:
            WordTokens(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / CHARACTERS).unlink()
    with pytest.raises(BundleError, match=CHARACTERS):
        WordTokens(tmp_path)


# --- vectors from a file ---------------------------------------------------------------------------------------------------------

LINES = ["the 1 0 0", "Snow 0 2 0", "light 0 0 3", "snow 9 9 9"]


def written(path: Path, lines: list[str], end: str = "\n") -> Path:
    content = ("\n".join(lines) + end).encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["vectors.txt", "vectors.vec", "vectors.txt.gz"])
@pytest.mark.parametrize("header", [[], ["4 3"]], ids=["glove", "word2vec"])
def test_a_file_is_read_in_either_form(tmp_path: Path, name: str, header: list[str]) -> None:
    for end in ("\n", "", " \n", "\r\n"):
        vectors = read_vectors(written(tmp_path / name, [*header, *LINES], end), limit=10)
        assert vectors.words == ["the", "snow", "light"]
        np.testing.assert_array_equal(vectors.table, [[1, 0, 0], [0, 2, 0], [0, 0, 3]])
        np.testing.assert_array_equal(vectors.mean, [2.5, 2.75, 3])
        assert vectors.table.dtype == vectors.mean.dtype == np.float32


def test_wanted_words_come_first_and_the_limit_cuts_the_others(tmp_path: Path) -> None:
    path = written(tmp_path / "v.txt", LINES)
    assert read_vectors(path, first={"light", "absent"}, limit=10).words == ["light", "the", "snow"]
    assert read_vectors(path, first={"light"}, limit=2).words == ["light", "the"]
    few = read_vectors(path, first={"light", "snow"}, limit=1)
    assert few.words == ["snow"] and few.table.tolist() == [[0, 2, 0]] and few.mean.tolist() == [2.5, 2.75, 3]


def test_an_unknown_word_gets_the_mean_of_the_file(tmp_path: Path) -> None:
    vectors = read_vectors(written(tmp_path / "v.txt", LINES), limit=2)
    table = table_of(vectors, seed=0)
    assert table.shape == (4 + 2, 3) and table.dtype == np.float32 and not table[0].any()
    np.testing.assert_array_equal(table[1], [2.5, 2.75, 3])
    np.testing.assert_array_equal(table[4:], vectors.table)
    assert (table[2] != table[3]).all() and (table_of(vectors, seed=0) == table).all() and not (table_of(vectors, seed=1) == table).all()


def test_a_word_of_gloves_may_hold_spaces(tmp_path: Path) -> None:
    vectors = read_vectors(written(tmp_path / "v.txt", ["the 1 0 0", ". . . 0 1 0", "at name@domain.com 0 0 1", "3 1 1 1"]), limit=9)
    assert vectors.words == ["the", ". . .", "at name@domain.com", "3"] and vectors.table[1].tolist() == [0, 1, 0]


BROKEN = {
    "too few numbers": (["the 1 0 0", "snow 1 0"], r"line 2: 2 numbers after 'snow' instead of 3"),
    "too many numbers": (["the 1 0 0", "snow 1 0 0 5"], r"line 2: 4 numbers after 'snow' instead of 3"),
    "other than the header says": (["2 3", "the 1 0", "snow 1 0"], r"line 2: 2 numbers after 'the' instead of 3"),
    "cut off in a line": (["the 1 0 0", "sno"], r"line 2: 0 numbers after 'sno' instead of 3"),
    "cut off between lines": (["3 3", "the 1 0 0"], r"line 2: the file ends after 1 of 3 vectors"),
    "more than the header says": (["1 3", "the 1 0 0", "snow 1 0 0"], r"line 3: the file ends after 2 of 1 vectors"),
    "no number": (["the 1 0 0", "snow 1 zero 0"], r"line 2: 'zero' after 'snow' is no number"),
    "not a number": (["the 1 0 nan"], r"line 1: 'nan' after 'the' is no number"),
    "infinite": (["the 1 0 0", "snow 1 1e99 0"], r"line 2: '1e99' after 'snow' is no number"),
    "no word": (["the 1 0 0", " 1 0 0"], r"line 2: 3 numbers without a word"),
    "an empty line": (["the 1 0 0", "", "snow 1 0 0"], r"line 2: 0 numbers after '' instead of 3"),
    "not UTF-8": (["the 1 0 0", "sn\udcff 1 0 0"], r"line 2: 'sn\ufffd' is not UTF-8"),
    "words alone": (["the", "snow"], r"line 1: 0 numbers after 'the'"),
}


@pytest.mark.parametrize("name", ["v.txt", "v.txt.gz"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named(tmp_path: Path, case: str, name: str) -> None:
    lines, why = BROKEN[case]
    with pytest.raises(DataError, match=rf"{name}: {why}") as error:
        read_vectors(written(tmp_path / name, lines), limit=9)
    assert "\n" not in str(error.value)


def test_an_empty_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    for lines in ([], ["0 3"]):
        with pytest.raises(DataError, match=r"v\.txt: line \d: the file ends after 0 of"):
            read_vectors(written(tmp_path / "v.txt", lines, "\n" if lines else ""), limit=9)
    whole = written(tmp_path / "v.txt.gz", [f"word{row} {row} 1 2" for row in range(3000)]).read_bytes()
    for content in (whole[:-200], b"the 1 2\n", whole[:200] + b"\0" * 200 + whole[400:]):
        (tmp_path / "v.txt.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"v\.txt\.gz: line \d+: .*copy the file again") as error:
            read_vectors(tmp_path / "v.txt.gz", limit=9)
        assert "\n" not in str(error.value)
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(ConfigError, match=rf"model\.config\.vectors = '{path}': no such file"):
            read_vectors(path, limit=9)


# --- vectors made from texts -----------------------------------------------------------------------------------------------------


def test_words_in_like_places_get_like_vectors() -> None:
    rng = np.random.default_rng(0)
    groups = {"cold": ["snow", "ice", "frost"], "warm": ["sun", "fire", "flame"]}
    places = {"cold": ["winter", "white", "north"], "warm": ["summer", "red", "south"]}
    texts = [" ".join([rng.choice(groups[kind]), *rng.permutation(places[kind])]) for kind in rng.choice(["cold", "warm"], 400)]
    vectors = make_vectors(texts, dimension=4, limit=100)
    unit = dict(zip(vectors.words, vectors.table / np.linalg.norm(vectors.table, axis=1, keepdims=True), strict=True))
    assert unit["snow"] @ unit["ice"] > 0.8 and unit["sun"] @ unit["flame"] > 0.8 and abs(unit["snow"] @ unit["sun"]) < 0.4
    np.testing.assert_allclose(vectors.mean, vectors.table.mean(0), atol=1e-6)
    assert vectors.table.std() == pytest.approx(0.4, rel=1e-5)


def test_made_vectors_are_the_same_again_and_survive_a_file(tmp_path: Path) -> None:
    vectors = make_vectors(tiny.TEXTS, dimension=6, limit=12)
    again = make_vectors(iter(tiny.TEXTS), dimension=6, limit=12)
    assert vectors.words == again.words and (vectors.table == again.table).all() and len(vectors.words) == 12
    counted = [word for text in tiny.TEXTS for word in split()(text)]
    assert all(counted.count(word) >= 2 for word in vectors.words) and vectors.words[0] == max(vectors.words, key=counted.count)
    for name in ("v.txt", "deep/v.txt.gz"):
        tiny.write_vectors(vectors, tmp_path / name)
        read = read_vectors(tmp_path / name, limit=99)
        assert read.words == vectors.words
        np.testing.assert_allclose(read.table, vectors.table, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(read.mean, vectors.mean, rtol=1e-4, atol=1e-6)


def test_too_few_words_for_the_dimension_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.config\.dimension = 50: the texts have 2 words that stand in them twice.*model\.config\.vectors"):
        make_vectors(["light snow", "snow light"], dimension=50, limit=100)


def test_the_information_is_that_of_a_slow_count() -> None:
    from kit.models.words import _information

    documents = [["a", "b", "c", "a"], ["b", "a", "x", "a", "b", "c", "a", "c"]]
    words = ["a", "b", "c"]
    counts = np.zeros((3, 3))
    for document in documents:
        for i, one in enumerate(document):
            for j, other in enumerate(document):
                if i != j and abs(i - j) <= 5 and one in words and other in words:
                    counts[words.index(one), words.index(other)] += 1 / abs(i - j)
    often, around = counts.sum(1), counts.sum(1) ** 0.75
    with np.errstate(divide="ignore"):
        expected = np.maximum(0, np.log(counts / (often[:, None] * (around / around.sum())[None])))
    np.testing.assert_allclose(_information(documents, words).toarray(), expected, atol=1e-12)
