"""What a run or an inference gave, as tables to show in a notebook. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd


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
