"""Figures of a benchmark beside what is asked for, as a table and as a chart. `python -m tests.bench.figures` shows all benchmarks on one page.

The page, artifacts/bench/index.html, has of each result JSON the charts whose names begin as its own does, and its numbers.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kit import manifest

BENCH = Path("artifacts/bench")


class Figure(NamedTuple):
    """bar: what is asked for: at least or at most."""

    name: str
    value: float
    bar: float
    at_least: bool

    @property
    def held(self) -> bool:
        """Whether the bar is."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def text(self) -> str:
        """ "4.9 (at least 4.7)"."""
        return f"{short(self.value)} (at {'least' if self.at_least else 'most'} {short(self.bar)})"


Bars = dict[str, tuple[str, float, bool]]
"""Key of a result → name, what is asked for, and whether that is the least or the most."""


def short(value: float) -> str:
    """With as many digits as say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.01 else f"{value:.1e}"


def barred(found: dict[str, Any], bars: Bars) -> list[Figure]:
    """Of the results that are there, those with a bar."""
    return [Figure(name, found[key], bar, at_least) for key, (name, bar, at_least) in bars.items() if key in found]


def table(figures: Sequence[Figure], others: dict[str, float]) -> str:
    """Each figure beside its bar, and below them those that have none."""
    lines = [f"{'' if own.held else 'MISSED':8s}{own.name:58s}{own.text}" for own in figures]
    return "\n".join([*lines, *(f"        {name:58s}{short(value)}" for name, value in others.items())])


def draw(figures: Sequence[Figure], path: Path) -> None:
    """Every ratio as a multiple of its bar: to the right of 1 it holds. Differences, which lie orders below, are left out."""
    from matplotlib.figure import Figure as Picture

    rows = [own for own in figures if not own.name.startswith("largest")][::-1]
    if not rows:
        return
    picture = Picture(figsize=(11, 1 + 0.34 * len(rows)), layout="constrained")
    axes = picture.subplots()
    lengths = [own.value / own.bar if own.at_least else own.bar / own.value for own in rows]
    drawn = axes.barh([own.name for own in rows], lengths, color=["C0" if own.held else "#c00000" for own in rows])
    axes.bar_label(drawn, [f" {own.text}" for own in rows], fontsize=8)
    axes.axvline(1, color="0.45", lw=1)
    axes.set_xlim(0, 1.5 * max(lengths))
    axes.set_xlabel("multiple of what is asked for: right of 1 is better")
    picture.savefig(path, dpi=110)


# --- one page --------------------------------------------------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """All results of a folder as HTML; charts are named, not held."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        charts = "".join(f'<p><img src="{html.escape(chart.name)}" alt="{html.escape(chart.stem)}"></p>' for chart in sorted(folder.glob(f"{path.stem}*.png")))
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{short(value)}</td></tr>" for name, value in _numbers(json.loads(path.read_text())))
        sections.append(f"<h2>{html.escape(path.stem)}</h2>{charts}<details><summary>figures</summary><table>{rows}</table></details>")
    style = "body{font-family:sans-serif;max-width:75em;margin:auto}img{max-width:100%}td{padding:0 1em 0 0}"
    return f'<!doctype html><meta charset="utf-8"><title>Benchmarks</title><style>{style}</style><h1>Benchmarks</h1>{"".join(sections)}\n'


def _numbers(values: Any, name: str = "") -> list[tuple[str, float]]:
    """Every number of nested results by its dotted name; what is behind a figure (details, lists) is left out."""
    if isinstance(values, dict):
        return [one for key, value in values.items() if key != "details" for one in _numbers(value, f"{name}.{key}" if name else key)]
    return [(name, float(values))] if isinstance(values, int | float) and not isinstance(values, bool) else []


def main() -> None:
    """Write the page."""
    manifest.write_atomically(BENCH / "index.html", page(BENCH))
    print(BENCH / "index.html")


if __name__ == "__main__":
    main()
