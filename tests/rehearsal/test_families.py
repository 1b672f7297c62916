"""kit.rehearsal.families: what is asked of the kit, and what is made of its answers, on folders written here. tests/test_dry_run.py really trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import AutoConfig

from kit.errors import KitError
from kit.rehearsal.families import FAMILIES, Family, judge, play
from kit.sample import write_sample
from tests import tiny

ESSAYS, READING, TEXT = FAMILIES


def played(family: Family, folder: Path) -> list[list[str]]:
    """What was asked of a kit that only says where things would be; leaves the sample as `play` does."""
    asked: list[list[str]] = []

    def kit(*arguments: object) -> dict[str, Any]:
        asked.append([str(part) for part in arguments])
        return {"run": str(folder / "artifacts" / "runs" / "one"), "bundles": [str(folder / "artifacts" / "bundles" / "one")]}

    play(family, folder, kit)
    (folder / "artifacts" / "runs" / "one" / "fold0").mkdir(parents=True)
    (folder / "artifacts" / "runs" / "one" / "fold0" / "metrics.json").touch()
    return asked


@pytest.mark.parametrize(("family", "test"), [(ESSAYS, "test.csv"), (READING, "test.json")])
def test_a_family_is_trained_packed_and_tried_without_sight_of_the_answers(tmp_path: Path, family: Family, test: str) -> None:
    folder = tmp_path / "one"
    (folder / "artifacts" / "runs" / "earlier").mkdir(parents=True)
    train, pack, infer = played(family, folder)
    assert not (folder / "artifacts" / "runs" / "earlier").exists(), "made by another version of the kit"
    assert train == ["train", family.recipe, f"--set=data.folder={folder / 'input'}", f"--artifacts={folder / 'artifacts'}"]
    assert pack == ["pack", f"{folder / 'artifacts' / 'runs' / 'one'}", f"--artifacts={folder / 'artifacts'}"]
    assert infer == ["infer", f"{folder / 'artifacts' / 'bundles' / 'one'}", f"--test={folder / 'input' / test}", f"--out={folder / 'submission.csv'}"]
    assert (folder / "input" / test).is_file()
    assert not list((folder / "input").glob("*answers*"))
    assert len(list((folder / "answers").iterdir())) == 1


def test_what_submits_nothing_is_trained_only(tmp_path: Path) -> None:
    assert [verb for verb, *_ in played(TEXT, tmp_path / "one")] == ["train"]


def test_a_submission_is_judged_row_by_row_beside_the_rule(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    played(ESSAYS, folder)
    right = pd.read_csv(folder / "answers" / "test_answers.csv").sample(frac=1, random_state=0)
    right.to_csv(folder / "submission.csv", index=False)
    perfect = judge(ESSAYS, folder)
    assert (perfect["task"], perfect["metric"], perfect["value"], perfect["rows"]) == ("essay_regression", "MCRMSE", 0, 120)
    means = pd.read_csv(folder / "input" / "train.csv")[[*right.columns[1:]]].mean().to_numpy()
    rule = np.sqrt(np.square(right.iloc[:, 1:] - means).mean()).mean()
    assert perfect["baseline"] == {"name": "mean of the training scores", "value": pytest.approx(rule, rel=1e-5), "se": pytest.approx(0.04, abs=0.02)}
    assert perfect["gain"]["value"] == pytest.approx(rule, rel=1e-5), "above 0, though less is better"

    right.assign(**dict(zip(right.columns[1:], means, strict=True))).to_csv(folder / "submission.csv", index=False)
    same = judge(ESSAYS, folder)
    assert same["gain"] == {"value": pytest.approx(0, abs=1e-6), "se": pytest.approx(0, abs=1e-6)}
    assert same["se"] > 0.01, "though the metric is not sure"


def test_answers_of_a_reader_are_judged_beside_the_best_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    played(READING, folder)
    sample = write_sample(tmp_path / "sample", READING.sample)
    frame = pd.read_csv(sample / "sample_submission.csv")
    right = right_answers(folder)
    frame.assign(answer=[right[id_] for id_ in frame["id"]]).iloc[::-1].to_csv(folder / "submission.csv", index=False)
    perfect = judge(READING, folder)
    assert (perfect["task"], perfect["metric"], perfect["value"], perfect["rows"]) == ("extractive_qa", "F1", 1, len(frame))
    assert 0.1 < perfect["baseline"]["value"] < 0.3
    assert perfect["gain"]["value"] == pytest.approx(1 - perfect["baseline"]["value"])


def right_answers(folder: Path) -> dict[str, str]:
    articles = json.loads((folder / "answers" / "test_answers.json").read_text(encoding="utf-8"))["data"]
    return {one["id"]: one["answers"][0]["text"] for article in articles for part in article["paragraphs"] for one in part["qas"]}


def test_a_language_model_is_judged_out_of_fold(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    played(TEXT, folder)
    run = folder / "artifacts" / "runs" / "one"
    tiny.prompting(run / "fold0", "llama3")
    AutoConfig.for_model("gpt2").save_pretrained(run / "fold0")
    documents = pd.read_json(folder / "input" / "passages.jsonl", lines=True)
    fold = np.arange(len(documents)) % 2
    oof = pd.DataFrame({"id": documents["id"], "fold": fold, "t0": 0, "p0": np.float32(-np.log(3)), "p1": np.float32(100)})
    oof.to_parquet(run / "oof.parquet")
    judged = judge(TEXT, folder)
    assert (judged["task"], judged["metric"], judged["rows"]) == ("causal_lm", "perplexity per token", 168)
    assert judged["value"] == pytest.approx(3, rel=1e-5)
    assert judged["baseline"]["value"] > 8
    assert judged["gain"]["value"] == pytest.approx(judged["baseline"]["value"] - 3, rel=1e-5)


def test_a_failure_of_the_kit_is_passed_on(tmp_path: Path) -> None:
    def broken(*arguments: object) -> dict[str, Any]:
        raise KitError("out of order")

    with pytest.raises(KitError, match="out of order"):
        play(ESSAYS, tmp_path / "one", broken)
