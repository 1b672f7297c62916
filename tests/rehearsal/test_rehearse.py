"""kit.rehearsal.rehearse: the saved version and the hidden rerun of a notebook, from staged datasets alone, and what stops a submission."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kit import manifest
from kit.config import Recipe
from kit.data.tables import read_table
from kit.errors import BundleError, ConfigError, DataError, RehearsalError
from kit.rehearsal.rehearse import Rehearsal, agree, rehearse, sample_datasets, staged_or_sample
from kit.vendor.dataset import stage
from kit.vendor.profile import Profile
from kit.vendor.resolve import Index
from kit.vendor.wheels import pack_code
from tests import packed
from tests.tiny_wheels import ROOT, make_image, write_house, write_requirements, write_wheel

ROWS = 40
BM25 = 'retrieve.retriever={kind = "bm25"}'


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that an inference notebook needs, with a stand-in among the wheels; every member counts. Not to be changed."""
    folder = tmp_path_factory.mktemp("staged")
    shop = packed.copy(folder)
    packed.complement(list(shop.members.values()))
    house = write_house(folder, write_wheel(folder / "index", "tiny-extra", code="FOUND = True"))
    stage([*sorted(shop.bundles.iterdir()), house, pack_code(folder)], folder / "datasets", owner="owner")
    return folder / "datasets"


@pytest.fixture(scope="module")
def here() -> Profile:
    return Profile.capture()


def copy_of(staged: Path, folder: Path, *, without: str = "nothing") -> Path:
    return Path(shutil.copytree(staged, folder / "datasets", ignore=shutil.ignore_patterns(without)))


def write_notebook(path: Path, *cells: str) -> Path:
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), path)
    return path


def extended_notebook(path: Path, cell: str) -> Path:
    """The project's own, with a cell at the end."""
    notebook = nbformat.read(ROOT / "notebooks" / "infer.ipynb", as_version=4)
    notebook.cells.append(new_code_cell(cell))
    nbformat.write(notebook, path)
    return path


def play(datasets: Path, notebook: Path, profile: Profile, artifacts: Path) -> Rehearsal:
    return rehearse(datasets, notebook, packed.workshop().competition, profile=profile, artifacts=artifacts, rows=ROWS)


