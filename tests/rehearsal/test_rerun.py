"""kit.rehearsal.rerun: what the hidden rerun may look like, and that inference gives a valid submission for it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

import kit
from kit import runtime
from kit.data.tables import read_table
from kit.errors import DataError
from kit.inference.submission import Submission
from kit.rehearsal.lint import judge
from kit.rehearsal.rerun import LONG, ODDITIES, link_files, look_alike
from kit.sample import write_sample
from kit.tasks import Task
from kit.tasks.essay_regression import EssayRegression
from kit.tasks.extractive_qa import ExtractiveQA
from kit.tasks.multiple_choice import MultipleChoice
from tests import packed
from tests.packed import read_rows, write_rows


@pytest.fixture(scope="module")
def competition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("competition") / "kit-sample")


@pytest.fixture(scope="module")
def like(competition: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return look_alike(competition, tmp_path_factory.mktemp("hidden") / "kit-sample", rows=2400)


def essays(folder: Path, rows: int) -> Path:
    """A competition of another kind: one text, six numbers to predict; with a file in a sub-folder."""
    write_rows(folder / "test.csv", [("text_id", "id", "full_text"), *((f"t{i}", f"e{i}", f"Essay number {i}.") for i in range(rows))])
    write_rows(folder / "sample_submission.csv", [("id", "cohesion", "syntax"), *((f"e{i}", "3.0", "2.5") for i in range(rows))])
    write_rows(folder / "extra" / "notes.csv", [("id",), ("1",)])
    return folder


def texts_of(path: Path) -> list[tuple[str, ...]]:
    frame = read_table(path).frame
    return list(frame[sorted(set(frame) - {"id"})].itertuples(index=False, name=None))


def test_ids_are_new_distinct_in_no_order_and_partly_texts(like: Path) -> None:
    ids = read_table(like / "test.csv").frame["id"].tolist()
    numbers = [int(id_) for id_ in ids if id_.isdigit() and not id_.startswith("0")]
    assert len(set(ids)) == len(ids) == 2400
    assert 400 < len(numbers) < 800
    assert numbers != sorted(numbers)
    assert max(numbers) > 2 * len(ids)
    assert any(id_.startswith("00") and id_.isdigit() for id_ in ids)
    assert any(" " in id_ and "," in id_ for id_ in ids)


def test_columns_stand_in_another_order_and_lines_end_with_carriage_returns(competition: Path, like: Path) -> None:
    public, hidden = read_table(competition / "test.csv").frame, read_table(like / "test.csv").frame
    assert sorted(public) == sorted(hidden)
    assert list(public) != list(hidden)
    assert hidden.columns[0] != "id"
    for name in ("test.csv", "sample_submission.csv"):
        assert (like / name).read_bytes().split(b"\n")[0].endswith(b"\r")


def test_the_sample_submission_has_the_ids_of_the_test_set_in_its_order_and_the_same_values(competition: Path, like: Path) -> None:
    header, *rows = read_rows(like / "sample_submission.csv")
    assert header == read_rows(competition / "sample_submission.csv")[0]
    assert [id_ for id_, _ in rows] == read_table(like / "test.csv").frame["id"].tolist()
    assert {value for _, value in rows} == {"A B C"}


@pytest.mark.parametrize("kind", ODDITIES)
@pytest.mark.parametrize("rows", [50, 200])
def test_every_kind_of_oddity_occurs(competition: Path, tmp_path: Path, kind: str, rows: int) -> None:
    public = {text for row in texts_of(competition / "test.csv") for text in row}
    hidden = {text for row in texts_of(look_alike(competition, tmp_path / "out", rows=rows, seed=rows) / "test.csv") for text in row}
    assert hidden & {ODDITIES[kind](text) for text in public}


def test_most_rows_are_as_in_the_public_test_set(competition: Path, like: Path) -> None:
    public = set(texts_of(competition / "test.csv"))
    odd = sum(row not in public for row in texts_of(like / "test.csv"))
    assert 0.08 * 2400 < odd <= 0.1 * 2400


def test_some_rows_lack_every_text_and_some_texts_are_very_long(like: Path) -> None:
    rows = texts_of(like / "test.csv")
    assert any(not any(text.strip() for text in row) for row in rows)
    assert max(len(text) for row in rows for text in row) == LONG


def test_some_prompts_occur_under_several_ids_even_where_few_rows_are_drawn_of_many(tmp_path: Path) -> None:
    rows = texts_of(look_alike(essays(tmp_path / "public", 5000), tmp_path / "out", rows=50) / "test.csv")
    assert len(set(rows)) < 50


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(competition: Path, tmp_path: Path) -> None:
    made = [look_alike(competition, tmp_path / str(i), rows=60, seed=seed) for i, seed in enumerate((0, 0, 1))]
    contents = [[(folder / name).read_bytes() for name in ("test.csv", "sample_submission.csv")] for folder in made]
    assert contents[0] == contents[1] != contents[2]


def test_another_kind_of_competition_is_treated_alike(tmp_path: Path) -> None:
    out = look_alike(essays(tmp_path / "public", 30), tmp_path / "out", rows=600)
    assert list(read_table(out / "test.csv").frame) == ["full_text", "id", "text_id"]
    header, *rows = read_rows(out / "sample_submission.csv")
    assert header == ["id", "cohesion", "syntax"]
    assert {tuple(values) for _, *values in rows} == {("3.0", "2.5")}
    assert (out / "extra" / "notes.csv").read_text() == "id\n1\n"


def test_the_public_folder_stays_as_it_is_and_other_files_are_the_same_there(competition: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in competition.iterdir()}
    out = look_alike(competition, tmp_path / "out", rows=20)
    assert {path.name: path.read_bytes() for path in competition.iterdir()} == before
    assert {path.name for path in out.iterdir()} == set(before)
    assert all((out / name).read_bytes() == before[name] for name in ("train.csv", "passages.jsonl"))


def test_a_competition_without_a_sample_submission_stays_without(tmp_path: Path) -> None:
    (essays(tmp_path / "public", 3) / "sample_submission.csv").unlink()
    out = look_alike(tmp_path / "public", tmp_path / "out", rows=1)
    assert not (out / "sample_submission.csv").exists()
    assert len(read_table(out / "test.csv").frame) == 1


def test_no_rows_a_folder_in_use_and_a_missing_test_set_are_refused(competition: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows = 0: .* at least one row"):
        look_alike(competition, tmp_path / "out", rows=0)
    with pytest.raises(DataError, match="is not empty: name a new folder"):
        look_alike(competition, competition, rows=5)
    with pytest.raises(DataError, match=r"test\.csv: no such file"):
        look_alike(tmp_path / "nowhere", tmp_path / "out", rows=5)


# --- the other families ----------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[Task, str]] = {"essays": (EssayRegression(), "test.csv"), "readings": (ExtractiveQA(), "test.json")}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path, Path]:
    """A task, and the test sets of its sample competition and of the look-alike."""
    task, name = FAMILIES[request.param]
    public = write_sample(tmp_path_factory.mktemp("public") / "sample", request.param)
    out = look_alike(public, tmp_path_factory.mktemp("hidden") / "sample", rows=120, test=name, ids=task.id_column)
    return task, public / name, out / name


def test_the_task_reads_a_look_alike_of_its_family_and_every_id_is_new(family: tuple[Task, Path, Path]) -> None:
    task, public, hidden = family
    known, found = (read_table(path, ids=task.id_column).frame for path in (public, hidden))
    assert sorted(found) == sorted(known)
    assert len(task.read(read_table(hidden, ids=task.id_column))) == 120
    assert not set(found[task.id_column]) & set(known[task.id_column])
    sample = read_table(hidden.with_name("sample_submission.csv"), ids=task.id_column).frame
    assert sample[task.id_column].tolist() == found[task.id_column].tolist(), "the file's order is that of the sample submission"


def test_every_kind_of_oddity_occurs_in_every_family(family: tuple[Task, Path, Path]) -> None:
    task, public, hidden = family
    known, found = (
        {text for name, column in read_table(path, ids=task.id_column).frame.items() if name != task.id_column for text in column} for path in (public, hidden)
    )
    assert [kind for kind, change in ODDITIES.items() if not found & {change(text) for text in known}] == []


def test_the_fallback_for_a_look_alike_is_a_submission_that_the_site_can_score(family: tuple[Task, Path, Path], tmp_path: Path) -> None:
    task, _, hidden = family
    sample = hidden.with_name("sample_submission.csv")
    Submission.open(tmp_path / "submission.csv", task, read_table(hidden, ids=task.id_column), sample).write()
    assert [found for found in judge(tmp_path / "submission.csv", task, sample=sample, test=hidden) if found.level == "error"] == []


FORMATS = ("test.csv", "test.csv.gz", "test.jsonl", "test.parquet", "data/essays.CSV")


@pytest.mark.parametrize("name", FORMATS)
def test_a_test_set_is_written_again_in_the_format_it_was_read_in(tmp_path: Path, name: str) -> None:
    public = tmp_path / "public" / name
    public.parent.mkdir(parents=True)
    frame = pd.DataFrame({"text_id": [f"e{i}" for i in range(40)], "full_text": [f"Essay {i}." for i in range(40)]})
    plain = {".csv": frame.to_csv(index=False).encode(), ".jsonl": frame.to_json(orient="records", lines=True).encode()}
    frame.to_parquet(public) if name.endswith(".parquet") else public.write_bytes(plain[Path(name.lower().removesuffix(".gz")).suffix])
    if name.endswith(".gz"):
        public.write_bytes(gzip.compress(public.read_bytes()))
    made = [look_alike(tmp_path / "public", tmp_path / str(i), rows=60, test=name, ids="text_id") / name for i in range(2)]
    assert made[0].read_bytes() == made[1].read_bytes()
    assert made[0].read_bytes()[:3] == public.read_bytes()[:3] or name.endswith((".csv", ".jsonl", ".CSV"))
    assert [*read_table(made[0], ids="text_id").frame] == ["full_text", "text_id"]
    assert {"None", "", ODDITIES["control"]("")[-3:]} & set(read_table(made[0], ids="text_id").frame["full_text"])


def test_readings_are_written_as_squad_has_them_gzipped_too_and_without_answers(tmp_path: Path) -> None:
    asked = [{"id": f"q{i}", "question": f"Where is {i}?", "answers": [{"text": "here", "answer_start": 0}]} for i in range(9)]
    (tmp_path / "public").mkdir()
    data = json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "here it is", "qas": asked}]}]}).encode()
    (tmp_path / "public" / "dev.json.gz").write_bytes(gzip.compress(data))
    out = look_alike(tmp_path / "public", tmp_path / "out", rows=30, test="dev.json.gz") / "dev.json.gz"
    table = read_table(out)
    assert list(table.frame) == ["id", "title", "context", "question"]
    assert len(ExtractiveQA().read(table)) == 30


def test_what_is_asked_for_is_left_out_of_a_test_set_made_of_labelled_rows(tmp_path: Path) -> None:
    folder = essays(tmp_path / "public", 5)
    write_rows(folder / "test.csv", [("id", "full_text", "syntax", "answer", "answers"), *((f"e{i}", "Text.", "2.0", "A", "[]") for i in range(5))])
    assert list(read_table(look_alike(folder, tmp_path / "out", rows=20) / "test.csv").frame) == ["full_text", "id"]


def test_test_sets_without_ids_or_texts_are_refused(tmp_path: Path) -> None:
    folder = essays(tmp_path / "public", 5)
    with pytest.raises(DataError, match=r"test\.csv: .*column 'text' is missing"):
        look_alike(folder, tmp_path / "out", rows=5, ids="text")
    write_rows(folder / "test.csv", [("id", "syntax"), ("1", "3.0")])
    with pytest.raises(DataError, match=r"test\.csv: has no column but 'id' that is not asked for"):
        look_alike(folder, tmp_path / "out", rows=5)
    (folder / "test.json").write_text('{"q1": "Ann"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.json: has no column but 'id' that is not asked for"):
        look_alike(folder, tmp_path / "out", rows=5, test="test.json")
    write_rows(folder / "test.csv", [("id", "full_text"), ("1", "Text."), ("1", "Text.")])
    with pytest.raises(DataError, match="has the same id"):
        look_alike(folder, tmp_path / "out", rows=5)


@pytest.mark.parametrize(("datasets", "competitions"), [(".", "."), ("datasets/owner", "competitions")])
@pytest.mark.parametrize("marker", [None, "1"])
def test_inference_gives_a_valid_submission_for_a_hidden_test_set_of_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets: str, competitions: str, marker: str | None
) -> None:
    shop, root = packed.copy(tmp_path), tmp_path / "input"
    packed.complement([*shop.members.values()])  # so that the blend uses them all
    link_files(shop.bundles, root / datasets)
    hidden = look_alike(shop.competition, root / competitions / "science", rows=60)
    shutil.copyfile(hidden / "sample_submission.csv", tmp_path / "sample.csv")
    if marker:
        monkeypatch.setenv(runtime.RERUN_MARKER, marker)
    outcome = kit.infer(root=root, out=tmp_path / "submission.csv")
    assert outcome.failures == {}
    assert outcome.finished
    assert set(outcome.scored.values()) == {60}
    submitted, sample, test = (read_table(path) for path in (tmp_path / "submission.csv", tmp_path / "sample.csv", hidden / "test.csv"))
    assert submitted.frame["id"].tolist() == sample.frame["id"].tolist()
    assert MultipleChoice().check(submitted, test) == []
    assert submitted.frame["prediction"].str.split().str.len().eq(3).all()
    assert submitted.frame["prediction"].nunique() > 5
