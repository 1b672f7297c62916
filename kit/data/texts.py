"""Corpora for language models: documents from JSON lines, text files or folders of Python files → one .jsonl that `kit train` reads.

Documents stream through: kept by words, freed of those that stand twice, and written, one at a time. What stays in memory of each that is
written is a hash and 16 numbers (about 2 KB): texts that nearly repeat an earlier one are found by MinHash (Broder 1997; bands as in
Leskovec et al., Mining of Massive Datasets, 3.4) and then compared exactly, as kit.data.audit does. Knows no task and no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from kit.data.audit import GRAM, evened, overlaps
from kit.errors import ConfigError, DataError

_PART_CHARS = 20_000  # a text file is cut at the next blank line after so many, or at the next line after four times as many
_BANDS, _ROWS = 16, 8  # finds 0.9999 of the pairs with similarity 0.9, 0.94 of those with 0.8; of those with 0.3 a thousandth comes to be compared
_LEAST_SIMILARITY = 0.8
_SHOWN = 80  # characters of a value in an error


class Document(NamedTuple):
    """id: where it stands: file below the folder, or file and line. source: the file, or the package or folder next below the folder named."""

    id: str
    source: str
    text: str


class Kept(NamedTuple):
    """How many documents were read, how many left out and why, and what was written.

    unreadable: Python files whose bytes are not in the encoding they name. without_words: that hold none of the words. equal, similar: to an earlier one.
    """

    read: int
    unreadable: int
    blank: int
    without_words: int
    equal: int
    similar: int
    written: int
    chars: int

    def summary(self) -> dict[str, Any]:
        """The counts, the share that has the words, and the share that was written."""
        with_words = self.read - self.unreadable - self.blank - self.without_words
        return self._asdict() | {"share_with_words": with_words / self.read, "share_written": self.written / self.read}


def write_corpus(sources: Sequence[str | Path], out: str | Path, *, words: Sequence[str] = (), similarity: float = 0.9) -> Kept:
    """Write the documents of all sources that hold one of the words (all, if there are none), each text once: keys id, source and text.

    sources: .jsonl (key text), .txt and .py files, and folders, whose .py files are read at any depth in the order of their names.
    words: whole words, case as written. similarity: Jaccard index of 5-grams from which on a text counts as there already.
    Raises ConfigError; DataError, naming the file and line, where a source is missing or damaged, or nothing is left. Then nothing is written.
    """
    out, paths = Path(out), [Path(source) for source in sources]
    has_word = _word_filter(words)
    _check(paths, out, similarity)
    counts: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    try:
        with part.open("w+b") as file:
            written = _Written(file, similarity)
            for path in paths:
                for document in _documents(path):
                    counts["read"] += 1
                    counts[_add(document, has_word, written)] += 1
        if not counts["read"]:
            raise DataError(f"{', '.join(map(str, paths))}: no documents: give sources with .py files, texts or JSON lines in them")
        kept = Kept(**{name: counts[name] for name in Kept._fields if name != "chars"}, chars=written.chars)
        if not kept.written:
            raise DataError(f"{', '.join(map(str, paths))}: nothing is left of {_told(kept)}: give other words or sources")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return kept


def _add(document: Document | None, has_word: Callable[[str], bool], written: _Written) -> str:
    """Write a document, unless there is a reason not to: the name of what is counted."""
    if document is None:
        return "unreadable"
    if not document.text.strip():
        return "blank"
    if not has_word(document.text):
        return "without_words"
    return written.add(document)


def _told(kept: Kept) -> str:
    reasons = [f"{count} {name.replace('_', ' ')}" for name, count in kept._asdict().items() if count and name not in ("read", "written", "chars")]
    return f"{kept.read} documents ({', '.join(reasons)})"


def _word_filter(words: Sequence[str]) -> Callable[[str], bool]:
    for word in words:
        if not word.strip() or word != word.strip():
            raise ConfigError(f"word {word!r} is blank or has blanks around it: give whole words")
    if not words:
        return lambda text: True
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)")
    return lambda text: pattern.search(text) is not None


def _check(paths: Sequence[Path], out: Path, similarity: float) -> None:
    if not _LEAST_SIMILARITY <= similarity <= 1:
        raise ConfigError(f"similarity = {similarity}: give {_LEAST_SIMILARITY} to 1, above which a text counts as there already")
    if out.suffix != ".jsonl":
        raise ConfigError(f"{out}: a corpus is written as JSON lines: give a name that ends in .jsonl")
    if not paths:
        raise ConfigError("no source to read: give .jsonl, .txt or .py files, or folders of .py files")
    names: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder: check the path")
        if not path.is_dir() and path.suffix not in _READERS:
            raise DataError(f"{path}: the kind of text is unknown from its name: give one that ends in {', '.join(_READERS)}, or a folder")
        if path.resolve() == out.resolve():
            raise ConfigError(f"{out}: is also a source: write the corpus elsewhere")
        if other := names.get(_name(path)):
            raise ConfigError(f"{other} and {path} have the same name, by which documents are told apart: rename one")
        names[_name(path)] = path


def _name(path: Path) -> str:
    return path.resolve().name


# --- reading -------------------------------------------------------------------------------------------------------------------------------


def _documents(path: Path) -> Iterator[Document | None]:
    """The documents of a source, one at a time; None for a Python file that nobody can read. Raises DataError."""
    if not path.is_dir():
        yield from _READERS[path.suffix](path, _name(path))
        return
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        for name in sorted(name for name in files if name.endswith(".py")):
            place = Path(folder, name)
            below = place.relative_to(path)
            for document in _read_python(place, below.as_posix()):
                yield document and document._replace(id=f"{_name(path)}/{document.id}", source=Path(below.parts[0]).stem)


def _read_python(path: Path, name: str) -> Iterator[Document | None]:
    """The whole file, in the encoding it names (PEP 263)."""
    try:
        with tokenize.open(path) as file:
            yield Document(name, name, file.read())
    except (SyntaxError, UnicodeError, LookupError):
        yield None
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_text(path: Path, name: str) -> Iterator[Document]:
    """Parts of about 20,000 characters, cut at blank lines."""
    lines: list[str] = []
    begun, chars = 1, 0
    for number, line in _lines(path):
        if chars >= _PART_CHARS and not line.strip() or chars >= 4 * _PART_CHARS:
            yield Document(f"{name}:{begun}", name, "".join(lines))
            lines, begun, chars = [], number, 0
        lines.append(line)
        chars += len(line)
    yield Document(f"{name}:{begun}", name, "".join(lines))


def _read_jsonl(path: Path, name: str) -> Iterator[Document]:
    """One document a line; keys other than text are passed over."""
    for number, line in _lines(path):
        if line.strip():
            yield Document(f"{name}:{number}", name, _text_of(path, number, line))


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number}: cannot be read as JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number}: is no JSON object with keys: write one {{…}} a line")
    if "text" not in row:
        raise DataError(f"{path}: line {number}: key 'text' is missing (keys: {', '.join(row)}): name the key of the texts 'text'")
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f"{path}: line {number}, key 'text' = {repr(text)[:_SHOWN]}: give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: line {number}, key 'text': half a character, {text[error.start]!r}, at {error.start}: write the file again as UTF-8") from None
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, with or without BOM; each ends with a line feed, the last one perhaps without."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}: line {number}: byte 0x{line[error.start]:02x} is not UTF-8: save the file as UTF-8") from None
                text = text.removeprefix("\ufeff") if number == 1 else text
                yield number, f"{text[:-2]}\n" if text.endswith("\r\n") else text
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror or error}")


_READERS: dict[str, Callable[[Path, str], Iterator[Document | None]]] = {".jsonl": _read_jsonl, ".txt": _read_text, ".py": _read_python}


# --- what is there already -------------------------------------------------------------------------------------------------------------------


class _Written:
    """The documents in a file so far; a new one is written where it does not repeat one of them."""

    def __init__(self, file: IO[bytes], similarity: float) -> None:
        self._file, self._similarity = file, similarity
        self._places: list[int] = []  # where each begins in the file
        self._hashes: set[bytes] = set()
        self._bands: dict[int, int] = {}  # the first document with this band
        self.chars = 0

    def add(self, document: Document) -> str:
        """ "equal", "similar" or "written"."""
        own = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if own in self._hashes:
            return "equal"
        bands = _bands_of(document.text)
        alike = sorted({self._bands[band] for band in bands if band in self._bands})
        if alike and overlaps([document.text], [self._read(number) for number in alike], threshold=self._similarity):
            return "similar"
        for band in bands:
            self._bands.setdefault(band, len(self._places))
        self._hashes.add(own)
        self._places.append(self._file.seek(0, os.SEEK_END))
        self._file.write(json.dumps(document._asdict(), ensure_ascii=False).encode() + b"\n")
        self.chars += len(document.text)
        return "written"

    def _read(self, number: int) -> str:
        self._file.seek(self._places[number])
        return json.loads(self._file.readline())["text"]


def _odd_numbers(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, count, np.uint64) * np.uint64(2) + np.uint64(1)


_OF_LETTERS, _OF_ORDERS, _OF_ROWS = _odd_numbers(GRAM, 0), _odd_numbers(_BANDS * _ROWS, 1), _odd_numbers(_ROWS + 1, 2)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def _bands_of(text: str) -> list[int]:
    """16 numbers, of which texts with similar sets of 5-grams share one: each made of the first 5-grams in 8 random orders."""
    letters = np.frombuffer(evened(text).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    count = len(letters) - GRAM + 1
    grams = _mixed(sum(letters[start : start + count] * factor for start, factor in enumerate(_OF_LETTERS)))  # (5-grams,)
    first = np.array([(grams * factor).min() for factor in _OF_ORDERS]).reshape(_BANDS, _ROWS)
    return _mixed(first @ _OF_ROWS[:-1] + np.arange(_BANDS, dtype=np.uint64) * _OF_ROWS[-1]).tolist()


def _mixed(values: Any) -> np.ndarray:
    """Every bit of a number depends on those below it and above it."""
    values = (values ^ (values >> np.uint64(32))) * _MIX
    mixed: np.ndarray = values ^ (values >> np.uint64(29))
    return mixed
