"""Essays, their features, losses, and the submission's rows."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kit import assemble
from kit.config import Recipe
from kit.data.tables import Table, read_table
from kit.errors import ConfigError, DataError
from kit.models.encoder import Encoder
from kit.models.tokens import HFTokens
from kit.tasks import Feature
from kit.tasks.essay_regression import Essay, EssayRegression
from tests import tiny

DATA = Path(__file__).parents[2] / os.environ.get("KIT_DATA", "../shared/data")
SIX = ("cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions")
TASK = EssayRegression(max_length=24)
TWO = EssayRegression(max_length=24, columns=("clear", "kind"), weights=(1.0, 3.0))


def table(**columns: list[str]) -> Table:
    return Table("some.csv", pd.DataFrame(columns, dtype=object))


def essay_table(**changes: Any) -> Table:
    columns = {"text_id": ["7", "x", "9"], "full_text": ["Why?", " Be\n\ncause. ", "So."], "clear": ["1.0", "2.5", "5"], "kind": ["3", " 4.5 ", "1e0"]}
    columns.update(changes)
    return table(**{name: values for name, values in columns.items() if values is not None})


def answers(**changes: Any) -> Table:
    return essay_table(full_text=None, **changes)


def essays(n: int, columns: int = 6) -> list[Essay]:
    """TEXTS over and over, with grades that differ."""
    grades = [tuple(1 + ((3 * row + 2 * k) % 9) / 2 for k in range(columns)) for row in range(n)]
    return [Essay(f"e{row}", tiny.TEXTS[row % len(tiny.TEXTS)], grades[row]) for row in range(n)]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> HFTokens:
    return tiny.tokens(tmp_path_factory.mktemp("tokens"))


# reading


def test_read_keeps_every_text_as_it_is_and_the_grades_in_the_order_of_the_columns() -> None:
    found = TWO.read(essay_table())
    assert found == [Essay("7", "Why?", (1.0, 3.0)), Essay("x", " Be\n\ncause. ", (2.5, 4.5)), Essay("9", "So.", (5.0, 1.0))]
    assert EssayRegression(columns=("kind", "clear")).read(essay_table())[1].grades == (4.5, 2.5)


def test_read_takes_other_names_of_columns_and_another_scale() -> None:
    task = EssayRegression(id_column="id", text_column="essay", columns=["mark"], low=-3, high=100)
    assert task.read(table(id=["1"], essay=["Yes."], mark=["-2.5"], other=["?"])) == [Essay("1", "Yes.", (-2.5,))]
    assert (task.outputs, task.width([]), task.columns) == (1, 1, ("mark",))


def test_a_test_set_has_no_grades_and_may_hold_a_blank_essay() -> None:
    found = TWO.read(essay_table(clear=None, kind=None, full_text=["Why?", " ", ""]))
    assert [essay.grades for essay in found] == [None] * 3
    assert np.isneginf(TWO.targets(found)).all() and (TWO.strata(found) == -1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_id": None, "textid": ["1", "2", "3"]}, r"some\.csv: column 'text_id' is missing \(did you mean 'textid'\?\)"),
        ({"full_text": None, "essay": ["a", "b", "c"]}, r"column 'full_text' is missing \(known: clear, essay, kind, text_id\)"),
        ({"kind": None}, r"column 'kind' is missing"),
        ({"text_id": ["7", "x", "7"]}, r"row 3, column 'text_id' = '7': row 1 has the same id: give every row its own"),
        ({"text_id": ["7", " ", "9"]}, r"row 2, column 'text_id' = ' ': the id is empty: give every row its own"),
        ({"full_text": ["a", " \n", "c"]}, r"row 2, column 'full_text' = ' \\n': the essay is blank: drop the row"),
        ({"clear": ["1", "", "2"]}, r"row 2, column 'clear' = '': is no number: give one from 1 to 5"),
        ({"clear": ["1", "3,5", "2"]}, r"row 2, column 'clear' = '3,5': is no number: give one from 1 to 5"),
        ({"clear": ["1", "nan", "2"]}, r"row 2, column 'clear' = 'nan': is no number"),
        ({"kind": ["1", "2", "inf"]}, r"row 3, column 'kind' = 'inf': is no number"),
        ({"kind": ["1", "2", "5.5"]}, r"row 3, column 'kind' = '5.5': is outside the scale from 1 to 5 \(task.low, task.high\)"),
        ({"kind": ["0.5", "2", "3"]}, r"row 1, column 'kind' = '0.5': is outside the scale from 1 to 5"),
    ],
)
def test_a_table_that_cannot_be_learnt_from_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        TWO.read(essay_table(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ()}, "give a name to each, and at least one of grades"),
        ({"columns": ("a", " ")}, "give a name to each"),
        ({"columns": ("a", "b", "a")}, "task.columns name 'a' 2 times"),
        ({"columns": ("text_id",)}, "name 'text_id' 2 times"),
        ({"weights": (1.0,)}, r"task.weights has 1 numbers, but task.columns 6 names: give one for each, or none"),
        ({"columns": ("a", "b"), "weights": (1.0, -1.0)}, r"task.weights = \[1.0, -1.0\]: give numbers from 0 on, not all of them 0"),
        ({"columns": ("a", "b"), "weights": (0, 0)}, "not all of them 0"),
        ({"columns": ("a", "b"), "weights": (math.nan, 1)}, "give numbers from 0 on"),
        ({"low": 5.0}, r"task.low = 5.0, task.high = 5.0: give the ends of the scale, the lower one first"),
        ({"high": math.inf}, "task.high = inf"),
        ({"objective": "rsme"}, r"task.objective = 'rsme' is unknown \(did you mean 'rmse'\?\)"),
        ({"max_length": 7}, "task.max_length = 7: give at least 8 tokens"),
        ({"long_length": 512}, r"task.long_length = 512, task.max_length = 512: give a greater length, or 0 for no such view"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EssayRegression(**settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.columns=cohesion", r"task.columns = 'cohesion': 'str' instances are not allowed as a Sequence value"),
        ('task.weights=[1,1,1,1,1,"2"]', r"task.weights = \[1, 1, 1, 1, 1, '2'\]: input should be a valid number"),
        ("task.target=x", "unknown key 'task.target'"),
        ("task.newline=1", "task.newline = 1: input should be a valid string"),
    ],
)
def test_a_recipe_with_wrong_values_is_refused_with_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble.make_task(Recipe.load("feedback_minilm", [override]))


def test_a_recipe_sets_columns_and_weights_as_lists() -> None:
    task = assemble.make_task(Recipe.load("feedback_minilm", ['task.columns=["a", "b"]', "task.weights=[1, 2.5]"]))
    assert (task.columns, task.weights, task.outputs) == (("a", "b"), (1, 2.5), 2)
    assert hash(task) == hash(assemble.make_task(Recipe.load("feedback_minilm", ['task.columns=["a", "b"]', "task.weights=[1, 2.5]"])))


# encoding and losses


def words(tokens: HFTokens, feature: Feature) -> list[str]:
    return [tokens._tokenizer.id_to_token(int(id_)) for id_ in feature.encodings[0]["input_ids"]]


def test_a_line_break_becomes_a_token_that_a_space_does_not(tmp_path: Path, tokens: HFTokens) -> None:
    texts = ["light speed", "light\nspeed", "light\n\nspeed", "light\r\nspeed", "light\rspeed"]
    for made in (tokens, tiny.tokens(tmp_path, byte_level=True)):
        spaced, *broken = [feature.encodings[0]["input_ids"].tolist() for feature in TASK.encode([Essay("1", text) for text in texts], made)]
        assert broken[0] != spaced and broken[0] == broken[2] == broken[3]
        assert len(broken[1]) > len(broken[0]) > len(spaced)
    plain = EssayRegression(max_length=24, newline="")
    assert len({tuple(feature.encodings[0]["input_ids"]) for feature in plain.encode([Essay("1", text) for text in texts], tokens)}) == 1
    named = EssayRegression(max_length=24, newline="snow")
    assert words(tokens, named.encode([Essay("1", texts[1])], tokens)[0]) == ["[CLS]", "light", "snow", "speed", "[SEP]"]


def test_an_essay_is_cut_to_the_tasks_length_and_the_models(tokens: HFTokens) -> None:
    text = " ".join(tiny.TEXTS)
    lengths = [EssayRegression(max_length=length).encode([Essay("1", text)], tokens)[0].tokens for length in (8, 24, 64, 500)]
    assert lengths == [8, 24, 64, 64]
    short, long = (TASK.views().get(name) for name in ("short", "long"))
    assert short is not None and short.task.max_length == 12 and not short.more and long is None
    seen = EssayRegression(max_length=24, long_length=40).views()
    assert seen["long"].more and seen["long"].task.encode([Essay("1", text)], tokens)[0].tokens == 40
    assert {view.task.long_length for view in seen.values()} == {0}


def test_a_batch_has_targets_only_when_all_its_essays_have(tokens: HFTokens) -> None:
    own = essays(3)
    batch = TASK.collate(TASK.encode(own, tokens), tokens)
    np.testing.assert_array_equal(batch["target"].numpy(), TASK.targets(own))
    assert batch["target"].dtype == torch.float32 and batch["input_ids"].shape[0] == 3
    assert "target" not in TASK.collate(TASK.encode([own[0], Essay("u", "unknown")], tokens), tokens)


def test_a_new_head_begins_in_the_middle_of_the_scale_and_a_quarter_is_its_unit() -> None:
    marks = EssayRegression(columns=("mark",), low=0, high=100)
    assert marks.scores(torch.tensor([[0.0], [1.0], [-2.0]]), {}).tolist() == [[50.0], [75.0], [0.0]]
    assert TASK.scores(torch.ones(1, 6), {}).tolist() == [[4.0] * 6]


def by_loop(objective: str, error: np.ndarray, weights: list[float]) -> float:
    """error (B, K) float64, in quarters of the scale."""
    columns = []
    for k in range(error.shape[1]):
        squares = [float(e) ** 2 for e in error[:, k]]
        smooth = [s / 2 if s < 1 else math.sqrt(s) - 0.5 for s in squares]
        each = {"smooth_l1": math.fsum(smooth), "mse": math.fsum(squares), "rmse": math.fsum(squares)}[objective] / len(squares)
        columns.append(math.sqrt(each) if objective == "rmse" else each)
    return math.fsum(w * c for w, c in zip(weights, columns, strict=True)) / math.fsum(weights)


@pytest.mark.parametrize("objective", ["smooth_l1", "rmse", "mse"])
@pytest.mark.parametrize("weights", [(), (1.0, 0.0, 2.5)])
@pytest.mark.parametrize("scale", [(1.0, 5.0), (0.0, 100.0)])
def test_the_loss_equals_a_plain_loop(objective: Any, weights: tuple[float, ...], scale: tuple[float, float]) -> None:
    task = EssayRegression(columns=("a", "b", "c"), weights=weights, objective=objective, low=scale[0], high=scale[1])
    rng = np.random.default_rng(0)
    values, targets = rng.uniform(*scale, (2, 7, 3))
    loss = task.loss(torch.tensor(values), {"target": torch.tensor(targets)})
    error = (values - targets) / ((scale[1] - scale[0]) / 4)
    assert float(loss) == pytest.approx(by_loop(objective, error, list(weights or (1.0,) * 3)), rel=1e-6)


@pytest.mark.parametrize("objective", ["smooth_l1", "rmse", "mse"])
def test_gradients_are_finite_where_the_prediction_is_exact(objective: Any) -> None:
    task = EssayRegression(objective=objective)
    values = torch.full((4, 6), 3.5, requires_grad=True)
    task.loss(values, {"target": torch.full((4, 6), 3.5)}).backward()
    assert values.grad is not None and torch.isfinite(values.grad).all()


def test_a_column_of_no_weight_is_not_learnt() -> None:
    values = torch.zeros(2, 2, requires_grad=True)
    EssayRegression(columns=("a", "b"), weights=(0.0, 1.0)).loss(values, {"target": torch.ones(2, 2)}).backward()
    assert values.grad is not None and values.grad[:, 0].abs().max() == 0 and values.grad[:, 1].abs().min() > 0


def test_grades_of_a_few_essays_are_learnt(tmp_path: Path) -> None:
    model, own = tiny.encoder(tmp_path, outputs=6, pooling="weighted"), essays(6)
    made = Encoder.tokens(tmp_path)
    batch = TASK.collate(TASK.encode(own, made), made)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        TASK.loss(TASK.scores(model(batch), batch), batch).backward()
        optimizer.step()
    with torch.inference_mode():
        features = TASK.encode(own, made)
        prediction = TASK.decode([*TASK.scores(model.eval()(batch), batch).numpy()], features, own)
    metric = TASK.metrics["neg_mcrmse"]
    middle = np.full((6, 6), 3.0, np.float32)
    assert metric(prediction, TASK.targets(own)) > 0.3 * metric(middle, TASK.targets(own))


# predictions and submissions


def test_decode_puts_rows_where_they_belong_and_nan_where_nobody_scored() -> None:
    features = [Feature(2, (), None), Feature(0, (), None)]
    prediction = TWO.decode([np.array([1.0, 2.0]), np.array([9.0, -4.0])], features, essays(3, 2))
    np.testing.assert_array_equal(prediction, np.array([[9, -4], [np.nan, np.nan], [1, 2]], np.float32))
    assert prediction.dtype == np.float32 and TWO.decode([], [], []).shape == (0, 2)


def test_rows_are_clipped_to_the_scale_and_the_middle_of_it_where_there_is_no_value() -> None:
    prediction = np.array([[0.2, 3.25], [7.0, np.nan], [-np.inf, np.inf]], np.float32)
    rows = TWO.rows(prediction, essays(3, 2))
    assert list(rows) == ["text_id", "clear", "kind"]
    assert rows.to_numpy().tolist() == [["e0", 1.0, 3.25], ["e1", 5.0, 3.0], ["e2", 3.0, 3.0]]
    assert list(TWO.rows(np.zeros((0, 2), np.float32), [])) == ["text_id", "clear", "kind"]


finite_or_not = st.one_of(st.floats(-9, 15, width=32), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(hnp.arrays(np.float32, (5, 2), elements=finite_or_not))
def test_what_is_written_has_no_fault_and_scores_what_the_prediction_scores(prediction: np.ndarray) -> None:
    own = essays(5, 2)
    targets = TWO.targets(own)
    written = TWO.rows(prediction, own).astype(str)
    submission = Table("sub.csv", written.iloc[::-1].reset_index(drop=True))
    known = Table("answers.csv", pd.DataFrame({"text_id": [one.id for one in own], **{c: targets[:, k].astype(str) for k, c in enumerate(TWO.columns)}}))
    assert TWO.check(submission, known) == TWO.check(submission, None) == []
    parsed, wanted = TWO.parse(submission, known)
    np.testing.assert_array_equal(wanted, targets[::-1])
    for name, metric in TWO.metrics.items():
        assert metric(parsed, wanted) == pytest.approx(metric(prediction, targets), abs=1e-5), name


def test_the_first_metric_decides_and_each_column_is_reported() -> None:
    own = essays(40)
    targets = TASK.targets(own)
    prediction = (targets + np.arange(6)).astype(np.float32) * np.float32(0.5) + 1.5
    values = {name: metric(prediction, targets) for name, metric in TASK.metrics.items()}
    assert list(values) == ["neg_mcrmse", *(f"neg_rmse_{name}" for name in SIX)]
    assert values["neg_mcrmse"] == pytest.approx(np.mean([values[f"neg_rmse_{name}"] for name in SIX]))
    clipped = prediction.clip(1, 5).astype(np.float64)
    assert values["neg_mcrmse"] == pytest.approx(-np.sqrt(np.square(clipped - targets).mean(0)).mean())


def test_merit_doubt_and_regret_are_those_of_values() -> None:
    own = essays(4, 2)
    targets = TWO.targets(own)
    prediction = targets + np.array([[0.0, 0.0], [0.5, 0.0], [np.nan, 0.0], [9.0, 9.0]], np.float32)
    filled = np.where(np.isfinite(prediction), prediction, 3).clip(1, 5)
    merit = TWO.merit(prediction, targets)
    np.testing.assert_allclose(merit, -np.square(filled.astype(np.float64) - targets).mean(1))
    assert merit.dtype == np.float64 and merit[0] == 0
    assert TWO.doubt(prediction).tolist() == [0, 0, 1, 0]
    belief = np.full((4, 2), 2.0, np.float32)
    np.testing.assert_allclose(TWO.regret(prediction, belief), np.square(filled - 2.0).mean(1), rtol=1e-6)
    assert TWO.regret(belief, belief).tolist() == [0] * 4
    better = targets + (prediction - targets) / 2
    assert TWO.merit(better, targets).mean() > merit.mean()


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"clear": ["1", "x", "5"]}, [(1, "clear", "is no number: give one from 1 to 5")]),
        ({"clear": ["1", "", "5"], "kind": ["1", "?", "6"]}, [(1, "clear", "is no number"), (2, "kind", "is outside the scale from 1 to 5")]),
        ({"kind": ["nan", "3", "-1"]}, [(0, "kind", "is no number"), (2, "kind", "is outside the scale")]),
    ],
)
def test_check_finds_the_first_fault_of_every_row_and_parse_refuses_it(changes: dict[str, Any], faults: list[tuple[int, str, str]]) -> None:
    submission = answers(**changes)
    for known in (answers(), None):
        found = TWO.check(submission, known)
        assert [fault[:2] for fault in found] == [fault[:2] for fault in faults]
        assert all(one.why.startswith(why) for one, (*_, why) in zip(found, faults, strict=True))
    row, column, why = faults[0]
    with pytest.raises(DataError, match=rf"some\.csv: row {row + 1}, column '{column}' = .*: {why}"):
        TWO.parse(submission, answers())


@pytest.mark.parametrize(
    ("submitted", "known", "message"),
    [
        ({"kind": None}, {}, r"some\.csv: column 'kind' is missing"),
        ({"text_id": None}, {}, r"column 'text_id' is missing"),
        ({"text_id": ["7", "x", "y"]}, {}, r"row 3, column 'text_id' = 'y': this id is not in some\.csv"),
        ({"text_id": ["7", "x", "x"]}, {}, r"row 3, column 'text_id' = 'x': row 2 has the same id"),
        ({"text_id": ["7", "x"], "clear": ["1", "1"], "kind": ["1", "1"]}, {}, r"text_id '9' of some\.csv is missing \(1 in all\): every essay needs a prediction"),
        ({}, {"kind": ["1", "", "1"]}, r"row 2, column 'kind' = '': is no number"),
        ({}, {"clear": None}, r"column 'clear' is missing"),
    ],
)
def test_a_submission_that_does_not_go_with_the_answers_is_refused_in_one_line(submitted: dict[str, Any], known: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        TWO.parse(answers(**submitted), answers(**known))
    assert "\n" not in str(error.value)


def test_check_refuses_a_submission_without_its_columns() -> None:
    for missing in ("text_id", "clear", "kind"):
        with pytest.raises(DataError, match=f"column '{missing}' is missing"):
            TWO.check(answers(**{missing: None}), None)


# what folds and the planner ask for


def test_strata_tell_half_points_apart_on_the_usual_scale_and_eighths_on_any() -> None:
    assert EssayRegression(columns=("a",)).strata([Essay("1", "x", (1 + k / 2,)) for k in range(9)]).ravel().tolist() == list(range(9))
    marks = EssayRegression(columns=("a",), low=0, high=100)
    assert marks.strata([Essay("1", "x", (grade,)) for grade in (0, 12.5, 49, 51, 100)]).ravel().tolist() == [0, 1, 4, 4, 8]


def test_sizes_and_hints_follow_the_characters() -> None:
    own = [Essay("1", "x" * chars) for chars in (0, 40, 10_000)]
    assert TASK.sizes(own).tolist() == [2, 12, 24]
    np.testing.assert_array_equal(TASK.sizes(own, np.array([1, 2, 3])), TASK.sizes(own))
    assert TASK.hints(own)["length"].tolist() == [[0] * 6, [40] * 6, [10_000] * 6]
    assert TASK.hints([])["length"].shape == (0, 6)


def test_queries_and_augmented_essays_are_the_essays() -> None:
    own = essays(3)
    assert TASK.queries(own, "prompt") == TASK.queries(own, "prompt_options") == [one.text for one in own]
    assert TASK.augment(own, np.random.default_rng(0)) == own


def test_an_essay_with_quotes_and_line_breaks_survives_a_file(tmp_path: Path) -> None:
    text = 'He said: "No, never."\n\nI, however, stayed.'
    frame = pd.DataFrame({"text_id": ["a"], "full_text": [text], "clear": [3.5], "kind": [4.0]})
    frame.to_csv(tmp_path / "train.csv", index=False)
    assert TWO.read(read_table(tmp_path / "train.csv", ids=None)) == [Essay("a", text, (3.5, 4.0))]


def test_the_real_essays_are_read_and_predicting_the_mean_scores_065() -> None:
    path = DATA / "fb3" / "train.csv.gz"
    if not path.is_file():
        pytest.skip("needs the development data (KIT_DATA)")
    task = EssayRegression()
    own = task.read(read_table(path, ids=None))
    targets = task.targets(own)
    assert len(own) == 3111 and targets.shape == (3111, 6)
    mean = np.broadcast_to(targets.mean(0), targets.shape)
    assert task.metrics["neg_mcrmse"](mean, targets) == pytest.approx(-0.65, abs=0.01)
    assert set(np.unique(task.strata(own))) == set(range(9))
