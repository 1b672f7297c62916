"""kit.training.distill: what a student is told by which of its teacher's fits, what is refused, and what it learns from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kit import assemble, manifest, runtime
from kit.config import Recipe
from kit.errors import BundleError, ConfigError, DataError
from kit.metrics import accuracy
from kit.predict import predict
from kit.tasks.multiple_choice import Question
from kit.training.crossval import Run, read_examples, train
from tests import tiny


class World:
    """A competition, and a run on it of which every fold is fitted."""

    def __init__(self, folder: Path, *, rows: int = 12, **settings: object) -> None:
        self.data, self.artifacts = tiny.competition(folder / "data", train=rows), folder / "artifacts"
        tiny.write_questions(self.data / "train.csv", tiny.questions(rows), context=True)
        self.recipe = tiny.recipe(self.data, *(f"{key}={value}" for key, value in settings.items()))
        self.teacher: Run = train(self.recipe.with_overrides(["name=teacher"]), artifacts=self.artifacts)

    @property
    def named(self) -> str:
        return f"data.teacher=run:{self.teacher.folder.name}"

    def oof(self, run: Run | None = None) -> np.ndarray:
        return oof_of(run or self.teacher)

    def student(self, *overrides: str) -> Recipe:
        return self.recipe.with_overrides([self.named, "task.distill=0.5", "name=student", *overrides])

    def said(self, fit: str, examples: list[Question]) -> np.ndarray:
        """What one fit of the teacher says, loaded and scored here."""
        task, folder = assemble.make_task(self.recipe), self.teacher.folder / fit
        model, tokens = assemble.load_model(self.recipe, task, folder), assemble.load_tokens(self.recipe, folder)
        features = task.encode(examples, tokens)
        return task.decode(predict(model, task, features, tokens, runtime=runtime.choose("fp32", "cpu"), batch_tokens=4096), features, examples)

    def examples(self, recipe: Recipe) -> list[Question]:
        return read_examples(recipe, assemble.make_task(recipe), self.artifacts).own


def oof_of(run: Run) -> np.ndarray:
    return pd.read_parquet(run.folder / "oof.parquet").filter(regex=r"^p\d$").to_numpy()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), **{"data.folds": 3, "train.lr": "3e-3", "train.epochs": 2})


# --- who is told what ------------------------------------------------------------------------------------------------------------


def test_each_fit_is_taught_by_the_teachers_fit_of_the_same_fold_and_by_no_other(world: World) -> None:
    """So nothing it is told was learnt from what it is validated on."""
    run = train(world.student("task.distill=1.0"), artifacts=world.artifacts)
    examples, folds = world.examples(world.recipe), np.load(run.folder / "folds.npy")
    assert sorted(path.name for path in (run.folder / "soft").iterdir()) == ["fold0.npy", "fold1.npy", "fold2.npy"]
    for fold in range(3):
        learnt = [example for example, number in zip(examples, folds, strict=True) if number != fold]
        soft = np.load(run.folder / "soft" / f"fold{fold}.npy")
        by_fit = [np.abs(soft - world.said(f"fold{other}", learnt)).max() for other in range(3)]
        assert by_fit.pop(fold) < 1e-6 and min(by_fit) > 1e-3


def test_a_fit_on_everything_is_taught_by_all_fits(world: World) -> None:
    run = train(world.student(), artifacts=world.artifacts, full=True)
    examples = world.examples(world.recipe)
    expected = np.mean([world.said(f"fold{fold}", examples) for fold in range(3)], axis=0)
    np.testing.assert_allclose(np.load(run.folder / "soft" / "full.npy"), expected, atol=1e-6)


def test_a_teacher_reads_the_rows_as_its_own_recipe_says_with_the_extra_ones_last(tmp_path: Path) -> None:
    """Its contexts are retrieved, its sequences longer; the student has neither."""
    data = tiny.competition(tmp_path / "data")
    extra = [replace(question, id=f"x{question.id}") for question in tiny.questions(15)[12:]]
    tiny.write_questions(data / "extra.csv", extra)
    with_contexts = tiny.recipe(data, "name=teacher", "task.max_length=60", retrieve=True)
    teacher = train(with_contexts, artifacts=tmp_path)
    plain = tiny.recipe(data, f"data.teacher=run:{teacher.folder.name}", "task.distill=0.5", "task.max_length=20", 'data.extra=["extra.csv"]')
    run = train(plain, artifacts=tmp_path, folds=[0])
    own = with_contexts.with_overrides(['data.extra=["extra.csv"]'])
    task, folder, found = assemble.make_task(own), teacher.folder / "fold0", read_examples(own, assemble.make_task(own), tmp_path)
    rows = [*(found.own[row] for row in np.flatnonzero(np.load(run.folder / "folds.npy") != 0)), *found.extra]
    assert all(example.context for example in rows) and len(found.extra) == 3
    model, tokens = assemble.load_model(own, task, folder), assemble.load_tokens(own, folder)
    features = task.encode(rows, tokens)
    expected = task.decode(predict(model, task, features, tokens, runtime=runtime.choose("fp32", "cpu"), batch_tokens=4096), features, rows)
    np.testing.assert_allclose(np.load(run.folder / "soft" / "fold0.npy"), expected, atol=1e-6)


def test_seeds_of_teacher_and_student_are_averaged_and_share(tmp_path: Path) -> None:
    world = World(tmp_path, **{"train.seeds": "[0, 1]", "train.lr": "1e-2"})
    run = train(world.student(), artifacts=world.artifacts, folds=[1])
    assert [path.name for path in (run.folder / "soft").iterdir()] == ["fold1.npy"]
    learnt = [example for example, number in zip(world.examples(world.recipe), np.load(run.folder / "folds.npy"), strict=True) if number != 1]
    parts = [world.said(f"fold1-seed{seed}", learnt) for seed in (0, 1)]
    assert np.abs(parts[0] - parts[1]).max() > 1e-3
    np.testing.assert_allclose(np.load(run.folder / "soft" / "fold1.npy"), np.mean(parts, axis=0), atol=1e-6)


def test_a_run_is_named_by_what_its_teacher_has_learnt(world: World) -> None:
    """And what it is told does not change what a run without a teacher is called or learns."""
    other = train(world.recipe.with_overrides(["name=teacher", "train.lr=1e-4"]), artifacts=world.artifacts)
    names = set()
    copy = world.artifacts / "runs" / "copy"
    for source in (world.teacher.folder, other.folder):
        copy.unlink(missing_ok=True)
        copy.symlink_to(source.resolve())
        names.add(train(world.student("data.teacher=run:copy"), artifacts=world.artifacts, folds=[0]).folder.name)
    assert len(names) == 2
    assert train(world.recipe.with_overrides(["name=teacher"]), artifacts=world.artifacts).folder == world.teacher.folder


def test_a_teacher_is_a_run_a_bundle_or_a_folder(world: World) -> None:
    said = []
    bundle = world.artifacts / "bundles" / "packed"
    bundle.parent.mkdir(exist_ok=True)
    bundle.symlink_to(world.teacher.folder.resolve())
    manifest.write(bundle, "packed", "member")
    for named in (f"run:{world.teacher.folder.name}", "bundle:packed", str(world.teacher.folder), f"../artifacts/runs/{world.teacher.folder.name}"):
        run = train(world.student(f"data.teacher={named}"), artifacts=world.artifacts, folds=[0])
        said.append(np.load(run.folder / "soft" / "fold0.npy"))
    assert all(np.array_equal(said[0], one) for one in said)


def test_a_killed_student_goes_on_with_what_it_was_told(world: World) -> None:
    recipe = world.student("train.epochs=3")
    run = train(recipe, artifacts=world.artifacts, folds=[0])
    soft = run.folder / "soft" / "fold0.npy"
    before = (soft.stat().st_mtime_ns, (run.folder / "fold0" / "valid.npy").read_bytes())
    (run.folder / "fold0" / "metrics.json").unlink()
    again = train(recipe, artifacts=world.artifacts, folds=[0])
    assert (soft.stat().st_mtime_ns, (again.folder / "fold0" / "valid.npy").read_bytes()) == before


def test_a_debug_run_has_a_teacher_though_its_folds_are_others(world: World) -> None:
    run = train(world.student(), artifacts=world.artifacts, debug=True)
    assert len(json.loads((run.folder / "fold0" / "history.json").read_text())["epochs"]) == 1 and (run.folder / "soft" / "fold1.npy").is_file()


# --- what is refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.teacher=run:nowhere"], r'data\.teacher = "run:nowhere": .*runs/nowhere/oof\.parquet is missing: give a run whose folds are all fitted'),
        (["data.teacher=nowhere"], r'data\.teacher = "nowhere": .*data/nowhere/oof\.parquet is missing'),
        (["task.distill=0.0"], r"data\.teacher = .* but task 'multiple_choice' has no task\.distill above 0"),
    ],
)
def test_a_teacher_that_is_not_there_or_not_asked_is_refused(world: World, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(world.student(*overrides), artifacts=world.artifacts)


def test_a_share_without_a_teacher_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=r"task\.distill = 0\.5, but there is no data\.teacher"):
        train(world.recipe.with_overrides(["task.distill=0.5"]), artifacts=world.artifacts)


@pytest.mark.parametrize("override", ["data.fold_seed=1", "data.folds=2", "data.fold_by=random"])
def test_other_folds_than_the_teachers_are_refused(world: World, override: str) -> None:
    with pytest.raises(DataError, match=r"oof\.parquet: id 'q\d+': the fold differs, .*: set data\.folds, fold_by, group and fold_seed as"):
        train(world.student(override), artifacts=world.artifacts)


def spoiled(frame: pd.DataFrame, how: str) -> pd.DataFrame:
    frame = frame.copy()
    if how == "missing":
        return frame.drop(index=[3, 5])
    if how == "target":
        frame.loc[3, "t0"] = (frame.loc[3, "t0"] + 1) % 5
    elif how == "twice":
        frame.loc[4, "id"] = "q3"
    return frame.drop(columns=[how] if how in frame else [])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"no row with id 'q3' \(2 rows of data\.train\): the teacher must be trained on the same table"),
        ("target", r"id 'q3': the target differs: the teacher must be trained on the same table \(1 rows\)"),
        ("p4", r"has 1 targets and 4 predictions \(columns t0 …, p0 …\) instead of 1 and 5"),
        ("t0", r"has 0 targets and 5 predictions"),
        ("id", r"cannot be read as OOF predictions \(KeyError\)"),
        ("fold", r"cannot be read as OOF predictions \(KeyError\)"),
        ("twice", r"id 'q3' stands twice"),
        ("no parquet", r"cannot be read as OOF predictions"),
    ],
)
def test_a_run_on_other_rows_is_refused_by_file_and_id(world: World, tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "oof.parquet"
    spoiled(pd.read_parquet(world.teacher.folder / "oof.parquet"), how).to_parquet(path, index=False)
    (tmp_path / "recipe.toml").write_text(world.recipe.to_toml())
    if how == "no parquet":
        path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=rf"^{path}: {message}"):
        train(world.student(f"data.teacher={tmp_path}"), artifacts=world.artifacts)


def test_a_teacher_without_its_fits_is_refused(world: World, tmp_path: Path) -> None:
    for name in ("oof.parquet", "recipe.toml"):
        (tmp_path / name).write_bytes((world.teacher.folder / name).read_bytes())
    with pytest.raises(ConfigError, match=rf"data\.teacher: {tmp_path} has no fit 'fold0'"):
        train(world.student(f"data.teacher={tmp_path}"), artifacts=world.artifacts)
    (tmp_path / "fold0").mkdir()
    with pytest.raises(BundleError, match=f"{tmp_path}/fold0"):
        train(world.student(f"data.teacher={tmp_path}"), artifacts=world.artifacts)


# --- what is learnt --------------------------------------------------------------------------------------------------------------


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence of probabilities (N, C) from others."""
    return float((one * (np.log(one + 1e-9) - np.log(other + 1e-9))).sum(1).mean())


