"""kit.training.crossval: who saw which row, what a run folder holds, and runs that are killed, repeated or spread over processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from kit import assemble, runtime
from kit.config import Recipe
from kit.data.tables import read_table
from kit.errors import BundleError, ConfigError, DataError
from kit.metrics import accuracy, map_at_k
from kit.predict import predict
from kit.tasks.multiple_choice import Question
from kit.training.crossval import Run, read_examples, train
from kit.vendor.bundle import pack
from tests import tiny
from tests.training.conftest import largest_difference, meant, step_gradients

ROOT = Path(__file__).parents[2]
RANDOM_MAP = (1 + 1 / 2 + 1 / 3) / 5
MEMORISES = ("train.epochs=25", "train.lr=1e-2", "train.batch_size=8", "train.keep=last", "train.warmup=0.2", "task.shuffle_options=false")


def written(folder: Path, **settings: Any) -> Path:
    """A competition folder whose table has contexts."""
    tiny.competition(folder, **settings)
    tiny.write_questions(folder / "train.csv", tiny.questions(settings.get("train", 12)), context=True)
    return folder


def riddles(n: int, seed: int = 0) -> list[Question]:
    """Questions that can be known by heart but not be answered: the options are numbers, the right one is chance."""
    rng = np.random.default_rng(seed)
    return [
        Question(f"r{row}", f"text {row}", tuple(" ".join(str(n) for n in rng.integers(0, 10, 3)) for _ in range(5)), int(rng.integers(5)))
        for row in range(n)
    ]


def said_by(run: Run, fit: str, recipe: Recipe, examples: list[Question], view: str | None = None) -> np.ndarray:
    """Predictions (N, C) of the saved model of one fit."""
    task, folder = assemble.make_task(recipe), run.folder / fit
    model, tokens = assemble.load_model(recipe, task, folder), assemble.load_tokens(recipe, folder)
    task = task.views()[view].task if view else task
    features = task.encode(examples, tokens)
    scores = predict(model, task, features, tokens, runtime=runtime.choose("fp32", "cpu"), batch_tokens=4096)
    return task.decode(scores, features, examples)


def own_examples(recipe: Recipe) -> list[Question]:
    return assemble.make_task(recipe).read(read_table(Path(recipe.data.folder) / recipe.data.train))


def oof_of(run: Run) -> tuple[pd.DataFrame, np.ndarray]:
    frame = pd.read_parquet(run.folder / "oof.parquet")
    return frame, frame.filter(regex=r"^p\d+$").to_numpy()


def short_of(frame: pd.DataFrame) -> np.ndarray:
    return frame.filter(regex=r"^p\d+@short$").to_numpy()


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file: when it was written, and what it holds."""
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


# --- a finished run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data"), train=11)


@pytest.fixture(scope="module")
def recipe(data: Path) -> Recipe:
    return tiny.recipe(data, "data.folds=3", "train.epochs=2")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def run(recipe: Recipe, artifacts: Path) -> Run:
    return train(recipe, artifacts=artifacts)


def test_oof_rows_are_predicted_by_the_model_that_did_not_see_them(run: Run, recipe: Recipe) -> None:
    frame, oof = oof_of(run)
    examples = own_examples(recipe)
    for fold in range(3):
        by_fit = {k: said_by(run, f"fold{k}", recipe, examples) for k in range(3)}
        rows = (frame["fold"] == fold).to_numpy()
        np.testing.assert_allclose(oof[rows], by_fit[fold][rows], atol=1e-6)
        assert all(np.abs(oof[rows] - by_fit[k][rows]).max() > 1e-4 for k in range(3) if k != fold)
        np.testing.assert_allclose(np.load(run.folder / f"fold{fold}" / "valid.npy"), oof[rows], atol=0)


def test_the_oof_table_is_in_the_order_of_the_training_table(run: Run, recipe: Recipe) -> None:
    frame, oof = oof_of(run)
    examples = own_examples(recipe)
    names = ["p{}", "p{}@short", "overlap{}", "length{}"]
    assert frame.columns.tolist() == ["id", "fold", "t0", *(name.format(k) for name in names for k in range(5))]
    assert frame["id"].tolist() == [example.id for example in examples]
    assert frame["t0"].tolist() == [example.answer for example in examples]
    assert oof.dtype == np.float32 and np.allclose(oof.sum(1), 1, atol=1e-5)


