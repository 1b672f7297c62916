"""Reads and checks a table of texts: CSV, gzipped CSV, Parquet, JSON lines, SQuAD's JSON. Does not know what the columns mean, except `id`.

Every value is a text exactly as in the file ("None", "NA", "" and " x " stay); Parquet and JSON numbers become their digits and
nulls "". A damaged file is refused with the line, never repaired.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kit.data.squad import flatten
from kit.errors import DataError, nearest

_SHOWN = 80  # characters of a value in an error


@dataclass(frozen=True)
class Table:
    """A checked table. source: its file. frame: (N, columns) of str. lines: the file's line where each row begins, if known.

    places: where else each row stands in the file, if that is known. ids: the column that names the rows.
    """

    source: str
    frame: pd.DataFrame
    lines: Sequence[int] = ()
    places: Sequence[str] = ()
    ids: str = "id"

    def error(self, why: str, *, row: int | None = None, column: str | None = None) -> DataError:
        """The DataError that names this file, the row (0-based position in `frame`, shown 1-based), the column and the value there."""
        places = []
        if row is not None:
            places.append(f"row {row + 1}{self._aside(row, column)}")
        if column is not None:
            known = row is not None and column in self.frame
            places.append(f"column {column!r}" + (f" = {_shown(self.frame[column].iloc[row])}" if known else ""))
        where = f"{', '.join(places)}: " if places else ""
        return DataError(f"{self.source}: {where}{why}")

    def _aside(self, row: int, column: str | None) -> str:
        parts = [f"line {self.lines[row]} of the file"] if len(self.lines) else []
        parts += [self.places[row]] if len(self.places) else []
        if self.ids in self.frame and column != self.ids:
            parts.append(f"{self.ids} {_shown(self.frame[self.ids].iloc[row])}")
        return f" ({', '.join(parts)})" if parts else ""


class _Raw(NamedTuple):
    """A file's texts before the checks: column names, columns of values, and the line or the place of each row where there are such."""

    names: list[str]
    columns: list[Sequence[str]]
    lines: Sequence[int] = ()
    places: Sequence[str] = ()


def read_table(path: str | Path, *, ids: str | None = "id") -> Table:
    """The table of a .csv, .csv.gz, .parquet or .jsonl file (UTF-8, with or without BOM), columns in the file's order, or of SQuAD's .json or .json.gz.

    ids: the column that must be there with distinct texts that are not blank, if any. Raises DataError, naming the line, row or column, where
    the file is missing, empty, damaged or ragged, or has no rows.
    """
    path = Path(path)
    suffix = next((suffix for suffix in _READERS if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"{path}: the kind of table is unknown from its name: give one that ends in {', '.join(_READERS)}")
    raw = _READERS[suffix](path, _content(path))
    names = [name.strip() for name in raw.names]
    _check_names(path, names)
    if not len(raw.columns[0]):
        raise DataError(f"{path}: has column names but no rows: give a table with at least one row")
    table = Table(str(path), pd.DataFrame(dict(zip(names, raw.columns, strict=True)), dtype=object), raw.lines, raw.places, ids or "id")
    if ids:
        _check_ids(table, ids)
    return table


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path}: is a folder: give the file in it")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not data.strip():
        raise DataError(f"{path}: is empty ({len(data)} bytes): write or download it again")
    return data


def _read_csv(path: Path, data: bytes) -> _Raw:
    text = _decoded(path, data)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a context may be longer than the default 131,072
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    lines = []
    begun = 1
    try:
        for row in reader:
            if row:  # not a blank line
                rows.append(row)
                lines.append(begun)
                if len(row) != len(rows[0]):
                    raise DataError(f"{path}: line {begun} (row {len(rows) - 1}) has {_counted(row, rows[0])}: quote values that hold a comma")
            begun = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: {_csv_fault(str(error), begun, reader.line_num)}") from None
    if not rows:
        raise DataError(f"{path}: holds only blank lines: write or download it again")
    columns: list[Sequence[str]] = list(zip(*rows[1:], strict=True)) if len(rows) > 1 else [()] * len(rows[0])
    return _Raw(rows[0], columns, lines[1:])


def _counted(row: list[str], header: list[str]) -> str:
    return f"{len(row)} value{'s' * (len(row) != 1)}, but the header names {len(header)} column{'s' * (len(header) != 1)}"


def _csv_fault(error: str, begun: int, line: int) -> str:
    if "end of data" in error:
        return f"line {begun}: a quote opened in the row that begins here is never closed: close it, or download the file again"
    return f"line {line} (the row begins on line {begun}): malformed CSV, {error}: double the quotes inside a quoted value"


