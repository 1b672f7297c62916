"""kit.report.plots: a picture of what the run folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from kit.report.plots import draw_curves


def history(run: Path, fit: str, *, loss: float, epochs: int = 2) -> None:
    values = {
        "steps": [[loss / (step + 1), 1e-3 * (10 - step)] for step in range(10)],
        "epochs": [{"epoch": epoch, "loss": loss, "map@3": 0.4 + 0.1 * epoch, "accuracy": 0.2} for epoch in range(epochs)],
    }
    (run / fit).mkdir(parents=True)
    (run / fit / "history.json").write_text(json.dumps(values))


def picture(path: Path) -> np.ndarray:
    return imread(path)


def test_the_curves_of_every_fit_are_drawn_into_the_run_folder(tmp_path: Path) -> None:
    history(tmp_path, "fold0", loss=2.0)
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    one = picture(path)
    assert one.shape[1] > 2 * one.shape[0] > 400
    history(tmp_path, "fold1", loss=1.0)
    assert (picture(draw_curves(tmp_path)) != one).any()


def test_a_fit_without_validation_is_drawn_too(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "history.json").write_text(json.dumps({"steps": [[1.0, 1e-3]], "epochs": [{"epoch": 0, "loss": 1.0}]}))
    assert picture(draw_curves(tmp_path)).size


def test_an_interrupted_fit_without_an_epoch_is_drawn_too(tmp_path: Path) -> None:
    history(tmp_path, "fold0", loss=1.0, epochs=0)
    assert picture(draw_curves(tmp_path)).size
