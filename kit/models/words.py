"""Texts → words with their characters; and vectors of words, read from GloVe's and word2vec's text files or made from texts.

Words are lower-cased before they are looked up, characters are not. What encodings are cut to, and how, is the business of
kit.models.tokens. Knows no task and no model.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.linalg import svds
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from kit.errors import BundleError, ConfigError, DataError
from kit.models.tokens import FILE, HFTokens

if TYPE_CHECKING:
    from kit.tasks import Batch, Encoding

CHARACTERS = "characters.json"
WIDTH = 16
"""Characters of a word that are looked at, the first ones (as in Seo et al. 2016)."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
"""The first token ids. The first characters' ids say the same: none, unknown, and what special tokens are spelled with."""
_WORD = (  # numbers; do|n't, it|'s as GloVe's corpora have them; words; anything else by itself
    r"\p{N}+(?:[.,:]\p{N}+)*|[\p{L}\p{M}]+?(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|[\p{L}\p{M}]+|\S"
)
_LIMIT = 8192  # tokens of a sequence; nothing in these models ends there
_MOST_CHARACTERS = 1000
_LEAST = 2  # times that a word or a character stands in the texts
_WINDOW = 5  # words on each side that count as context
_SMOOTHING = 0.75  # of the contexts' frequencies (Levy, Goldberg & Dagan 2015)
_SPREAD = 0.4  # standard deviation of a number in GloVe's files
_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 40  # characters of what is wrong in a line


class Vectors(NamedTuple):
    """words: V different ones. table: (V, D) float32. mean: (D,) float32 of all vectors there were, for words that have none."""

    words: list[str]
    table: np.ndarray
    mean: np.ndarray


