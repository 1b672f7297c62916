"""kit.inference.pipeline: real tiny members, from a first valid file to the pooled submission, whatever goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from safetensors.numpy import load_file, save_file

import kit
from kit import manifest
from kit.budget import Budget
from kit.config import Recipe
from kit.data.tables import read_table
from kit.errors import BundleError, DataError
from kit.inference.crew import Event, Fetch, Order
from kit.inference.member import Member, weigh
from kit.inference.pipeline import Outcome, infer
from kit.inference.submission import score
from kit.rehearsal import guard
from kit.tasks.multiple_choice import MultipleChoice, word_shares
from tests import crews, packed
from tests.packed import Workshop, read_rows, write_rows

ROOT = Path(kit.__file__).parents[1]
ALL = packed.NAMES
FITS = 2  # of a member


@pytest.fixture
def shop() -> Workshop:
    """Of its members, only the best one is worth scoring."""
    return packed.workshop()


@pytest.fixture(scope="module")
def blended(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """All of its members are needed. Not to be changed."""
    return packed_together(tmp_path_factory.mktemp("blended"))


@pytest.fixture
def own(tmp_path: Path) -> Workshop:
    """A workshop to be damaged, all of whose members are needed."""
    return packed_together(tmp_path)


def packed_together(folder: Path) -> Workshop:
    shop = packed.copy(folder)
    packed.complement(list(shop.members.values()))
    return shop


def run(shop: Workshop, tmp_path: Path, *names: str, **options: Any) -> Outcome:
    """Infer with members by recipe name, on the competition's test set unless another is given; scored in a thread."""
    usual = {"test": shop.competition / "test.csv", "budget": Budget(3600, 60, 0), "root": shop.bundles, "open_crew": crews.Thread}
    options = usual | options
    return infer([shop.members[name] for name in names], out=tmp_path / "submission.csv", **options)


def timed(seconds: float, look: Callable[[], object] = lambda: None, **costs: float) -> dict[str, Any]:
    """Options of `run`: that many simulated seconds, of which scoring takes what `costs` say."""
    clock = crews.Clock()
    return {"budget": Budget(seconds + 1, 1, 0, clock), "open_crew": partial(crews.Timed, clock=clock, look=look, **costs)}


@contextmanager
def crew_of(kind: Callable[[Path], crews.Thread] = crews.Thread) -> Iterator[tuple[list[Order | Fetch], Callable[[Path], crews.Thread]]]:
    """What a crew is sent, and how to open it."""
    sent: list[Order | Fetch] = []

    def open_crew(folder: Path) -> crews.Thread:
        crew = kind(folder)
        crew.sent = sent
        return crew

    yield sent, open_crew


def rows_of(tmp_path: Path) -> dict[str, list[str]]:
    """Submission rows: id → letters."""
    return {id_: letters.split() for id_, letters in read_rows(tmp_path / "submission.csv")[1:]}


def rows_of_alone(shop: Workshop, tmp_path: Path, *names: str, **options: Any) -> dict[str, list[str]]:
    """Submission rows if these members are all there are."""
    run(shop, tmp_path / "alone", *names, **options)
    return rows_of(tmp_path / "alone")


def letters_of(prediction: np.ndarray) -> list[list[str]]:
    """The best three of each row; the first three where nothing is known."""
    best = np.argsort(-np.nan_to_num(prediction), axis=-1, kind="stable")[:, :3]
    return [["ABCDE"[option] for option in row] for row in best]


def pooled(shop: Workshop, outcome: Outcome) -> np.ndarray:
    """What the OOF-fitted blend makes of each member's own predictions."""
    members = [Member.open(manifest.read(shop.bundles / name)) for name in outcome.weights]
    return weigh(members).blend.pool(outcome.predictions)


def timeline(outcome: Outcome) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((outcome.run / "timeline.json").read_text())
    return values


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


def changed_test(shop: Workshop, tmp_path: Path, change: Any, name: str = "changed.csv") -> Path:
    """The test set as `change` (frame → frame) makes it."""
    frame = pd.read_csv(shop.competition / "test.csv", dtype=str, keep_default_na=False)
    path = tmp_path / name
    change(frame).to_csv(path, index=False)
    return path


def repeated(frame: pd.DataFrame, times: int = 20) -> pd.DataFrame:
    return pd.concat([frame] * times, ignore_index=True).assign(id=lambda both: [f"n{row}" for row in both.index])


# --- what is predicted -----------------------------------------------------------------------------------------------------------