def latest(artifacts: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((artifacts / "rehearsals" / "latest" / "summary.json").read_text())
    return summary


@pytest.mark.slow
def test_both_runs_give_what_inference_gives_from_the_datasets_alone(staged: Path, here: Profile, tmp_path: Path) -> None:
    record = """
        import json, os
        import tiny_extra
        seen = {"found": tiny_extra.FOUND, "kit": kit.__file__, "marker": os.environ.get("KAGGLE_IS_COMPETITION_RERUN")}
        seen["mounts"] = sorted(str(path.parent.relative_to(INPUT)) for path in INPUT.rglob("*.lock"))
        seen["competition"] = str(next(INPUT.rglob("test.csv")).parent.relative_to(INPUT))
        Path("seen.json").write_text(json.dumps(seen))
    """
    notebook = extended_notebook(tmp_path / "infer.ipynb", "\n".join(line.strip() for line in record.splitlines()))
    done = play(staged, notebook, here, tmp_path / "artifacts")
    summary = done.summary
    assert summary == latest(tmp_path / "artifacts")
    assert (summary["valid"], summary["identical_to_outside"], summary["rows"], summary["sockets"]) == (True, True, ROWS, 0)
    assert summary["seconds"] > sum(run["seconds"] for run in summary["runs"].values())
    assert summary["peak_mb"] == max(run["peak_mb"] for run in summary["runs"].values()) > 50
    members = {member.name for member in packed.workshop().members.values()}
    for name, rows in (("public", packed.TEST_ROWS), ("rerun", ROWS)):
        assert summary["runs"][name]["scored"] == dict.fromkeys(members, rows)
        assert len(read_table(done.folder / name / "working" / "submission.csv").frame) == rows
        assert {path.name for path in (done.folder / name).iterdir()} == {"working"}
    public, rerun = (json.loads((done.folder / name / "working" / "seen.json").read_text()) for name in ("public", "rerun"))
    assert public["found"] and rerun["found"]
    assert "site-packages" in public["kit"] and str(ROOT) not in public["kit"]
    assert (public["marker"], public["mounts"], public["competition"]) == (None, ["kit-code", "kit-wheels"], "competition")
    assert (rerun["marker"], rerun["competition"]) == ("1", "competitions/competition")
    assert rerun["mounts"] == ["datasets/owner/kit-code", "datasets/owner/kit-wheels"]


def test_a_damaged_dataset_and_a_missing_competition_stop_it_before_anything_runs(staged: Path, here: Profile, tmp_path: Path) -> None:
    datasets = copy_of(staged, tmp_path)
    weights = next(datasets.glob("plain-*/fold1--model.safetensors"))
    weights.chmod(0o644)
    packed.damage(weights)
    with pytest.raises(BundleError, match=r"plain-.*: file fold1/model\.safetensors is damaged"):
        play(datasets, ROOT / "notebooks" / "infer.ipynb", here, tmp_path / "artifacts")
    with pytest.raises(BundleError, match="no datasets: stage a trained run"):
        play(tmp_path / "nowhere", ROOT / "notebooks" / "infer.ipynb", here, tmp_path / "artifacts")
    with pytest.raises(DataError, match=r"no test set below .*nowhere: looked for test\.csv, test\.json, .*no such folder"):
        rehearse(staged, ROOT / "notebooks" / "infer.ipynb", tmp_path / "nowhere", profile=here, artifacts=tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()


def test_a_missing_base_is_named_before_anything_runs(staged: Path, here: Profile, tmp_path: Path) -> None:
    datasets = copy_of(staged, tmp_path)
    folder = next(datasets.glob("plain-*"))
    (folder / "recipe.toml").write_text(Recipe.load("sample_qlora").to_toml(), encoding="utf-8")
    found = manifest.read(folder)
    entry = manifest.sha256(folder / "recipe.toml"), (folder / "recipe.toml").stat().st_size
    manifest.write_atomically(folder / manifest.FILE, replace(found, files={**found.files, "recipe.toml": entry}).to_json())
    with pytest.raises(BundleError, match=rf"^{folder.name}: its base sample-lm is not in {datasets} \(bundles: kit-code, .*\): stage it, too"):
        play(datasets, ROOT / "notebooks" / "infer.ipynb", here, tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()


def test_a_folder_that_is_no_bundle_is_refused(staged: Path, here: Profile, tmp_path: Path) -> None:
    datasets = copy_of(staged, tmp_path)
    (datasets / "notes").mkdir()
    with pytest.raises(BundleError, match="notes: no MANIFEST.json"):
        play(datasets, ROOT / "notebooks" / "infer.ipynb", here, tmp_path / "artifacts")


@pytest.mark.slow
def test_members_that_were_scored_without_their_index_are_found_and_the_rerun_is_not_tried(staged: Path, here: Profile, tmp_path: Path) -> None:
    index = next(path for path in staged.iterdir() if manifest.read(path).kind == "index")
    datasets = copy_of(staged, tmp_path, without=index.name)
    words = rf"public run: member \S*reader-\S+ scored 10 of 10 rows: scored without contexts: bundle '{index.name}' is .* nor mounted"
    with pytest.raises(RehearsalError, match=words):
        play(datasets, ROOT / "notebooks" / "infer.ipynb", here, tmp_path / "artifacts")
    summary = latest(tmp_path / "artifacts")
    assert (summary["valid"], summary["identical_to_outside"], list(summary["runs"])) == (False, False, ["public"])
    assert set(summary["runs"]["public"]["scored"].values()) == {packed.TEST_ROWS}
    assert len(summary["runs"]["public"]["failures"]) == 2
    assert "outside the box" in summary["problems"][-1]
    folder = (tmp_path / "artifacts" / "rehearsals" / "latest").resolve()
    assert (folder / "public" / "working" / "submission.csv").is_file()
    assert {path.name for path in folder.iterdir()} == {"public", "outside", "summary.json"}


@pytest.mark.slow
def test_a_submission_of_the_public_rows_and_members_that_did_nothing_are_found(staged: Path, here: Profile, tmp_path: Path) -> None:
    """As a notebook does that was written to the public rows, and skips the heavy path."""
    name = next(iter(packed.workshop().members.values())).name
    rows = "".join(f"{i},A B C\\n" for i in range(packed.TEST_ROWS))
    told = json.dumps({"scored": {name: packed.TEST_ROWS}, "failures": {name: "scored without contexts"}})
    cell = f"from pathlib import Path\nPath('submission.csv').write_text('id,prediction\\n{rows}')\nPath('outcome.json').write_text({told!r})"
    with pytest.raises(RehearsalError, match=r"^public run: member .* scored .* \(and \d more, see there\); what was written is in "):
        play(staged, write_notebook(tmp_path / "short.ipynb", cell), here, tmp_path / "artifacts")
    summary = latest(tmp_path / "artifacts")
    problems = "\n".join(summary["problems"])
    assert not summary["valid"]
    assert not summary["identical_to_outside"]
    assert [run["valid"] for run in summary["runs"].values()] == [False, False]
    assert f"public run: member {name} scored 10 of 10 rows: scored without contexts" in problems
    assert problems.count("scored 0 of 10 rows") == problems.count("scored 0 of 40 rows") == 2
    assert f"rerun run: Submission Scoring Error: {summary_folder(tmp_path)}" in problems
    assert "10 rows, but" in problems
    assert "submission.csv of the public run differs from" in problems


def summary_folder(tmp_path: Path) -> Path:
    return (tmp_path / "artifacts" / "rehearsals" / "latest").resolve()


def test_a_notebook_that_tells_no_outcome_is_not_believed(staged: Path, here: Profile, tmp_path: Path) -> None:
    shutil.copytree(staged / "kit-code", tmp_path / "datasets" / "kit-code")
    with pytest.raises(RehearsalError, match=r"public run: the notebook wrote no outcome\.json, .*: call outcome\.save"):
        play(tmp_path / "datasets", write_notebook(tmp_path / "silent.ipynb", "pass"), here, tmp_path / "artifacts")


@pytest.mark.parametrize(
    ("rows", "is_same"),
    [
        ([("1", "2.500001"), ("2", "Ann")], True),
        ([("1", "2.51"), ("2", "Ann")], False),
        ([("1", "2.5"), ("2", "Bo")], False),
        ([("1.000001", "2.5"), ("2", "Ann")], False),
        ([("1", "2.5")], False),
        ([("1", ""), ("2", "Ann")], False),
    ],
)
def test_submissions_agree_that_differ_by_rounding_alone(tmp_path: Path, rows: list[tuple[str, str]], is_same: bool) -> None:
    ours = packed.write_rows(tmp_path / "ours.csv", [("id", "score"), ("1", "2.5"), ("2", "Ann")])
    assert agree(ours, packed.write_rows(tmp_path / "theirs.csv", [("id", "score"), *rows]), "id") is is_same


def test_a_submission_with_other_columns_or_none_agrees_with_nothing(tmp_path: Path) -> None:
    ours = packed.write_rows(tmp_path / "ours.csv", [("id", "score"), ("1", "2.5")])
    assert not agree(ours, packed.write_rows(tmp_path / "theirs.csv", [("id", "grade"), ("1", "2.5")]), "id")
    (tmp_path / "theirs.csv").write_bytes(b"")
    assert not agree(ours, tmp_path / "theirs.csv", "id")


def test_what_is_not_named_is_what_is_staged_and_where_it_was_trained(staged: Path, here: Profile, tmp_path: Path) -> None:
    shop = packed.workshop()
    copy_of(staged, tmp_path)
    assert staged_or_sample(None, None, tmp_path, here) == (tmp_path / "datasets", shop.competition)
    assert staged_or_sample(staged, tmp_path, tmp_path, here) == (staged, tmp_path)
    moved = copy_of(staged, tmp_path / "moved", without="*reader-*")
    member = next(moved.glob("plain-*"))
    packed.change_member(member, f"data.folder={tmp_path / 'elsewhere'}")
    with pytest.raises(ConfigError, match=r"datasets: the folder .* is not here: give --competition the folder with the test set"):
        staged_or_sample(moved, None, tmp_path, here)
    with pytest.raises(BundleError, match="typo: no datasets"):
        staged_or_sample(tmp_path / "typo", None, tmp_path, here)


@pytest.mark.slow
def test_something_to_rehearse_with_is_made_once(tmp_path: Path) -> None:
    write_wheel(tmp_path / "index", "tiny-extra")
    requirements = write_requirements(tmp_path / "requirements.in", "tiny-extra")
    options: dict[str, Any] = {"requirements": requirements, "index": Index((tmp_path / "index",), no_index=True), "recipes": {"sample_rules": [BM25]}}
    datasets, competition = sample_datasets(tmp_path / "artifacts", make_image(), **options)
    kinds = sorted(manifest.verify(folder).kind for folder in datasets.iterdir())
    assert kinds == ["code", "index", "member", "wheels"]
    assert {path.name for path in competition.iterdir()} == {"train.csv", "test.csv", "sample_submission.csv", "passages.jsonl"}
    before = {path: path.stat().st_mtime_ns for path in (competition.parent / "members").rglob("*")}
    (competition.parent / "wheels" / "kit-wheels" / "kept").touch()
    assert sample_datasets(tmp_path / "artifacts", make_image(), **options) == (datasets, competition)
    assert {path: path.stat().st_mtime_ns for path in (competition.parent / "members").rglob("*")} == before
    assert (competition.parent / "wheels" / "kit-wheels" / "kept").is_file()