def test_the_run_folder_says_which_folds_recipe_and_metrics(run: Run, recipe: Recipe) -> None:
    frame, oof = oof_of(run)
    folds = np.load(run.folder / "folds.npy")
    assert folds.dtype == np.int8 and frame["fold"].tolist() == folds.tolist()
    assert sorted(np.bincount(folds).tolist()) == [3, 4, 4]
    assert Recipe.load(run.folder / "recipe.toml") == recipe
    assert json.loads((run.folder / "inputs.json").read_text()) == {"index": None, "rows": 11, "extra": 0}
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics == run.metrics
    assert metrics["oof"]["map@3"]["value"] == map_at_k(oof, frame["t0"].to_numpy())
    assert metrics["oof"]["accuracy"]["value"] == accuracy(oof, frame["t0"].to_numpy())
    assert 0 < metrics["oof"]["map@3"]["se"] < 0.5
    for fold in range(3):
        rows = (frame["fold"] == fold).to_numpy()
        assert metrics["folds"][f"fold{fold}"]["map@3"]["value"] == map_at_k(oof[rows], frame["t0"].to_numpy()[rows])


def test_a_finished_fit_keeps_what_inference_needs_and_no_state(run: Run) -> None:
    expected = ["config.json", "history.json", "metrics.json", "model.safetensors", "tokenizer.json", "valid-short.npy", "valid.npy"]
    for fold in range(3):
        assert sorted(path.name for path in (run.folder / f"fold{fold}").iterdir()) == expected


def test_a_second_call_changes_nothing_and_gives_the_same(run: Run, recipe: Recipe, artifacts: Path) -> None:
    before = files_of(artifacts)
    again = train(recipe, artifacts=artifacts)
    assert again == run
    after = files_of(artifacts)
    assert {name: content for name, (_, content) in after.items()} == {name: content for name, (_, content) in before.items()}
    fits = [name for name in after if re.search(r"/fold\d/", name)]
    assert len(fits) == 21
    assert {name: after[name][0] for name in fits} == {name: before[name][0] for name in fits}