def test_the_submission_is_the_blend_of_all_members_by_their_oof(blended: Workshop, tmp_path: Path) -> None:
    outcome = run(blended, tmp_path, *ALL, sample=blended.competition / "sample_submission.csv")
    names = {folder.name for folder in blended.members.values()}
    assert set(outcome.predictions) == set(outcome.weights) == names
    assert min(outcome.weights.values()) > 0
    assert list(rows_of(tmp_path).values()) == letters_of(pooled(blended, outcome))
    assert list(rows_of(tmp_path)) == [row[0] for row in read_rows(blended.competition / "test.csv")[1:]]
    assert outcome.finished
    assert outcome.failures == {}
    assert outcome.scored == dict.fromkeys(outcome.weights, packed.TEST_ROWS)
    assert set(outcome.oof) == {*names, "blend"}
    assert outcome.expected == pytest.approx(outcome.oof["blend"]["map@3"])
    assert outcome.oof["blend"]["map@3"] > 0.2 + max(outcome.oof[name]["map@3"] for name in names)
    assert score(tmp_path / "submission.csv", blended.competition / "test_answers.csv", MultipleChoice())["n"] == packed.TEST_ROWS


def test_members_that_the_blend_does_not_use_are_not_scored_in_vain(shop: Workshop, tmp_path: Path) -> None:
    """With 24 OOF rows nothing beats the best member; with time to spare it is all of the submission."""
    outcome = run(shop, tmp_path, *ALL)
    (best,) = (name for name, weight in outcome.weights.items() if weight)
    assert best == max(outcome.oof.keys() - {"blend"}, key=lambda name: outcome.oof[name]["map@3"])
    assert outcome.scored[best] == packed.TEST_ROWS
    assert sum(outcome.scored.values()) <= 2 * packed.TEST_ROWS  # the cheapest one is insurance
    assert outcome.finished
    assert list(rows_of(tmp_path).values()) == letters_of(outcome.predictions[best])


def test_a_members_prediction_is_the_mean_over_its_fits(own: Workshop, tmp_path: Path) -> None:
    name = own.members["plain"].name
    both = run(own, tmp_path, "plain").predictions[name]
    singles = []
    for fit in ("fold0", "fold1"):
        packed.seal(own.members["plain"], fits=[fit])
        singles.append(run(own, tmp_path / fit, "plain").predictions[name])
    assert not np.allclose(*singles, atol=1e-6)
    assert both == pytest.approx(np.mean(singles, axis=0), abs=1e-6)


def test_a_members_predictions_do_not_depend_on_the_others_or_on_the_order_of_rows(blended: Workshop, tmp_path: Path) -> None:
    name = blended.members["reader"].name
    together = run(blended, tmp_path, "reader", "second-reader").predictions[name]
    backwards = changed_test(blended, tmp_path, lambda frame: frame[::-1])
    alone = run(blended, tmp_path, "reader", test=backwards).predictions[name]
    assert alone[::-1] == pytest.approx(together, abs=1e-5)
    assert list(rows_of(tmp_path)) == [row[0] for row in read_rows(backwards)[1:]]


def test_without_contexts_only_the_members_that_read_them_change(blended: Workshop, tmp_path: Path) -> None:
    plain, reader = blended.members["plain"].name, blended.members["reader"].name
    with_them = run(blended, tmp_path, "plain", "reader").predictions
    with crew_of() as (sent, open_crew):
        outcome = run(blended, tmp_path, "plain", "reader", use_contexts=False, open_crew=open_crew)
    assert not [order for order in sent if isinstance(order, Fetch)]
    assert outcome.finished
    assert outcome.predictions[plain] == pytest.approx(with_them[plain], abs=1e-6)
    assert not np.allclose(outcome.predictions[reader], with_them[reader], atol=1e-4)


def test_readers_of_one_index_share_what_is_retrieved(blended: Workshop, tmp_path: Path) -> None:
    with crew_of() as (sent, open_crew):
        run(blended, tmp_path, "reader", "second-reader", open_crew=open_crew)
    fetched = [row for order in sent if isinstance(order, Fetch) for row in order.rows]
    assert sorted(fetched) == list(range(packed.TEST_ROWS))


def test_rows_stand_in_the_order_of_the_sample_submission_and_ids_are_copied(shop: Workshop, tmp_path: Path) -> None:
    ids = [f"{number:03d} é,x" for number in range(packed.TEST_ROWS)]
    test = changed_test(shop, tmp_path, lambda frame: frame.assign(id=ids))
    sample = write_rows(tmp_path / "sample.csv", [("id", "prediction"), *((id_, "A B C") for id_ in reversed(ids))])
    run(shop, tmp_path, "plain", test=test, sample=sample)
    assert list(rows_of(tmp_path)) == ids[::-1]
    assert not is_fallback(tmp_path)


@pytest.mark.parametrize("options", [2, 4, 7])
def test_a_test_set_may_have_another_number_of_options(blended: Workshop, tmp_path: Path, options: int) -> None:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        texts = {letter: [f"{text} {letter}" for text in frame["ABCDE"[number % 5]]] for number, letter in enumerate("ABCDEFG"[:options])}
        return frame[["id", "prompt"]].assign(**texts)

    test = changed_test(blended, tmp_path, change)
    outcome = run(blended, tmp_path, "plain", "reader", test=test)
    assert outcome.finished
    assert_valid(tmp_path, test)
    assert {values.shape for values in outcome.predictions.values()} == {(packed.TEST_ROWS, options)}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda frame: frame[:1], id="one row"),
        pytest.param(lambda frame: frame.assign(prompt=""), id="empty prompts"),
        pytest.param(lambda frame: frame.assign(prompt="😀 ﷽ \x00 [SEP] </s>"), id="odd characters"),
        pytest.param(lambda frame: frame.assign(prompt="why " * 3000), id="very long prompts"),
        pytest.param(lambda frame: frame.assign(more="column"), id="a column more"),
        pytest.param(repeated, id="200 rows"),
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


