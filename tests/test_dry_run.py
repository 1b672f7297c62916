"""The dry run's machinery on a tiny setting: two notebooks in sealed boxes, from the sample competition to a submission, and the other task families.

One of the three members is an adapter in four bits, whose base lies beside it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from kit import manifest
from kit.cli import app
from kit.config import Recipe
from kit.data.tables import read_table
from kit.errors import KitError, RehearsalError
from kit.rehearsal import dryrun
from kit.rehearsal.dryrun import dry_run
from kit.rehearsal.families import FAMILIES, Family
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


ROWS = {"essay_regression": 120, "extractive_qa": 56, "causal_lm": 168}
_SIZES = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SHORT = {
    "sample_essays": [
        "task.max_length=64", "model.source=scratch", "model.vocab_size=1500", "model.pooling=mean",
        *(f"model.config.{key}={value}" for key, value in _SIZES.items()), "model.config.max_position_embeddings=64",
        "train.epochs=4", "train.lr=5e-3", "train.freeze_embeddings=false", "train.freeze_layers=0",
    ],
    "sample_reading": ["train.epochs=3", "train.batch_size=2", "train.lr=3e-4", "train.freeze_layers=3"],
    "sample_text": [
        "task.max_length=64", "model.vocab_size=600", "model.config.n_embd=48", "model.config.n_layer=1", "model.config.n_head=2",
        "train.epochs=2", "train.batch_size=4", "train.lr=4e-3",
    ],
}  # fmt: skip


def tiny_families(folder: Path) -> list[Family]:
    """Those of the dry run, with settings for seconds."""
    families = []
    for family in FAMILIES:
        path = folder / f"{family.recipe}.toml"
        path.write_text(Recipe.load(family.recipe, SHORT[family.recipe]).to_toml(), encoding="utf-8")
        families.append(replace(family, recipe=str(path)))
    return families


def write_notebooks(folder: Path, train: str = TRAIN, infer: str = INFER) -> Path:
    folder.mkdir(exist_ok=True)
    for name, code in (("train", train), ("infer", infer)):
        nbformat.write(new_notebook(cells=[new_code_cell(INSTALL), new_code_cell(code)]), folder / f"{name}.ipynb")
    return folder


@pytest.mark.slow
def test_both_notebooks_run_sealed_and_what_is_unchanged_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebooks = write_notebooks(tmp_path / "notebooks")
    root = tmp_path / "artifacts" / "dry-run"
    earlier = root / "train" / "working" / "artifacts" / "bundles" / "earlier"
    earlier.mkdir(parents=True)
    manifest.write(earlier, "earlier", "code")
    families = tiny_families(tmp_path)
    summary, table = dry_run(tmp_path / "artifacts", notebooks, families)
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
    assert set(summary["families"]) == {"essay_regression", "extractive_qa", "causal_lm"}
    for kind, judged in summary["families"].items():
        assert judged["rows"] == ROWS[kind]
        assert judged["seconds"] > 0 and judged["se"] > 0 and judged["baseline"]["se"] > 0
        assert judged["gain"]["value"] > 2 * judged["gain"]["se"], f"{kind} is better than {judged['baseline']['name']}, by more than chance"
        assert f"{kind}, {judged['metric']}" in table and judged["baseline"]["name"] in table
    assert not list(root.glob("family-*/input/test_answers.*"))

    again, _ = dry_run(tmp_path / "artifacts", notebooks, families)
    assert again["reused"] == ["train", "infer", "infer without contexts", *alone, *(family.name for family in families)]
    assert again["map@3"] == summary["map@3"]
    assert again["families"] == summary["families"]

    write_notebooks(tmp_path / "notebooks", infer=INFER.replace("outcome.save", "outcome.failures['one'] = 'broke'; outcome.save"))
    Path(families[0].recipe).write_text(Recipe.load(families[0].recipe, ["task.columns=['grammar', 'beauty']"]).to_toml(), encoding="utf-8")
    monkeypatch.setattr(dryrun, "dry_run", partial(dry_run, families=families))  # the command has no say in which
    done = CliRunner().invoke(app, ["dry-run", "--artifacts", str(tmp_path / "artifacts"), "--notebooks", str(tmp_path / "notebooks")])
    assert "FAILED: one: broke" in done.stdout
    assert "FAILED: family sample_essays: kit train failed: error: " in done.stdout and "'beauty'" in done.stdout
    assert "extractive_qa, F1" in done.stdout and "causal_lm, perplexity" in done.stdout, "the others are not lost"
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
