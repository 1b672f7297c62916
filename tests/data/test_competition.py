"""kit.data.competition: the test set is found under any usual name and the recipe's own; where there is none, the error says what was looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit import manifest
from kit.data.competition import SAMPLE, TESTS, find_test, named_in, sample_beside
from kit.errors import DataError


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("layout", ["exam", "competitions/exam", "."])
@pytest.mark.parametrize("name", TESTS)
def test_a_test_set_is_found_under_every_usual_name_and_mount(tmp_path: Path, name: str, layout: str) -> None:
    touch(tmp_path / layout / "train.csv")
    test = touch(tmp_path / layout / name)
    assert find_test(tmp_path, ["essays.csv"]) == test


def test_the_name_of_the_recipe_goes_before_the_usual_ones(tmp_path: Path) -> None:
    usual, named = touch(tmp_path / "exam" / "test.csv"), touch(tmp_path / "exam" / "essays.csv")
    assert find_test(tmp_path, ["data/essays.csv"]) == named
    assert find_test(tmp_path, ["other.csv"]) == find_test(tmp_path) == usual


def test_a_test_set_inside_a_bundle_is_none(tmp_path: Path) -> None:
    touch(tmp_path / "member" / "test.json")
    manifest.write(tmp_path / "member", "member", "member")
    with pytest.raises(DataError, match="no table is there"):
        find_test(tmp_path)


def test_what_was_looked_for_and_what_is_there_is_said(tmp_path: Path) -> None:
    touch(tmp_path / "exam" / "questions.csv")
    touch(tmp_path / "exam" / "picture.png")
    with pytest.raises(DataError) as caught:
        find_test(tmp_path, ["essays.csv", "test.csv"])
    said = str(caught.value)
    assert "looked for essays.csv, test.csv, test.json, test.csv.gz, " in said
    assert "(tables there: exam/questions.csv): attach the competition's data, or name the file" in said
    assert "data.test" in said


def test_many_tables_are_counted_and_a_missing_folder_is_said(tmp_path: Path) -> None:
    for number in range(13):
        touch(tmp_path / f"{number}.json")
    with pytest.raises(DataError, match="and 3 more"):
        find_test(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        find_test(tmp_path / "nowhere")


def test_recipes_say_what_they_call_the_test_set_and_damaged_ones_nothing(tmp_path: Path) -> None:
    good, damaged = tmp_path / "good.toml", tmp_path / "damaged.toml"
    good.write_text('task.kind = "extractive_qa"\nmodel.kind = "encoder"\ndata.test = "dev.json"\n', encoding="utf-8")
    damaged.write_text("[data", encoding="utf-8")
    assert named_in([damaged, good, tmp_path / "none.toml"]) == ["dev.json"]


def test_the_sample_submission_is_the_one_beside_it(tmp_path: Path) -> None:
    test = touch(tmp_path / "exam" / "test.json")
    touch(tmp_path / SAMPLE)
    assert sample_beside(test) is None
    sample = touch(tmp_path / "exam" / SAMPLE)
    assert sample_beside(test) == sample
