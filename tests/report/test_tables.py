"""kit.report.tables: what a run and an inference gave, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.errors import DataError
from kit.report.tables import outcome_table, read_timeline, run_table, timeline_table

METRICS: dict[str, Any] = {
    "folds": {
        "fold0": {"map@3": {"value": 0.51234, "se": 0.04}, "accuracy": {"value": 0.3, "se": 0.05}},
        "fold1": {"map@3": {"value": 0.6, "se": 0.04}, "accuracy": {"value": 0.4, "se": 0.05}},
    },
    "oof": {"map@3": {"value": 0.55555, "se": 0.0123, "low": 0.5, "high": 0.6}, "accuracy": {"value": 0.35, "se": 0.02, "low": 0.3, "high": 0.4}},
}


def test_a_run_has_a_row_per_fit_and_one_for_oof_with_its_standard_error() -> None:
    table = run_table({"first": METRICS, "second": METRICS})
    assert table.index.tolist() == [(run, part) for run in ("first", "second") for part in ("fold0", "fold1", "OOF")]
    assert list(table) == ["map@3", "accuracy"]
    assert table.loc[("first", "fold0")].tolist() == ["0.5123 ± 0.0400", "0.3000 ± 0.0500"]
    assert table.loc[("second", "OOF")].tolist() == ["0.5555 ± 0.0123", "0.3500 ± 0.0200"]


def test_a_run_with_some_folds_has_no_oof_row() -> None:
    assert run_table({"r": {"folds": METRICS["folds"]}}).index.tolist() == [("r", "fold0"), ("r", "fold1")]


def test_an_inference_has_a_row_per_member_with_what_went_wrong() -> None:
    summary = {
        "weights": {"a": 0.71234, "b": 0.0},
        "oof": {"a": {"map@3": 0.6123456, "se": 0.01}, "b": {"map@3": 0.4, "se": 0.01}, "blend": {"map@3": 0.62, "se": 0.01}},
        "scored": {"a": 200, "b": 0},
        "seconds": {"fallback": 1.0, "a": 12.345},
        "failures": {"b": "BundleError: no weights"},
    }
    table = outcome_table(summary)
    assert table.index.tolist() == ["a", "b"]
    assert table.loc["a"].tolist() == [0.712, 0.6123, 200, 12.3, ""]
    assert table.loc["b"].tolist() == [0.0, 0.4, 0, 0.0, "BundleError: no weights"]
    assert list(table) == ["weight", "OOF map@3", "rows", "seconds", "failure"]


def span(member: str, fit: str, begin: float, end: float, **others: Any) -> dict[str, Any]:
    plain = {"slot": 0, "member": member, "fit": fit, "view": "full", "rows": 10, "start": begin, "end": end, "load_s": 0.0, "tokens": 100, "gain": 0.01}
    return {**plain, "forecast_s": [1.0, 2.0, 4.0], "state": "done", **others}


def write_timeline(run: Path, *spans: dict[str, Any], ended: float = 9.0) -> Path:
    timeline = {"rows": 10, "budget_s": 12.0, "reserve_s": 1.0, "slots": ["cpu"], "spans": spans, "metric": [], "decisions": [], "skipped": [], "ended": ended}
    (run / "timeline.json").write_text(json.dumps(timeline))
    return run


def test_a_timeline_has_a_row_per_member_with_its_passes_and_how_far_off_the_forecasts_were(tmp_path: Path) -> None:
    chunks = [span("a", "fold0", 0, 3, load_s=1.0), span("a", "fold0", 3, 5), span("a", "fold1", 5, 6, rows=4), span("a", "fold1", 6, 9, state="failed")]
    table = timeline_table(write_timeline(tmp_path, *chunks, span("b", "fold0", 0, 2)))
    assert list(table) == ["passes", "rows", "seconds", "loading", "forecast error"]
    assert table.loc["a"].tolist() == [2, 24, 9.0, 1.0, "50%"]  # of 3, 2 and 1 s for 2 s: 50, 0 and 50 %
    assert table.loc["b"].tolist() == [1, 10, 2.0, 0.0, "0%"]


def test_a_timeline_without_work_is_an_empty_table(tmp_path: Path) -> None:
    table = timeline_table(write_timeline(tmp_path))
    assert table.empty
    assert "forecast error" in table


def test_a_member_that_never_finished_a_chunk_has_no_forecast_error(tmp_path: Path) -> None:
    assert timeline_table(write_timeline(tmp_path, span("a", "fold0", 0, 3, state="failed"))).loc["a"].tolist() == [0, 0, 3.0, 0.0, ""]


def test_what_was_going_on_when_a_run_was_killed_ends_where_the_timeline_ends(tmp_path: Path) -> None:
    spans = read_timeline(write_timeline(tmp_path, span("a", "fold0", 0, 3), span("a", "fold1", 3, 0, state="busy"), ended=7.0))["spans"]
    assert [(each["end"], each["state"]) for each in spans] == [(3, "done"), (7.0, "cut")]


def test_a_folder_without_a_timeline_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"timeline.json: cannot be read .*kit infer"):
        timeline_table(tmp_path)
    (tmp_path / "timeline.json").write_text("{")
    with pytest.raises(DataError, match=r"timeline.json: cannot be read .*kit infer"):
        read_timeline(tmp_path)