class WordTokens(HFTokens):
    """Words as tokens, "[CLS] text [SEP] pair [SEP]"; encodings have their characters, too: (T, WIDTH) int16, 0 behind a word's last."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, limit=_LIMIT)
        letters = _read_characters(Path(folder) / CHARACTERS)
        self._characters = letters
        self._letters = {letter: len(SPECIAL) + place for place, letter in enumerate(letters)}
        self._spelled = lru_cache(maxsize=1 << 16)(self._spell)

    @property
    def characters(self) -> int:
        """Ids of characters."""
        return len(SPECIAL) + len(self._letters)

    def encode(self, text: str, pair: str | None = None, *, max_length: int, stride: int = 0, pair_first: bool = False) -> list[Encoding]:
        """See kit.tasks.Tokens: the pair stands behind the text in any case, for the recurrent readers read the two apart."""
        made = super().encode(text, pair, max_length=max_length, stride=stride)
        return [{**encoding, "characters": self._spellings(encoding, (text, pair or ""))} for encoding in made]

    def pad(self, encodings: Sequence[Encoding]) -> Batch:
        """See kit.tasks.Tokens: what HFTokens gives, and int64 characters (R, T, WIDTH)."""
        batch = super().pad(encodings)
        characters = np.zeros((*batch["input_ids"].shape, WIDTH), np.int64)
        for row, encoding in enumerate(encodings):
            characters[row, : len(encoding["characters"])] = encoding["characters"]
        return batch | {"characters": torch.from_numpy(characters)}

    def save(self, folder: Path) -> None:
        """See kit.tasks.Tokens: tokenizer.json and characters.json."""
        super().save(folder)
        _write_characters(self._characters, Path(folder))

    def _spellings(self, encoding: Encoding, texts: tuple[str, str]) -> np.ndarray:
        """Characters of all tokens (T, WIDTH)."""
        ids, parts, offsets = (encoding[name].tolist() for name in ("input_ids", "segment", "offsets"))
        words = (texts[part][start:stop] if part >= 0 else id_ for id_, part, (start, stop) in zip(ids, parts, offsets, strict=True))
        return np.stack([self._spelled(word) for word in words])

    def _spell(self, word: str | int) -> np.ndarray:
        """Characters of a word; a special token, given by its id, is spelled with that."""
        spelled = np.zeros(WIDTH, np.int16)
        ids = [word] if isinstance(word, int) else [self._letters.get(letter, 1) for letter in word[:WIDTH]]
        spelled[: len(ids)] = ids
        return spelled


def write_words(words: Sequence[str], texts: Iterable[str], folder: Path) -> None:
    """Write the files of WordTokens: for these words, and for the characters that the texts have more than once."""
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    usual = sorted((letter for letter, count in counts.items() if count >= _LEAST and not letter.isspace()), key=lambda letter: (-counts[letter], letter))
    tokenizer = _untrained({word: id_ for id_, word in enumerate((*SPECIAL, *words))})
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / FILE))
    _write_characters("".join(sorted(usual[:_MOST_CHARACTERS])), Path(folder))


def split() -> Callable[[str], list[str]]:
    """The function that splits a text into lower-cased words, as WordTokens does."""
    tokenizer = _untrained({word: id_ for id_, word in enumerate(SPECIAL)})
    return lambda text: [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]


def table_of(vectors: Vectors, *, seed: int) -> np.ndarray:
    """Rows for the special tokens and the words (4 + V, D): padding is zero, an unknown word the mean, the separators random."""
    width = len(vectors.mean)
    marks = np.random.default_rng(seed).normal(0, _SPREAD, (2, width))
    return np.concatenate([np.zeros((1, width)), vectors.mean[None], marks, vectors.table]).astype(np.float32)


def read_vectors(path: Path, *, first: Collection[str] = (), limit: int) -> Vectors:
    """At most `limit` vectors of a text file (.txt, .vec, or either as .gz), a word and its numbers a line, word2vec's header or not.

    Words of `first` that are there come first, then others in the file's order. Words are lower-cased; of equal ones the first counts.
    Raises ConfigError where there is no file, DataError naming the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"model.config.vectors = {str(path)!r}: no such file: give GloVe's or word2vec's vectors as text, or leave it out")
    wanted, room = set(first), max(0, limit)
    known: dict[str, np.ndarray] = {}
    others: dict[str, np.ndarray] = {}
    total, count = np.zeros(1), 0
    for raw, vector in _lines(path):
        word = raw.lower()
        total, count = total + vector, count + 1
        if word not in known and word not in others and (word in wanted or len(others) < room):
            (known if word in wanted else others)[word] = vector
    kept = dict(islice((known | others).items(), room))
    table = np.stack([*kept.values()]) if kept else np.zeros((0, len(total)))
    return Vectors([*kept], table.astype(np.float32), (total / count).astype(np.float32))


def make_vectors(texts: Iterable[str], *, dimension: int, limit: int) -> Vectors:
    """Vectors for the words, at most `limit`, that stand in the texts more than once: the same for the same texts.

    Positive pointwise mutual information with the words around, its rank reduced (Levy, Goldberg & Dagan 2015). Raises ConfigError.
    """
    words_of = split()
    documents = [words_of(text) for text in texts]
    counts = Counter(word for document in documents for word in document)
    words = sorted((word for word, count in counts.items() if count >= _LEAST), key=lambda word: (-counts[word], word))[:limit]
    if len(words) <= dimension:
        raise ConfigError(
            f"model.config.dimension = {dimension}: the texts have {len(words)} words that stand in them twice, and vectors need more than {dimension}: "
            "lower it, or give model.config.vectors"
        )
    left, singular, _ = svds(_information(documents, words), k=dimension, v0=np.ones(len(words)))
    table = left * np.sqrt(singular)
    table *= np.sign(table[np.abs(table).argmax(0), np.arange(dimension)])  # which way an axis points is chance
    table = (table[:, ::-1] * (_SPREAD / max(table.std(), 1e-12))).astype(np.float32)
    return Vectors(words, table, table.mean(0))


