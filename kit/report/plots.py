"""Pictures of a run as PNG: curves of training, the timeline of an inference, metric against budget. Reads the run's folder; knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import DependencyError
from kit.report.tables import read_timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY = "0.45"
_LATE = "#c00000"
_RED = 3  # of matplotlib's ten colours: left to the deadline
_CHARACTER = 5.2  # pixels of one character of a label
_WIDE = 25  # top ÷ bottom of the forecast panel from which on only powers of ten are marked
_NAMED = 20  # members in the legend
_SHOWN_SKIPPED = 8
_LINE = 190  # characters of a line below the picture
_NEAR = 0.02  # difference in the metric up to which the axis is linear
_FAR = 1.6  # a deadline beyond this many times the end of the run is said, not drawn: it would squeeze the run


def draw_curves(run: Path) -> Path:
    """curves.png in the run folder: loss and learning rate per step, and each metric per epoch, one line per fit. Raises DependencyError."""
    figure = _figure(13, 3.6, "drawing curves", "(the trained fits are finished and kept)")
    histories = {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("*/history.json"))}
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


def draw_timeline(run: Path) -> Path:
    """timeline.png in the run folder, from its timeline.json: what each slot scored, forecast against actual seconds, expected metric over time.

    One colour per member, loading hatched, failed and cut spans crossed out; the forecast panel shows actual ÷ forecast and the forecast's
    interval for each chunk. Raises DataError where timeline.json cannot be read, DependencyError.
    """
    timeline = read_timeline(run)
    slots = timeline["slots"] or [""]
    said = _skipped(timeline["skipped"])
    heights = [0.5 + 0.6 * len(slots), 1.3, 1.5, 0.12 + 0.17 * len(said)]
    figure = _figure(14, 1.4 + sum(heights), "drawing the timeline", "(the run's files are complete without it)")
    lanes, ratio, metric, text = figure.subplots(4, 1, height_ratios=heights)
    for above in (lanes, ratio):
        above.sharex(metric)
        above.tick_params(labelbottom=False)
    metric.set_xlim(0, _last_second(timeline))
    colours = _colours(timeline["spans"])
    _draw_lanes(lanes, timeline["spans"], slots, colours)
    _draw_forecasts(ratio, timeline["spans"], colours)
    _draw_metric(metric, timeline["metric"], timeline["ended"])
    figure.suptitle(_draw_deadline([lanes, ratio, metric], timeline), fontsize=10)
    _label_spans(lanes, timeline["spans"], pixels=figure.get_figwidth() * figure.dpi * 0.9)
    text.set_axis_off()
    text.text(0, 1, "\n".join(said), va="top", fontsize=8, transform=text.transAxes, parse_math=False)
    figure.savefig(run / "timeline.png")
    return run / "timeline.png"


def draw_values(results: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Metric against budget, one column per data set, and below it what the planner gains over each other policy on the same rows.

    results: title → {"metric": name, "rows": N, "full_s": seconds of the full cost, "policies": {name: {share of the full cost: estimate}},
    "gains": {name: {share: estimate of the planner minus that policy}}}; an estimate has value, low and high. Raises DependencyError.
    """
    figure = _figure(5.5 * len(results), 7.5, "drawing the value curve", "(the numbers are in the JSON file)")
    panels = figure.subplots(2, len(results), squeeze=False, sharex="col", height_ratios=[3, 2])
    for column, (title, result) in enumerate(results.items()):
        above, below = panels[:, column]
        names = list(result["policies"])
        for name, points in result["policies"].items():
            _draw_estimates(above, points, name, names.index(name), len(names), line="-")
        for name, points in result["gains"].items():
            _draw_estimates(below, points, name, names.index(name), len(names), line="")
        above.set_title(f"{title} ({result['rows']} rows, full cost {result['full_s']:.0f} s)", fontsize=10)
        above.set_ylabel(f"{result['metric']}, 95 % interval over rows")
        above.legend(fontsize=8, loc="lower right")
        below.axhline(0, color=_GREY, lw=0.8)
        below.set_yscale("symlog", linthresh=_NEAR)  # small differences decide, and large ones must not hide them
        below.set_ylabel("planner minus the other, paired")
        below.set_xlabel("budget, share of the full cost")
        shares = sorted({float(share) for points in result["policies"].values() for share in points})
        below.set_xscale("log")
        below.set_xticks(shares, [f"{share:.0%}" for share in shares])
        below.minorticks_off()
    figure.savefig(path, dpi=110)
    return path


