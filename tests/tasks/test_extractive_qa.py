"""kit.tasks.extractive_qa: windows, spans and the official figures."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from kit.data.squad import answers_json
from kit.data.tables import Table, read_table
from kit.errors import ConfigError, DataError
from kit.models.tokens import HFTokens
from kit.sample.readings import write_readings
from kit.tasks import Feature
from kit.tasks.extractive_qa import SPANS, Answer, ExtractiveQA, Reading, Span, as_prediction, as_spans
from kit.tasks.spans import NO_SPAN
from tests import tiny

DATA = Path(__file__).parents[2] / os.environ.get("KIT_DATA", "../shared/data")
TEXT = " ".join(tiny.TEXTS[:3])
TASK = ExtractiveQA(max_length=48, stride=12, max_question=12, max_answer=6)


def reading(answer: str | None, question: str = "Which share is high?", context: str = TEXT, id_: str = "q") -> Reading:
    known = None if answer is None else (Answer(answer, context.index(answer)),) if answer else ()
    return Reading(id_, question, context, known)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> HFTokens:
    return tiny.tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> HFTokens:
    return tiny.tokens(tmp_path_factory.mktemp("bytes"), byte_level=True)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_readings(tmp_path_factory.mktemp("readings"))


def table(rows: Sequence[dict[str, str]], source: str = "dev.csv") -> Table:
    return Table(source, pd.DataFrame(list(rows), dtype=object))


def planted(feature: Feature, at: tuple[int, int], value: float = -0.1) -> np.ndarray:
    """Scores (T, 2) of a window that begins and ends an answer at these positions."""
    score = np.full((feature.tokens, 2), -9.0, np.float32)
    score[at[0], 0] = score[at[1], 1] = value
    return score


# reading a table


def row(answers: str = '[{"text": "stood", "answer_start": 9}]', **changes: str) -> dict[str, str]:
    return {"id": "q1", "question": "Where?", "context": "The mill stood there.", "answers": answers} | changes


def test_read_gives_readings_with_their_answers_and_places() -> None:
    (one,) = ExtractiveQA().read(table([row('[{"text": "stood", "answer_start": 9}, {"text": "mill", "answer_start": 4}]', title="Mills")]))
    assert one == Reading("q1", "Where?", "The mill stood there.", (Answer("stood", 9), Answer("mill", 4)), "Mills")
    (asked,) = ExtractiveQA().read(table([{name: text for name, text in row().items() if name != "answers"}]))
    assert asked.answers is None
    (none,) = ExtractiveQA(no_answer=True).read(table([row("[]")]))
    assert none.answers == ()


BAD: dict[str, tuple[dict[str, str], str]] = {
    "no question": (row(question=" "), "column 'question' = ' ': the question is blank"),
    "no context": (row(context=""), "column 'context' = '': the context is blank"),
    "no answer": (row("[]"), "the question has no answer: set task.no_answer = true"),
    "no JSON": (row("stood"), 'a list of {"text"'),
    "no list": (row("{}"), 'a list of {"text"'),
    "null": (row("null"), 'a list of {"text"'),
    "texts": (row('["stood"]'), 'a list of {"text"'),
    "no start": (row('[{"text": "stood"}]'), 'a list of {"text"'),
    "start is a text": (row('[{"text": "stood", "answer_start": "9"}]'), 'a list of {"text"'),
    "answer is blank": (row('[{"text": " ", "answer_start": 3}]'), 'a list of {"text"'),
    "columns of lists": (row('{"text": ["stood"], "answer_start": [9]}'), 'a list of {"text"'),
    "elsewhere": (row('[{"text": "stood", "answer_start": 8}]'), "the context has ' stoo' at character 8, not 'stood'"),
    "behind the end": (row('[{"text": "stood", "answer_start": 99}]'), "the context has nothing at character 99"),
    "before the beginning": (row('[{"text": "stood", "answer_start": -5}]'), "the context has nothing at character -5"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_in_one_line(name: str) -> None:
    values, words = BAD[name]
    with pytest.raises(DataError) as error:
        ExtractiveQA().read(table([row(id="q0"), values]))
    text = str(error.value)
    assert text.startswith("dev.csv: row 2 (id 'q1'), column '") and words in text and "\n" not in text


@pytest.mark.parametrize("column", ["id", "question", "context"])
def test_a_missing_column_is_named(column: str) -> None:
    with pytest.raises(DataError, match=f"column '{column}' is missing"):
        ExtractiveQA().read(table([{name: text for name, text in row().items() if name != column}]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stride": 0}, "task.stride = 0"),
        ({"max_answer": 0}, "task.max_answer = 0"),
        ({"max_question": 0}, "task.max_question = 0"),
        ({"max_length": 203}, "task.max_length = 203 leaves no step beside task.max_question = 64 and task.stride = 128: give 204 tokens"),
        ({"no_answer_threshold": 1.0}, "task.no_answer = false"),
    ],
)
def test_settings_that_disagree_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExtractiveQA(**settings)
    ExtractiveQA(max_length=204)


# encoding


@pytest.mark.parametrize("kind", ["wordpiece", "bytes"])
def test_windows_cover_the_text_and_targets_lead_back_to_the_answer(kind: str, tokens: HFTokens, byte_level: HFTokens) -> None:
    made = tokens if kind == "wordpiece" else byte_level
    words = ["Albedo", "high albedo", "low one.", "second law", "the same for every observer", "source."]
    examples = [reading(word) for word in words]
    features = TASK.encode(examples, made)
    assert [feature.row for feature in features] == sorted(feature.row for feature in features)
    for place, word in enumerate(words):
        own = [feature for feature in features if feature.row == place]
        assert len(own) > 1
        covered = np.zeros(len(TEXT), bool)
        for feature in own:
            (window,) = feature.encodings
            assert feature.tokens <= 48
            offsets = window["offsets"][window["segment"] == 0]
            for start, stop in offsets:
                covered[start:stop] = True
            first, last = feature.target
            if first:
                assert TEXT[window["offsets"][first, 0] : window["offsets"][last, 1]].strip() == word
            else:
                assert last == 0 and not (offsets[0, 0] <= TEXT.index(word) and TEXT.index(word) + len(word) <= offsets[-1, 1])
        assert all(covered[k] for k in range(len(TEXT)) if TEXT[k] != " ")
        assert any(feature.target[0] for feature in own)
    assert not all(feature.target[0] for feature in features)


def test_no_answer_has_the_first_position_and_a_test_set_no_target(tokens: HFTokens) -> None:
    none, unknown = (ExtractiveQA(max_length=48, stride=12, max_question=12, no_answer=True).encode([reading(text)], tokens) for text in ("", None))
    assert {feature.target for feature in none} == {(0, 0)}
    assert {feature.target for feature in unknown} == {None}
    assert "target" not in TASK.collate(unknown, tokens)


def test_the_answer_that_most_gave_is_learnt() -> None:
    words = ("Albedo", "albedo", "albedo")
    answers = tuple(Answer(word, TEXT.index(word)) for word in words)
    assert _target_text(replace(reading("Albedo"), answers=answers)) == "albedo"
    assert _target_text(replace(reading("Albedo"), answers=answers[:2])) == "Albedo"
    assert _target_text(replace(reading("Albedo"), answers=(Answer(" is the ", TEXT.index(" is the ")),))) == "is the"


def _target_text(one: Reading) -> str:
    from kit.tasks.extractive_qa import _usual

    answer = _usual(one.answers or ())
    assert answer and one.context[answer.start : answer.stop] == answer.text
    return answer.text


def test_the_question_stands_first_in_every_window(tokens: HFTokens) -> None:
    features = ExtractiveQA(max_length=40, stride=6, max_question=10).encode([reading("high", context=TEXT * 3)], tokens)
    assert len(features) > 2
    for feature in features:
        segment = feature.encodings[0]["segment"]
        assert np.flatnonzero(segment == 1).max() < np.flatnonzero(segment == 0).min()
        assert segment[0] == -1, "where no answer has its place"


def test_a_long_question_is_cut_and_never_the_text(tokens: HFTokens) -> None:
    long = reading("Albedo", question="Which share is high? " * 50)
    features = TASK.encode([long], tokens)
    for feature in features:
        (window,) = feature.encodings
        assert 1 <= (window["segment"] == 1).sum() <= TASK.max_question
        assert feature.tokens <= 48
    assert sum(bool(feature.target[0]) for feature in features) >= 1
    odd = TASK.encode([reading("Albedo", question="\u200b"), reading("Albedo", question="word" * 400)], tokens)
    assert {feature.row for feature in odd} == {0, 1}


def test_a_model_without_room_is_refused_before_any_text_is_read(tmp_path: Path) -> None:
    small = tiny.tokens(tmp_path, limit=32)
    with pytest.raises(ConfigError, match=r"positions for 32 tokens leaves no step beside task\.max_question = 12 and task\.stride = 12"):
        TASK.encode([reading("Albedo", context="Albedo.")], small)


# scores and loss


def test_scores_are_log_probabilities_over_text_and_first_position(tokens: HFTokens) -> None:
    features = TASK.encode([reading("Albedo"), reading("high albedo", context=TEXT[:130])], tokens)
    batch = TASK.collate(features, tokens)
    output = torch.randn(*batch["input_ids"].shape, 2, generator=torch.Generator().manual_seed(0))
    output[batch["segment"] == 1] = 50.0  # the question shouts
    scores = TASK.scores(output, batch)
    open_ = batch["segment"] == 0
    open_[:, 0] = True
    assert torch.isfinite(scores).all()
    assert (scores[~open_] < -1000).all()
    torch.testing.assert_close((scores.exp() * open_[..., None]).sum(1), torch.ones(len(features), 2))
    expected = []
    for index, feature in enumerate(features):
        for end in (0, 1):
            values = output[index, open_[index], end].double()
            expected.append(values.logsumexp(0) - output[index, feature.target[end], end].double())
    torch.testing.assert_close(TASK.loss(scores, batch).double(), torch.stack(expected).mean())


# decoding


def brute_force(scores: list[np.ndarray], features: list[Feature], context: str, longest: int) -> dict[tuple[int, int], float]:
    """Every span of every window, by loops."""
    found: dict[tuple[int, int], float] = {}
    for score, feature in zip(scores, features, strict=True):
        (window,) = feature.encodings
        text = [k for k in range(len(window["segment"])) if window["segment"][k] == 0 and window["offsets"][k][1] > window["offsets"][k][0]]
        for a, first in enumerate(text):
            for last in text[a : a + longest]:
                start, stop = int(window["offsets"][first][0]), int(window["offsets"][last][1])
                part = context[start:stop]
                start, stop = start + len(part) - len(part.lstrip()), start + len(part.rstrip())
                value = float(score[first, 0]) + float(score[last, 1])
                if stop > start:
                    found[start, stop] = max(value, found.get((start, stop), -np.inf))
    return found


@pytest.mark.parametrize("kind", ["wordpiece", "bytes"])
@pytest.mark.parametrize("seed", range(5))
def test_decode_finds_the_best_spans_of_all_windows(kind: str, seed: int, tokens: HFTokens, byte_level: HFTokens) -> None:
    made = tokens if kind == "wordpiece" else byte_level
    rng = np.random.default_rng(seed)
    examples = [reading("Albedo"), reading("high albedo", context=TEXT[:130])]
    features = TASK.encode(examples, made)
    scores = [rng.normal(-4, 2, (feature.tokens + 3, 2)).astype(np.float32) for feature in features]  # 3: padding of a batch
    prediction = TASK.decode(scores, features, examples)
    assert prediction.shape == (2, 3 * SPANS) and prediction.dtype == np.float32
    for place, one in enumerate(examples):
        own = [k for k, feature in enumerate(features) if feature.row == place]
        every = brute_force([scores[k] for k in own], [features[k] for k in own], one.context, TASK.max_answer)
        best = sorted(every.items(), key=lambda item: -item[1])[:SPANS]
        assert [(span.start, span.stop) for span in as_spans(prediction[place])] == [span for span, _ in best]
        assert [span.log_p for span in as_spans(prediction[place])] == pytest.approx([value for _, value in best], abs=1e-5)
    np.testing.assert_array_equal(TASK.decode(scores[::-1], features[::-1], examples), prediction)


def test_spans_stay_within_the_text_and_the_limit(tokens: HFTokens) -> None:
    example = reading("Albedo")
    features = TASK.encode([example], tokens)
    scores = []
    for feature in features:
        score = np.full((feature.tokens, 2), -9.0, np.float32)
        score[feature.encodings[0]["segment"] != 0] = 0.0  # what is no text seems best
        scores.append(score)
    for span in as_spans(TASK.decode(scores, features, [example])[0]):
        assert 0 <= span.start < span.stop <= len(TEXT)
        assert span.log_p == pytest.approx(-18)
    first, last = (int(k) for k in np.flatnonzero(features[0].encodings[0]["segment"] == 0)[[2, 9]])
    best = as_spans(TASK.decode([planted(features[0], (first, last))], features[:1], [example])[0])[0]
    assert best.log_p < -9  # eight tokens are more than max_answer
    longer = replace(TASK, max_answer=8)
    assert as_spans(longer.decode([planted(features[0], (first, last))], features[:1], [example])[0])[0].log_p == pytest.approx(-0.2)


def test_rows_that_nobody_scored_are_nan_and_few_spans_are_filled_up(tokens: HFTokens) -> None:
    examples = [reading("Albedo"), reading("Snow", context="Snow"), reading("Albedo")]
    features = [feature for feature in TASK.encode(examples, tokens) if feature.row == 1]
    prediction = TASK.decode([np.full((feature.tokens, 2), -1.0, np.float32) for feature in features], features, examples)
    assert np.isnan(prediction[[0, 2]]).all()
    spans = as_spans(prediction[1])
    assert Span(0, 4, -2.0) in spans and 1 <= len(spans) < SPANS and (prediction[1, 3 * len(spans) :].reshape(-1, 3) == np.float32(NO_SPAN)).all()
    assert TASK.decode([], [], []).shape == (0, 3 * SPANS)
    broken = [np.full((feature.tokens, 2), np.nan, np.float32) for feature in features]
    assert np.isnan(TASK.decode(broken, features, examples)).all()


def test_no_answer_needs_every_window_and_the_threshold(tokens: HFTokens) -> None:
    task = replace(TASK, no_answer=True)
    example = reading("")
    features = task.encode([example], tokens)
    text = int(np.flatnonzero(features[0].encodings[0]["segment"] == 0)[0])
    scores = [planted(feature, (0, 0), -0.25) for feature in features]
    assert as_spans(task.decode(scores, features, [example])[0])[0] == (-1, -1, -0.5)
    scores[0] = planted(features[0], (text, text), -0.5)
    scores[0][0] = -1.0  # this window says "no answer" with -2, and its span with -1
    spans = as_spans(task.decode(scores, features, [example])[0])
    assert spans[0].start >= 0 and spans[0].log_p == pytest.approx(-1) and spans[1] == (-1, -1, -2.0)
    brave = replace(task, no_answer_threshold=-1.5)
    assert as_spans(brave.decode(scores, features, [example])[0])[0] == (-1, -1, -0.5)
    assert all(span.start >= 0 for span in as_spans(TASK.decode(scores, features, [example])[0]))


def test_targets_planted_in_scores_come_back_as_right_answers(tokens: HFTokens, sample: Path) -> None:
    known = read_table(sample / "test_answers.json")
    task = ExtractiveQA(max_length=60, stride=20, max_question=24)
    examples = task.read(known)
    features = task.encode(examples, tokens)
    scores = [planted(feature, feature.target) for feature in features]
    prediction = task.decode(scores, features, examples)
    assert {name: metric(prediction, task.targets(examples)) for name, metric in task.metrics.items()} == dict.fromkeys(task.metrics, 1.0)
    submission = task.rows(prediction, examples)
    assert task.check(table(submission.to_dict("records")), known) == []
    parsed, targets = task.parse(table(submission.to_dict("records")), known)
    assert {name: metric(parsed, targets) for name, metric in task.metrics.items()} == dict.fromkeys(task.metrics, 1.0)


def test_a_test_set_is_read_scored_and_answered_whatever_stands_in_it(tokens: HFTokens) -> None:
    rows = [{"id": id_, "question": question, "context": context} for id_, question, context in (("a", "", TEXT), ("b", " Why \n so? ", " "), ("c", "", ""))]
    examples = TASK.read(table([*rows, {"id": "d", "question": "Why?", "context": "\u200b\x01"}]))
    features = TASK.encode(examples, tokens)
    prediction = TASK.decode([np.full((feature.tokens, 2), -1.0, np.float32) for feature in features], features, examples)
    assert np.isfinite(prediction[:, :3]).all()
    for some in (prediction, np.full_like(prediction, np.nan)):
        submission = TASK.rows(some, examples)
        assert TASK.check(table(submission.to_dict("records")), None) == []
        assert submission["answer"].tolist()[1:3] == ["Why so?", "?"]


# what predictions are worth


PUBLISHED = {
    "bert_ensemble": (85.863, 92.047), "r_net_plus": (82.437, 88.591), "slqa_plus": (81.992, 88.487), "match_lstm": (67.690, 77.073),
    "logistic_regression": (40.508, 51.159),
}  # fmt: skip


@pytest.mark.parametrize("system", PUBLISHED)
def test_published_predictions_have_their_official_figures(system: str) -> None:
    folder = DATA / "squad"
    if not folder.is_dir():
        pytest.skip("needs the development data (KIT_DATA)")
    known = read_table(folder / "squad_dev_v1.1_dev.json.gz")
    given = read_table(folder / "predictions" / f"{system}.json.gz").frame
    said = dict(zip(given["id"], given["answer"], strict=True))
    rows = [{"id": id_, "answer": said.get(id_, "")} for id_ in known.frame["id"]]  # a question without a prediction counts 0
    task = ExtractiveQA(no_answer=True)
    prediction, targets = task.parse(table(rows), known)
    exact, f1 = (100 * task.metrics[name](prediction, targets) for name in ("em", "f1"))
    assert (exact, f1) == (pytest.approx(PUBLISHED[system][0], abs=0.001), pytest.approx(PUBLISHED[system][1], abs=0.001))


ANSWERS = table([row(id="a"), row('[{"text": "The mill", "answer_start": 0}, {"text": "mill", "answer_start": 4}]', id="b")])


def submitted(*answers: str) -> Table:
    return table([{"id": id_, "answer": answer} for id_, answer in zip("ab", answers, strict=False)], "mine.csv")


def values(*answers: str, known: Table = ANSWERS) -> dict[str, list[float]]:
    task = ExtractiveQA()
    prediction, targets = task.parse(submitted(*answers), known)
    return {name: [metric(prediction[[k]], targets[[k]]) for k in range(len(answers))] for name, metric in task.metrics.items()}


def test_every_metric_says_what_its_name_says() -> None:
    found = values("mill stood", "the mill")
    assert found["f1"] == pytest.approx([2 / 3, 1])
    assert found["em"] == [0, 1]
    assert found["precision"] == [0.5, 1]
    assert found["recall"] == [1, 1]
    assert found["start_accuracy"] == [0, 0]  # "the mill" in lower case does not stand in the text
    assert found["end_accuracy"] == [1, 0]
    assert values("stood", "mill")["start_accuracy"] == [1, 1]


def test_an_answer_is_taken_where_it_is_most_right() -> None:
    context = "Red, blue and red; red."
    known = table([row('[{"text": "red", "answer_start": 19}]', context=context)])
    prediction, targets = ExtractiveQA().parse(submitted("red"), known)
    assert as_spans(prediction[0])[0][:2] == (19, 22)
    assert json.loads(targets[0])["context"] == context


def test_an_answer_that_is_not_in_the_text_is_measured_as_it_is() -> None:
    found = values("stood .", "a mill, perhaps (mill)")
    assert found["f1"] == pytest.approx([1, 0.5])
    assert found["em"] == [1, 0]


def test_a_blank_answer_is_a_fault_unless_there_may_be_none() -> None:
    task, none = ExtractiveQA(), table([row(id="a"), row("[]", id="b")])
    (fault,) = task.check(submitted("x", " "), ANSWERS)
    assert (fault.row, fault.column) == (1, "answer") and "blank" in fault.why
    assert [one.row for one in task.check(submitted("", "x"), None)] == [0]
    assert task.check(submitted("x", ""), none) == ExtractiveQA(no_answer=True).check(submitted("x", ""), ANSWERS) == []
    assert values("x", "", known=none)["f1"] == [0, 1]
    assert values("x", "mill", known=none)["f1"] == [0, 0]
    with pytest.raises(DataError, match=r"mine\.csv: row 2 \(id 'b'\), column 'answer' = ' ': the answer is blank"):
        task.parse(submitted("x", " "), ANSWERS)
    with pytest.raises(DataError, match="column 'answer' is missing"):
        task.check(ANSWERS, None)
    with pytest.raises(DataError, match="column 'answers' is missing"):
        task.parse(submitted("x", "y"), submitted("x", "y"))


def test_merit_is_the_f1_of_the_best_span_and_0_without_one() -> None:
    task, examples = ExtractiveQA(), [replace(reading("high albedo"), id=str(k)) for k in range(4)]
    start = TEXT.index("high albedo")
    spans = [[Span(start, start + 11, -0.1), Span(0, 6, -3.0)], [Span(start, start + 4, -0.1)], [Span(0, 6, -0.1), Span(start, start + 11, -3.0)], []]
    merit = task.merit(as_prediction(spans), task.targets(examples))
    assert merit == pytest.approx([1, 2 / 3, 2 / 3, 0])  # "Albedo" is one word of two
    assert task.metrics["f1"](as_prediction(spans), task.targets(examples)) == pytest.approx(merit.mean())
    assert next(iter(task.metrics)) == "f1"


def test_doubt_grows_as_the_best_span_is_less_likely() -> None:
    prediction = as_prediction([[Span(0, 5, 0.0)], [Span(0, 5, -0.5), Span(1, 5, -1.0)], [Span(-1, -1, -3.0)], []])
    doubt = ExtractiveQA().doubt(prediction)
    assert doubt == pytest.approx([0, 1 - np.exp(-0.5), 1 - np.exp(-3), 1])


def test_regret_is_0_for_the_same_best_span_and_1_for_none_of_its_characters() -> None:
    task = ExtractiveQA()
    belief = as_prediction([[Span(0, 10, -0.1)], [Span(0, 10, -0.1)], [Span(0, 10, -0.1)], [Span(-1, -1, -0.1)], [Span(-1, -1, -0.1)]])
    other = as_prediction([[Span(0, 10, -2.0)], [Span(0, 5, -0.1)], [Span(20, 30, -0.1)], [Span(-1, -1, -5.0)], [Span(0, 9, -0.1)]])
    assert task.regret(other, belief) == pytest.approx([0, 1 / 3, 1, 0, 1])
    assert task.regret(as_prediction([[]] * 5), belief) == pytest.approx([1] * 5)
    both = as_prediction([[Span(0, 10, np.log(0.6)), Span(20, 30, np.log(0.2))]])
    assert task.regret(as_prediction([[Span(20, 30, -0.1)]]), both) == pytest.approx([0.5])  # 3 to 1 the first
    assert task.regret(both, as_prediction([[]])) == pytest.approx([0])


# submissions


def test_rows_are_texts_in_one_line() -> None:
    context = "One\ntwo  three. Snow has\nan albedo, and soil has none. The end."
    examples = [Reading(id_, "What has snow?", context) for id_ in "abcd"]
    prediction = as_prediction([[Span(0, 14, -1.0)], [], [Span(-1, -1, -1.0), Span(0, 3, -2.0)], [Span(3, 4, -1.0)]])
    rows = ExtractiveQA().rows(prediction, examples)
    like = "Snow has an albedo, and soil has none."  # the sentence that has most words of the question
    assert rows.to_dict("list") == {"id": list("abcd"), "answer": ["One two three", like, like, like]}
    assert ExtractiveQA(no_answer=True).rows(prediction, examples)["answer"].tolist() == ["One two three", like, "", like]


def test_both_forms_of_a_submission_are_read_alike(tmp_path: Path) -> None:
    rows = pd.DataFrame({"id": ["a", "b"], "answer": ['the "old" mill, 1843', "NA"]})
    rows.to_csv(tmp_path / "mine.csv", index=False)
    (tmp_path / "mine.json").write_text(answers_json(rows["id"].tolist(), rows["answer"].tolist()), encoding="utf-8")
    (tmp_path / "mine.json.gz").write_bytes(gzip.compress((tmp_path / "mine.json").read_bytes()))
    for name in ("mine.csv", "mine.json", "mine.json.gz"):
        assert read_table(tmp_path / name).frame.equals(rows.astype(object)), name


def test_hints_are_sentences_the_most_alike_first() -> None:
    examples = [Reading("a", "Who built the mill?", "It stood there. Ada built the mill! In 1.5 years?"), Reading("b", "Where?", "no end")]
    (first, second) = (as_spans(row) for row in ExtractiveQA().hints(examples)["overlap"])
    assert [examples[0].context[span.start : span.stop] for span in first] == ["Ada built the mill!", "It stood there.", "In 1.5 years?"]
    assert first[0].log_p == pytest.approx(np.log(4 / 5)) and first[1].log_p == pytest.approx(np.log(1 / 5))
    assert [(span.start, span.stop) for span in second] == [(0, 6)]
    assert ExtractiveQA().hints([])["overlap"].shape == (0, 3 * SPANS)


def test_sizes_are_near_the_tokens_of_the_windows(tokens: HFTokens) -> None:
    examples = [reading("Albedo", context=" ".join(tiny.TEXTS[:count])) for count in (1, 2, 4, 8)]
    real = [sum(feature.tokens for feature in TASK.encode([one], tokens)) for one in examples]
    estimate = TASK.sizes(examples)
    assert (np.diff(estimate) > 0).all()
    assert np.corrcoef(estimate, real)[0, 1] > 0.98
    np.testing.assert_array_equal(TASK.sizes(examples, np.array([len(one.context) for one in examples])), estimate)
    assert TASK.sizes([]).shape == (0,)
    four = TASK.sizes([reading("Albedo")], np.array([400]))  # windows of 40 tokens, each 28 further than the one before
    assert four == pytest.approx([100 + 3 * 12 + 4 * 8])
    short = ExtractiveQA().sizes([reading("Albedo")])
    assert short[0] == pytest.approx((len(TEXT) + len("Which share is high?")) / 4 + 3)


def test_rows_without_known_answers_are_not_scored() -> None:
    task, unknown = ExtractiveQA(), [reading(None)]
    with pytest.raises(AssertionError, match="score labelled rows only"):
        task.merit(as_prediction([[Span(0, 6, -0.1)]]), task.targets(unknown))
