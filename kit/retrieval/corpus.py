"""Corpus: the passages of a knowledge source in one memory-mapped Arrow file. Does not know how they are searched.

A folder holds `passages.arrow` (columns id, title, text) and `passages.json` (the source's name and sha256, the number of
passages). Building streams the source, so memory stays bounded whatever its size: 16 bytes per passage for the check of ids.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from kit import manifest
from kit.errors import BundleError, DataError

FILE = "passages.arrow"
RECORD = "passages.json"
_SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
_BATCH = 2048


class Passage(NamedTuple):
    """The unit of a corpus. title is "" where there is none."""

    id: str
    title: str
    text: str


class Corpus:
    """Passages by position, read from the memory-mapped file when they are asked for."""

    def __init__(self, folder: Path, table: pa.Table, digest: str) -> None:
        self.folder = folder
        self.digest = digest  # sha256 of the source: tells an index whether it was built from this corpus
        self._table = table

    @classmethod
    def build(cls, source: Path, folder: Path) -> Self:
        """The corpus of a .parquet, .jsonl or .csv file with id (or passage_id), title (optional) and text, written into `folder`.

        Does nothing when `folder` already holds this source. Raises DataError naming the file, row, column and value.
        """
        source, folder = Path(source), Path(folder)
        read = _reader(source)
        try:
            digest = manifest.sha256(source)
            if _is_built(folder, digest):
                return cls.open(folder)
            _build(read(source), source, folder, digest)
        except OSError as error:
            raise DataError(f"{error.filename or source}: {error.strerror or error}: corpus not built") from None
        except (UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
            raise DataError(f"{source}: is no readable {source.suffix[1:]} file in UTF-8: {error}") from None
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The corpus in a folder that `build` wrote. Raises BundleError."""
        folder = Path(folder)
        record = _record(folder)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise BundleError(f"{folder / FILE}: cannot be opened ({error}): build the corpus again") from None
        if table.schema != _SCHEMA or len(table) != record["passages"]:
            raise BundleError(f"{folder / FILE}: holds {len(table)} passages, {RECORD} names {record['passages']}: build the corpus again")
        return cls(folder, table, record["sha256"])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: int) -> Passage:
        if not 0 <= i < len(self):
            raise IndexError(f"passage {i} of {len(self)}")
        return Passage(*(column[int(i)].as_py() for column in self._table.columns))

    def passages(self, ids: Sequence[int]) -> list[Passage]:
        """The passages at these positions, in this order."""
        return [self[i] for i in ids]

    def texts(self, start: int, stop: int) -> list[str]:
        """What is indexed of the passages [start, stop): "title. text", or the text where there is no title."""
        _, titles, texts = (column.to_pylist() for column in self._table.slice(start, stop - start).columns)
        return [f"{title}. {text}" if title else text for title, text in zip(titles, texts, strict=True)]


def _is_built(folder: Path, digest: str) -> bool:
    try:
        return Corpus.open(folder).digest == digest
    except BundleError:
        return False


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {"sha256": str(record["sha256"]), "passages": int(record["passages"])}
    except FileNotFoundError:
        raise BundleError(f"{folder}: no {RECORD}, so this is no corpus: build it, or check which folder is meant") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder / RECORD}: is damaged ({error!r}): build the corpus again") from None


class _Row(NamedTuple):
    """A row of the source before the checks. place: where it is there, as a user counts."""

    place: int
    id: Any
    title: Any
    text: Any


_Reader = Callable[[Path], Iterator[_Row]]


def _build(rows: Iterator[_Row], source: Path, folder: Path, digest: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{FILE}.{os.getpid()}.part"
    try:
        places = _write(rows, source, part)
        (folder / RECORD).unlink(missing_ok=True)  # never a record beside passages that it does not describe
        os.replace(part, folder / FILE)
    finally:
        part.unlink(missing_ok=True)
    record = {"source": source.name, "sha256": digest, "passages": places}
    manifest.write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")


def _write(rows: Iterator[_Row], source: Path, path: Path) -> int:
    """Check and write all rows; the number of passages."""
    places, hashes = array("q"), array("q")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer, tqdm(desc="passages", unit="", disable=None) as bar:
        while block := [_checked(row, source) for row in islice(rows, _BATCH)]:
            columns = list(zip(*block, strict=True))[1:]
            writer.write_batch(pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=_SCHEMA))
            places.extend(row.place for row in block)
            hashes.extend(hash(row.id) for row in block)
            bar.update(len(block))
    if not places:
        raise DataError(f"{source}: holds no passage: give a file with at least one row of id and text")
    _refuse_duplicate_ids(path, source, places, hashes)
    return len(places)