def test_a_student_gets_closer_to_its_teacher_by_soft_labels_than_by_answers(tmp_path: Path) -> None:
    """On rows that neither has seen. The teacher has stopped early and is unsure; answers make a student that trains longer surer than that."""
    world = World(tmp_path, rows=40, **{"model.pooling": "match", "train.epochs": 2, "train.lr": "1e-2"})
    longer = ("train.epochs=8", "train.keep=last")
    hard = train(world.recipe.with_overrides(["name=student", *longer]), artifacts=world.artifacts)
    by_answers = divergence(world.oof(), world.oof(hard))
    for temperature in ("1.0", "3.0"):
        soft = train(world.student("task.distill=1.0", f"task.temperature={temperature}", *longer), artifacts=world.artifacts)
        assert divergence(world.oof(), world.oof(soft)) < 0.5 * by_answers, temperature


def test_a_student_of_a_teacher_that_knows_its_rows_by_heart_guesses_what_it_has_not_seen(tmp_path: Path) -> None:
    """The right options are chance. Taught by out-of-fold predictions, of fits that had seen its validation rows, it would know every other one."""
    rng = np.random.default_rng(0)
    riddles = [
        Question(f"r{row}", f"text {row}", tuple(" ".join(str(n) for n in rng.integers(0, 10, 3)) for _ in range(5)), int(rng.integers(5)))
        for row in range(40)
    ]
    data = tiny.competition(tmp_path / "data")
    tiny.write_questions(data / "train.csv", riddles)
    heart = ("train.epochs=20", "train.lr=1e-2", "train.batch_size=8", "train.keep=last", "train.warmup=0.2", "task.shuffle_options=false")
    recipe = tiny.recipe(data, *heart)
    teacher = train(recipe.with_overrides(["name=teacher"]), artifacts=tmp_path)
    student = train(recipe.with_overrides([f"data.teacher=run:{teacher.folder.name}", "task.distill=1.0"]), artifacts=tmp_path)
    targets = np.array([riddle.answer for riddle in riddles])
    assert accuracy(np.load(student.folder / "soft" / "fold0.npy"), targets[np.load(student.folder / "folds.npy") != 0]) > 0.8
    assert accuracy(oof_of(student), targets) < 0.4
