"""kit.inference.pipeline: real tiny members, from a first valid file to the pooled submission, whatever goes wrong."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import kit
from kit import manifest
from kit.budget import Budget
from kit.config import Recipe
from kit.errors import BundleError, DataError
from kit.inference.blend import fit_weights, pool
from kit.inference.pipeline import Outcome, infer
from kit.inference.submission import score
from kit.rehearsal import guard
from kit.tasks.multiple_choice import MultipleChoice
from tests import packed
from tests.packed import Workshop, read_rows, write_rows


@pytest.fixture
def shop() -> Workshop:
    return packed.workshop()


@pytest.fixture
def own(tmp_path: Path) -> Workshop:
    """A workshop to be damaged."""
    return packed.copy(tmp_path)


def run(shop: Workshop, tmp_path: Path, *names: str, **options: Any) -> Outcome:
    """Infer with members by recipe name, on the competition's test set unless another is given."""
    options = {"test": shop.competition / "test.csv", "budget": Budget(3600, 60, 0), "root": shop.bundles} | options
    return infer([shop.members[name] for name in names], out=tmp_path / "submission.csv", **options)


def rows_of(tmp_path: Path) -> dict[str, list[str]]:
    """Submission rows: id → letters."""
    return {id_: letters.split() for id_, letters in read_rows(tmp_path / "submission.csv")[1:]}


def assert_valid(tmp_path: Path, test: Path) -> None:
    """Every row of the test set once, three distinct letters of its options."""
    header, *rows = read_rows(test)
    letters = [name for name in header if len(name) == 1]
    submitted = rows_of(tmp_path)
    assert sorted(submitted) == sorted(row[header.index("id")] for row in rows)
    for named in submitted.values():
        assert len(named) == len(set(named)) == min(3, len(letters))
        assert set(named) <= set(letters)


def is_fallback(tmp_path: Path) -> bool:
    return all(named == ["A", "B", "C"] for named in rows_of(tmp_path).values())


