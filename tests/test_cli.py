"""kit.cli: every verb through the real entry; what is printed, and the exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer.main

import kit
from kit import manifest
from kit.cli import app, main
from kit.config import Recipe
from kit.data.tables import read_table
from kit.sample import FILES
from tests import packed, tiny
from tests.packed import Workshop, read_rows, write_rows


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every verb, with the group it belongs to: "vendor wheels" → its command."""
    for name, inner in sorted(command.commands.items()):
        yield from verbs(inner, (*path, name)) if hasattr(inner, "commands") else [(" ".join((*path, name)), inner)]


VERBS = dict(verbs(typer.main.get_command(app)))
ROOT = Path(kit.__file__).parents[1]


@pytest.fixture
def own(tmp_path: Path) -> Workshop:
    return packed.copy(tmp_path)


def run(*arguments: object) -> int:
    """The exit code of `kit ARGUMENTS`."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object in the last line of stdout."""
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(values, dict)
    return values


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What stands on stderr, but for other libraries' progress bars."""
    return [line for line in capsys.readouterr().err.splitlines() if line.strip() and "it/s]" not in line]


def test_the_verbs_are_those_of_the_flow() -> None:
    flow = {"sample", "index", "context", "train", "pack", "infer", "score", "vendor wheels", "vendor prove", "vendor weights", "vendor bundle", "rehearse", "push"}
    flow |= {"plan", "simulate", "chaos", "corpus", "generate", "answer"}
    assert flow | {"recipes", "dry-run", "doctor", "lint-submission", "profile capture", "profile show"} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_with_an_example_that_its_parser_takes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*verb.split(), "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--json" in text
    assert f"kit {verb}" in text.partition("Example")[2]
    for example in VERBS[verb].epilog.partition(": ")[2].split("|"):
        words = shlex.split(example)
        words = words[words.index(verb.split()[-1]) + 1 :]
        VERBS[verb].make_context(verb, words)  # raises where an option is unknown or an argument missing


def test_help_lists_the_verbs_also_without_any_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    asked = capsys.readouterr().out
    assert run() == 0
    assert capsys.readouterr().out == asked
    assert all(f"\n  {verb.split()[0]} " in asked for verb in VERBS)


