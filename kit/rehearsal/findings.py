"""What a look beforehand found: a level, a check, one line with the values, the way out. Owns how findings are shown. Knows no check."""

from __future__ import annotations

import html
from typing import NamedTuple

_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}


class Finding(NamedTuple):
    """level: "ok", "warning" or "error". check: short name. what: one line with the values. todo: the way out, "" when ok."""

    level: str
    check: str
    what: str
    todo: str = ""


class Said(NamedTuple):
    """A finding that does not know yet which check it is of."""

    level: str
    what: str
    todo: str = ""


class Findings(list[Finding]):
    """Findings that a notebook shows as a table, and a terminal as lines."""

    def __str__(self) -> str:
        width = max((len(found.check) for found in self), default=0)
        return "\n".join(f"{_MARKS[level]} {check:<{width}}  {what}{todo and ' → '}{todo}" for level, check, what, todo in self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = ["".join(f"<td style='text-align:left'>{html.escape(text)}</td>" for text in found) for found in self]
        return f"<table><tr><th>{'</th><th>'.join(Finding._fields)}</th></tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def one_line(error: Exception) -> str:
    """The words of an error that may have many lines, 300 characters at most."""
    return " ".join(str(error).split())[:300]
