"""kit.data.tables: texts come out exactly as they stand in the file, and each damage is named by its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.data.tables import Table, read_table
from kit.errors import DataError

DATA = Path(__file__).parents[2] / os.environ.get("KIT_DATA", "../shared/data")
ODD_TEXTS = ["None", "NA", "nan", "", " x ", "007", "1e5", "3.0", "a,b", 'say "x"', "two\nlines", "a\r\nb", "naïve ∑ 😀", "\u2028", "NULL"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_csv(path: Path, columns: dict[str, list[str]]) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *zip(*columns.values(), strict=True)])
    return write(path, text.getvalue())


def write_gzip(path: Path, columns: dict[str, list[str]]) -> Path:
    return write(path, gzip.compress(write_csv(path, columns).read_bytes()))


def write_jsonl(path: Path, columns: dict[str, list[str]]) -> Path:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_parquet(path: Path, columns: dict[str, list[str]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


WRITERS: dict[str, Callable[[Path, dict[str, list[str]]], Path]] = {
    ".csv": write_csv,
    ".csv.gz": write_gzip,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_text_is_read_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    columns = {"text": ODD_TEXTS, "id": [f"{row:03}" for row in range(len(ODD_TEXTS))]}
    table = read_table(WRITERS[suffix](tmp_path / f"t{suffix}", columns))
    assert table.frame.to_dict("list") == columns
    assert list(table.frame) == ["text", "id"]
    assert all(type(value) is str for column in table.frame for value in table.frame[column])


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6), st.booleans())
def test_any_csv_and_jsonl_reads_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], bom: bool) -> None:
    columns = {"a": [row[0] for row in rows], "b": [row[1] for row in rows]}
    for suffix, writer in [(".csv", write_csv), (".jsonl", write_jsonl)]:
        path = writer(tmp_path_factory.getbasetemp() / f"any{suffix}", columns)
        write(path, b"\xef\xbb\xbf" * bom + path.read_bytes())
        assert read_table(path, ids=None).frame.to_dict("list") == columns


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("final", [True, False])
def test_bom_line_ends_and_the_last_newline_make_no_difference(tmp_path: Path, bom: bytes, newline: bytes, final: bool) -> None:
    lines = [b"id,answer", b"0,A", b'1,"B,C"'] + [b""] * final
    table = read_table(write(tmp_path / "t.csv", bom + newline.join(lines)))
    assert table.frame.to_dict("list") == {"id": ["0", "1"], "answer": ["A", "B,C"]}
    assert list(table.lines) == [2, 3]


def test_column_names_are_stripped_and_values_are_not(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.csv", " id , prompt\n 3 , x \n"))
    assert table.frame.to_dict("list") == {"id": [" 3 "], "prompt": [" x "]}


def test_the_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    assert len(read_table(write(tmp_path / "T.CSV", "id\n1\n")).frame) == 1


def test_blank_lines_are_no_rows_and_lines_still_count_them(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.csv", '\nid,a\n\n1,"x\n\ny"\n\n2,z\n\n\n'))
    assert table.frame.to_dict("list") == {"id": ["1", "2"], "a": ["x\n\ny", "z"]}
    assert list(table.lines) == [4, 8]


def test_a_value_longer_than_the_csv_modules_limit_is_read(tmp_path: Path) -> None:
    long = "x" * 300_000
    assert read_table(write_csv(tmp_path / "t.csv", {"id": ["1"], "context": [long]})).frame["context"][0] == long


def test_parquet_numbers_become_digits_and_nulls_blank(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([3, 2**60], pa.int64()),
        "float": pa.array([3.0, 2.5]),
        "null": pa.array([None, 7]),
        "flag": pa.array([True, None]),
        "word": pa.array(["a", None]).dictionary_encode(),
        "nothing": pa.nulls(2),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").frame.to_dict("list") == {
        "id": ["3", str(2**60)],
        "float": ["3", "2.5"],
        "null": ["", "7"],
        "flag": ["true", ""],
        "word": ["a", ""],
        "nothing": ["", ""],
    }


def test_parquet_written_by_pandas_keeps_ids_that_became_floats_whole(tmp_path: Path) -> None:
    pd.DataFrame({"id": [3.0, 4.0]}).to_parquet(tmp_path / "t.parquet")
    assert list(read_table(tmp_path / "t.parquet").frame["id"]) == ["3", "4"]


def test_jsonl_numbers_keep_their_digits_and_null_is_blank(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", '{"id": 7, "x": 1}\n\r\n{"x": null, "id": 3.10}\n{"id": true, "x": false}')
    table = read_table(path)
    assert table.frame.to_dict("list") == {"id": ["7", "3.10", "true"], "x": ["1", "", "false"]}
    assert list(table.lines) == [1, 3, 4]


def test_ids_are_not_required_when_not_asked_for(tmp_path: Path) -> None:
    assert len(read_table(write(tmp_path / "t.csv", "a,b\n1,2\n1,2\n"), ids=None).frame) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is empty \(0 bytes\)"),
        (" \n\n", "is empty"),
        ("\ufeff\n\n", "holds only blank lines"),
        ("id,a\n", "has column names but no rows"),
        ("id,a\r\n\r\n", "has column names but no rows"),
        ("id,a\n1,x\n2,y,z\n", r"line 3 \(row 2\) has 3 values, but the header names 2 columns"),
        ("id,a\n1,x\n2\n", r"line 3 \(row 2\) has 1 value, but the header names 2 columns"),
        ('id,a\n1,"x\ny"\n2\n', r"line 4 \(row 2\) has 1 value,"),
        ('id,a\n1,x\n2,"y\nz\n3,w\n', "line 3: a quote opened in the row that begins here is never closed"),
        ('id,a\n1,x\n2,"y', "line 3: a quote opened"),
        ('id,a\n1,x\n2,"y\nz"w\n', r"line 4 \(the row begins on line 3\): malformed CSV"),
        ("id,a,b, a\n1,x,y,z\n", "column 'a' stands twice, as columns 2 and 4"),
        ("number,a\n1,x\n", r"column 'id' is missing \(known: a, number\)"),
        ("ids,a\n1,x\n", r"column 'id' is missing \(did you mean 'ids'\?\)"),
        (",prompt\n0,x\n", "column 'id' is missing; the first column, named '', looks like a saved row index"),
        ("Unnamed: 0,prompt\n0,x\n", "column 'id' is missing; the first column, named 'Unnamed: 0', looks like"),
        ("id,a\n1,x\n,y\n", r"row 2 \(line 3 of the file\), column 'id' = '': the id is empty"),
        ("id,a\n1,x\n \t,y\n", r"row 2 \(line 3 of the file\), column 'id' = ' \\t': the id is empty"),
        ('id,a\n7,"x\ny"\n8,x\n7,z\n', r"row 3 \(line 5 of the file\), column 'id' = '7': row 1 has the same id"),
        (b"id,a\n1,x\n2,caf\xe9\n", "line 3: byte 0xe9 at offset 14 is not UTF-8"),
        (b"\xef\xbb\xbfid,a\n1,\xff\n", "line 2: byte 0xff at offset 10 is not UTF-8"),
        ("id,a\n1,x\n".encode("utf-16"), "line 1: byte 0xff at offset 0 is not UTF-8"),
    ],
)
def test_a_damaged_csv_is_refused_with_the_place(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert_refused(write(tmp_path / "t.csv", content), message)
    if content:
        packed = gzip.compress(content.encode() if isinstance(content, str) else content)
        assert_refused(write(tmp_path / "t.csv.gz", packed), message.split(" \\(0 bytes")[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\ufeff\n", "holds only blank lines"),
        ('{"id": "1"}\n{"id": ', "line 2: cannot be read as JSON: Expecting value"),
        ('{"id": "1"}\n\n["2"]\n', "line 3: is no JSON object"),
        ("{}\n", "line 1: is no JSON object with keys"),
        ('{"id": "1", "a": "x"}\n{"id": "2", "b": "y"}\n', "line 2: its keys differ from those of line 1 in 'a', 'b'"),
        ('{"id": "1", "id": "2"}\n', "line 1: cannot be read as JSON: key 'id' stands twice"),
        ('{"id": "1", "a": ["x"]}\n', r"line 1, key 'a' = \['x'\]: give a text, a number"),
        ('{"id": "1", " id": "2"}\n', "column 'id' stands twice, as columns 1 and 2"),
        ('{"id": "1"}\n{"id": null}\n', r"row 2 \(line 2 of the file\), column 'id' = '': the id is empty"),
        ('{"id": "1"}\n{"id": 1}\n', "row 1 has the same id"),
        ("[" * 100_000, "line 1: cannot be read as JSON"),
        (b'{"id": "\xe9"}\n', "line 1: byte 0xe9 at offset 8 is not UTF-8"),
    ],
)
def test_damaged_json_lines_are_refused_with_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert_refused(write(tmp_path / "t.jsonl", content), message)


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    assert_refused(write(path, b"PAR1 no parquet at all"), r"cannot be read as Parquet \(")
    pq.write_table(pa.table({"id": ["1"] * 1000}), path)
    assert_refused(write(path, path.read_bytes()[:-200]), "cannot be read as Parquet")
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), path)
    assert_refused(path, "has column names but no rows")
    pq.write_table(pa.table({}), path)
    assert_refused(path, "has no columns")
    pq.write_table(pa.table([["1"], ["2"]], ["id", "id"]), path)
    assert_refused(path, "column 'id' stands twice")
    pq.write_table(pa.table({"id": ["1"], "vector": [[1.0]]}), path)
    assert_refused(path, "column 'vector' of type list<.*> cannot become texts")
    pq.write_table(pa.table({"id": ["1", "2", "1"]}), path)
    assert_refused(path, "row 3, column 'id' = '1': row 1 has the same id")


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = write_gzip(tmp_path / "t.csv.gz", {"id": [str(row) for row in range(1000)]})
    packed = path.read_bytes()
    for damaged in (b"id\n1\n", packed[:-10], packed[:60] + b"\x00\xff\x00" + packed[63:], packed[:-8] + b"\x00" * 8):
        assert_refused(write(path, damaged), r"cannot be unpacked as gzip \(")
    assert_refused(write(path, gzip.compress(b"")), "is empty once unpacked")


def test_a_missing_file_a_folder_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "train.csv", "no such file")
    (tmp_path / "folder.csv").mkdir()
    assert_refused(tmp_path / "folder.csv", "is a folder")
    assert_refused(write(tmp_path / "t.xlsx", "x"), r"ends in .csv, .csv.gz, .parquet, .jsonl, .json, .json.gz$")
    assert_refused(write(tmp_path / "inner", "x"), "the kind of table is unknown")
    assert_refused(tmp_path / "inner" / "t.csv", "cannot be read: Not a directory")


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read_table(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_an_error_names_file_row_line_id_column_and_value(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'id,answer\nx,"A\n"\ny,F\n')
    table = read_table(path)
    assert str(table.error("the answer must be A", row=1, column="answer")) == (
        f"{path}: row 2 (line 4 of the file, id 'y'), column 'answer' = 'F': the answer must be A"
    )
    assert str(table.error("is odd", row=0)) == f"{path}: row 1 (line 2 of the file, id 'x'): is odd"
    assert str(table.error("is missing", column="prompt")) == f"{path}: column 'prompt': is missing"
    assert str(table.error("is missing", row=0, column="prompt")) == f"{path}: row 1 (line 2 of the file, id 'x'), column 'prompt': is missing"
    assert str(table.error("is odd")) == f"{path}: is odd"


def test_errors_name_rows_by_the_column_of_their_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text_id,full_text\nx,one\n")
    table = read_table(path, ids="text_id")
    assert str(table.error("is odd", row=0, column="full_text")) == f"{path}: row 1 (line 2 of the file, text_id 'x'), column 'full_text' = 'one': is odd"


def test_an_error_counts_positions_whatever_the_frames_index_and_shortens_long_values() -> None:
    table = Table("made", pd.DataFrame({"a": ["x", "y\n" * 1000]}, index=[10, 0]))
    message = str(table.error("too long", row=1, column="a"))
    assert message.startswith("made: row 2, column 'a' = 'y\\ny\\n")
    assert message.endswith("…: too long")
    assert len(message) < 150


def test_twenty_thousand_rows_are_read_in_a_second(tmp_path: Path) -> None:
    count = 20_000
    columns = {"id": [str(row) for row in range(count)], "prompt": ["a question, " * 20] * count, **{letter: ["an option"] * count for letter in "ABCDE"}}
    path = write_csv(tmp_path / "t.csv", columns)
    begun = time.process_time()
    assert len(read_table(path).frame) == count
    assert time.process_time() - begun < 1.0


@pytest.mark.skipif(not (DATA / "mcq").is_dir(), reason="the real tables are not on this machine")
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("official_train_150", 150),
        ("official_train_150_with_context", 150),
        ("extra500_with_context", 398),
        ("stem1k_with_context", 755),
        ("gen6k", 5565),
        ("mmlu_stem_4opt", 3597),
        ("edge_cases_empty_or_duplicate_options", 16),
    ],
)
def test_real_tables_are_read_as_pandas_reads_texts(tmp_path: Path, name: str, rows: int) -> None:
    path = DATA / "mcq" / f"{name}.csv"
    frame = read_table(path).frame
    assert len(frame) == rows
    assert frame.to_numpy().tolist() == pd.read_csv(path, dtype=str, keep_default_na=False).to_numpy().tolist()
    as_released = b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").rstrip()
    again = read_table(write(tmp_path / "crlf.csv", as_released)).frame
    assert [text.replace("\r\n", "\n") for text in again.to_numpy().ravel()] == [text.replace("\r\n", "\n") for text in frame.to_numpy().ravel()]
