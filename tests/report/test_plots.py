"""kit.report.plots: a picture of what the run folder holds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from kit.errors import DataError
from kit.report.plots import draw_curves, draw_timeline, draw_values


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


def timeline(
    run: Path, *, chunks: int = 6, slots: int = 1, members: Iterable[str] = ("rules", "deberta"), budget: float = 60.0, **others: Any
) -> Path:
    """A run of 40 s in as many chunks of equal length, the members by turns in each slot."""
    each, names = 40.0 * slots / max(chunks, 1), list(members)
    spans = [
        {
            "slot": index % slots, "member": names[index * len(names) // chunks], "fit": "fold0", "view": "full", "rows": 5,
            "start": each * (index // slots), "end": each * (index // slots + 1), "load_s": 0.2 * each, "forecast_s": [0.5 * each, each, 2 * each],
            "tokens": 500, "gain": 0.01, "state": "done",
        }
        for index in range(chunks)
    ]  # fmt: skip
    values = {
        "rows": 30, "budget_s": budget, "reserve_s": 6.0, "slots": [f"cuda:{slot}" for slot in range(slots)], "spans": spans, "decisions": [], "skipped": [],
        "metric": [{"at": span["end"], "expected": 0.4 + 0.001 * index} for index, span in enumerate(spans)], "ended": 40.0 if chunks else 2.0,
    }  # fmt: skip
    run.mkdir(exist_ok=True)
    (run / "timeline.json").write_text(json.dumps({**values, **others}))
    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures as they are saved, to look into."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that does not fit
        yield figures


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text()]


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("chunks", "slots"), [(0, 1), (1, 1), (7, 1), (40, 3), (2000, 2), (2000, 4)])
def test_a_timeline_of_any_length_is_drawn_into_the_run_folder(tmp_path: Path, drawn: list[Figure], chunks: int, slots: int) -> None:
    run = timeline(tmp_path, chunks=chunks, slots=slots)
    assert draw_timeline(run) == run / "timeline.png"
    assert picture(run / "timeline.png").shape[1] > 1000
    lanes, ratio, metric, _ = drawn[0].axes
    assert [label.get_text() for label in lanes.get_yticklabels()] == [f"cuda:{slot}" for slot in range(slots)]
    assert len({axes.get_xlim() for axes in (lanes, ratio, metric)}) == 1
    assert (texts(lanes) == ["nothing was scored"]) == (chunks == 0)
    assert len(ratio.collections[1].get_offsets()) == chunks


def test_each_member_has_its_colour_and_chunks_that_follow_one_another_have_one_label(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_timeline(timeline(tmp_path, chunks=6, members=("rules", "deberta", "minilm")))
    lanes = drawn[0].axes[0]
    assert legend(lanes) == ["deberta", "minilm", "rules", "loading", "failed or cut"]
    assert len({tuple(patch.get_facecolor()) for patch in lanes.get_legend().legend_handles[:3]}) == 3
    assert texts(lanes) == ["fold0 full"] * 3


def test_a_label_that_does_not_fit_is_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_timeline(timeline(tmp_path, chunks=2000, members=[f"m{index}" for index in range(50)] * 20))
    assert texts(drawn[0].axes[0]) == []


def test_a_deadline_is_drawn_where_it_is_near_and_said_where_it_is_far(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_timeline(timeline(tmp_path / "near", budget=60.0))
    draw_timeline(timeline(tmp_path / "far", budget=32400.0))
    near, far = ({line.get_xdata()[0] for line in figure.axes[0].lines} for figure in drawn)
    assert near == {40.0, 54.0, 60.0}
    assert far == {40.0}
    assert drawn[1].axes[0].get_xlim()[1] < 60
    assert drawn[0].get_suptitle() == "30 rows, ended after 40.0 s; reserve from 54 s, deadline at 60 s"
    assert drawn[1].get_suptitle().endswith("deadline at 32400 s, beyond the right edge")


def test_the_forecast_panel_shows_actual_by_forecast_and_the_interval(tmp_path: Path, drawn: list[Figure]) -> None:
    run = timeline(tmp_path, chunks=2)
    values = json.loads((run / "timeline.json").read_text())
    values["spans"][0]["forecast_s"] = [5.0, 10.0, 30.0]  # took 20 s
    values["spans"][1]["state"] = "failed"
    (run / "timeline.json").write_text(json.dumps(values))
    draw_timeline(run)
    bands, dots = drawn[0].axes[1].collections
    assert dots.get_offsets().tolist() == [[10.0, 2.0]]
    assert [segment.tolist() for segment in bands.get_segments()] == [[[10.0, 0.5], [10.0, 3.0]]]


def test_the_metric_is_a_step_line_to_the_end_of_the_run(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_timeline(timeline(tmp_path, metric=[{"at": 20.0, "expected": 0.5}, {"at": 1.0, "expected": 0.4}, {"at": 0.5, "expected": None}]))
    line = drawn[0].axes[2].lines[0]
    assert line.get_xdata().tolist() == [1.0, 20.0, 40.0]
    assert line.get_ydata().tolist() == [0.4, 0.5, 0.5]
    assert line.get_drawstyle() == "steps-post"


def test_what_was_left_out_is_said_in_a_few_lines(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_timeline(timeline(tmp_path, skipped=[{"member": "deberta", "rows": 7, "why": "out of\nmemory, $cost$ " + "x" * 300}] * 12))
    (said,) = texts(drawn[0].axes[3])
    lines = said.split("\n")
    assert lines[0].startswith("left out: deberta: 7 rows: out of memory, $cost$ xxx")
    assert lines[-1] == "and 4 more"
    assert len(lines) == 9
    assert max(map(len, lines)) <= 190


def test_a_run_that_was_killed_is_drawn_with_what_was_going_on(tmp_path: Path, drawn: list[Figure]) -> None:
    run = timeline(tmp_path, chunks=4)
    values = json.loads((run / "timeline.json").read_text())
    values["spans"][-1] |= {"end": 0.0, "state": "busy"}
    (run / "timeline.json").write_text(json.dumps(values))
    draw_timeline(run)
    lost = [bars for bars in drawn[0].axes[0].collections if bars.get_hatch() == "xx" and bars.get_paths()]
    assert [bars.get_paths()[0].get_extents().intervalx.tolist() for bars in lost] == [[30.0, 40.0]]


def test_a_run_without_a_timeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"timeline.json: cannot be read"):
        draw_timeline(tmp_path)


def estimates(*values: float) -> dict[str, dict[str, float]]:
    return {str(share): {"value": value, "low": value - 0.02, "high": value + 0.01} for share, value in zip((0.1, 1.0), values, strict=True)}


def test_the_value_curve_has_a_line_per_policy_and_the_differences_below(tmp_path: Path, drawn: list[Figure]) -> None:
    one = {"metric": "map@3", "rows": 150, "full_s": 120.0}
    one |= {"policies": {"planner": estimates(0.6, 0.7), "in order": estimates(0.5, 0.7)}, "gains": {"in order": estimates(0.1, 0.0)}}
    assert draw_values({"exam": one, "sample": one}, tmp_path / "values.png") == tmp_path / "values.png"
    above, second, below, _ = drawn[0].axes
    assert above.get_title() == "exam (150 rows, full cost 120 s)"
    assert second.get_title().startswith("sample")
    assert legend(above) == ["planner", "in order"]
    assert [bars.lines[0].get_ydata().tolist() for bars in above.containers] == [[0.6, 0.7], [0.5, 0.7]]
    assert [bars.lines[0].get_ydata().tolist() for bars in below.containers] == [[0.1, 0.0]]
    low, high = (line.get_ydata().tolist() for line in above.containers[0].lines[1])
    np.testing.assert_allclose([low, high], [[0.58, 0.68], [0.61, 0.71]])
    assert [label.get_text() for label in below.get_xticklabels()] == ["10%", "100%"]
    assert picture(tmp_path / "values.png").size


def test_a_policy_keeps_its_colour_in_the_differences(tmp_path: Path, drawn: list[Figure]) -> None:
    policies = {"planner": estimates(0.6, 0.7), "cascade": estimates(0.5, 0.6), "in order": estimates(0.5, 0.7)}
    panel = {"metric": "map@3", "rows": 9, "full_s": 1.0, "policies": policies, "gains": {"cascade": estimates(0.1, 0.1), "in order": estimates(0.1, 0)}}
    draw_values({"exam": panel}, tmp_path / "values.png")
    above, below = drawn[0].axes
    assert [bars.lines[0].get_color() for bars in above.containers][1:] == [bars.lines[0].get_color() for bars in below.containers]
