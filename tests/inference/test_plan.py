"""The predicted timeline of recipes and of trained members."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from kit.config import shipped_recipes
from kit.errors import BundleError, ConfigError
from kit.inference.plan import plan

RECIPE = """
[task]
kind = "multiple_choice"
max_length = {length}
[model]
kind = "encoder"
source = "scratch"
vocab_size = 1000
[model.config]
model_type = "bert"
hidden_size = {hidden}
num_hidden_layers = 4
intermediate_size = 256
[data]
folds = 3
[train]
seeds = {seeds}
"""


def write_recipe(folder: Path, name: str, *, hidden: int = 128, length: int = 64, seeds: str = "[0]") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(RECIPE.format(hidden=hidden, length=length, seeds=seeds))
    return path


def write_run(folder: Path, *, skill: float, floats: int = 1000) -> Path:
    """A run folder as training leaves it, as far as planning reads it."""
    write_recipe(folder, "recipe.toml")
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 5, 120)
    for fit in ("fold0", "fold1"):
        (folder / fit).mkdir()
        save_file({"w": np.zeros(floats, np.float32)}, folder / fit / "model.safetensors")
    scores = skill * np.eye(5)[targets] + rng.normal(size=(120, 5))
    odds = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    columns = {"id": np.arange(120).astype(str), "t0": targets, **{f"p{k}": odds[:, k].astype(np.float32) for k in range(5)}}
    pd.DataFrame(columns).to_parquet(folder / "oof.parquet")
    return folder


def test_a_recipe_is_planned_by_the_size_it_would_have(tmp_path: Path) -> None:
    made = plan([write_recipe(tmp_path, "tiny.toml")], 500, "t4x2")
    (member,) = made.members
    assert (made.rows, made.device, made.fits_in_time, made.left_out, made.assumed) == (500, "t4x2", True, [], ["tiny"])
    assert (member["name"], member["fits"]) == ("tiny", 3)
    parameters = 1000 * 128 + 4 * (4 * 128**2 + 2 * 128 * 256)
    assert member["token_us"] == pytest.approx(2 * parameters / 1.8e13 * 1e6, rel=0.01)
    assert {span["slot"] for span in made.timeline} == {0, 1}
    assert sum(span["rows"] for span in made.timeline if span["view"] == "full") == 3 * 500
    assert made.seconds == max(span["end"] for span in made.timeline)
    json.dumps(made.summary())


def test_consecutive_orders_for_one_fit_are_one_line_of_the_timeline(tmp_path: Path) -> None:
    made = plan([write_recipe(tmp_path, "large.toml", hidden=2048)], 300, "cpu", budget_s=1e6)
    for before, after in zip(made.timeline, made.timeline[1:], strict=False):
        assert any(before[name] != after[name] for name in ("member", "fit", "view"))
        assert before["end"] <= after["start"]


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "large.toml", hidden=2048, length=512)
    made = plan([recipe], 4000, "cpu", budget_s=3600)
    assert not made.fits_in_time
    assert made.left_out[0]["member"] == "large"
    assert made.left_out[0]["rows"] > 0
    assert made.seconds == pytest.approx(3600 * 0.97, rel=0.02)
    assert plan([recipe], 4000, "h100", budget_s=3600).fits_in_time


def test_seeds_and_folds_make_the_fits(tmp_path: Path) -> None:
    made = plan([write_recipe(tmp_path, "two.toml", seeds="[0, 1]")], 10, "t4")
    assert made.members[0]["fits"] == 6
    assert {span["fit"] for span in made.timeline} >= {"fold0-seed0", "fold2-seed1"}


def test_trained_members_bring_their_own_size_fits_and_skill(tmp_path: Path) -> None:
    good, poor = write_run(tmp_path / "good", skill=4.0, floats=5000), write_run(tmp_path / "poor", skill=0.0)
    made = plan([good, poor], 300, "t4")
    sizes = {member["name"]: member for member in made.members}
    assert made.assumed == []
    assert sizes["good"]["fits"] == 2
    assert sizes["good"]["token_us"] == pytest.approx(2 * (5000 * 4 + 72) / 4 / 1.8e13 * 1e6, abs=1e-3)
    assert sum(span["rows"] for span in made.timeline if span["member"] == "good") == 600
    assert sum(span["rows"] for span in made.timeline if span["member"] == "poor") <= 300  # at most insurance


def test_where_one_has_no_oof_the_standard_skill_is_assumed_for_all(tmp_path: Path) -> None:
    made = plan([write_run(tmp_path / "good", skill=4.0), write_recipe(tmp_path, "new.toml")], 50, "t4")
    assert made.assumed == ["good", "new"]


def test_wrong_input_is_refused_with_words(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "tiny.toml")
    with pytest.raises(ConfigError, match="device 't5' is unknown"):
        plan([recipe], 10, "t5")
    with pytest.raises(ConfigError, match="0 rows: give at least 1"):
        plan([recipe], 0)
    with pytest.raises(ConfigError, match="neither a file nor shipped"):
        plan(["nothing"], 10)
    with pytest.raises(ConfigError, match="each needs a name of its own"):
        plan([recipe, recipe], 10)
    (tmp_path / "empty").mkdir()
    write_recipe(tmp_path / "empty", "recipe.toml")
    with pytest.raises(BundleError, match="no fit with weights"):
        plan([tmp_path / "empty"], 10)
    with pytest.raises(ConfigError, match="neither a file nor shipped"):
        plan([tmp_path], 10)


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "tiny.toml")
    code = f"import sys; from kit.inference.plan import plan; plan([{str(recipe)!r}], 20); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0




def test_a_model_larger_than_memory_is_planned_as_passes_over_its_layers() -> None:
    made = plan(["stream_70b"], 500, "t4x2")
    (member,) = made.members
    assert member["read_s"] > 300, "140 GB, as the name of the bundle says"
    assert member["fits"] == 1
    assert made.fits_in_time
    assert sum(span["rows"] for span in made.timeline if span["view"] == "full") >= 500
    short = plan(["stream_70b"], 500, "t4x2", budget_s=600)
    assert not short.fits_in_time
    assert all(span["end"] - span["start"] < 100 for span in short.timeline), "a pass that cannot end in time is not begun"


def test_a_model_that_fits_into_memory_is_not() -> None:
    (member,) = plan(["qlora_7b"], 500, "t4x2").members
    assert "read_s" not in member


def test_a_base_that_is_not_there_and_whose_name_does_not_say_its_size_is_refused(tmp_path: Path) -> None:
    text = shipped_recipes()["qlora_7b"].read_text(encoding="utf-8").replace("bundle:mistral-7b", "bundle:mistral")
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="mistral"):
        plan([tmp_path / "own.toml"], 500)