def test_blank_options_are_never_ranked_above_real_ones(blended: Workshop, tmp_path: Path) -> None:
    blank = np.random.default_rng(0).random((packed.TEST_ROWS, 5)) < 0.2
    blank[0] = [True, True, True, False, True]

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(**{letter: frame[letter].where(~blank[:, column], " ") for column, letter in enumerate("ABCDE")})

    test = changed_test(blended, tmp_path, change)
    outcome = run(blended, tmp_path, "plain", "reader", test=test)
    assert outcome.finished
    assert_valid(tmp_path, test)
    for row, named in enumerate(rows_of(tmp_path).values()):
        seen = [blank[row, "ABCDE".index(letter)] for letter in named]
        assert seen == sorted(seen), f"row {row}: {named} ranks a blank option above a real one"
        assert sum(not is_blank for is_blank in seen) == min(3, (~blank[row]).sum())


# --- members and indexes that are not as they should be --------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def fill_with_noise(path: Path) -> None:
    """A file of the right size whose content is no such file."""
    path.write_bytes(b"\xff" * path.stat().st_size)


def misspell(path: Path) -> None:
    path.write_text(path.read_text().replace('"fits"', '"fitz"'))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights": ("fold0/model.safetensors", packed.damage, "file fold0/model.safetensors is damaged"),
    "tokenizer": ("fold1/tokenizer.json", packed.damage, "file fold1/tokenizer.json is damaged"),
    "a missing file": ("fold1/tokenizer.json", Path.unlink, "file fold1/tokenizer.json is missing"),
    "a shorter file": ("fold1/model.safetensors", cut, "bytes instead of"),
    "predictions": ("oof.parquet", packed.damage, "file oof.parquet is damaged"),
    "a recipe": ("recipe.toml", fill_with_noise, "TOML"),
    "no recipe": ("recipe.toml", Path.unlink, "recipe.toml"),
    "a manifest": ("MANIFEST.json", fill_with_noise, "MANIFEST.json: unreadable manifest"),
    "a word of the manifest": ("MANIFEST.json", misspell, "MANIFEST.json: unreadable manifest (it has no fits)"),
    "no manifest": ("MANIFEST.json", Path.unlink, "MANIFEST.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_member_is_left_out_and_named(own: Workshop, tmp_path: Path, what: str) -> None:
    file, spoil, words = DAMAGE[what]
    broken = own.members["plain"]
    spoil(broken / file)
    outcome = run(own, tmp_path, *ALL)
    assert list(outcome.failures) == [broken.name]
    assert words in outcome.failures[broken.name]
    assert not outcome.finished
    assert outcome.scored == {own.members[name].name: packed.TEST_ROWS for name in ALL[1:]}
    assert list(rows_of(tmp_path).values()) == letters_of(pooled(own, outcome))
    assert rows_of(tmp_path) == rows_of_alone(own, tmp_path, *ALL[1:])


def test_a_bundle_that_is_not_there_is_left_out_and_named(own: Workshop, tmp_path: Path) -> None:
    bundles = ["no-such", own.members["plain"]]
    outcome = infer(bundles, test=own.competition / "test.csv", out=tmp_path / "submission.csv", root=own.bundles, open_crew=crews.Thread)
    assert list(outcome.failures) == ["no-such"]
    assert "neither a folder" in outcome.failures["no-such"]
    assert not outcome.finished
    assert outcome.scored == {own.members["plain"].name: packed.TEST_ROWS}


@pytest.mark.parametrize("what", ["weights", "predictions", "a missing file"])
def test_when_no_member_is_left_that_is_an_error_and_the_fallback_is_there(own: Workshop, tmp_path: Path, what: str) -> None:
    file, spoil, words = DAMAGE[what]
    for name in ("plain", "reader"):
        spoil(own.members[name] / file)
    with pytest.raises(BundleError, match=words):
        run(own, tmp_path, "plain", "reader")
    assert_valid(tmp_path, own.competition / "test.csv")
    assert is_fallback(tmp_path)


@pytest.mark.parametrize("spoil", [lambda index: packed.damage(index / "corpus" / "passages.arrow"), shutil.rmtree], ids=["damaged", "missing"])
def test_without_its_index_a_member_is_scored_without_contexts_and_that_is_a_failure(own: Workshop, tmp_path: Path, spoil: Any) -> None:
    index = own.bundles / manifest.read(own.members["reader"]).meta["index"]
    expected = run(own, tmp_path / "without", *ALL, use_contexts=False)
    spoil(index)
    outcome = run(own, tmp_path, *ALL)
    assert outcome.failures.keys() == {own.members[name].name for name in ALL[1:]}
    assert all(why.startswith("scored without contexts: ") and index.name in why for why in outcome.failures.values())
    assert not outcome.finished
    assert outcome.scored == dict.fromkeys(outcome.weights, packed.TEST_ROWS)
    for name, prediction in outcome.predictions.items():
        assert prediction == pytest.approx(expected.predictions[name], abs=1e-6)


def test_without_contexts_nobody_misses_the_index(own: Workshop, tmp_path: Path) -> None:
    shutil.rmtree(own.bundles / manifest.read(own.members["reader"]).meta["index"])
    outcome = run(own, tmp_path, "reader", use_contexts=False)
    assert outcome.failures == {}
    assert outcome.finished


def test_members_without_a_common_oof_row_are_not_blended_and_the_best_is_used(own: Workshop, tmp_path: Path) -> None:
    strong, weak = own.members["reader"], own.members["plain"]
    targets = np.arange(60) % 5
    packed.write_oof(strong, targets, np.eye(5)[targets] * 0.5 + 0.1, ids=[f"other{row}" for row in range(60)])
    outcome = run(own, tmp_path, "plain", "reader")
    assert list(outcome.failures) == [weak.name]
    assert "have no OOF row in common: train them on one table" in outcome.failures[weak.name]
    assert not outcome.finished
    assert outcome.scored == {strong.name: packed.TEST_ROWS}
    assert rows_of(tmp_path) == rows_of_alone(own, tmp_path, "reader")


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
    assert rows_of(tmp_path) == rows_of_alone(own, tmp_path, "plain")


@pytest.mark.parametrize("strong", ["plain", "second-reader"])
def test_a_member_that_the_blend_does_not_use_speaks_where_the_others_fail(own: Workshop, tmp_path: Path, strong: str) -> None:
    weak = "second-reader" if strong == "plain" else "plain"
    targets = np.arange(60) % 5
    for name, certainty in ((strong, 0.9), (weak, 0.1)):
        wrong = np.random.default_rng(1).random(60) < 0.5 if name == weak else np.zeros(60, bool)
        believed = np.eye(5)[np.where(wrong, (targets + 1) % 5, targets)]
        packed.write_oof(own.members[name], targets, believed * certainty + (1 - certainty) / 5)
    packed.change_member(own.members[strong], f'model.pooling="{"mean" if weak == "plain" else "match"}"')
    outcome = run(own, tmp_path, weak, strong)
    assert outcome.weights[own.members[weak].name] == 0
    assert outcome.scored == {own.members[weak].name: packed.TEST_ROWS, own.members[strong].name: 0}
    assert rows_of(tmp_path) == rows_of_alone(own, tmp_path, weak)


def test_a_member_whose_scores_are_not_finite_is_left_out_and_named(own: Workshop, tmp_path: Path) -> None:
    for path in own.members["plain"].glob("*/model.safetensors"):
        save_file({name: np.full_like(values, np.nan) for name, values in load_file(path).items()}, path)
    packed.seal(own.members["plain"])
    outcome = run(own, tmp_path, "plain")
    assert outcome.failures == {own.members["plain"].name: f"{2 * packed.TEST_ROWS} of its rows x fits are left out: their scores are not finite"}
    assert not outcome.finished
    assert is_fallback(tmp_path)


class Broken(crews.Thread):
    """A crew that fails in a way that nobody has thought of, once something is scored."""

    def wait(self, seconds: float) -> list[Event]:
        if len(self.sent) > 1:
            raise RuntimeError("no such slot")
        return super().wait(seconds)


def test_an_error_in_the_loop_itself_does_not_cost_what_is_scored(shop: Workshop, tmp_path: Path) -> None:
    outcome = run(shop, tmp_path, "plain", open_crew=Broken)
    assert outcome.failures["run"] == "RuntimeError: no such slot"
    assert not outcome.finished
    assert outcome.scored[shop.members["plain"].name] == packed.TEST_ROWS
    assert not is_fallback(tmp_path)


def test_when_every_member_fails_the_fallback_stays(own: Workshop, tmp_path: Path) -> None:
    packed.change_member(own.members["plain"], 'model.pooling="match"')
    outcome = run(own, tmp_path, "plain")
    assert not outcome.finished
    assert set(outcome.scored.values()) == {0}
    assert is_fallback(tmp_path)
    assert_valid(tmp_path, own.competition / "test.csv")


# --- time ------------------------------------------------------------------------------------------------------------------------


def test_what_is_scored_until_the_time_is_up_counts(own: Workshop, tmp_path: Path) -> None:
    for name in ("plain", "reader"):
        packed.make_heavy(own.members[name])
    test, full = own.competition / "test.csv", run(own, tmp_path / "full", "plain", "reader").predictions
    in_part, counts = False, []
    for seconds in (8, 25, 60):
        folder = tmp_path / str(seconds)
        outcome = run(own, folder, "plain", "reader", **timed(seconds))
        assert_valid(folder, test)
        assert outcome.seconds["total"] <= seconds + 1
        assert outcome.finished == (not outcome.failures)
        counts.append(sum(outcome.scored.values()))
        for member, prediction in outcome.predictions.items():
            scored = np.isfinite(prediction).all(-1)
            assert scored.sum() == outcome.scored[member]
            assert outcome.failures.get(member, "no time left for").startswith("no time left for")
            in_part |= 0 < scored.sum() < packed.TEST_ROWS
        assert list(rows_of(folder).values()) == expected_letters(own, outcome)
    assert in_part
    assert counts == sorted(counts)
    assert outcome.finished
    assert all(outcome.predictions[member] == pytest.approx(full[member], abs=1e-5) for member in full)


def expected_letters(shop: Workshop, outcome: Outcome) -> list[list[str]]:
    """Of each row the blend of what is scored; where nothing is, what retrieval found, if it did."""
    prediction = pooled(shop, outcome)
    return letters_of(np.where(np.isfinite(prediction), prediction, overlaps(shop, outcome)))


def overlaps(shop: Workshop, outcome: Outcome) -> np.ndarray:
    """Share (N, C) of each option's words that the row's context has, by the contexts in the run folder; NaN where there is none."""
    contexts: dict[str, str] = {}
    for path in outcome.run.glob("contexts/*/*.json"):
        contexts |= json.loads(path.read_text())
    header, *rows = read_rows(shop.competition / "test.csv")
    options = [[row[header.index(letter)] for letter in "ABCDE"] for row in rows]
    return np.array([word_shares(texts, contexts.get(str(number), "")) for number, texts in enumerate(options)])


def test_left_over_rows_and_fits_are_counted(blended: Workshop, tmp_path: Path) -> None:
    outcome = run(blended, tmp_path, "plain", **timed(14, row_s=1.0))
    spans = [span for span in timeline(outcome)["spans"] if span["state"] == "done"]
    left = FITS * packed.TEST_ROWS - sum(span["rows"] for span in spans)
    assert 0 < left < FITS * packed.TEST_ROWS
    assert outcome.failures == {blended.members["plain"].name: f"no time left for {left} of its rows x fits"}


def test_with_no_time_at_all_the_fallback_is_written(blended: Workshop, tmp_path: Path) -> None:
    outcome = run(blended, tmp_path, "plain", budget=Budget(100, 10, 95))
    everything = FITS * packed.TEST_ROWS
    assert outcome.failures == {blended.members["plain"].name: f"no time left for {everything} of its rows x fits"}
    assert not outcome.finished
    assert is_fallback(tmp_path)


def test_with_time_for_some_members_only_the_submission_is_theirs(blended: Workshop, tmp_path: Path) -> None:
    outcome = run(blended, tmp_path, "plain", "reader", **timed(16))
    assert not outcome.finished
    assert 0 < sum(outcome.scored.values()) < 2 * packed.TEST_ROWS
    assert not is_fallback(tmp_path)


def test_rows_that_nobody_has_scored_are_ordered_by_what_retrieval_found(blended: Workshop, tmp_path: Path) -> None:
    outcome = run(blended, tmp_path, "reader", **timed(30, load_s=1000.0))
    assert outcome.scored == {blended.members["reader"].name: 0}
    shares = overlaps(blended, outcome)
    assert np.isfinite(shares).all()
    assert list(rows_of(tmp_path).values()) == letters_of(shares)
    assert not is_fallback(tmp_path)
    assert [span["state"] for span in timeline(outcome)["spans"]] == ["done", "cut"]


def test_the_submission_is_valid_at_every_moment_and_is_rewritten_as_scores_come(blended: Workshop, tmp_path: Path) -> None:
    """Looked at before every wait, and all the time by a thread."""
    test, stop = blended.competition / "test.csv", threading.Event()
    versions: list[str] = []
    seen, broken = 0, []

    def look() -> None:
        assert_valid(tmp_path, test)
        text = (tmp_path / "submission.csv").read_text()
        if text not in versions:
            versions.append(text)

    def watch() -> None:
        nonlocal seen
        while not stop.is_set():
            if (tmp_path / "submission.csv").exists():
                lines = (tmp_path / "submission.csv").read_text().splitlines()
                seen += 1
                if len(lines) != 1 + packed.TEST_ROWS or not all(len(line.split()) == 3 for line in lines[1:]):
                    broken.append(lines)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        outcome = run(blended, tmp_path, *ALL, **timed(200, look))
    finally:
        stop.set()
        watcher.join()
    assert outcome.finished
    assert (seen > 10, broken) == (True, [])
    assert len(versions) > 5
    assert [part.name for part in tmp_path.iterdir() if part.name.endswith(".part")] == []


def test_the_timeline_tells_what_happened(blended: Workshop, tmp_path: Path) -> None:
    outcome = run(blended, tmp_path, "plain", "reader", **timed(30))
    values = timeline(outcome)
    names = {"rows", "budget_s", "reserve_s", "slots", "spans", "metric", "decisions", "skipped", "ended"}
    assert set(values) == names
    assert (values["rows"], values["budget_s"], values["reserve_s"], values["slots"]) == (packed.TEST_ROWS, 31, 1, ["cpu"])
    span_keys = {"slot", "member", "fit", "view", "rows", "start", "end", "load_s", "forecast_s", "tokens", "gain", "state"}
    assert all(set(span) == span_keys for span in values["spans"])
    assert {span["member"] for span in values["spans"]} == {*outcome.weights, "contexts"}
    assert {span["state"] for span in values["spans"]} <= {"done", "cut"}
    for before, after in zip(values["spans"], values["spans"][1:], strict=False):
        assert 0 <= before["start"] < before["end"] <= after["start"]
    for span in values["spans"]:
        low, mid, high = span["forecast_s"]
        assert 0 < low <= mid <= high
        assert (span["tokens"] > 0, span["load_s"] >= 0) == (span["state"] == "done" and span["member"] != "contexts", True)
    done = [(span["member"], span["rows"]) for span in values["spans"] if (span["fit"], span["state"]) == ("fold0", "done")]
    assert {name: sum(rows for member, rows in done if member == name) for name in outcome.weights} == outcome.scored
    expected = [point["expected"] for point in values["metric"]]
    assert expected[-1] == pytest.approx(outcome.expected)
    assert expected == sorted(expected)
    assert [point["at"] for point in values["metric"]] == sorted(point["at"] for point in values["metric"])
    assert {entry["member"]: entry["why"] for entry in values["skipped"]} == outcome.failures
    assert all(entry["rows"] > 0 for entry in values["skipped"])
    assert values["ended"] == pytest.approx(30, abs=0.1)
    log = (outcome.run / "decisions.log").read_text().splitlines()
    assert [line.split(maxsplit=1)[1] for line in log] == [entry["text"] for entry in values["decisions"]]
    assert log[-1].endswith("the time is up")


# --- going on ----------------------------------------------------------------------------------------------------------------------


def test_what_was_scored_is_not_scored_again(blended: Workshop, tmp_path: Path) -> None:
    first = run(blended, tmp_path, *ALL)
    before = first.submission.read_bytes()
    first.submission.unlink()
    with crew_of() as (sent, open_crew):
        again = run(blended, tmp_path, *ALL, open_crew=open_crew)
    assert sent == []
    assert again.submission.read_bytes() == before
    assert again.finished
    assert again.scored == first.scored
    assert "60 rows x fits are kept from an earlier start of this run" in (again.run / "decisions.log").read_text()


def test_a_run_out_of_time_is_finished_by_the_next(blended: Workshop, tmp_path: Path) -> None:
    first = run(blended, tmp_path, *ALL, **timed(40))
    assert not first.finished
    done = [span for span in timeline(first)["spans"] if span["state"] == "done"]
    kept = {(span["member"], span["fit"]) for span in done if span["rows"] == packed.TEST_ROWS}
    assert kept
    with crew_of() as (sent, open_crew):
        outcome = run(blended, tmp_path, *ALL, open_crew=open_crew)
    assert outcome.finished
    assert not {(order.member, order.fit) for order in sent if isinstance(order, Order)} & kept
    assert rows_of(tmp_path) == rows_of_alone(blended, tmp_path, *ALL)


def test_a_record_that_a_kill_cut_off_is_scored_again(blended: Workshop, tmp_path: Path) -> None:
    first = run(blended, tmp_path, "plain")
    before = first.submission.read_bytes()
    (first.run / "submission.csv").unlink(missing_ok=True)
    for file in first.run.glob("scores/*/*"):
        file.write_bytes(file.read_bytes()[:-5])
    with crew_of() as (sent, open_crew):
        again = run(blended, tmp_path, "plain", open_crew=open_crew)
    assert [len(order.rows) for order in sent if isinstance(order, Order)] == [1, 1]
    assert again.submission.read_bytes() == before


def other_test(shop: Workshop, tmp_path: Path) -> dict[str, Any]:
    return {"test": changed_test(shop, tmp_path, lambda frame: frame.assign(prompt=frame["prompt"] + " Why?"))}


def other_member(shop: Workshop, tmp_path: Path) -> dict[str, Any]:
    packed.change_member(shop.members["plain"], "task.max_length=32")
    return {}


def without_contexts(shop: Workshop, tmp_path: Path) -> dict[str, Any]:
    return {"use_contexts": False}


@pytest.mark.parametrize("change", [other_test, other_member, without_contexts])
def test_scores_of_another_test_set_member_or_setting_are_not_taken(own: Workshop, tmp_path: Path, change: Any) -> None:
    first = run(own, tmp_path, "plain", "reader")
    (first.run / "stale").touch()
    changed = change(own, tmp_path)
    outcome = run(own, tmp_path, "plain", "reader", **changed)
    fresh = run(own, tmp_path / "fresh", "plain", "reader", **changed)
    assert not (outcome.run / "stale").exists()
    assert "are kept" not in (outcome.run / "decisions.log").read_text()
    for name in first.predictions:
        assert outcome.predictions[name] == pytest.approx(fresh.predictions[name], abs=1e-6)


def test_scores_made_without_an_index_are_not_taken_once_it_is_there(own: Workshop, tmp_path: Path) -> None:
    index = own.bundles / manifest.read(own.members["reader"]).meta["index"]
    index.rename(tmp_path / "away")
    assert not run(own, tmp_path, "reader").finished
    (tmp_path / "away").rename(index)
    outcome = run(own, tmp_path, "reader")
    assert outcome.finished
    expected = run(own, tmp_path / "fresh", "reader")
    assert outcome.predictions[own.members["reader"].name] == pytest.approx(expected.predictions[own.members["reader"].name], abs=1e-6)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"state": 1}'])
