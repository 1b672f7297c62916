from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from kit.errors import BundleError, DataError
from kit.retrieval.corpus import FILE, RECORD, Corpus, Passage

ROWS = [("a", "None", "NA"), ("b", "", "Ωμέγα, 物理学\nsecond line"), ("3", "Title", "x" * 200_000)]


def write(path: Path, rows: list[tuple], names: tuple[str, ...] = ("id", "title", "text")) -> Path:
    """Rows as the file that the suffix names, with an extra column, the columns in another order, and a BOM."""
    frame = pd.DataFrame(rows, columns=list(names)).assign(page=7)
    frame = frame[["page", *reversed(names)]]
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False, encoding="utf-8-sig")
    else:
        lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in frame.to_dict("records"))
        path.write_text(lines + "\n\n", "utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_every_format_gives_the_same_passages(tmp_path: Path, suffix: str) -> None:
    corpus = Corpus.build(write(tmp_path / f"c{suffix}", ROWS), tmp_path / "out")
    assert [corpus[i] for i in range(len(corpus))] == [Passage(*row) for row in ROWS]
    assert Corpus.open(tmp_path / "out").passages([2, 0]) == [Passage(*ROWS[2]), Passage(*ROWS[0])]


def test_passage_id_is_taken_for_id_and_a_missing_title_is_empty(tmp_path: Path) -> None:
    corpus = Corpus.build(write(tmp_path / "c.parquet", [(7, "text")], ("passage_id", "text")), tmp_path / "out")
    assert corpus[0] == Passage("7", "", "text")


def test_a_null_title_is_empty(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": 1, "title": null, "text": "x"}')
    assert Corpus.build(tmp_path / "c.jsonl", tmp_path / "out")[0] == Passage("1", "", "x")


def test_texts_to_index_carry_their_title(tmp_path: Path) -> None:
    corpus = Corpus.build(write(tmp_path / "c.csv", ROWS), tmp_path / "out")
    assert corpus.texts(0, 2) == ["None. NA", ROWS[1][2]]
    assert corpus.texts(2, 2) == []


def test_positions_outside_the_corpus_are_refused(tmp_path: Path) -> None:
    corpus = Corpus.build(write(tmp_path / "c.csv", ROWS), tmp_path / "out")
    for i in (-1, 3):
        with pytest.raises(IndexError, match=f"passage {i} of 3"):
            corpus[i]


def test_passages_beyond_one_record_batch_keep_their_order(tmp_path: Path) -> None:
    rows = [(f"id{i}", "", f"text {i}") for i in range(5000)]
    corpus = Corpus.build(write(tmp_path / "c.parquet", rows), tmp_path / "out")
    assert corpus.texts(0, 5000) == [f"text {i}" for i in range(5000)]
    assert corpus[4999] == Passage("id4999", "", "text 4999")


def test_an_unchanged_source_is_not_built_again_and_a_changed_one_is(tmp_path: Path) -> None:
    source = write(tmp_path / "c.csv", ROWS)
    first = Corpus.build(source, tmp_path / "out")
    built = (tmp_path / "out" / FILE).stat().st_mtime_ns
    assert Corpus.build(source, tmp_path / "out").digest == first.digest
    assert (tmp_path / "out" / FILE).stat().st_mtime_ns == built
    write(source, ROWS[:1])
    assert len(Corpus.build(source, tmp_path / "out")) == 1
    assert first[2].text == ROWS[2][2], "an open corpus keeps the file it has mapped"


def test_a_failed_build_leaves_the_old_corpus_and_no_rubbish(tmp_path: Path) -> None:
    source = write(tmp_path / "c.csv", ROWS)
    Corpus.build(source, tmp_path / "out")
    write(source, [*ROWS, ("a", "", "the id again")])
    with pytest.raises(DataError):
        Corpus.build(source, tmp_path / "out")
    assert len(Corpus.open(tmp_path / "out")) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([FILE, RECORD])


BAD_ROWS = {
    "duplicate id": ([("a", "", "x"), ("b", "", "y"), ("a", "", "z")], r"row 2, column 'id', value 'a': this id is also at row 0"),
    "empty text": ([("a", "", "x"), ("b", "", " \n ")], r"row 1, column 'text', value ' \\n ': a passage must not be empty"),
    "empty id": ([("", "", "x")], r"row 0, column 'id', value (''|None|nan): an id must be"),
}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_named_with_file_place_column_and_value(tmp_path: Path, fault: str, suffix: str) -> None:
    rows, message = BAD_ROWS[fault]
    if suffix == ".jsonl":  # lines are counted from 1
        message = re.sub(r"row (\d)", lambda found: f"line {int(found[1]) + 1}", message)
    with pytest.raises(DataError, match=rf"c\{suffix}: {message}"):
        Corpus.build(write(tmp_path / f"c{suffix}", rows), tmp_path / "out")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_missing_column_and_those_found_are_named(tmp_path: Path, suffix: str) -> None:
    for names, missing in ((("id", "title", "body"), "text"), (("key", "title", "text"), "id")):
        source = write(tmp_path / f"c{suffix}", ROWS, names)
        with pytest.raises(DataError, match=rf"c\{suffix}: .*column '{missing}' is missing: found 'page', "):
            Corpus.build(source, tmp_path / "out")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_corpus_without_passages_is_refused(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"c{suffix}"
    if suffix == ".parquet":
        pd.DataFrame({"id": [], "text": []}, dtype=str).to_parquet(source)
    else:
        source.write_text("id,text\n" if suffix == ".csv" else "\n")
    with pytest.raises(DataError, match="holds no passage"):
        Corpus.build(source, tmp_path / "out")


JSON_FAULTS = {
    '{"id": 1, "text": "x"': "line 2 is no JSON",
    '["x"]': r"line 2 is '\[\"x\"\]': write one JSON object per line",
    '{"id": 1}': "line 2: column 'text' is missing: found 'id'",
    '{"id": 1.5, "text": "x"}': "line 2, column 'id', value 1.5: an id must be",
    '{"id": true, "text": "x"}': "line 2, column 'id', value True: an id must be",
    '{"id": 1, "text": 3}': "line 2, column 'text', value 3: a text must be a text",
    '{"id": 1, "text": null}': "line 2, column 'text', value None: a text must be a text",
    '{"id": 1, "title": [], "text": "x"}': "line 2, column 'title', value",
    '{"id": 1, "text": "\\ud800"}': "line 2, column 'text', .*half of a surrogate pair",
}


@pytest.mark.parametrize("line", JSON_FAULTS)
def test_a_wrong_json_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": 0, "text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=JSON_FAULTS[line]) as caught:
        Corpus.build(tmp_path / "c.jsonl", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_csv_row_with_other_cells_than_the_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,text\n1,fine\n2,one,two\n")
    with pytest.raises(DataError, match="row 1 has 3 cells, the header 2"):
        Corpus.build(tmp_path / "c.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content"),
    [("c.csv", b'id,text\n1,"open quote\n'), ("c.csv", b"id,text\n1,\xff\n"), ("c.jsonl", b"\xff\xfe"), ("c.parquet", b"no parquet")],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: is no readable {Path(name).suffix[1:]} file"):
        Corpus.build(tmp_path / name, tmp_path / "out")


def test_a_missing_file_and_an_unknown_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: No such file"):
        Corpus.build(tmp_path / "none.csv", tmp_path / "out")
    with pytest.raises(DataError, match=r"c\.txt: passages are read from \.parquet, \.jsonl, \.csv files, not from '\.txt'"):
        Corpus.build(tmp_path / "c.txt", tmp_path / "out")


def test_opening_a_folder_without_or_with_a_damaged_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"no {RECORD}, so this is no corpus"):
        Corpus.open(tmp_path)
    source = write(tmp_path / "c.csv", ROWS)
    Corpus.build(source, tmp_path / "out")
    (tmp_path / "out" / FILE).write_bytes(b"rubbish")
    with pytest.raises(BundleError, match=f"{FILE}: cannot be opened"):
        Corpus.open(tmp_path / "out")
    assert len(Corpus.build(source, tmp_path / "out")) == 3, "building mends it"
    (tmp_path / "out" / RECORD).write_text('{"sha256": "0", "passages": 2}')
    with pytest.raises(BundleError, match=f"holds 3 passages, {RECORD} names 2"):
        Corpus.open(tmp_path / "out")
    (tmp_path / "out" / RECORD).write_text("{}")
    with pytest.raises(BundleError, match=f"{RECORD}: is damaged"):
        Corpus.open(tmp_path / "out")


def test_a_csv_that_python_quotes_comes_back_as_it_was(tmp_path: Path) -> None:
    text = 'He said "1,5 µm",\r\nthen left.'
    with open(tmp_path / "c.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "id"], [text, "x"]])
    assert Corpus.build(tmp_path / "c.csv", tmp_path / "out")[0].text == text