def test_the_whole_flow_prints_json_as_the_last_line(own: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts = ["--artifacts", own.artifacts]
    assert run("sample", tmp_path / "sample", "--json") == 0
    assert sorted(path.name for path in Path(last_json(capsys)["folder"]).iterdir()) == sorted(FILES)

    assert run("recipes", "--json") == 0
    assert set(last_json(capsys)) >= {"sample_minilm", "sample_deberta"}

    assert run("index", own.root / "reader.toml", *artifacts, "--json") == 0
    assert manifest.verify(Path(last_json(capsys)["index"])).kind == "index"

    out = tmp_path / "with_context.csv"
    assert run("context", own.root / "reader.toml", "--table", own.competition / "test.csv", "--out", out, *artifacts, "--json") == 0
    assert last_json(capsys) == {"out": str(out), "rows": packed.TEST_ROWS, "empty": 0}
    assert read_rows(out)[0] == [*read_rows(own.competition / "test.csv")[0], "context"]

    assert run("train", own.root / "plain.toml", *artifacts, "--json") == 0
    trained = last_json(capsys)
    assert Path(trained["run"]) == own.runs["plain"]  # it was there, and is kept
    assert set(trained["oof"]) == {"map@3", "accuracy", "accuracy@3"}
    assert Path(trained["curves"]).is_file()

    assert run("pack", own.runs["plain"], own.runs["reader"], *artifacts, "--out", tmp_path / "bundles", "--json") == 0
    bundles = last_json(capsys)["bundles"]
    assert [manifest.verify(Path(bundle)).kind for bundle in bundles] == ["member", "member", "index"]

    submission = tmp_path / "submission.csv"
    sample = ["--sample-submission", own.competition / "sample_submission.csv"]
    assert run("infer", *bundles, "--test", own.competition / "test.csv", "--out", submission, *sample, "--json") == 0
    summary = last_json(capsys)
    assert summary["finished"]
    assert summary["rows"] == packed.TEST_ROWS
    assert json.loads((tmp_path / "submission.run" / "outcome.json").read_text()) == summary
    assert summary["run"] == str(tmp_path / "submission.run")
    assert {path.name for path in Path(summary["run"]).iterdir()} >= {"timeline.json", "decisions.log", "predictions.npz", "setup.json"}

    assert run("score", submission, own.competition / "test_answers.csv", "--json") == 0
    scored = last_json(capsys)
    assert scored["n"] == packed.TEST_ROWS
    assert 0 <= scored["map@3"] <= 1


OTHERS: dict[str, dict[str, Any]] = {
    "essays": {"task": {"kind": "essay_regression", "max_length": 48}, "model": {"pooling": "mean"}},
    "readings": {"task": {"kind": "extractive_qa", "max_length": 64, "stride": 8, "max_question": 16}, "model": {"pooling": "none"}},
}


@pytest.mark.parametrize("family", OTHERS)
def test_the_other_families_go_the_same_way(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, parts, artifacts = tmp_path / family, OTHERS[family], tmp_path / "artifacts"
    assert run("sample", folder, "--family", family, "--json") == 0
    files = {path.name.partition(".")[0]: path for path in folder.iterdir()}
    tiny.encoder_folder(folder / "encoder")
    recipe = tiny.recipe(folder, data={"train": files["train"].name, "test": files["test"].name}, model=parts["model"])
    (tmp_path / "own.toml").write_text(Recipe.of({**recipe.model_dump(exclude_none=True), "task": parts["task"]}).to_toml())
    capsys.readouterr()
    assert run("train", tmp_path / "own.toml", "--artifacts", artifacts, "--json") == 0
    trained = last_json(capsys)
    assert run("pack", trained["run"], "--artifacts", artifacts, "--json") == 0
    bundle, out = last_json(capsys)["bundles"][0], tmp_path / "submission.csv"
    sample = ["--sample-submission", files["sample_submission"]] if "sample_submission" in files else []
    assert run("infer", bundle, "--test", files["test"], "--out", out, *sample, "--json") == 0
    assert last_json(capsys)["finished"]
    assert run("score", out, files["test_answers"], "--task", parts["task"]["kind"], "--json") == 0
    scored = last_json(capsys)
    assert set(scored) - {"se", "n"} == set(trained["oof"]) and scored["n"] == len(read_table(files["test"], ids=None).frame)
    assert run("score", out, files["test_answers"]) == 2  # as the other kind of task, whose columns these are not
    assert len(error_lines(capsys)) == 1
    assert run("infer", bundle, "--test", files["test"], "--out", tmp_path / "answers.json", "--json") == (2 if family == "essays" else 0)
    if family == "essays":
        assert "answers.json: JSON is for answers by id, and this submission has the columns text_id, cohesion" in error_lines(capsys)[-1]
    if family == "readings":
        last_json(capsys)
        assert run("score", tmp_path / "answers.json", files["test_answers"], "--task", "extractive_qa", "--json") == 0
        assert last_json(capsys) == scored
        (tmp_path / "text.txt").write_text(tiny.TEXTS[0])
        assert run("answer", bundle, "What has a high albedo?", "--text", tmp_path / "text.txt", "--count", "2", "--json") == 0
        answers = last_json(capsys)["answers"]
        assert len(answers) == 2 and all(tiny.TEXTS[0][one["start"] : one["stop"]] == one["text"] for one in answers)
        assert run("answer", bundle, "What?", "--text", tmp_path / "missing.txt") == 2
        assert len(error_lines(capsys)) == 1


def test_a_language_model_is_trained_on_a_corpus_and_goes_on_from_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code").mkdir()
    for number in range(4):
        (tmp_path / "code" / f"part{number}.py").write_text(f"import numpy as np\n\nvalues{number} = np.arange({number})\n" * 4)
    (tmp_path / "code" / "other.py").write_text("import os\n")
    assert run("corpus", tmp_path / "code", "--out", tmp_path / "train.jsonl", "--word", "numpy", "--json") == 0
    kept = last_json(capsys)
    assert (kept["read"], kept["without_words"], kept["written"]) == (5, 1, 4)
    recipe = tiny.recipe(tmp_path, data={"train": "train.jsonl"}).model_dump(exclude_none=True)
    recipe |= {"task": {"kind": "causal_lm", "max_length": 32, "packing": True}, "model": {"kind": "causal", "source": "scratch", **tiny.MODELS["causal"]}}
    (tmp_path / "own.toml").write_text(Recipe.of(recipe).to_toml())
    assert run("train", tmp_path / "own.toml", "--artifacts", tmp_path / "artifacts", "--json") == 0
    trained = last_json(capsys)
    several = ["--tokens", 5, "--temperature", 1, "--returns", 3]
    assert run("generate", trained["run"], "import numpy", *several, "--json") == 0
    assert len(last_json(capsys)["completions"]) == 3
    assert run("generate", trained["run"], "import numpy", "--returns", 3) == 2
    assert "temperature" in error_lines(capsys)[0]


def test_without_json_the_values_are_lines_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "a.csv", [("id", "answer"), ("1", "A"), ("2", "B")])
    write_rows(tmp_path / "s.csv", [("id", "prediction"), ("1", "A B"), ("2", "C B")])
    assert run("score", tmp_path / "s.csv", tmp_path / "a.csv") == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["map@3: 0.7500", "accuracy: 0.5000"]


def test_training_some_folds_with_other_settings_is_a_run_of_its_own(own: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", own.root / "plain.toml", "--artifacts", own.artifacts, "--set", "train.lr=5e-3", "--folds", "1", "--json"]
    before = set(own.runs.values())
    assert run(*arguments) == 0
    values = last_json(capsys)
    assert Path(values["run"]) not in before
    assert list(values["folds"]) == ["fold1"]
    assert "oof" not in values


def test_a_debug_run_is_quick_and_apart(own: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", own.root / "plain.toml", "--artifacts", own.artifacts, "--debug", "--json") == 0
    assert Path(last_json(capsys)["run"]).name.startswith("plain-debug-")


def test_an_inference_done_in_part_exits_with_1_and_warns(own: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed.change_member(own.members["reader"], 'model.pooling="mean"')
    members = [own.members["plain"], own.members["reader"]]
    packed.complement(members)
    arguments = ["infer", *members, "--test", own.competition / "test.csv", "--out", tmp_path / "s.csv", "--json"]
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert not json.loads(printed.out.splitlines()[-1])["finished"]
    assert f"warning: member {members[1].name}: BundleError" in printed.err
    assert "Traceback" not in printed.err
    assert len(read_rows(tmp_path / "s.csv")) == 1 + packed.TEST_ROWS


def test_a_member_is_named_without_its_folder_where_it_is_mounted(
    own: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KIT_INPUT", str(own.bundles))
    monkeypatch.chdir(tmp_path)
    assert run("infer", own.members["reader"].name, "--test", own.competition / "test.csv", "--json") == 0
    assert list(last_json(capsys)["weights"]) == [own.members["reader"].name]
    assert (tmp_path / "submission.csv").is_file()


def test_what_fails_inside_exits_with_1_in_one_line(own: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = write_rows(tmp_path / "file", []) / "submission.csv"
    assert run("infer", own.members["plain"], "--test", own.competition / "test.csv", "--out", blocked) == 1
    (line,) = error_lines(capsys)
    assert line.startswith("error: ")
    assert "Error: [Errno" in line
    assert str(tmp_path / "file") in line


def test_refused_input_exits_with_2_in_one_line_and_debug_adds_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score", tmp_path / "no.csv", tmp_path / "no.csv") == 2
    assert error_lines(capsys) == [f"error: {tmp_path / 'no.csv'}: no such file: check the path"]
    assert run("--debug", "score", tmp_path / "no.csv", tmp_path / "no.csv") == 2
    lines = error_lines(capsys)
    assert lines[0].startswith("Traceback")
    assert lines[-1] == f"error: {tmp_path / 'no.csv'}: no such file: check the path"


def start(*arguments: object) -> subprocess.Popen[str]:
    """`python -m kit ARGUMENTS` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "kit", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_module_runs_as_a_command() -> None:
    process = start("recipes", "--json")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert "sample_minilm" in json.loads(out)


def test_ctrl_c_while_training_keeps_what_is_finished_and_the_next_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epochs = 30
    recipe = packed.write_recipe(tmp_path / "long.toml", packed.write_competition(tmp_path / "competition"))
    arguments = ["train", recipe, "--set", f"train.epochs={epochs}", "--set", "train.keep=last", "--artifacts"]
    process = start(*arguments, tmp_path / "broken")
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("broken/runs/*/fold0/state/last.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "interrupted: what was finished is kept; run the same command again to go on"
    assert "Traceback" not in error
    assert out == ""
    (folder,) = tmp_path.glob("broken/runs/*")
    assert not (folder / "fold0" / "metrics.json").exists()

    assert run(*arguments, tmp_path / "broken") == 0
    assert run(*arguments, tmp_path / "whole") == 0
    capsys.readouterr()
    assert [path for path in folder.rglob("*") if "part" in path.name] == []
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert epochs <= sum("fold0/loss" in line for line in logged) <= epochs + 1  # it went on, and did not begin again
    (whole,) = tmp_path.glob("whole/runs/*")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "oof.parquet"), pd.read_parquet(whole / "oof.parquet"), rtol=1e-4)
    assert np.array_equal(np.load(folder / "folds.npy"), np.load(whole / "folds.npy"))