def _read_gzipped_csv(path: Path, data: bytes) -> _Raw:
    return _read_csv(path, _unpacked(path, data))


def _unpacked(path: Path, data: bytes) -> bytes:
    try:
        data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked as gzip ({error}): download it again, or drop .gz from its name") from None
    if not data.strip():
        raise DataError(f"{path}: is empty once unpacked: write or download it again")
    return data


def _read_json(path: Path, data: bytes) -> _Raw:
    """SQuAD's readings, or answers by question id."""
    try:
        values = json.loads(_decoded(path, data), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    rows = flatten(str(path), values)
    return _Raw([*rows.columns], [*rows.columns.values()], places=rows.places)


def _read_gzipped_json(path: Path, data: bytes) -> _Raw:
    return _read_json(path, _unpacked(path, data))


def _read_jsonl(path: Path, data: bytes) -> _Raw:
    rows: list[dict[str, str]] = []
    lines = []
    for number, line in enumerate(_decoded(path, data).split("\n"), 1):  # not splitlines: U+2028 may stand inside a text
        if line.strip():
            rows.append(_json_row(path, number, line))
            lines.append(number)
            if rows[-1].keys() != rows[0].keys():
                odd = sorted(rows[-1].keys() ^ rows[0].keys())
                raise DataError(f"{path}: line {number}: its keys differ from those of line {lines[0]} in {', '.join(map(repr, odd))}: give every row the same keys")
    if not rows:
        raise DataError(f"{path}: holds only blank lines: write or download it again")
    names = list(rows[0])
    return _Raw(names, [[row[name] for row in rows] for name in names], lines)


def _json_row(path: Path, number: int, line: str) -> dict[str, str]:
    """One line's values; numbers keep their digits as written, null is "", true and false their words."""
    try:
        row = json.loads(line, object_pairs_hook=_distinct, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number}: cannot be read as JSON: {error}") from None
    if not isinstance(row, dict) or not row:
        raise DataError(f"{path}: line {number}: is no JSON object with keys: write one {{…}} a line")
    for name, value in row.items():
        if isinstance(value, list | dict):
            raise DataError(f"{path}: line {number}, key {name!r} = {_shown(value)}: give a text, a number, true, false or null")
    return {name: value if isinstance(value, str) else _JSON_WORDS[value] for name, value in row.items()}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return row


def _read_parquet(path: Path, data: bytes) -> _Raw:
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({_one_line(error)}): write or download it again") from None
    if not table.num_columns:
        raise DataError(f"{path}: has no columns: write it again")
    columns: list[Sequence[str]] = [_parquet_texts(path, name, column) for name, column in zip(table.column_names, table.columns, strict=True)]
    return _Raw(table.column_names, columns)


def _parquet_texts(path: Path, name: str, column: pa.ChunkedArray) -> list[str]:
    try:
        return pc.fill_null(column.cast(pa.large_string()), "").to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: column {name!r} of type {column.type} cannot become texts ({_one_line(error)}): drop or convert it") from None


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8: save the file as UTF-8") from None


def _check_names(path: Path, names: list[str]) -> None:
    first: dict[str, int] = {}
    for position, name in enumerate(names, 1):
        if name in first:
            raise DataError(f"{path}: column {name!r} stands twice, as columns {first[name]} and {position}: rename or drop one")
        first[name] = position


def _check_ids(table: Table, column: str) -> None:
    if column not in table.frame:
        names = list(table.frame)
        if names[0] in ("", "Unnamed: 0"):
            raise table.error(f"column {column!r} is missing; the first column, named {names[0]!r}, looks like a saved row index: name it {column!r}")
        raise table.error(f"column {column!r} is missing{nearest(column, names)}: name the column of row identifiers {column!r}")
    first: dict[str, int] = {}
    for row, value in enumerate(table.frame[column]):
        if not value.strip():
            raise table.error("the id is empty: give every row its own", row=row, column=column)
        if value in first:
            raise table.error(f"row {first[value] + 1} has the same id: give every row its own", row=row, column=column)
        first[value] = row


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


_JSON_WORDS = {None: "", True: "true", False: "false"}
_READERS = {
    ".csv": _read_csv, ".csv.gz": _read_gzipped_csv, ".parquet": _read_parquet, ".jsonl": _read_jsonl,
    ".json": _read_json, ".json.gz": _read_gzipped_json,
}  # fmt: skip