class Clock:
    """A clock that goes on by one second at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def changed_test(shop: Workshop, tmp_path: Path, change: Any) -> Path:
    """The test set as `change` (frame → frame) makes it."""
    frame = pd.read_csv(shop.competition / "test.csv", dtype=str, keep_default_na=False)
    path = tmp_path / "changed.csv"
    change(frame).to_csv(path, index=False)
    return path


def test_the_submission_is_the_pool_of_all_members_with_weights_from_their_oof(shop: Workshop, tmp_path: Path) -> None:
    names = packed.NAMES
    outcome = run(shop, tmp_path, *names, sample=shop.competition / "sample_submission.csv")
    members = [shop.members[name].name for name in outcome_order(shop, outcome)]
    frames = [pd.read_parquet(shop.bundles / member / "oof.parquet") for member in members]
    weights = fit_weights([frame.filter(regex=r"^p\d").to_numpy(np.float32) for frame in frames], frames[0]["t0"].to_numpy())
    assert list(outcome.weights.values()) == pytest.approx(weights, abs=1e-6)
    expected = pool([outcome.predictions[member] for member in members], weights)
    ids = [row[0] for row in read_rows(shop.competition / "test.csv")[1:]]
    best = {id_: ["ABCDE"[option] for option in np.argsort(-row, kind="stable")[:3]] for id_, row in zip(ids, expected, strict=True)}
    assert rows_of(tmp_path) == best
    assert outcome.finished
    assert outcome.failures == {}
    assert set(outcome.scored.values()) == {packed.TEST_ROWS}
    assert set(outcome.oof) == {*members, "blend"}
    assert score(tmp_path / "submission.csv", shop.competition / "test_answers.csv", MultipleChoice())["n"] == packed.TEST_ROWS


def outcome_order(shop: Workshop, outcome: Outcome) -> list[str]:
    """Recipe names in the order of the outcome."""
    by_folder = {folder.name: name for name, folder in shop.members.items()}
    return [by_folder[member] for member in outcome.weights]


def test_a_members_prediction_is_the_mean_over_its_fits(own: Workshop, tmp_path: Path) -> None:
    both = run(own, tmp_path, "plain").predictions[own.members["plain"].name]
    folder = own.members["plain"]
    old = manifest.read(folder)
    singles = []
    for fit in ("fold0", "fold1"):
        manifest.write(folder, old.name, old.kind, **{**old.meta, "fits": [fit]})
        singles.append(run(own, tmp_path, "plain").predictions[folder.name])
    assert not np.allclose(*singles, atol=1e-6)
    assert both == pytest.approx(np.mean(singles, axis=0), abs=1e-6)


def test_a_members_predictions_do_not_depend_on_the_others_or_on_the_order_of_rows(shop: Workshop, tmp_path: Path) -> None:
    name = shop.members["reader"].name
    together = run(shop, tmp_path, "reader", "second-reader").predictions[name]
    backwards = changed_test(shop, tmp_path, lambda frame: frame[::-1])
    alone = run(shop, tmp_path, "reader", test=backwards).predictions[name]
    assert alone[::-1] == pytest.approx(together, abs=1e-5)
    assert list(rows_of(tmp_path)) == [row[0] for row in read_rows(backwards)[1:]]


def test_without_contexts_only_the_members_that_read_them_change(shop: Workshop, tmp_path: Path) -> None:
    plain, reader = shop.members["plain"].name, shop.members["reader"].name
    with_them = run(shop, tmp_path, "plain", "reader").predictions
    without = run(shop, tmp_path, "plain", "reader", use_contexts=False).predictions
    assert without[plain] == pytest.approx(with_them[plain], abs=1e-6)
    assert not np.allclose(without[reader], with_them[reader], atol=1e-4)


def test_rows_stand_in_the_order_of_the_sample_submission_and_ids_are_copied(shop: Workshop, tmp_path: Path) -> None:
    ids = [f"{number:03d} é,x" for number in range(packed.TEST_ROWS)]
    test = changed_test(shop, tmp_path, lambda frame: frame.assign(id=ids))
    sample = write_rows(tmp_path / "sample.csv", [("id", "prediction"), *((id_, "A B C") for id_ in reversed(ids))])
    run(shop, tmp_path, "plain", test=test, sample=sample)
    assert list(rows_of(tmp_path)) == ids[::-1]
    assert not is_fallback(tmp_path)


@pytest.mark.parametrize("options", [2, 4, 7])
def test_a_test_set_may_have_another_number_of_options(shop: Workshop, tmp_path: Path, options: int) -> None:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        texts = {letter: [f"{text} {letter}" for text in frame["ABCDE"[number % 5]]] for number, letter in enumerate("ABCDEFG"[:options])}
        return frame[["id", "prompt"]].assign(**texts)

    test = changed_test(shop, tmp_path, change)
    outcome = run(shop, tmp_path, "plain", "reader", test=test)
    assert outcome.finished
    assert_valid(tmp_path, test)
    assert outcome.predictions[shop.members["plain"].name].shape == (packed.TEST_ROWS, options)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda frame: frame[:1], id="one row"),
        pytest.param(lambda frame: frame.assign(prompt=""), id="empty prompts"),
        pytest.param(lambda frame: frame.assign(prompt="😀 ﷽ \x00 [SEP] </s>"), id="odd characters"),
        pytest.param(lambda frame: frame.assign(prompt="why " * 3000), id="very long prompts"),
        pytest.param(lambda frame: frame.assign(more="column"), id="a column more"),
        pytest.param(lambda frame: pd.concat([frame] * 20, ignore_index=True).assign(id=lambda both: [f"n{row}" for row in both.index]), id="200 rows"),
    ],
)
def test_odd_test_sets_are_scored_all_the_same(shop: Workshop, tmp_path: Path, change: Any) -> None:
    test = changed_test(shop, tmp_path, change)
    outcome = run(shop, tmp_path, "reader", test=test)
    assert outcome.finished
    assert outcome.failures == {}
    assert_valid(tmp_path, test)


def test_equal_questions_get_equal_predictions(shop: Workshop, tmp_path: Path) -> None:
    test = changed_test(shop, tmp_path, lambda frame: pd.concat([frame[:3]] * 2, ignore_index=True).assign(id=list("uvwxyz")))
    prediction = run(shop, tmp_path, "reader", test=test).predictions[shop.members["reader"].name]
    assert prediction[:3] == pytest.approx(prediction[3:], abs=1e-6)


def test_blank_options_are_never_ranked_above_real_ones(shop: Workshop, tmp_path: Path) -> None:
    blank = np.random.default_rng(0).random((packed.TEST_ROWS, 5)) < 0.2
    blank[0] = [True, True, True, False, True]

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(**{letter: frame[letter].where(~blank[:, column], " ") for column, letter in enumerate("ABCDE")})

    test = changed_test(shop, tmp_path, change)
    outcome = run(shop, tmp_path, "plain", "reader", test=test)
    assert outcome.finished
    assert_valid(tmp_path, test)
    for row, named in enumerate(rows_of(tmp_path).values()):
        seen = [blank[row, "ABCDE".index(letter)] for letter in named]
        assert seen == sorted(seen), f"row {row}: {named} ranks a blank option above a real one"
        assert sum(not is_blank for is_blank in seen) == min(3, (~blank[row]).sum())


@pytest.mark.parametrize("file", ["fold0/model.safetensors", "fold1/tokenizer.json", "oof.parquet"])
def test_a_damaged_member_is_refused_when_the_fallback_is_already_there(own: Workshop, tmp_path: Path, file: str) -> None:
    packed.damage(own.members["plain"] / file)
    with pytest.raises(BundleError, match=f"{own.members['plain'].name}.*{file} is damaged"):
        run(own, tmp_path, "plain", "reader")
    assert_valid(tmp_path, own.competition / "test.csv")
    assert is_fallback(tmp_path)


def test_a_damaged_or_missing_index_is_refused_when_the_fallback_is_already_there(own: Workshop, tmp_path: Path) -> None:
    index = own.bundles / manifest.read(own.members["reader"]).meta["index"]
    packed.damage(index / "corpus" / "passages.arrow")
    with pytest.raises(BundleError, match=r"corpus/passages.arrow is damaged"):
        run(own, tmp_path, "reader")
    assert is_fallback(tmp_path)
    (tmp_path / "submission.csv").unlink()
    shutil.rmtree(index)
    with pytest.raises(BundleError, match=f"'{index.name}' is neither a folder .* nor mounted"):
        run(own, tmp_path, "reader")
    assert is_fallback(tmp_path)


def test_a_member_that_fails_is_left_out_and_named(own: Workshop, tmp_path: Path) -> None:
    packed.change_member(own.members["reader"], 'model.pooling="mean"')  # its head was trained on another width
    broken, sound = own.members["reader"].name, own.members["plain"].name
    outcome = run(own, tmp_path, "plain", "reader")
    assert set(outcome.failures) == {broken}
    assert outcome.failures[broken].startswith("BundleError: ")
    assert "fold0" in outcome.failures[broken]
    assert "do not fit the model" in outcome.failures[broken]
    assert not outcome.finished
    assert outcome.scored == {sound: packed.TEST_ROWS, broken: 0}
    submitted = rows_of(tmp_path)
    assert submitted == rows_of_alone(own, tmp_path, "plain")


def rows_of_alone(shop: Workshop, tmp_path: Path, name: str) -> dict[str, list[str]]:
    (tmp_path / "alone").mkdir()
    run(shop, tmp_path / "alone", name)
    return rows_of(tmp_path / "alone")


def test_a_member_without_weight_speaks_where_the_others_fail(own: Workshop, tmp_path: Path) -> None:
    weights = run(own, tmp_path, "plain", "second-reader").weights
    weak = min(packed.NAMES[::2], key=lambda name: weights[own.members[name].name])
    strong = "second-reader" if weak == "plain" else "plain"
    other = "mean" if strong == "second-reader" else "match"
    packed.change_member(own.members[strong], f'model.pooling="{other}"')
    outcome = run(own, tmp_path, weak, strong)
    assert outcome.scored == {own.members[weak].name: packed.TEST_ROWS, own.members[strong].name: 0}
    assert rows_of(tmp_path) == rows_of_alone(own, tmp_path, weak)


def test_when_every_member_fails_the_fallback_stays(own: Workshop, tmp_path: Path) -> None:
    packed.change_member(own.members["reader"], 'model.pooling="mean"')
    outcome = run(own, tmp_path, "reader")
    assert not outcome.finished
    assert set(outcome.scored.values()) == {0}
    assert is_fallback(tmp_path)
    assert_valid(tmp_path, own.competition / "test.csv")


def test_time_that_runs_out_stops_between_batches_and_what_is_scored_counts(own: Workshop, tmp_path: Path) -> None:
    for name in ("plain", "reader"):
        packed.change_member(own.members[name], "infer.batch_tokens=300")  # a question or two at a time
    test = own.competition / "test.csv"
    full = run(own, tmp_path, "plain", "reader").predictions
    partial = False
    for total in (8, 16, 24, 32, 60):
        outcome = run(own, tmp_path, "plain", "reader", budget=Budget(total, 1, 0, Clock()))
        assert_valid(tmp_path, test)
        if outcome.finished:
            break
        assert outcome.failures
        assert all(failure.startswith("no time left") for failure in outcome.failures.values())
        for member, prediction in outcome.predictions.items():
            scored = np.isfinite(prediction).all(-1)
            assert scored.sum() == outcome.scored[member]
            partial |= 0 < scored.sum() < packed.TEST_ROWS
        blended = pool(list(outcome.predictions.values()), np.array(list(outcome.weights.values())))
        for row, named in zip(blended, rows_of(tmp_path).values(), strict=True):
            assert named == (["A", "B", "C"] if np.isnan(row).any() else ["ABCDE"[k] for k in np.argsort(-row, kind="stable")[:3]])
    assert partial
    assert outcome.finished
    assert all(outcome.predictions[member] == pytest.approx(full[member], abs=1e-5) for member in full)


def test_with_no_time_at_all_the_fallback_is_written(shop: Workshop, tmp_path: Path) -> None:
    outcome = run(shop, tmp_path, "plain", budget=Budget(100, 10, 95))
    assert outcome.failures == {shop.members["plain"].name: "no time left before fold0"}
    assert is_fallback(tmp_path)


def mount(shop: Workshop, root: Path) -> Path:
    """Members, index, code and competition where the site has put such things."""
    for number, bundle in enumerate(sorted(path for path in shop.bundles.iterdir() if not path.name.startswith("."))):
        shutil.copytree(bundle, root / (bundle.name if number % 2 else f"datasets/owner/{bundle.name}"))
    (root / "competitions" / "exam").mkdir(parents=True)
    for name in ("test.csv", "sample_submission.csv"):
        shutil.copyfile(shop.competition / name, root / "competitions" / "exam" / name)
    return root


def test_everything_is_found_by_its_mount(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_INPUT", str(mount(shop, tmp_path / "input")))
    outcome = infer(out=tmp_path / "submission.csv", budget=Budget(3600, 60, 0))
    assert outcome.finished
    assert set(outcome.weights) == {folder.name for folder in shop.members.values()}
    assert_valid(tmp_path, shop.competition / "test.csv")


def test_members_are_found_by_name_below_the_root(shop: Workshop, tmp_path: Path) -> None:
    root = mount(shop, tmp_path / "input")
    outcome = infer([shop.members["reader"].name], out=tmp_path / "submission.csv", root=root, budget=Budget(3600, 60, 0))
    assert list(outcome.weights) == [shop.members["reader"].name]
    with pytest.raises(BundleError, match="'no-such' is neither a folder .* found bundles"):
        infer(["no-such"], out=tmp_path / "submission.csv", root=root)


def test_no_members_is_an_error_that_says_so(shop: Workshop, tmp_path: Path) -> None:
    for bundles in ([], [shop.bundles / manifest.read(shop.members["reader"]).meta["index"]]):
        with pytest.raises(BundleError, match="no member bundle among .*: pack a trained run, and attach it"):
            infer(bundles, test=shop.competition / "test.csv", out=tmp_path / "submission.csv", root=shop.bundles)


def test_a_bundle_that_is_named_twice_is_one_member(shop: Workshop, tmp_path: Path) -> None:
    """As when every part of a divided bundle is named: each of them leads to the whole."""
    once, twice = (run(shop, tmp_path / str(count), *["plain"] * count) for count in (1, 2))
    assert twice.weights == once.weights
    assert twice.scored == once.scored
    assert twice.submission.read_bytes() == once.submission.read_bytes()


def test_a_wrong_test_set_is_refused(shop: Workshop, tmp_path: Path) -> None:
    test = changed_test(shop, tmp_path, lambda frame: frame.drop(columns="prompt"))
    with pytest.raises(DataError, match="column 'prompt' is missing"):
        run(shop, tmp_path, "plain", test=test)


def test_members_trained_on_different_tables_are_refused_together(own: Workshop, tmp_path: Path) -> None:
    folder = own.members["reader"]
    frame = pd.read_parquet(folder / "oof.parquet")
    frame.assign(id=[f"other{row}" for row in frame.index]).to_parquet(folder / "oof.parquet", index=False)
    old = manifest.read(folder)
    manifest.write(folder, old.name, old.kind, **old.meta)
    with pytest.raises(BundleError, match="have no OOF row in common"):
        run(own, tmp_path, "plain", "reader")
    assert is_fallback(tmp_path)


def test_an_outcome_is_saved_with_each_members_predictions(shop: Workshop, tmp_path: Path) -> None:
    outcome = run(shop, tmp_path, "plain")
    outcome.save(tmp_path / "details")
    saved = np.load(tmp_path / "details" / "predictions.npz")
    assert {name: saved[name].tolist() for name in saved} == {name: values.tolist() for name, values in outcome.predictions.items()}
    summary = pd.read_json(tmp_path / "details" / "outcome.json", typ="series")
    assert summary["finished"]
    assert summary["rows"] == packed.TEST_ROWS
    assert set(summary["seconds"]) >= {"fallback", "verify", "total", shop.members["plain"].name}


def test_inference_calls_no_other_machine(shop: Workshop, tmp_path: Path) -> None:
    seal = tmp_path / "seal"
    seal.mkdir()
    shutil.copyfile(guard.__file__, seal / "sitecustomize.py")
    code = "import sys, kit; kit.infer(sys.argv[3:], test=sys.argv[1], out=sys.argv[2])"
    arguments = [str(shop.competition / "test.csv"), str(tmp_path / "submission.csv"), str(shop.members["reader"])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(seal), str(Path(kit.__file__).parents[1]))), "KIT_INPUT": str(shop.bundles)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not (seal / "attempts.log").exists()
    assert_valid(tmp_path, shop.competition / "test.csv")
    assert not is_fallback(tmp_path)


def test_the_recipe_inside_a_bundle_is_the_one_it_was_trained_with(shop: Workshop) -> None:
    for name, folder in shop.members.items():
        assert Recipe.load(folder / "recipe.toml").digest == Recipe.load(shop.root / f"{name}.toml").digest


def test_two_bundles_of_one_name_are_not_confused(own: Workshop, tmp_path: Path) -> None:
    """A bundle given as a folder is that folder, also where another of its name is mounted."""
    other = tmp_path / "elsewhere" / own.members["plain"].name
    shutil.copytree(own.members["plain"], other)
    packed.damage(own.members["plain"] / "oof.parquet")
    outcome = infer([other], test=own.competition / "test.csv", out=tmp_path / "submission.csv", root=own.bundles, budget=Budget(3600, 60, 0))
    assert outcome.finished


def test_the_submission_grows_better_while_members_finish(own: Workshop, tmp_path: Path) -> None:
    """With time for the first member only, the submission is that member's, not the fallback."""
    packed.change_member(own.members["plain"], "infer.batch_tokens=100000")
    for total in itertools.count(6):
        outcome = run(own, tmp_path, "plain", "reader", budget=Budget(total, 1, 0, Clock()))
        if outcome.scored[next(iter(outcome.scored))]:
            break
    assert not outcome.finished
    assert not is_fallback(tmp_path)
