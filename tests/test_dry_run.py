"""The dry run's machinery on a tiny setting: two notebooks in sealed boxes, from the sample competition to a submission.

One of the three members is an adapter in four bits, whose base lies beside it.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from kit import manifest
from kit.cli import app
from kit.data.tables import read_table
from kit.errors import KitError, RehearsalError
from kit.rehearsal.dryrun import dry_run
from tests import packed

INSTALL = """
import subprocess, sys
from pathlib import Path
INPUT = Path.cwd().parent / "input"
subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *map(str, INPUT.rglob("*.whl"))])
import kit
assert kit.__file__.startswith(sys.prefix), kit.__file__
"""
TRAIN = f"""
from kit.paths import find_competition
from kit.vendor.weights import vendor_weights
TEXT = {packed.RECIPE.format(folder='"competition"', pooling="match", retrieve="", lr=1e-3)!r}
Path("tiny.toml").write_text(TEXT)
folder = f"data.folder={{find_competition(INPUT, 'train.csv')}}"
small = ["train.epochs=1", "train.batch_size=64"]
sizes = ["model.vocab_size=400", "model.config.num_hidden_layers=1", "model.config.hidden_size=32", "model.config.intermediate_size=64"]
base = kit.train(kit.Recipe.load("sample_lm", [folder, *small, *sizes]), full=True).folder / "full"
vendor_weights(base, Path("artifacts/bundles"), name="sample-lm", licence="apache-2.0")
recipes = [kit.Recipe.load("tiny.toml", [folder, f"train.lr={{lr}}"]) for lr in (1e-3, 1e-5)]
kit.pack([kit.train(recipe).folder for recipe in (*recipes, kit.Recipe.load("sample_qlora", [folder, *small, "task.max_length=120"]))])
"""
INFER = """
assert [path.name for path in Path.cwd().iterdir() if path.suffix != ".ipynb"] == [], "nothing of an earlier run"
from kit.paths import find_competition
assert not (find_competition(INPUT) / "test_answers.csv").exists()
outcome = kit.infer()
outcome.save(Path.cwd())
"""


def write_notebooks(folder: Path, train: str = TRAIN, infer: str = INFER) -> Path:
    folder.mkdir(exist_ok=True)
    for name, code in (("train", train), ("infer", infer)):
        nbformat.write(new_notebook(cells=[new_code_cell(INSTALL), new_code_cell(code)]), folder / f"{name}.ipynb")
    return folder


@pytest.mark.slow
def test_both_notebooks_run_sealed_and_what_is_unchanged_is_not_run_again(tmp_path: Path) -> None:
    notebooks = write_notebooks(tmp_path / "notebooks")
    root = tmp_path / "artifacts" / "dry-run"
    earlier = root / "train" / "working" / "artifacts" / "bundles" / "earlier"
    earlier.mkdir(parents=True)
    manifest.write(earlier, "earlier", "code")
    summary, table = dry_run(tmp_path / "artifacts", notebooks)
    assert not (root / "infer" / "input" / "earlier").exists()
    assert summary["sockets"] == []
    assert summary["reused"] == []
    assert summary["failures"] == {}
    assert summary["rows"] == len(read_table(root / "submission.csv").frame) >= 120
    alone = [f"infer {name} alone" for name, weight in sorted(summary["weights"].items()) if weight == 0]
    assert alone, "what the notebook does not score"
    assert sorted(name.partition("-")[0] for name in summary["weights"]) == ["sample", "tiny", "tiny"], "and no base"
    assert set(summary["map@3"]) >= {"random", "longest", "overlap", "test", "without_context", "oof", "folds", *summary["weights"]}
    assert all(0 <= estimate["value"] <= 1 for name, estimate in summary["map@3"].items() if name not in ("oof", "folds"))
    assert "blend = submission.csv" in table

    again, _ = dry_run(tmp_path / "artifacts", notebooks)
    assert again["reused"] == ["train", "infer", "infer without contexts", *alone]
    assert again["map@3"] == summary["map@3"]

    write_notebooks(tmp_path / "notebooks", infer=INFER.replace("outcome.save", "outcome.failures['one'] = 'broke'; outcome.save"))
    done = CliRunner().invoke(app, ["dry-run", "--artifacts", str(tmp_path / "artifacts"), "--notebooks", str(tmp_path / "notebooks")])
    assert "FAILED: one: broke" in done.stdout
    assert done.exit_code == 1

    write_notebooks(tmp_path / "notebooks", infer=INFER + "\nraise RuntimeError('changed')")
    with pytest.raises(RehearsalError, match=r"infer\.ipynb, cell 2: RuntimeError: changed; the partly run notebook is"):
        dry_run(tmp_path / "artifacts", notebooks)


def test_missing_notebooks_are_named_before_anything_is_done(tmp_path: Path) -> None:
    write_notebooks(tmp_path / "notebooks")
    (tmp_path / "notebooks" / "infer.ipynb").unlink()
    with pytest.raises(KitError, match=r"infer\.ipynb is missing: give --notebooks"):
        dry_run(tmp_path / "artifacts", tmp_path / "notebooks")
    assert not (tmp_path / "artifacts").exists()
