"""kit.sample.essays: the embedded essays have the format of Feedback Prize ELL, and their scores can be learned."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from kit.data.audit import overlaps
from kit.data.tables import read_table
from kit.errors import DataError
from kit.sample.essays import FILES, TARGETS, compose, write_essays
from kit.tasks.essay_regression import Essay, EssayRegression

TASK = EssayRegression()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_essays(tmp_path_factory.mktemp("sample") / "essays")


def essays(path: Path) -> list[Essay]:
    return TASK.read(read_table(path, ids=None))


def test_the_tables_have_the_columns_of_the_competition(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    columns = {name: list(read_table(folder / name, ids=None).frame) for name in FILES}
    assert columns["train.csv"] == ["text_id", "full_text", *TARGETS]
    assert columns["test.csv"] == ["text_id", "full_text"]
    assert columns["test_answers.csv"] == columns["sample_submission.csv"] == ["text_id", *TARGETS]
    train, test = essays(folder / "train.csv"), essays(folder / "test.csv")
    assert (len(train), len(test)) == (320, 120) and len({essay.id for essay in (*train, *test)}) == 440
    assert all(essay.grades is None for essay in test)


def test_the_sample_submission_can_be_handed_in_and_scores_like_the_mean(folder: Path) -> None:
    submission, answers = (read_table(folder / name, ids=None) for name in ("sample_submission.csv", "test_answers.csv"))
    assert TASK.check(submission, answers) == []
    prediction, targets = TASK.parse(submission, answers)
    assert -1.0 < TASK.metrics["neg_mcrmse"](prediction, targets) < -0.75


def test_scores_are_half_points_of_the_whole_scale_that_go_together_but_are_not_the_same(folder: Path) -> None:
    targets = TASK.targets(essays(folder / "train.csv"))
    assert set(np.unique(targets)) == {1 + half / 2 for half in range(9)}
    correlation = np.corrcoef(targets.T)[~np.eye(6, dtype=bool)]
    assert correlation.min() > 0.6 and correlation.max() < 0.85


def test_essays_are_texts_without_a_trace_of_how_they_were_composed(folder: Path) -> None:
    texts = [essay.text for essay in essays(folder / "train.csv")]
    assert not [text for text in texts if re.search(r"[{}\[\]<>|/]", text) or text != text.strip()]
    assert min(len(text.split()) for text in texts) > 60 and max(len(text.split()) for text in texts) < 350
    assert 0.3 < np.mean(["\n\n" in text for text in texts]) < 0.98


def test_no_essay_of_the_test_part_stands_in_the_training_part(folder: Path) -> None:
    assert overlaps([essay.text for essay in essays(folder / "test.csv")], [essay.text for essay in essays(folder / "train.csv")], threshold=0.9) == []


def test_every_score_can_be_learned_beyond_what_they_have_in_common(folder: Path) -> None:
    train, test = essays(folder / "train.csv"), essays(folder / "test.csv")
    known = read_table(folder / "test_answers.csv", ids=None)
    texts = TfidfVectorizer(ngram_range=(1, 2), lowercase=False, token_pattern=r"[\w']+|[^\w ]", sublinear_tf=True)
    features = texts.fit_transform([essay.text for essay in train])
    model = Ridge(alpha=1.0).fit(features, TASK.targets(train))
    submission = TASK.rows(model.predict(texts.transform([essay.text for essay in test])).astype(np.float32), test).astype(str)
    prediction, targets = TASK.parse(type(known)("ridge.csv", submission), known)
    mean = np.broadcast_to(TASK.targets(train).mean(0), targets.shape)
    for name, metric in TASK.metrics.items():
        assert metric(prediction, targets) > 0.85 * metric(mean, targets), name
    own = [np.corrcoef((prediction - prediction.mean(1, keepdims=True))[:, k], (targets - targets.mean(1, keepdims=True))[:, k])[0, 1] for k in range(6)]
    assert min(own) > 0.1, "each score says something of its own"


def test_the_same_seed_gives_the_same_essays_everywhere_and_another_seed_others(folder: Path) -> None:
    assert compose(5, seed=6) == compose(8, seed=6)[:5] != compose(5, seed=7)
    assert hashlib.sha256((folder / "train.csv").read_bytes()).hexdigest()[:16] == "68cccdcffd41661a"


def test_writing_again_mends_what_was_changed_and_leaves_other_files(tmp_path: Path, folder: Path) -> None:
    write_essays(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "train.csv").write_text("spoiled")
    (tmp_path / "a" / "b" / "mine.txt").write_text("kept")
    assert write_essays(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert {name: (tmp_path / "a" / "b" / name).read_bytes() for name in FILES} == {name: (folder / name).read_bytes() for name in FILES}
    assert (tmp_path / "a" / "b" / "mine.txt").read_text() == "kept"


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: is a file: name a folder to write the sample essays into"):
        write_essays(tmp_path / "file")
