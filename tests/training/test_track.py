"""kit.training.track: a line per epoch in the run's log, and trackers whose package is missing."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from kit.errors import DependencyError
from kit.training.crossval import train
from kit.training.track import JSONLines
from tests import tiny


def test_values_are_appended_one_object_per_line(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = JSONLines(tmp_path / "log.jsonl")
        tracker.log({"fold0/loss": 0.5, "fold0/map@3": 1.0}, step=3)
    assert tracker.tracker == tmp_path / "log.jsonl"
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 3, "fold0/loss": 0.5, "fold0/map@3": 1.0}] * 2


def test_a_run_logs_every_epoch_of_every_fit_with_its_step_and_metrics(tmp_path: Path) -> None:
    tiny.competition(tmp_path / "data", train=9)
    run = train(tiny.recipe(tmp_path / "data", "train.epochs=3", "train.batch_size=2"), artifacts=tmp_path / "artifacts")
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    logged = iter(lines)
    for fit in ("fold0", "fold1"):
        history = json.loads((run.folder / fit / "history.json").read_text())
        steps = len(history["steps"]) // 3
        for number, epoch in enumerate(history["epochs"]):
            assert next(logged) == {"step": steps * (number + 1), **{f"{fit}/{name}": value for name, value in epoch.items()}}
        assert next(logged)[f"{fit}/seconds"] > 0
    assert not [*logged]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_without_its_package_is_refused_with_the_way_out(tracker: str, tmp_path: Path) -> None:
    if find_spec(tracker) or (tracker == "tensorboard" and find_spec("tensorboardX")):
        pytest.skip(f"{tracker} is installed here")
    tiny.competition(tmp_path / "data")
    with pytest.raises(DependencyError, match=rf'train\.tracker = "{tracker}" needs its package: pip install {tracker}, or set train\.tracker = "jsonl"'):
        train(tiny.recipe(tmp_path / "data", f"train.tracker={tracker}"), artifacts=tmp_path / "artifacts")
