"""kit.rehearsal.findings: how findings are shown."""

from __future__ import annotations

from kit.rehearsal.findings import Finding, Findings, one_line


def test_findings_show_as_lines_and_as_a_table() -> None:
    findings = Findings([Finding("ok", "run", "a < b"), Finding("error", "locks", "none", "install")])
    assert str(findings) == repr(findings) == "✓ run    a < b\n✗ locks  none → install"
    table = findings._repr_html_()
    assert "a &lt; b" in table and table.count("<tr>") == 3
    assert str(Findings()) == ""


def test_an_error_of_many_lines_becomes_a_short_one() -> None:
    assert one_line(ValueError("first,\n  then second")) == "first, then second"
    assert len(one_line(ValueError("word " * 100))) == 300