def _checked(row: _Row, source: Path) -> _Row:
    """The row with its id as text and an empty title for none."""
    if row.id is None or isinstance(row.id, bool) or not isinstance(row.id, int | str) or row.id == "":
        raise _error(source, row.place, "id", row.id, "an id must be a text or a whole number")
    row = row._replace(id=str(row.id), title="" if row.title is None else row.title)
    for name, value in (("title", row.title), ("text", row.text)):
        if not isinstance(value, str):
            raise _error(source, row.place, name, value, f"a {name} must be a text")
    if not row.text.strip():
        raise _error(source, row.place, "text", row.text, "a passage must not be empty: remove the row or give it a text")
    if not all(value.isascii() or _is_unicode(value) for value in row[1:]):
        raise _error(source, row.place, "text", row.text[:40], "half of a surrogate pair is no character: repair the escape sequence")
    return row


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_duplicate_ids(path: Path, source: Path, places: Sequence[int], hashes: Sequence[int]) -> None:
    """Equal hashes are candidates; the ids themselves decide. Needs 16 bytes per passage instead of a set of all ids."""
    keys = np.asarray(hashes)
    order = keys.argsort(kind="stable")
    ids = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("id")
    for j in np.flatnonzero(np.diff(keys[order]) == 0):
        first, second = order[j], order[j + 1]
        if ids[first] == ids[second]:
            why = f"this id is also at {_unit(source)} {places[first]}: ids must be unique"
            raise _error(source, places[second], "id", ids[second].as_py(), why)


def _unit(source: Path) -> str:
    return "line" if source.suffix.lower() == ".jsonl" else "row"


def _error(source: Path, place: int, column: str, value: Any, why: str) -> DataError:
    return DataError(f"{source}: {_unit(source)} {place}, column {column!r}, value {value!r}: {why}")


def _parquet_rows(path: Path) -> Iterator[_Row]:
    file = pq.ParquetFile(path, memory_map=True)
    names = _columns(file.schema_arrow.names, path)
    place = 0
    for batch in file.iter_batches(_BATCH, columns=[name for name in names if name]):
        columns = [batch.column(name).to_pylist() if name else [""] * len(batch) for name in names]
        for values in zip(*columns, strict=True):
            yield _Row(place, *values)
            place += 1


def _csv_rows(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 131,072 characters
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        at = [header.index(name) if name else None for name in _columns(header, path)]
        for place, cells in enumerate(row for row in reader if row):
            if len(cells) != len(header):
                raise DataError(f"{path}: row {place} has {len(cells)} cells, the header {len(header)}: check its commas and quotes")
            yield _Row(place, *("" if i is None else cells[i] for i in at))


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    with open(path, encoding="utf-8-sig") as file:
        for place, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}: line {place} is no JSON ({error}): write one object per line") from None
            if not isinstance(values, dict):
                raise DataError(f"{path}: line {place} is {line.strip()[:40]!r}: write one JSON object per line")
            yield _Row(place, *(values[name] if name else "" for name in _columns(list(values), path, f"line {place}: ")))


def _columns(found: Sequence[str], path: Path, place: str = "") -> list[str | None]:
    """What id, title and text are called here; None for a title that is not there."""
    names = ["id" if "id" in found else "passage_id", "title", "text"]
    for name in ("id", "text"):
        if name not in found and not (name == "id" and "passage_id" in found):
            there = ", ".join(map(repr, found)) or "none"
            raise DataError(f"{path}: {place}column {name!r} is missing: found {there}; passages need id and text, and may have a title")
    return [name if name in found else None for name in names]


_READERS: dict[str, _Reader] = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}


def _reader(source: Path) -> _Reader:
    if source.suffix.lower() not in _READERS:
        raise DataError(f"{source}: passages are read from {', '.join(_READERS)} files, not from {source.suffix!r}")
    return _READERS[source.suffix.lower()]
