"""Questions, their features, loss, decoding, and the submission's rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kit.data.tables import Table
from kit.errors import ConfigError, DataError
from kit.metrics import map_at_k
from kit.models.tokens import HFTokens
from kit.tasks import Feature
from kit.tasks.multiple_choice import LETTERS, MultipleChoice, Question
from tests import tiny

TASK = MultipleChoice()


def table(**columns: list[str]) -> Table:
    return Table("some.csv", pd.DataFrame(columns, dtype=object))


def question_table(**changes: Any) -> Table:
    columns = {"id": ["7", "x"], "prompt": ["Why?", " How? "], "A": ["a", "c"], "B": ["b", "d"], "answer": ["B", "A"]}
    columns.update(changes)
    return table(**{name: values for name, values in columns.items() if values is not None})


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> HFTokens:
    return tiny.tokens(tmp_path_factory.mktemp("tokens"))


def words(tokens: HFTokens, ids: Any) -> str:
    return tokens._tokenizer.decode(list(ids), skip_special_tokens=False)


def normal(text: str) -> str:
    """Letters and digits only, as an uncased tokenizer without accents may give them back."""
    return "".join(letter for letter in text.lower() if letter.isascii() and letter.isalnum())


# reading


def test_read_keeps_every_text_as_it_is_and_the_order() -> None:
    found = TASK.read(question_table(context=["c1", ""]))
    assert found == [Question("7", "Why?", ("a", "b"), 1, "c1"), Question("x", " How? ", ("c", "d"), 0, "")]


def test_read_without_answers_and_contexts() -> None:
    assert TASK.read(question_table(answer=None)) == [Question("7", "Why?", ("a", "b")), Question("x", " How? ", ("c", "d"))]


@pytest.mark.parametrize("options", range(2, 27))
def test_read_takes_any_number_of_options_in_any_order_of_columns(options: int, tmp_path: Path) -> None:
    letters = LETTERS[:options]
    columns = {letter: [f"option {letter}"] for letter in reversed(letters)}
    (found,) = TASK.read(table(answer=[letters[-1]], **columns, prompt=["p"], id=["0"]))
    assert found == Question("0", "p", tuple(f"option {letter}" for letter in letters), options - 1)


def test_read_takes_duplicate_and_blank_options_and_spaces_around_the_answer() -> None:
    (found,) = TASK.read(table(id=["0"], prompt=[""], A=["same"], B=["same"], C=["  "], answer=[" B "]))
    assert found == Question("0", "", ("same", "same", "  "), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, r"some\.csv: column 'prompt' is missing \(columns: id, A, B, answer\)"),
        ({"id": None}, r"some\.csv: column 'id' is missing"),
        ({"A": None}, r"some\.csv: column 'A' is missing: options are columns A, B, … without a gap"),
        ({"B": None}, r"some\.csv: column 'B' is missing"),
        ({"D": ["x", "y"]}, r"some\.csv: column 'C' is missing"),
        ({"A": ["a", " "], "B": ["b", ""]}, r"some\.csv: row 2 \(id 'x'\), column 'A' = ' ': every option is blank"),
        ({"answer": ["B", "C"]}, r"some\.csv: row 2 \(id 'x'\), column 'answer' = 'C': the answer must be one of A, B"),
        ({"answer": ["b", "A"]}, r"row 1 .*column 'answer' = 'b': the answer must be one of A, B"),
        ({"answer": ["", "A"]}, r"row 1 .*column 'answer' = '': the answer must be one of A, B"),
        ({"answer": ["AB", "A"]}, r"row 1 .*column 'answer' = 'AB': the answer must be one of A, B"),
        ({"B": ["", "d"]}, r"row 1 .*column 'answer' = 'B': the answer names a blank option"),
    ],
)
def test_read_refuses_and_says_where(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASK.read(question_table(**changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, r"task\.label_smoothing = 1.0: give a number from 0 to below 1"),
        ({"label_smoothing": -0.1}, r"task\.label_smoothing"),
        ({"label_smoothing": float("nan")}, r"task\.label_smoothing"),
        ({"max_length": 7}, r"task\.max_length = 7"),
        ({"top": 0}, r"task\.top = 0"),
        ({"distill": 1.1}, r"task\.distill = 1.1, task\.temperature = 1.0: give a share from 0 to 1 and a temperature above 0"),
        ({"distill": float("nan")}, r"task\.distill = nan"),
        ({"temperature": 0.0}, r"task\.temperature = 0.0"),
        ({"temperature": float("inf")}, r"task\.temperature = inf"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultipleChoice(**settings)


def test_queries_are_the_prompt_or_the_prompt_with_its_options() -> None:
    question = Question("0", "Why?", ("a", "b"))
    assert TASK.queries([question], "prompt") == ["Why?"]
    assert TASK.queries([question], "prompt_options") == ["Why? a b"]
    assert TASK.queries([], "prompt") == []


# shuffling


@given(st.lists(st.text(max_size=4), min_size=2, max_size=26), st.data(), st.integers(0, 2**32 - 1))
def test_shuffling_moves_the_label_with_its_option(options: list[str], data: st.DataObject, seed: int) -> None:
    numbered = tuple(f"{i}{option}" for i, option in enumerate(options))
    question = Question("0", "p", numbered, data.draw(st.sampled_from([None, *range(len(options))])), "c")
    (shuffled,) = TASK.augment([question], np.random.default_rng(seed))
    assert sorted(shuffled.options) == sorted(numbered)
    assert replace(shuffled, options=question.options, answer=question.answer) == question
    if question.answer is None:
        assert shuffled.answer is None
    else:
        assert shuffled.answer is not None and shuffled.options[shuffled.answer] == numbered[question.answer]


def test_shuffling_moves_what_the_teacher_says_with_its_option() -> None:
    said = dict(zip("abcde", (0.1, 0.2, 0.3, 0.4, 0.0), strict=True))
    examples = [Question(str(row), "p", tuple(said), 2, soft=tuple(said.values())) for row in range(20)]
    shuffled = TASK.augment(examples, np.random.default_rng(0))
    assert len({question.options for question in shuffled}) > 10
    assert all(question.soft == tuple(said[option] for option in question.options) for question in shuffled)


def test_every_question_gets_an_order_of_its_own_and_every_epoch_another() -> None:
    examples = [Question(str(row), "p", ("a", "b", "c", "d", "e"), 2) for row in range(50)]
    rng = np.random.default_rng(0)
    first, second = TASK.augment(examples, rng), TASK.augment(examples, rng)
    assert len({question.options for question in first}) > 20
    assert [question.options for question in first] != [question.options for question in second]
    assert [question.id for question in first] == [question.id for question in examples]
    assert {question.answer for question in first} == set(range(5)), "no place of the label is preferred"


def test_shuffling_can_be_turned_off() -> None:
    examples = tiny.questions(5)
    assert list(MultipleChoice(shuffle_options=False).augment(examples, np.random.default_rng(0))) == examples


# encoding: what is cut


def test_a_feature_holds_one_sequence_per_option_of_context_prompt_and_option(tokens: HFTokens) -> None:
    (question,) = tiny.questions(1)
    (feature,) = MultipleChoice(max_length=64).encode([question], tokens)
    assert (feature.row, len(feature.encodings)) == (0, 5)
    for option, encoding in zip(question.options, feature.encodings, strict=True):
        ids, segment = encoding["input_ids"], encoding["segment"]
        assert normal(words(tokens, ids[segment == 0])) == normal(question.context)
        assert normal(words(tokens, ids[segment == 1])) == normal(f"{question.prompt} {option}")


@given(context=st.integers(0, 60), prompt=st.integers(0, 70), option=st.integers(1, 12), max_length=st.integers(8, 70))
def test_only_the_context_is_cut_and_then_the_beginning_of_the_prompt(tokens: HFTokens, context: int, prompt: int, option: int, max_length: int) -> None:
    question = Question("0", "text " * prompt, ("light " * option, "b"), 0, "snow " * context)
    encoding = MultipleChoice(max_length=max_length).encode([question], tokens)[0].encodings[0]
    ids, segment = encoding["input_ids"], encoding["segment"]
    context_words, pair_words = words(tokens, ids[segment == 0]).split(), words(tokens, ids[segment == 1]).split()
    room = tiny.POSITIONS - 3
    whole = ["text"] * prompt + ["light"] * option
    assert pair_words == whole[-room:], "uncut unless the model has no positions for it, and then the option stays"
    assert context_words == ["snow"] * max(0, min(context, min(max_length, tiny.POSITIONS) - 3 - len(whole)))
    assert len(ids) <= tiny.POSITIONS and words(tokens, ids[segment == -1]) == "[CLS] [SEP] [SEP]"


def test_the_end_of_an_option_longer_than_the_model_stays(tokens: HFTokens) -> None:
    question = Question("0", "text", (" ".join(["snow"] * 100 + ["light"]), "b"), 0, "entropy")
    encoding = TASK.encode([question], tokens)[0].encodings[0]
    pair = words(tokens, encoding["input_ids"][encoding["segment"] == 1]).split()
    assert pair == ["snow"] * 60 + ["light"]


def test_features_do_not_depend_on_the_other_examples(tokens: HFTokens) -> None:
    examples = tiny.questions(4)
    together = TASK.encode(examples, tokens)
    for row, question in enumerate(examples):
        (alone,) = TASK.encode([question], tokens)
        assert together[row].row == row
        assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(alone.encodings, together[row].encodings, strict=True))
    assert TASK.encode([], tokens) == []


def test_collate_gives_target_only_when_every_feature_has_an_answer(tokens: HFTokens) -> None:
    known, unknown = TASK.encode(tiny.questions(3), tokens), TASK.encode(tiny.questions(2, answers=False), tokens)
    batch = TASK.collate(known, tokens)
    assert batch["target"].tolist() == [0, 3, 1] and batch["target"].dtype == torch.int64
    assert batch["input_ids"].shape[0] == 15 and batch["blank"].shape == (3, 5) and not batch["blank"].any()
    assert "target" not in TASK.collate([*known, *unknown], tokens)


# scores and loss


def test_scores_are_one_row_per_question_and_blank_options_come_last(tokens: HFTokens) -> None:
    question = Question("0", "p", ("a", " ", "c"), 2)
    batch = TASK.collate(TASK.encode([question, replace(question, options=("a", "b", "c"))], tokens), tokens)
    output = torch.tensor([[-3e3], [9.0], [0.5], [1.0], [2.0], [3.0]])
    scores = TASK.scores(output, batch)
    assert scores[0].tolist()[0] == -3e3 and scores[0, 1] < -3e3 and scores[0, 2] == 0.5
    assert scores[1].tolist() == [1.0, 2.0, 3.0]
    assert torch.isfinite(scores.half()).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_loss_is_torchs_where_no_option_is_blank(smoothing: float) -> None:
    scores = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 3
    target = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    ours = MultipleChoice(label_smoothing=smoothing).loss(scores, {"target": target, "blank": torch.zeros(7, 5, dtype=torch.bool)})
    torch.testing.assert_close(ours, F.cross_entropy(scores, target, label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_blank_option_changes_neither_loss_nor_gradient(smoothing: float) -> None:
    task = MultipleChoice(label_smoothing=smoothing)
    output = torch.tensor([[1.0, 2.0, 0.5]], requires_grad=True)
    blank = torch.tensor([[False, False, True]])
    loss = task.loss(task.scores(output.view(-1, 1), {"blank": blank}), {"target": torch.tensor([0]), "blank": blank})
    two = F.cross_entropy(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), label_smoothing=smoothing)
    torch.testing.assert_close(loss, two)
    loss.backward()
    assert output.grad is not None and output.grad[0, 2] == 0 and torch.isfinite(output.grad).all()


# a teacher


def taught(*soft: tuple[float, ...] | None, options: int = 3) -> list[Question]:
    return [Question(str(row), "p", tuple("abcde"[:options]), row % options, soft=one) for row, one in enumerate(soft)]


def loss_and_gradient(task: MultipleChoice, examples: list[Question], scores: torch.Tensor, tokens: HFTokens) -> tuple[torch.Tensor, torch.Tensor]:
    output = scores.clone().requires_grad_()
    batch = task.collate(task.encode(examples, tokens), tokens)
    loss = task.loss(task.scores(output.view(-1, 1), batch), batch)
    loss.backward()
    assert output.grad is not None
    return loss.detach(), output.grad


SCORES = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.0, 3.0]])
SOFT = ((0.2, 0.7, 0.1), (0.0, 0.5, 0.5))


def test_with_distill_1_the_gradient_is_that_of_cross_entropy_with_the_teacher(tokens: HFTokens) -> None:
    """By hand: softmax(scores) - soft, the mean over questions."""
    loss, gradient = loss_and_gradient(MultipleChoice(distill=1.0, label_smoothing=0.3), taught(*SOFT), SCORES, tokens)
    odds = np.exp(SCORES.double().numpy())
    p = odds / odds.sum(1, keepdims=True)
    np.testing.assert_allclose(gradient.numpy(), (p - np.array(SOFT)) / 2, atol=1e-6)
    assert float(loss) == pytest.approx(-(np.array(SOFT) * np.log(p)).sum(1).mean(), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_a_temperature_softens_teacher_and_student_and_keeps_the_size_of_gradients(tokens: HFTokens, temperature: float) -> None:
    """By hand: T² · (softmax(scores / T) - softmax(log soft / T)) / T."""
    _, gradient = loss_and_gradient(MultipleChoice(distill=1.0, temperature=temperature), taught(*SOFT), SCORES, tokens)
    student = F.softmax(SCORES / temperature, -1).numpy()
    teacher = np.array(SOFT) ** (1 / temperature)
    teacher /= teacher.sum(1, keepdims=True)
    np.testing.assert_allclose(gradient.numpy(), temperature * (student - teacher) / 2, atol=1e-6)


def test_the_share_mixes_the_two_losses(tokens: HFTokens) -> None:
    parts = [loss_and_gradient(MultipleChoice(distill=share, temperature=2.0), taught(*SOFT), SCORES, tokens) for share in (0.0, 1.0, 0.3)]
    for hard, soft, mixed in zip(*parts, strict=True):
        assert (hard - soft).abs().max() > 0.01
        torch.testing.assert_close(mixed, 0.7 * hard + 0.3 * soft)


def test_questions_without_a_teacher_have_their_answer_alone(tokens: HFTokens) -> None:
    task, nobody = MultipleChoice(distill=0.6), taught(None, None)
    batch = task.collate(task.encode(taught(SOFT[0], None), tokens), tokens)
    assert batch["soft"].dtype == torch.float32 and batch["soft"][1].isnan().all()
    torch.testing.assert_close(batch["soft"][0], torch.tensor(SOFT[0]))
    _, gradient = loss_and_gradient(task, taught(SOFT[0], None), SCORES, tokens)
    _, hard = loss_and_gradient(MultipleChoice(), nobody, SCORES, tokens)
    torch.testing.assert_close(gradient[1], hard[1])
    assert (gradient[0] - hard[0]).abs().max() > 0.01
    assert "soft" not in task.collate(task.encode(nobody, tokens), tokens)
    torch.testing.assert_close(loss_and_gradient(task, nobody, SCORES, tokens)[1], hard)


def test_what_a_teacher_gives_a_blank_option_is_shared_by_the_others(tokens: HFTokens) -> None:
    examples = [replace(taught((0.2, 0.2, 0.6))[0], options=("a", "b", " "))]
    loss, gradient = loss_and_gradient(MultipleChoice(distill=1.0), examples, SCORES[:1], tokens)
    two = F.softmax(SCORES[0, :2], -1)
    torch.testing.assert_close(gradient[0], torch.tensor([float(two[0]) - 0.5, float(two[1]) - 0.5, 0.0]))
    assert float(loss) == pytest.approx(-float(two.log().mean()), rel=1e-5)


def test_a_sure_teacher_is_the_answer(tokens: HFTokens) -> None:
    sure = taught((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    for soft, hard in zip(loss_and_gradient(MultipleChoice(distill=1.0), sure, SCORES, tokens), loss_and_gradient(TASK, sure, SCORES, tokens), strict=True):
        torch.testing.assert_close(soft, hard)


# decoding and rows


def test_decode_puts_each_feature_into_its_row_and_leaves_the_others_nan(tokens: HFTokens) -> None:
    examples = tiny.questions(4)
    features = TASK.encode(examples, tokens)
    prediction = TASK.decode([np.array([0, 1, 2, 3, 4.0]), np.array([5.0, 0, 0, 0, 0])], [features[2], features[0]], examples)
    assert prediction.shape == (4, 5) and prediction.dtype == np.float32
    assert np.isnan(prediction[[1, 3]]).all() and prediction[2].argmax() == 4 and prediction[0].argmax() == 0
    np.testing.assert_allclose(prediction[[0, 2]].sum(1), 1, rtol=1e-6)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(4)), elements=st.floats(-10, 10, width=32) | st.floats(width=32)))
@example(np.array([[3e38, -3e38, 0, 1]], np.float32))
def test_decode_is_torchs_softmax(scores: np.ndarray) -> None:
    features = [Feature(row, ()) for row in range(len(scores))]
    prediction = TASK.decode([*scores], features, tiny.questions(len(scores), 4))
    assert prediction.dtype == np.float32
    np.testing.assert_allclose(prediction, F.softmax(torch.from_numpy(scores), -1).numpy(), rtol=2e-6, atol=1e-30)


def test_decode_of_nothing_is_nan_and_of_no_example_is_empty() -> None:
    assert np.isnan(TASK.decode([], [], tiny.questions(2))).all()
    assert TASK.decode([], [], []).shape == (0, 0)
    assert len(TASK.rows(np.zeros((0, 0), np.float32), [])) == 0


ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)


@given(st.integers(2, 26), st.integers(1, 4), st.data())
def test_rows_name_distinct_letters_with_blank_options_last_whatever_the_scores(options: int, n: int, data: st.DataObject) -> None:
    any_score = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 0.5])
    prediction = data.draw(hnp.arrays(np.float32, (n, options), elements=any_score))
    texts = st.lists(st.sampled_from(["same", "", " ", "x"]), min_size=options, max_size=options).filter(lambda row: any(map(str.strip, row)))
    examples = [Question(data.draw(ids), "p", tuple(data.draw(texts))) for _ in range(n)]
    rows = TASK.rows(prediction, examples)
    assert list(rows.columns) == ["id", "prediction"] and rows["id"].tolist() == [question.id for question in examples]
    for text, question, scores in zip(rows["prediction"], examples, prediction, strict=True):
        letters = text.split(" ")
        chosen = [LETTERS.index(letter) for letter in letters]
        assert len(set(chosen)) == len(chosen) == min(3, options) and max(chosen) < options
        real = [index for index in chosen if question.options[index].strip()]
        assert chosen[: len(real)] == real, "no blank option above a real one"
        assert len(real) == min(len(chosen), sum(bool(option.strip()) for option in question.options)), "no blank one instead of a real one"
        values = [float(scores[index]) if np.isfinite(scores[index]) else -np.inf for index in real]
        assert values == sorted(values, reverse=True)


def test_rows_break_ties_by_the_order_of_options_and_put_what_is_not_finite_last() -> None:
    prediction = np.array([[0.1, 0.4, 0.1, 0.4, 0], [np.nan] * 5, [0, 0, np.nan, 0, 1], [np.inf, 0.1, -np.inf, 0.2, np.nan]], np.float32)
    assert TASK.rows(prediction, tiny.questions(4))["prediction"].tolist() == ["B D A", "A B C", "E A B", "D B A"]


def test_a_test_question_whose_options_are_all_blank_is_read_and_answered() -> None:
    (question,) = TASK.read(table(id=["0"], prompt=["p"], A=[""], B=[" "], C=[""], D=[""]))
    assert TASK.rows(np.full((1, 4), np.nan, np.float32), [question])["prediction"].tolist() == ["A B C"]


def test_top_sets_the_number_of_letters() -> None:
    prediction = np.array([[0.1, 0.4, 0.2, 0.3, 0]], np.float32)
    assert MultipleChoice(top=1).rows(prediction, tiny.questions(1))["prediction"].tolist() == ["B"]
    assert MultipleChoice(top=5).rows(prediction, tiny.questions(1))["prediction"].tolist() == ["B D C A E"]


def test_targets_strata_and_width() -> None:
    examples = [*tiny.questions(2), *tiny.questions(1, answers=False)]
    assert TASK.targets(examples).tolist() == TASK.strata(examples).tolist() == [0, 3, -1]
    assert TASK.targets(examples).dtype == np.int64
    assert (TASK.width(examples), TASK.width(tiny.questions(1, 26)), TASK.width([])) == (5, 26, 0)


# what the planner asks for


def test_the_short_view_has_half_the_tokens_and_is_scored_instead() -> None:
    task = MultipleChoice(max_length=51, top=2, label_smoothing=0.1)
    assert task.views() == {"short": (replace(task, max_length=25), False)}
    assert MultipleChoice(max_length=10).views()["short"].task.max_length == 8


def test_sizes_count_every_option_with_its_context_up_to_the_longest_sequence() -> None:
    questions = [Question("0", "p" * 8, ("a" * 4, "b" * 12), context="c" * 8), Question("1", "", ("", "x" * 400), None)]
    assert MultipleChoice(max_length=10).sizes(questions).tolist() == [8 + 10, 3 + 10]
    assert MultipleChoice(max_length=999).sizes(questions).tolist() == [8 + 10, 3 + 103]
    assert MultipleChoice(max_length=999).sizes(questions, np.array([0, 4])).tolist() == [6 + 8, 4 + 104]


def test_sizes_are_about_what_is_encoded(tokens: HFTokens) -> None:
    task, questions = MultipleChoice(max_length=48), tiny.questions(8)
    exact = np.array([feature.tokens for feature in task.encode(questions, tokens)])
    ratio = task.sizes(questions) / exact
    assert (ratio > 0.7).all() and (ratio < 1.4).all(), ratio


def test_merit_is_the_average_precision_at_top() -> None:
    prediction = np.array([[0.1, 0.5, 0.4], [0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [np.nan] * 3], np.float32)
    targets = np.array([1, 1, 2, 0])
    assert MultipleChoice(top=2).merit(prediction, targets).tolist() == [1, 0.5, 0, 1]
    assert TASK.merit(prediction, targets) == pytest.approx([1, 0.5, 1 / 3, 1])


def test_doubt_is_the_merit_that_a_row_does_not_expect_of_itself() -> None:
    prediction = np.array([[0, 1, 0, 0], [0.1, 0.2, 0.3, 0.4], [0.25] * 4, [np.nan] * 4, [0.5, 0.5, 0, np.inf]], np.float32)
    even = 1 - (1 + 1 / 2 + 1 / 3) / 4
    assert TASK.doubt(prediction) == pytest.approx([0, 1 - 0.4 - 0.3 / 2 - 0.2 / 3, even, even, even])
    assert MultipleChoice(top=1).doubt(prediction)[1] == pytest.approx(0.6)
    assert MultipleChoice(top=5).doubt(np.array([[0.25, 0.75]])) == pytest.approx([1 - 0.75 - 0.125])


@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_doubt_is_what_a_calibrated_row_loses_on_average(options: int, seed: int) -> None:
    p = np.random.default_rng(seed).dirichlet(np.ones(options))
    expected = sum(p[right] * TASK.merit(p[None], np.array([right]))[0] for right in range(options))
    assert TASK.doubt(p[None])[0] == pytest.approx(1 - expected)


def test_hints_are_the_shared_words_and_the_length_of_every_option() -> None:
    context = "A red FOX runs; the dog not."
    options = ("red fox", "Red Fox fox bird", " ", "blue")
    hints = TASK.hints([Question("0", "p", options, context=context), Question("1", "p", options, context=" \n")])
    assert [*hints] == ["overlap", "length"]
    np.testing.assert_allclose(hints["overlap"], [[1, 2 / 3, 0, 0], [np.nan] * 4], rtol=1e-6)
    assert hints["length"].tolist() == [[7, 16, 0, 4]] * 2


# reading submissions


def submission(*predictions: str) -> Table:
    return table(id=[str(row) for row in range(len(predictions))], prediction=list(predictions))


def answers(*letters: str, options: str = "") -> Table:
    n = len(letters)
    return table(id=[str(row) for row in range(n)], answer=list(letters), **{letter: ["text"] * n for letter in options})


def score(predicted: Table, right: Table) -> float:
    prediction, targets = TASK.parse(predicted, right)
    return map_at_k(prediction, targets)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [("A B C", "A", 1), ("A B C", "B", 1 / 2), ("A B C", "C", 1 / 3), ("A B C", "D", 0), ("E", "E", 1), ("E", "A", 0), ("E D", "A", 0), ("  B   A ", "A", 1 / 2)],
)
def test_parse_scores_one_row_as_the_site(prediction: str, answer: str, expected: float) -> None:
    assert score(submission(prediction), answers(answer)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ("", r"row 1 \(id '0'\), column 'prediction' = '': a prediction is 1 to 3 letters separated by spaces"),
        ("  ", r"a prediction is 1 to 3 letters"),
        ("A B C D", r"column 'prediction' = 'A B C D': a prediction is 1 to 3 letters separated by spaces"),
        ("A A B", r"column 'prediction' = 'A A B': a letter is named twice"),
        ("a B C", r"column 'prediction' = 'a B C': 'a' is no option \(A to E\)"),
        ("A B F", r"'F' is no option \(A to E\)"),
        ("A,B,C", r"'A,B,C' is no option"),
        ("ABC", r"'ABC' is no option"),
        ("A B Ä", r"'Ä' is no option"),
        ("1 2 3", r"'1' is no option"),
    ],
)
def test_parse_refuses_what_the_site_refuses(prediction: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASK.parse(submission(prediction), answers("A", options="ABCDE"))


def test_answers_without_the_options_mean_a_to_e_or_on_to_their_last_letter() -> None:
    assert score(submission("E D A"), answers("E")) == 1
    with pytest.raises(DataError, match=r"'F' is no option \(A to E\)"):
        TASK.parse(submission("F A B"), answers("E"))
    assert score(submission("F A B", "G A F"), answers("A", "G")) == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize(("top", "expected"), [(1, [0.0, 0.0]), (2, [0.5, 1.0]), (5, [0.5, 1.0])])
def test_the_metrics_look_at_as_many_letters_as_a_prediction_has(top: int, expected: list[float]) -> None:
    prediction, targets = np.array([[0.1, 0.4, 0.2, 0.3, 0]], np.float32), np.array([3])
    metrics = MultipleChoice(top=top).metrics
    assert next(iter(metrics)) == f"map@{top}"
    assert [metrics[f"map@{top}"](prediction, targets), metrics[f"accuracy@{top}"](prediction, targets)] == expected


def test_parse_names_the_row_that_is_wrong() -> None:
    with pytest.raises(DataError, match=r"row 2 \(id '1'\)"):
        TASK.parse(submission("A B C", "A B B"), answers("A", "B"))
    with pytest.raises(DataError, match=r"row 2 \(id '1'\), column 'answer' = 'b': the answer must be one of A, B"):
        TASK.parse(submission("A", "B"), answers("A", "b", options="AB"))


def test_check_finds_every_faulty_prediction_without_knowing_the_answers() -> None:
    predicted = submission("A B C", "A A", "E", "", "F", "A B C D")
    assert [(fault.row, fault.column, fault.why) for fault in TASK.check(predicted, None)] == [
        (1, "prediction", "a letter is named twice"),
        (3, "prediction", "a prediction is 1 to 3 letters separated by spaces"),
        (4, "prediction", "'F' is no option (A to E)"),
        (5, "prediction", "a prediction is 1 to 3 letters separated by spaces"),
    ]


def test_check_takes_the_options_from_the_test_set_or_else_from_the_answers() -> None:
    test_set = table(id=["0"], prompt=["why"], **{letter: ["x"] for letter in "ABC"})
    for known, expected in ((test_set, ["'D' is no option (A to C)"]), (None, []), (answers("G"), [])):
        assert [fault.why for fault in TASK.check(submission("D A"), known)] == expected
    assert TASK.check(submission("G"), answers("G")) == []


def test_parse_needs_its_columns() -> None:
    with pytest.raises(DataError, match=r"column 'prediction' is missing \(columns: id, answer\)"):
        TASK.parse(answers("A"), answers("A"))
    with pytest.raises(DataError, match=r"column 'answer' is missing \(columns: id, prediction\)"):
        TASK.parse(submission("A"), submission("A"))


@given(st.integers(3, 26), st.integers(1, 8), st.data())
def test_a_written_and_parsed_prediction_scores_the_same(options: int, n: int, data: st.DataObject) -> None:
    prediction = data.draw(hnp.arrays(np.float32, (n, options), elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, np.nan])))
    targets = np.array(data.draw(st.lists(st.integers(0, options - 1), min_size=n, max_size=n)))
    examples = [Question(str(row), "p", ("text",) * options) for row in range(n)]
    written = Table("written.csv", TASK.rows(prediction, examples))
    assert score(written, answers(*(LETTERS[target] for target in targets), options=LETTERS[:options])) == pytest.approx(map_at_k(prediction, targets))