def test_a_run_folder_that_makes_no_sense_is_begun_anew(shop: Workshop, tmp_path: Path, text: str) -> None:
    (tmp_path / "submission.run").mkdir()
    (tmp_path / "submission.run" / "setup.json").write_text(text)
    assert run(shop, tmp_path, "plain").finished


def kit_infer(shop: Workshop, folder: Path) -> list[str]:
    members = [str(folder) for folder in shop.members.values()]
    places = ["--test", str(shop.competition / "test.csv"), "--out", str(folder / "submission.csv")]
    return [sys.executable, "-m", "kit", "infer", *members, *places, "--json"]


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_process_and_the_next_goes_on_with_what_it_scored(own: Workshop, tmp_path: Path) -> None:
    for folder in own.members.values():
        packed.change_member(folder, "infer.batch_tokens=1")  # slowly: a row at a time
    killed = tmp_path / "killed"
    killed.mkdir()
    process = subprocess.Popen(kit_infer(own, killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run_folder = killed / "submission.run"
    while not (kept := list(run_folder.glob("scores/*/*"))):
        assert process.poll() is None, "it ended before anything was scored"
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert_valid(killed, own.competition / "test.csv")
    before = {file: file.read_bytes() for file in kept}
    assert len(list(run_folder.glob("scores/*/*"))) < len(ALL) * FITS

    done = subprocess.run(kit_infer(own, killed), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "are kept from an earlier start of this run" in (run_folder / "decisions.log").read_text()
    assert all(file.read_bytes().startswith(content) for file, content in before.items())
    undisturbed = run(own, tmp_path / "undisturbed", *ALL)
    assert rows_of(killed) == rows_of(tmp_path / "undisturbed")
    assert json.loads(done.stdout.splitlines()[-1])["scored"] == undisturbed.scored


# --- a disk that is full -----------------------------------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
from pathlib import Path
from kit.budget import Budget
from kit.inference.pipeline import infer
from tests import crews

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
until = int(sys.argv[1])

class Filling(crews.Thread):
    def send(self, slot, order):
        limit = 20 if len(self.sent) < until else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        super().send(slot, order)

out, test, *members = map(Path, sys.argv[2:])
outcome = infer(members, test=test, out=out, root=members[0].parent, budget=Budget(3600, 60, 0), open_crew=Filling)
print(outcome.finished, *outcome.scored.values())
"""


@pytest.mark.parametrize("until", [1, 99], ids=["for a while", "to the end"])
def test_a_disk_that_is_full_does_not_end_the_run(blended: Workshop, tmp_path: Path, until: int) -> None:
    """From the first order on no file may grow beyond 20 bytes: neither scores nor the submission can be written."""
    test = blended.competition / "test.csv"
    arguments = [str(until), str(tmp_path / "submission.csv"), str(test), str(blended.members["plain"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FULL, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", str(packed.TEST_ROWS)]
    assert "not written: [Errno 27] File too large" in done.stderr
    assert_valid(tmp_path, test)
    assert is_fallback(tmp_path) == (until > 1)
    assert [path.name for path in tmp_path.rglob("*.part")] == []
    expected = run(blended, tmp_path / "alone", "plain")
    again = run(blended, tmp_path, "plain")  # what could be kept is whole
    assert again.finished
    assert again.submission.read_bytes() == expected.submission.read_bytes()


# --- what is found where -----------------------------------------------------------------------------------------------------------


def mount(shop: Workshop, root: Path) -> Path:
    """Members, index, code and competition where the site has put such things."""
    for number, bundle in enumerate(sorted(path for path in shop.bundles.iterdir() if not path.name.startswith("."))):
        shutil.copytree(bundle, root / (bundle.name if number % 2 else f"datasets/owner/{bundle.name}"))
    (root / "competitions" / "exam").mkdir(parents=True)
    for name in ("test.csv", "sample_submission.csv"):
        shutil.copyfile(shop.competition / name, root / "competitions" / "exam" / name)
    return root


def test_everything_is_found_by_its_mount(blended: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_INPUT", str(mount(blended, tmp_path / "input")))
    outcome = infer(out=tmp_path / "submission.csv", budget=Budget(3600, 60, 0), open_crew=crews.Thread)
    assert outcome.finished
    assert outcome.scored == {folder.name: packed.TEST_ROWS for folder in blended.members.values()}
    assert_valid(tmp_path, blended.competition / "test.csv")


def test_a_test_set_of_another_name_and_format_is_found(shop: Workshop, tmp_path: Path) -> None:
    root = mount(shop, tmp_path / "input")
    folder = root / "competitions" / "exam"
    header, *rows = packed.read_rows(folder / "sample_submission.csv")
    packed.write_rows(folder / "sample_submission.csv", [header, *rows[::-1]])  # an order of its own
    expected = run(shop, tmp_path / "csv", "plain", sample=folder / "sample_submission.csv")
    read_table(folder / "test.csv").frame.to_json(folder / "test.jsonl", orient="records", lines=True)
    (folder / "test.csv").unlink()
    outcome = infer([shop.members["plain"]], out=tmp_path / "submission.csv", root=root, budget=Budget(3600, 60, 0), open_crew=crews.Thread)
    assert outcome.finished and outcome.submission.read_bytes() == expected.submission.read_bytes()
    (folder / "test.jsonl").rename(folder / "hidden.jsonl")
    with pytest.raises(DataError, match=r"no test set below .*: looked for test\.csv, .*test\.jsonl \(tables there: .*hidden\.jsonl.*: attach"):
        infer([shop.members["plain"]], out=tmp_path / "submission.csv", root=root)


def test_members_are_found_by_name_below_the_root(shop: Workshop, tmp_path: Path) -> None:
    root, budget = mount(shop, tmp_path / "input"), Budget(3600, 60, 0)
    outcome = infer([shop.members["reader"].name], out=tmp_path / "submission.csv", root=root, budget=budget, open_crew=crews.Thread)
    assert outcome.finished
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


def test_two_bundles_of_one_name_are_not_confused(own: Workshop, tmp_path: Path) -> None:
    """A bundle given as a folder is that folder, also where another of its name is mounted."""
    other = tmp_path / "elsewhere" / own.members["plain"].name
    shutil.copytree(own.members["plain"], other)
    packed.damage(own.members["plain"] / "oof.parquet")
    outcome = infer([other], test=own.competition / "test.csv", out=tmp_path / "submission.csv", root=own.bundles, open_crew=crews.Thread)
    assert outcome.finished


def test_a_wrong_test_set_is_refused(shop: Workshop, tmp_path: Path) -> None:
    test = changed_test(shop, tmp_path, lambda frame: frame.drop(columns="prompt"))
    with pytest.raises(DataError, match="column 'prompt' is missing"):
        run(shop, tmp_path, "plain", test=test)


def test_the_outcome_lies_in_the_run_folder_with_each_members_predictions(blended: Workshop, tmp_path: Path) -> None:
    outcome = run(blended, tmp_path, "plain", "reader")
    assert outcome.run == tmp_path / "submission.run"
    saved = np.load(outcome.run / "predictions.npz")
    assert {name: saved[name].tolist() for name in saved} == {name: values.tolist() for name, values in outcome.predictions.items()}
    summary = json.loads((outcome.run / "outcome.json").read_text())
    assert summary == json.loads(json.dumps(outcome.summary()))
    assert summary["finished"]
    assert summary["rows"] == packed.TEST_ROWS
    assert set(summary["seconds"]) >= {"fallback", "verify", "blend", "contexts", "total", *outcome.weights}
    outcome.save(tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere" / "outcome.json").read_text()) == summary


def test_inference_calls_no_other_machine(shop: Workshop, tmp_path: Path) -> None:
    """Neither does its scoring process: both are guarded."""
    seal = tmp_path / "seal"
    seal.mkdir()
    shutil.copyfile(guard.__file__, seal / "sitecustomize.py")
    code = "import sys, kit; kit.infer(sys.argv[3:], test=sys.argv[1], out=sys.argv[2])"
    arguments = [str(shop.competition / "test.csv"), str(tmp_path / "submission.csv"), str(shop.members["reader"])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(seal), str(ROOT))), "KIT_INPUT": str(shop.bundles)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not (seal / guard.LOG).exists()
    assert_valid(tmp_path, shop.competition / "test.csv")
    assert not is_fallback(tmp_path)


def test_the_recipe_inside_a_bundle_is_the_one_it_was_trained_with(shop: Workshop) -> None:
    for name, folder in shop.members.items():
        assert Recipe.load(folder / "recipe.toml").digest == Recipe.load(shop.root / f"{name}.toml").digest