def _figure(width: float, height: float, doing: str, kept: str) -> Figure:
    """An empty figure, inches. Raises DependencyError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError(f"{doing} needs matplotlib: pip install matplotlib {kept}") from None
    return Figure(figsize=(width, height), layout="constrained")


def _smooth(values: list[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, at - window + 1) : at + 1]) / min(window, at + 1) for at in range(len(values))]


# --- the timeline --------------------------------------------------------------------------------------------------------------------


def _last_second(timeline: Mapping[str, Any]) -> float:
    """Where the time axis ends: after all that happened, and after the deadline if that is not far."""
    ended = max([timeline["ended"] or 0.0, 1e-3, *(span["end"] for span in timeline["spans"]), *(point["at"] for point in timeline["metric"])])
    return 1.02 * (max(ended, timeline["budget_s"]) if timeline["budget_s"] <= _FAR * ended else ended)


def _colours(spans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A colour per member, by name, so that it is the same whatever was scored first."""
    from matplotlib import colormaps

    palette = [colormaps["tab20"](2 * index + light) for light in (0, 1) for index in range(10) if index != _RED]
    return {name: palette[index % len(palette)] for index, name in enumerate(sorted({span["member"] for span in spans}))}


def _draw_lanes(axes: Axes, spans: Sequence[Mapping[str, Any]], slots: Sequence[str], colours: Mapping[str, Any]) -> None:
    """A lane per slot, from the top; all spans of a member in a slot are one collection, so that thousands are drawn at once."""
    axes.set_yticks(range(len(slots)), slots)
    axes.set_ylim(len(slots) - 0.4, -0.6)
    for place, (name, colour) in enumerate(colours.items()):
        axes.broken_barh([], (0, 0), color=colour, label=name if place < _NAMED else "_")
        for slot in range(len(slots)):
            lane, mine = (slot - 0.4, 0.8), [span for span in spans if span["member"] == name and span["slot"] == slot]
            loads = [(span["start"], load) for span in mine if (load := min(span["load_s"], _seconds(span))) > 0]
            work = [(span["start"] + span["load_s"], rest) for span in mine if (rest := _seconds(span) - span["load_s"]) > 0]
            axes.broken_barh(work, lane, facecolor=colour, edgecolor="white", linewidth=0.3 if len(mine) < 200 else 0)
            axes.broken_barh(loads, lane, facecolor="white", edgecolor=colour, hatch="////", linewidth=0.5)
            lost = [(span["start"], _seconds(span)) for span in mine if span["state"] != "done"]
            axes.broken_barh(lost, lane, facecolor="none", edgecolor="black", hatch="xx", linewidth=1)
    if spans:
        axes.broken_barh([], (0, 0), facecolor="white", edgecolor=_GREY, hatch="////", label="loading")
        axes.broken_barh([], (0, 0), facecolor="white", edgecolor="black", hatch="xx", label="failed or cut")
        axes.legend(fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    else:
        axes.text(0.5, 0.5, "nothing was scored", ha="center", va="center", color=_GREY, transform=axes.transAxes)


def _label_spans(axes: Axes, spans: Sequence[Mapping[str, Any]], *, pixels: float) -> None:
    """Fit and view, over the chunks of it that follow one another in a slot, where there is room. pixels: width of the axes."""
    each = pixels / axes.get_xlim()[1]
    ordered = sorted(spans, key=lambda span: (span["slot"], span["start"]))
    for (slot, _, fit, view), chunks in groupby(ordered, key=lambda span: (span["slot"], span["member"], span["fit"], span["view"])):
        together = list(chunks)
        begin, end = together[0]["start"] + together[0]["load_s"], together[-1]["end"]
        text = next((text for text in (f"{fit} {view}", fit) if len(text) * _CHARACTER < (end - begin) * each), "")
        axes.text((begin + end) / 2, slot, text, ha="center", va="center", fontsize=7, clip_on=True, parse_math=False)


def _draw_forecasts(axes: Axes, spans: Sequence[Mapping[str, Any]], colours: Mapping[str, Any]) -> None:
    """Actual ÷ forecast seconds of each finished chunk, as a dot, and the forecast's interval ÷ forecast, as a line."""
    done = [span for span in spans if span["state"] == "done" and span["forecast_s"] and span["forecast_s"][1] > 0 and _seconds(span) > 0]
    middle = [(span["start"] + span["end"]) / 2 for span in done]
    low, high = ([span["forecast_s"][end] / span["forecast_s"][1] for span in done] for end in (0, 2))
    actual = [_seconds(span) / span["forecast_s"][1] for span in done]
    tint = [colours[span["member"]] for span in done]
    axes.vlines(middle, low, high, colors=tint, alpha=0.35, lw=4 if len(done) < 200 else 1)
    axes.scatter(middle, actual, c=tint or None, s=12 if len(done) < 200 else 4, zorder=3)
    axes.axhline(1, color=_GREY, lw=0.8)
    axes.set_yscale("log")
    bottom, top = 0.8 * min([0.5, *actual, *(value for value in low if value > 0)]), 1.25 * max([2, *actual, *high])
    ticks = [0.2, 0.33, 0.5, 1, 2, 3, 5] if top < _WIDE * bottom else [10.0**power for power in range(-6, 7)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom, top)
    axes.set_ylabel("actual ÷\nforecast", fontsize=8)


def _draw_metric(axes: Axes, points: Sequence[Mapping[str, Any]], ended: float) -> None:
    """The expected metric as it stood at each second."""
    known = sorted((point["at"], point["expected"]) for point in points if point["expected"] is not None)
    if known:
        known.append((max(ended, known[-1][0]), known[-1][1]))
        axes.step([at for at, _ in known], [expected for _, expected in known], ".-", where="post", color="black", ms=3, lw=1.2)
        axes.margins(y=0.15)
    axes.set_ylabel("expected\nmetric", fontsize=8)
    axes.set_xlabel("seconds since the clock began")


def _draw_deadline(panels: Sequence[Axes], timeline: Mapping[str, Any]) -> str:
    """Draw the deadline, and where the reserve begins, unless they are too far to the right; gives a title that says them."""
    budget, reserve, last = timeline["budget_s"], timeline["budget_s"] - timeline["reserve_s"], panels[0].get_xlim()[1]
    for axes in panels:
        axes.axvline(timeline["ended"], color=_GREY, lw=0.8, ls=":")
        if budget <= last:
            axes.axvspan(reserve, budget, color=_LATE, alpha=0.08, lw=0)
            axes.axvline(reserve, color=_LATE, lw=0.8, ls="--")
            axes.axvline(budget, color=_LATE, lw=1.5)
    where = "" if budget <= last else ", beyond the right edge"
    return f"{timeline['rows']} rows, ended after {timeline['ended']:.1f} s; reserve from {reserve:.0f} s, deadline at {budget:.0f} s{where}"


def _skipped(skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines that say what was left out, and why."""
    lines = [f"left out: {entry['member']}: {entry['rows']} rows: {entry['why']}" for entry in skipped[:_SHOWN_SKIPPED]]
    lines = [line if len(line) <= _LINE else f"{line[: _LINE - 1]}…" for line in (" ".join(line.split()) for line in lines)]
    return [*lines, f"and {len(skipped) - _SHOWN_SKIPPED} more"] if len(skipped) > _SHOWN_SKIPPED else lines


def _seconds(span: Mapping[str, Any]) -> float:
    return float(span["end"] - span["start"])


# --- the value curve -----------------------------------------------------------------------------------------------------------------


def _draw_estimates(axes: Axes, points: Mapping[str, Mapping[str, float]], name: str, place: int, places: int, *, line: str) -> None:
    """Estimates over shares of the cost with their intervals, moved a little sideways so that policies do not hide each other."""
    moved = [float(share) * 1.035 ** (place - (places - 1) / 2) for share in points]
    values = [point["value"] for point in points.values()]
    around = [[abs(point["value"] - point[end]) for point in points.values()] for end in ("low", "high")]
    axes.errorbar(moved, values, yerr=around, fmt=f"o{line}", color=f"C{place}", ms=4, capsize=3, lw=1.2, label=name)