def test_the_same_run_elsewhere_is_bit_for_bit_the_same(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    again = train(recipe, artifacts=tmp_path)
    names = [name for name in files_of(run.folder) if name.startswith(("fold", "oof", "metrics"))]
    here, there = files_of(run.folder), files_of(again.folder)
    assert again.folder.name == run.folder.name
    assert all(here[name][1] == there[name][1] for name in names)


# --- views and hints -------------------------------------------------------------------------------------------------------------


def test_views_are_predicted_by_the_weights_the_fold_ends_with(data: Path, tmp_path: Path) -> None:
    """Also where these are not the last epoch's."""
    recipe = tiny.recipe(data, "train.epochs=4", "train.lr=1e-2", "train.keep=best")
    run = train(recipe, artifacts=tmp_path)
    frame, oof = oof_of(run)
    examples, short = own_examples(recipe), short_of(frame)
    kept = []
    for fold in (0, 1):
        rows = (frame["fold"] == fold).to_numpy()
        epochs = [epoch["map@3"] for epoch in json.loads((run.folder / f"fold{fold}" / "history.json").read_text())["epochs"]]
        kept.append(int(np.argmax(epochs)))
        np.testing.assert_allclose(short[rows], said_by(run, f"fold{fold}", recipe, examples, "short")[rows], atol=1e-6)
        np.testing.assert_array_equal(np.load(run.folder / f"fold{fold}" / "valid-short.npy"), short[rows])
    assert min(kept) < 3, "no fold went back to an earlier epoch: the test shows nothing"
    assert short.dtype == np.float32 and np.abs(short - oof).max() > 1e-3
    assert json.loads((run.folder / "metrics.json").read_text()) == run.metrics
    assert [*run.metrics["views"]] == ["short"] and run.metrics["views"]["short"].keys() == run.metrics["oof"].keys()
    assert run.metrics["views"]["short"]["map@3"]["value"] == map_at_k(short, frame["t0"].to_numpy())


def test_a_view_that_says_the_same_is_left_out(tmp_path: Path) -> None:
    """Without contexts no sequence is longer than half the tokens. Such rows have no overlap, but a length."""
    tiny.competition(tmp_path)
    run = train(tiny.recipe(tmp_path, "task.max_length=64"), artifacts=tmp_path / "artifacts")
    frame, _ = oof_of(run)
    assert (run.folder / "fold0" / "valid-short.npy").is_file()
    assert not short_of(frame).size and "views" not in run.metrics
    assert frame.filter(regex=r"^overlap\d$").isna().all(axis=None)
    assert frame.filter(regex=r"^length\d$").gt(0).all(axis=None)


def test_hints_are_those_of_the_examples_with_their_contexts(tmp_path: Path) -> None:
    tiny.competition(tmp_path)
    recipe = tiny.recipe(tmp_path, retrieve=True)
    run = train(recipe, artifacts=tmp_path / "artifacts")
    task = assemble.make_task(recipe)
    examples = read_examples(recipe, task, tmp_path / "artifacts").own
    assert all(example.context for example in examples)
    for name, values in task.hints(examples).items():
        found = oof_of(run)[0].filter(regex=rf"^{name}\d$").to_numpy()
        assert found.dtype == np.float32 and (found > 0).any()
        np.testing.assert_array_equal(found, values)


def test_a_run_with_a_fit_of_before_there_were_views_has_none_and_goes_on(recipe: Recipe, run: Run, tmp_path: Path) -> None:
    """A fit that was finished without them stays as it is, and the run has no views, for they would be of some rows only."""
    old = train(recipe, artifacts=tmp_path, folds=[1]).folder / "fold1"
    (old / "valid-short.npy").unlink()
    before = files_of(old)
    whole = train(recipe, artifacts=tmp_path)
    frame, oof = oof_of(whole)
    assert files_of(old) == before
    assert not short_of(frame).size and "views" not in whole.metrics
    np.testing.assert_array_equal(oof, oof_of(run)[1])
    assert whole.metrics == {name: value for name, value in run.metrics.items() if name != "views"}


# --- what a run learns from ------------------------------------------------------------------------------------------------------


def test_what_is_learnt_by_heart_does_not_leak_into_the_oof(tmp_path: Path) -> None:
    """Chance answers: the models know the rows they were trained on and guess the rows of their own fold. With the same rows as
    extra data they know those, too: extra data are trained on by every fit, and validated by none.
    """
    tiny.competition(tmp_path)
    own = riddles(16)
    tiny.write_questions(tmp_path / "train.csv", own)
    tiny.write_questions(tmp_path / "extra.csv", [replace(question, id=f"x{question.id}") for question in own])
    recipe = tiny.recipe(tmp_path, *MEMORISES)
    run = train(recipe, artifacts=tmp_path / "artifacts")
    frame, oof = oof_of(run)
    targets, inside = frame["t0"].to_numpy(), (frame["fold"] == 0).to_numpy()
    seen = said_by(run, "fold0", recipe, own)[~inside]
    assert accuracy(seen, targets[~inside]) > 0.9
    assert accuracy(oof, targets) < 0.6
    told = train(recipe.with_overrides(['data.extra=["extra.csv"]']), artifacts=tmp_path / "artifacts")
    frame, oof = oof_of(told)
    assert frame["id"].tolist() == [question.id for question in own]
    assert accuracy(oof, targets) > 0.9
    assert json.loads((told.folder / "inputs.json").read_text())["extra"] == 16


def test_an_easy_task_is_learnt(tmp_path: Path) -> None:
    """The context holds the right option: training lifts the out-of-fold MAP@3 of random weights far above chance."""
    written(tmp_path, train=100)
    recipe = tiny.recipe(tmp_path, "model.pooling=match", "train.epochs=6", "train.lr=1e-2")
    run = train(recipe, artifacts=tmp_path / "artifacts")
    untrained = train(recipe.with_overrides(["train.lr=1e-12", "train.epochs=1"]), artifacts=tmp_path / "artifacts")
    assert untrained.metrics["oof"]["map@3"]["value"] < RANDOM_MAP + 0.2
    assert run.metrics["oof"]["map@3"]["value"] > RANDOM_MAP + 0.35
    losses = [loss for loss, _ in json.loads((run.folder / "fold0" / "history.json").read_text())["steps"]]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_groups_stay_in_one_fold(tmp_path: Path) -> None:
    written(tmp_path)
    frame = pd.read_csv(tmp_path / "train.csv", dtype=str)
    frame["source"] = [f"page {row // 3}" for row in range(12)]
    frame.to_csv(tmp_path / "train.csv", index=False)
    recipe = tiny.recipe(tmp_path, "data.fold_by=grouped", "data.group=source")
    run = train(recipe, artifacts=tmp_path / "artifacts")
    folds = np.load(run.folder / "folds.npy")
    assert {len({*folds[at : at + 3]}) for at in range(0, 12, 3)} == {1}
    assert {*folds} == {0, 1}
    with pytest.raises(DataError, match=r"train\.csv.*data\.group = 'page' is no column \(columns: id, .*source\)"):
        train(recipe.with_overrides(["data.group=page"]), artifacts=tmp_path / "artifacts")


@pytest.mark.parametrize(("table", "where"), [("train.csv", "data.train"), ("extra.csv", "data.extra")])
def test_a_table_without_answers_is_refused(tmp_path: Path, table: str, where: str) -> None:
    written(tmp_path)
    tiny.write_questions(tmp_path / table, tiny.questions(12), answers=False)
    extra = ["data.extra=['extra.csv']"] * (table == "extra.csv")
    with pytest.raises(ConfigError, match=rf"{where}: example 1 has no answer"):
        train(tiny.recipe(tmp_path, *extra), artifacts=tmp_path / "artifacts")


# --- parts of a run --------------------------------------------------------------------------------------------------------------


def test_chosen_folds_are_fitted_first_and_the_others_later(data: Path, recipe: Recipe, run: Run, tmp_path: Path) -> None:
    part = train(recipe, artifacts=tmp_path, folds=[1])
    assert [path.name for path in part.folder.iterdir() if path.is_dir()] == ["fold1"]
    assert [*part.metrics["folds"]] == ["fold1"] and "oof" not in part.metrics
    assert not (part.folder / "oof.parquet").exists()
    before = files_of(part.folder / "fold1")
    whole = train(recipe, artifacts=tmp_path)
    assert files_of(part.folder / "fold1") == before
    assert whole.metrics == run.metrics
    with pytest.raises(ConfigError, match="--folds 3: the recipe has folds 0 to 2"):
        train(recipe, artifacts=tmp_path, folds=[0, 3])


def test_a_full_fit_trains_on_everything_and_has_no_oof(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe, artifacts=tmp_path, full=True)
    assert [path.name for path in run.folder.iterdir() if path.is_dir()] == ["full"]
    assert run.metrics == {"folds": {"full": {}}}
    assert [path.name for path in run.folder.glob("full/valid*")] == ["valid.npy"]
    steps = json.loads((run.folder / "full" / "history.json").read_text())["steps"]
    assert len(steps) == 2 * 3  # 2 epochs of 11 examples in batches of 4
    assert said_by(run, "full", recipe, own_examples(recipe)).shape == (11, 5)


def test_several_seeds_are_fitted_apart_and_averaged(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe.with_overrides(["train.seeds=[0, 7]", "data.folds=2"]), artifacts=tmp_path)
    frame, oof = oof_of(run)
    assert sorted(run.metrics["folds"]) == ["fold0-seed0", "fold0-seed7", "fold1-seed0", "fold1-seed7"]
    for fold in (0, 1):
        for file, averaged in (("valid.npy", oof), ("valid-short.npy", short_of(frame))):
            one, other = (np.load(run.folder / f"fold{fold}-seed{seed}" / file) for seed in (0, 7))
            assert np.abs(one - other).max() > 1e-4
            np.testing.assert_allclose(averaged[(frame["fold"] == fold).to_numpy()], (one + other) / 2, atol=1e-6)


def test_a_debug_run_is_small_and_apart(tmp_path: Path) -> None:
    written(tmp_path, train=40)
    recipe = tiny.recipe(tmp_path, "data.folds=5", "train.epochs=3", "train.batch_size=16")
    run = train(recipe, artifacts=tmp_path / "artifacts", debug=True)
    assert run.folder.name.startswith("tiny-debug-")
    assert len(oof_of(run)[0]) == 32
    assert sorted(run.metrics["folds"]) == ["fold0", "fold1"]
    assert len(json.loads((run.folder / "fold0" / "history.json").read_text())["epochs"]) == 1


def test_layers_are_drawn_anew_when_asked_for(data: Path, tmp_path: Path) -> None:
    run = train(tiny.recipe(data, "train.reinit_layers=1", "train.lr=1e-12"), artifacts=tmp_path, folds=[0])
    weights, start = load_file(run.folder / "fold0" / "model.safetensors"), load_file(data / "encoder" / "model.safetensors")
    changed = {name for name, weight in start.items() if (weights[f"backbone.{name}"] - weight).abs().max() > 1e-3}
    assert changed == {name for name in start if "layer.1." in name and name.endswith("weight") and "LayerNorm" not in name}


# --- names of runs ---------------------------------------------------------------------------------------------------------------


def run_name(recipe: Recipe, artifacts: Path) -> str:
    return train(recipe.with_overrides(["train.epochs=1"]), artifacts=artifacts, folds=[0]).folder.name


def test_a_run_is_named_by_data_and_settings_not_by_where_they_are(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    written(tmp_path / "one")
    written(tmp_path / "two")
    recipe = tiny.recipe(tmp_path / "one")
    name = run_name(recipe, artifacts)
    assert name.startswith("tiny-") and len(name) == len("tiny-") + 8
    assert run_name(tiny.recipe(tmp_path / "two"), artifacts) == name
    assert run_name(recipe.with_overrides(["infer.batch_tokens=99"]), artifacts) == name
    others = [run_name(recipe.with_overrides([setting]), artifacts) for setting in ("train.lr=2e-3", "task.max_length=40", "data.fold_seed=1")]
    tiny.encoder_folder(tmp_path / "two" / "encoder", seed=1)
    others.append(run_name(tiny.recipe(tmp_path / "two"), artifacts))
    with (tmp_path / "one" / "train.csv").open("a", encoding="utf-8") as file:
        file.write("new,A prompt,a,b,c,d,e,A,\n")
    others.append(run_name(recipe, artifacts))
    assert len({name, *others}) == 6


# --- killed runs -----------------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kit.config import Recipe
from kit.data.tables import read_table
from kit.training.crossval import train
if __name__ == "__main__":
    train(Recipe.load(sys.argv[1]), artifacts=Path(sys.argv[2]))
"""


def script(folder: Path, recipe: Recipe, before: str = "") -> list[str]:
    """Arguments of a python process that trains the recipe with artifacts in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(before + textwrap.dedent(SCRIPT))
    (folder / "recipe.toml").write_text(recipe.to_toml())
    return [str(folder / "train.py"), str(folder / "recipe.toml"), str(folder / "artifacts")]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def long_recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Enough epochs to be killed within; dropout, FGM and a scaler have states of their own."""
    folder = written(tmp_path_factory.mktemp("long"), train=24)
    tiny.encoder_folder(folder / "encoder", dropout=0.1)
    return tiny.recipe(folder, "train.epochs=8", "train.batch_size=2", "train.fgm=0.1", "train.precision=fp16", "model.dropout=0.1")


@pytest.fixture(scope="module")
def killed(long_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of a training that was killed within its second fold, after an epoch was done."""
    folder = tmp_path_factory.mktemp("killed")
    process = subprocess.Popen([sys.executable, *script(folder, long_recipe)], env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not [*folder.glob("artifacts/runs/*/fold1/state/last.pt")] and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors
    assert [*folder.glob("artifacts/runs/*/fold1/state/last.pt")] and not [*folder.glob("artifacts/runs/*/fold1/metrics.json")]
    return folder / "artifacts"


def test_a_damaged_state_of_a_killed_run_is_named(killed: Path, long_recipe: Recipe) -> None:
    (state,) = killed.glob("runs/*/fold1/state/last.pt")
    content = state.read_bytes()
    state.write_bytes(content[:1000])
    with pytest.raises(BundleError, match=f"{state}: the interrupted fit cannot be read"):
        train(long_recipe, artifacts=killed)
    state.write_bytes(content)


def test_a_killed_run_goes_on_and_ends_bit_for_bit_as_an_undisturbed_one(killed: Path, long_recipe: Recipe, tmp_path: Path) -> None:
    (finished,) = killed.glob("runs/*/fold0")
    before = files_of(finished)
    resumed, undisturbed = train(long_recipe, artifacts=killed), train(long_recipe, artifacts=tmp_path)
    assert files_of(finished) == before
    assert resumed.metrics == undisturbed.metrics
    for name in ("oof.parquet", "fold0/model.safetensors", "fold1/model.safetensors", "fold1/history.json", "fold1/valid.npy", "fold1/valid-short.npy"):
        assert (resumed.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes(), name
    assert not [*killed.glob("runs/*/*/state")]


def test_stopping_while_a_finished_fit_is_stored_costs_no_epoch(recipe: Recipe, tmp_path: Path) -> None:
    """As long as the fit is not done, its state is there to continue from. Here the disk refuses the file that says it is done."""
    folder = train(recipe, artifacts=tmp_path, folds=[1]).folder / "fold0"
    (folder / "metrics.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        train(recipe, artifacts=tmp_path, folds=[0])
    (folder / "metrics.json").rmdir()
    before = (folder / "valid.npy").read_bytes()
    with step_gradients() as steps:
        run = train(recipe, artifacts=tmp_path, folds=[0])
    assert steps == []
    assert (folder / "valid.npy").read_bytes() == before
    assert sorted(run.metrics["folds"]) == ["fold0", "fold1"]
    assert not (folder / "state").exists()


# --- two processes ---------------------------------------------------------------------------------------------------------------

TRACE = """
import os, sys
def note(event, arguments):
    rank = os.environ.get("RANK", "")
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        name = arguments[0]
    elif event == "os.rename":
        name = os.fspath(arguments[1])
    elif event == "os.remove":
        name = os.fspath(arguments[0])
    else:
        return
    if "artifacts" in name:
        os.write(log, f"{rank} {name}\\n".encode())
log = os.open(sys.argv[2] + ".writes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and the artifacts it made in two processes. 2 folds of 9: the last group of an epoch is 1 example for 2 processes."""
    folder = tmp_path_factory.mktemp("spread")
    written(folder / "data", train=18)
    recipe = tiny.recipe(folder / "data", "train.batch_size=2", "train.epochs=2", "train.lr=1e-4", "train.fgm=0.2", "train.clip=100")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script(folder, recipe, TRACE)]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe, folder / "artifacts"


def test_two_processes_end_with_the_weights_and_oof_of_one_with_twice_the_batch(spread: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, artifacts = spread
    (folder,) = artifacts.glob("runs/*")
    alone = train(recipe.with_overrides(["train.batch_size=4"]), artifacts=tmp_path)
    start = load_file(Path(recipe.data.folder) / "encoder" / "model.safetensors")
    for fold in ("fold0", "fold1"):
        two, one = (load_file(path / fold / "model.safetensors") for path in (folder, alone.folder))
        assert largest_difference(meant(two), meant(one)) < 1e-5
        assert max(float((one[f"backbone.{name}"] - weight).abs().max()) for name, weight in start.items()) > 2e-4
    (frame, oof), (expected_frame, expected) = oof_of(Run(folder, {})), oof_of(alone)
    assert frame[["id", "fold", "t0"]].equals(expected_frame[["id", "fold", "t0"]])
    np.testing.assert_allclose(oof, expected, atol=1e-5)
    np.testing.assert_allclose(short_of(frame), short_of(expected_frame), atol=1e-5)
    assert short_of(frame).shape == oof.shape
    steps, expected_steps = (json.loads((path / "fold0" / "history.json").read_text())["steps"] for path in (folder, alone.folder))
    np.testing.assert_allclose(steps, expected_steps, rtol=1e-4)


def test_only_the_first_process_writes(spread: tuple[Recipe, Path]) -> None:
    lines = Path(f"{spread[1]}.writes").read_text().splitlines()
    assert [line for line in lines if not line.startswith("0 ")] == []
    assert any(line.endswith("folds.npy") for line in lines) and any("last" in line for line in lines)
    log = next(spread[1].glob("runs/*/log.jsonl")).read_text().splitlines()
    assert len(log) == 2 * (2 + 1)  # of two fits, two epochs each and the time


def test_near_duplicates_between_parts_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.competition(tmp_path / "data", train=8)
    frame = pd.read_csv(folder / "train.csv", dtype=str, keep_default_na=False)
    frame.assign(id=[f"again-{id_}" for id_ in frame["id"]]).head(2).to_csv(folder / "extra.csv", index=False)
    recipe = tiny.recipe(folder, 'data.extra=["extra.csv"]')
    read_examples(recipe, assemble.make_task(recipe), tmp_path)
    assert "extra row 1 nearly repeats row 1 of train.csv (2 such rows)" in caplog.text


# --- pseudo-labels ---------------------------------------------------------------------------------------------------------------


def soft_table(path: Path, questions: list[Question], said: np.ndarray) -> Path:
    """The questions with columns p0 …"""
    tiny.write_questions(path, questions)
    pd.read_csv(path, keep_default_na=False).assign(**{f"p{k}": column for k, column in enumerate(said.T)}).to_csv(path, index=False)
    return path


def test_pseudo_labels_are_learnt_before_and_are_in_no_prediction(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = tiny.recipe(data, "train.epochs=1")
    tiny.write_questions(tmp_path / "pseudo.csv", riddles(5))
    pretrained = plain.with_overrides([f'data.pretrain=["{tmp_path}/pseudo.csv"]', "train.pretrain_epochs=2"])
    one, other = (train(recipe, artifacts=tmp_path / "artifacts") for recipe in (plain, pretrained))
    frame, oof = oof_of(other)
    assert frame["id"].tolist() == [example.id for example in own_examples(plain)] and one.folder != other.folder
    assert np.abs(oof - oof_of(one)[1]).max() > 1e-4
    history = [json.loads((run.folder / "fold0" / "history.json").read_text()) for run in (one, other)]
    assert [len(found["epochs"]) for found in history] == [1, 1]
    assert len(history[1]["steps"]) - len(history[0]["steps"]) == 4  # two batches of 4 and 1 in two epochs
    assert json.loads((other.folder / "inputs.json").read_text()) == {"index": None, "rows": 11, "extra": 0, "pretrain": 5}
    assert "pretrain row" not in caplog.text
    tiny.write_questions(tmp_path / "pseudo.csv", riddles(5, seed=1))
    assert train(pretrained, artifacts=tmp_path / "artifacts").folder != other.folder


def test_soft_pseudo_labels_are_read_beside_the_hard_ones_and_get_contexts(data: Path, tmp_path: Path) -> None:
    said = np.random.default_rng(0).dirichlet(np.ones(5), 4).round(4)
    soft_table(tmp_path / "soft.csv", tiny.questions(4), said)
    tiny.write_questions(tmp_path / "hard.csv", riddles(2))
    overrides = [f'data.pretrain=["{tmp_path}/soft.csv", "{tmp_path}/hard.csv"]', "train.pretrain_epochs=1"]
    recipe = tiny.recipe(data, retrieve=True).with_overrides(overrides)
    found = read_examples(recipe, assemble.make_task(recipe), tmp_path / "artifacts").pretrain
    assert [example.id for example in found] == ["q0", "q1", "q2", "q3", "r0", "r1"]
    assert np.array([example.soft for example in found[:4]]) == pytest.approx(said) and found[4].soft is None
    assert all(example.context for example in found[:4])  # no passage is about riddles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said[:, :4], r"column 'p3'.*soft labels need columns p0 to p4, one for each option"),
        (lambda said: said * 2, r"row 1\b.*column 'p0'.*soft labels are probabilities that add up to 1"),
        (lambda said: np.where(np.arange(4)[:, None] == 2, np.nan, said), r"row 3\b.*soft labels are probabilities"),
        (lambda said: np.where(np.eye(4, 5, 1) > 0, -said, said), r"soft labels are probabilities"),
    ],
    ids=["too few", "twice", "none", "negative"],
)
def test_soft_labels_that_are_none_are_refused(data: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = soft_table(tmp_path / "soft.csv", tiny.questions(4), change(np.full((4, 5), 0.2)))
    recipe = tiny.recipe(data, f'data.pretrain=["{path}"]', "train.pretrain_epochs=1")
    with pytest.raises(DataError, match=rf"soft.csv.*{message}") as refused:
        read_examples(recipe, assemble.make_task(recipe), tmp_path)
    assert "\n" not in str(refused.value)


def test_pseudo_labels_without_an_answer_are_refused(data: Path, tmp_path: Path) -> None:
    tiny.write_questions(tmp_path / "pseudo.csv", riddles(3), answers=False)
    recipe = tiny.recipe(data, f'data.pretrain=["{tmp_path}/pseudo.csv"]', "train.pretrain_epochs=1")
    with pytest.raises(ConfigError, match=r"data\.pretrain: example 1 has no answer"):
        read_examples(recipe, assemble.make_task(recipe), tmp_path)


def test_pseudo_labels_that_repeat_own_rows_are_warned_of(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = tiny.questions(11)
    tiny.write_questions(tmp_path / "pseudo.csv", [*riddles(1), replace(own[2], id="x", prompt=f"{own[2].prompt} ?"), replace(own[5], id="y")])
    recipe = tiny.recipe(data, f'data.pretrain=["{tmp_path}/pseudo.csv"]', "train.pretrain_epochs=1")
    read_examples(recipe, assemble.make_task(recipe), tmp_path)
    assert "pretrain row 2 nearly repeats row 3 of train.csv (2 such rows)" in caplog.text


def test_debug_shortens_what_needs_more_than_one_epoch(data: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(data, "train.epochs=4", "train.swa=2", "train.awp=0.01", "train.awp_from=2")
    assert train(recipe, artifacts=tmp_path, debug=True).metrics["oof"]


# --- what the run's name covers, and what may be packed ----------------------------------------------------------------------------


def test_other_word_vectors_are_another_run(tmp_path: Path) -> None:
    tiny.write_readings(tmp_path / "train.csv", tiny.readings(8))
    vectors = tmp_path / "vectors.txt"
    model = {"kind": "lstm", "source": "scratch", "hidden_size": 4, "config": {"vectors": str(vectors)}}
    values = tiny.recipe(tmp_path).model_dump(exclude_none=True) | {"task": {"kind": "extractive_qa", "max_length": 64, "stride": 8, "max_question": 16}, "model": model}
    folders = []
    for number in (1, 1, 2):
        vectors.write_text(f"the {number} 0 0\nmoon 0 {number} 0\n")
        folders.append(train(Recipe.of(values), artifacts=tmp_path / "artifacts", folds=[0]).folder)
    assert folders[0] == folders[1] != folders[2]


def test_a_further_encoder_with_other_weights_is_another_run(tmp_path: Path) -> None:
    tiny.write_essays(tmp_path / "train.csv", tiny.essays(8))
    tiny.encoder_folder(tmp_path / "one")
    model = {"kind": "frozen", "source": "one", "also": ["other"]}
    values = tiny.recipe(tmp_path).model_dump(exclude_none=True) | {"task": {"kind": "essay_regression", "max_length": 48}, "model": model, "train": {"epochs": 1}}
    folders = []
    for seed in (1, 1, 2):
        tiny.encoder_folder(tmp_path / "other", seed=seed)
        folders.append(train(Recipe.of(values), artifacts=tmp_path / "artifacts", folds=[0]).folder)
    assert folders[0] == folders[1] != folders[2]


def test_a_run_that_hands_in_nothing_is_not_packed(tmp_path: Path) -> None:
    rows = [json.dumps({"id": str(row), "text": text}) for row, text in enumerate(tiny.TEXTS)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    model = {"kind": "causal", "source": "scratch", **tiny.MODELS["causal"]}
    values = tiny.recipe(tmp_path, data={"train": "train.jsonl"}).model_dump(exclude_none=True) | {"task": {"kind": "causal_lm", "max_length": 32}, "model": model}
    run = train(Recipe.of(values), artifacts=tmp_path / "artifacts")
    with pytest.raises(BundleError, match=r'task\.kind = "causal_lm" predicts nothing that is handed in.*: kit generate uses the run, and kit vendor weights .*fold0 '):
        pack([run.folder], artifacts=tmp_path / "artifacts")
    assert not (tmp_path / "artifacts" / "bundles").exists()