# --- a file's lines --------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Word and vector (D,) of each line."""
    number, promised, dimension = 0, None, 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                fields = line.rstrip().split(b" ")
                if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                    promised, dimension = int(fields[0]), int(fields[1])
                    continue
                dimension = dimension or len(fields) - 1
                yield _vector(fields, dimension, f"{path}: line {number}")
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: line {number + 1}: cannot be read ({error}): copy the file again") from None
    found = number - (promised is not None)
    if found == 0 or promised not in (None, found):
        raise DataError(f"{path}: line {number}: the file ends after {found} of {promised or 'any number of'} vectors: copy it again")


def _vector(fields: list[bytes], dimension: int, place: str) -> tuple[str, np.ndarray]:
    """Word and vector (D,) of a line; in GloVe's largest file a word may hold spaces."""
    name, texts = fields[: len(fields) - dimension], fields[len(fields) - dimension :]
    if dimension < 1 or not name or (len(name) > 1 and _is_number(name[-1])):
        count = sum(map(_is_number, fields[1:]))
        raise DataError(f"{place}: {count} numbers after {_shown(fields[0])} instead of {max(1, dimension)}: the line is cut off or belongs to another file")
    if name == [b""]:
        raise DataError(f"{place}: {dimension} numbers without a word in front: mend the line or leave it out")
    try:
        vector = np.array([float(text) for text in texts])
    except ValueError:
        vector = np.array([math.nan])
    if not (np.abs(vector) < _LARGEST).all():
        bad = next(text for text in texts if not _is_number(text))
        raise DataError(f"{place}: {_shown(bad)} after {_shown(fields[0])} is no number: mend the line or copy the file again")
    try:
        return b" ".join(name).decode(), vector
    except UnicodeDecodeError:
        raise DataError(f"{place}: {_shown(name[0])} is not UTF-8: write the vectors anew, or leave the line out") from None


def _is_number(text: bytes) -> bool:
    try:
        return abs(float(text)) < _LARGEST
    except ValueError:
        return False


def _shown(text: bytes) -> str:
    return repr(text[:_SHOWN].decode(errors="replace"))


# --- made from texts -------------------------------------------------------------------------------------------------------------


def _information(documents: Iterable[Sequence[str]], words: Sequence[str]) -> csr_matrix:
    """Positive pointwise mutual information of words and the words around them (V, V); the nearest weigh most."""
    numbers = {word: number for number, word in enumerate(words)}
    gap = [-1] * _WINDOW  # between documents
    line = np.array([number for document in documents for number in (*(numbers.get(word, -1) for word in document), *gap)], np.int32)
    together = csr_matrix((len(words), len(words)), dtype=np.float64)
    for distance in range(1, _WINDOW + 1):
        one, other = line[:-distance], line[distance:]
        both = (one >= 0) & (other >= 0)
        weights = np.full(both.sum(), 1 / distance)
        together += coo_matrix((weights, (one[both], other[both])), together.shape).tocsr()
    pairs = (together + together.T).tocoo()
    often = np.asarray(pairs.sum(1)).ravel()
    around = often**_SMOOTHING / (often**_SMOOTHING).sum()
    information = np.log(pairs.data / (often[pairs.row] * around[pairs.col]))
    return coo_matrix((np.maximum(information, 0), (pairs.row, pairs.col)), pairs.shape).tocsr()


# --- a folder's files ------------------------------------------------------------------------------------------------------------


def _untrained(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_WORD), "isolated")])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends)
    return tokenizer


def _write_characters(letters: str, folder: Path) -> None:
    (folder / CHARACTERS).write_text(json.dumps({"characters": letters}), encoding="utf-8")


def _read_characters(path: Path) -> str:
    """The characters of a folder. Raises BundleError."""
    try:
        letters = json.loads(path.read_text(encoding="utf-8"))["characters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: the characters cannot be read ({error}): train the run again") from None
    if not isinstance(letters, str) or len(set(letters)) < len(letters):
        raise BundleError(f"{path}: characters must be a text of different letters: train the run again")
    return letters
