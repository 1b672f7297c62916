"""kit.report.tables: what a run and an inference gave, row by row."""

from __future__ import annotations

from typing import Any

from kit.report.tables import outcome_table, run_table

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
