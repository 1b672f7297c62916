"""What a run or an inference gave, as tables to show in a notebook. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.errors import DataError


def run_table(metrics: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Metrics of runs (name → metrics as `kit.train` gives them): a row per fit and one for OOF, as value ± standard error."""
    rows = []
    for run, values in metrics.items():
        parts = {**values["folds"], **({"OOF": values["oof"]} if "oof" in values else {})}
        for part, estimates in parts.items():
            rows.append({"run": run, "part": part, **{name: f"{e['value']:.4f} ± {e['se']:.4f}" for name, e in estimates.items()}})
    return pd.DataFrame(rows).set_index(["run", "part"])


def outcome_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """An inference's summary: a row per member with weight, OOF metric, rows scored, seconds and what went wrong."""
    rows = []
    for name, weight in summary["weights"].items():
        oof = next(iter(summary["oof"][name].items()))
        said = {f"OOF {oof[0]}": round(oof[1], 4), "rows": summary["scored"][name], "seconds": round(summary["seconds"].get(name, 0), 1)}
        rows.append({"member": name, "weight": round(weight, 3), **said, "failure": summary["failures"].get(name, "")})
    return pd.DataFrame(rows).set_index("member")


def timeline_table(run: Path) -> pd.DataFrame:
    """An inference's timeline.json: a row per member with its passes (fit and view), the rows of them all, seconds, and the forecast's error.

    Rows are counted once per pass. Error: the median of |actual ÷ forecast - 1| over finished chunks. Raises DataError.
    """
    spans = pd.DataFrame(read_timeline(run)["spans"], columns=["member", "fit", "view", "rows", "start", "end", "load_s", "forecast_s", "state"])
    rows = []
    for member, mine in spans.groupby("member"):
        done = mine[mine["state"] == "done"]
        seconds = mine["end"] - mine["start"]
        errors = [abs(took / forecast[1] - 1) for took, forecast in zip(done["end"] - done["start"], done["forecast_s"], strict=True) if forecast]
        said = {"rows": int(done["rows"].sum()), "seconds": round(float(seconds.sum()), 1), "loading": round(float(mine["load_s"].sum()), 1)}
        error = f"{np.median(errors):.0%}" if errors else ""
        rows.append({"member": member, "passes": len(done[["fit", "view"]].drop_duplicates()), **said, "forecast error": error})
    return pd.DataFrame(rows, columns=["member", "passes", "rows", "seconds", "loading", "forecast error"]).set_index("member")


def read_timeline(run: Path) -> dict[str, Any]:
    """The timeline of a run of `kit infer`, from its run folder. Work that was going on when it was written ends there, cut. Raises DataError."""
    path = run / "timeline.json"
    try:
        timeline = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}): give the folder of a run of `kit infer`") from None
    spans = [{**span, "end": timeline["ended"], "state": "cut"} if span["state"] == "busy" else span for span in timeline["spans"]]
    return {**timeline, "spans": spans}
