"""Curves of a run as PNG. Reads the run's folder; knows no model."""

from __future__ import annotations

import json
from pathlib import Path

from kit.errors import DependencyError


def draw_curves(run: Path) -> Path:
    """curves.png in the run folder: loss and learning rate per step, and each metric per epoch, one line per fit. Raises DependencyError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError("drawing curves needs matplotlib: pip install matplotlib (the trained fits are finished and kept)") from None
    histories = {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("*/history.json"))}
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    loss, rate, metric = figure.subplots(1, 3)
    for name, history in histories.items():
        values = [step[0] for step in history["steps"]]
        loss.plot(_smooth(values), label=name)
        rate.plot([step[1] for step in history["steps"]], label=name)
        if history["epochs"] and len(history["epochs"][0]) > 2:
            first = next(key for key in history["epochs"][0] if key not in ("epoch", "loss"))
            metric.plot([epoch["epoch"] + 1 for epoch in history["epochs"]], [epoch[first] for epoch in history["epochs"]], "o-", label=name)
            metric.set_title(f"validation {first} per epoch")
    loss.set_title("training loss per step (smoothed)")
    rate.set_title("learning rate of the head per step")
    loss.legend(fontsize="small")
    path = run / "curves.png"
    figure.savefig(path, dpi=90)
    return path


def _smooth(values: list[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, at - window + 1) : at + 1]) / min(window, at + 1) for at in range(len(values))]
