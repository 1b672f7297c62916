"""A competition folder as the hidden rerun may have it: more rows, other ids, odd texts. Knows no task and no model.

Every oddity has cost someone a submission or was met in published notebooks. More rows than the public test set: the site's time limit
and memory errors come from the hidden one alone. Other ids in another order: notebooks that number the rows from 0, or count on 200 of
them, score by luck. Columns by place instead of by name; texts that pandas takes for missing ("None", "NA", "nan") and cells that are
missing: the site's scoring and exception errors. Equal texts under several ids: joins by text multiply rows. A text longer than a
model has positions; other scripts, formulas, quotes and line breaks: what a tokenizer, or a CSV that is cut at line ends, breaks on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pandas as pd

from kit.data.tables import read_table
from kit.errors import DataError

TEST, SAMPLE = "test.csv", "sample_submission.csv"
LONG = 20_000  # characters of a very long text
_SHARE = 0.1  # of the rows are odd, so that the time stays what it would be

ODDITIES: dict[str, Callable[[str], str]] = {
    "missing": lambda text: "",
    "blank": lambda text: " \t ",
    "very long": lambda text: (f"{text} and " * (LONG // (len(text) + 5) + 1))[:LONG],
    "word None": lambda text: "None",
    "word NA": lambda text: "NA",
    "word nan": lambda text: "nan",
    "number": lambda text: "-1e400",
    "formula": lambda text: text + r" $\hat{H}\psi = E\psi,\ \frac{\partial u}{\partial t} = \alpha \nabla^{2} u,\ 10\% \text{of} \{x\}$",
    "lines": lambda text: f"\n{text}\r\n\r\n1.\tfirst\n2.\tsecond\n",
    "quotes": lambda text: f'"{text}", ""he said"", \'it\'; comma,,"',
    "Chinese, Japanese, Korean": lambda text: f"{text} 光合作用发生在叶绿体里。光合成はどこで起こりますか。 광합성은 어디에서",
    "right to left": lambda text: f"\u202e{text}\u202c أين تحدث عملية البناء الضوئي؟ היכן מתרחשת",
    "emoji": lambda text: f"{text} 👩🏽\u200d🔬🧬🏳️\u200d🌈",
    "combining": lambda text: f"{text} e\u0301 Z\u0351\u036b\u0343\u0306\u0302\u030d\u0308\u034c",
    "zero width": lambda text: "\u200b".join(text) + "\ufeff\u2060",
    "control": lambda text: f"{text}\x00\x07\x0b\x1b[31m\u2028\u0085",
}  # fmt: skip
_IDS: tuple[Callable[[int], str], ...] = (str, "{:09d}".format, "q-{:x}".format, "Row {}, b".format)


def look_alike(competition: Path, out: Path, *, rows: int, seed: int = 0) -> Path:
    """Make the folder `out` from a competition's: another test set of `rows` rows and its sample submission, all other files as they are.

    Rows are drawn from the public ones with replacement; a tenth of them, and at least one per kind of ODDITIES, get one kind of odd text
    in one or more columns other than `id`. The same seed gives the same bytes. Gives `out`, which must be new or empty. Raises DataError.
    """
    if rows < 1:
        raise DataError(f"rows = {rows}: a look-alike of the hidden test set needs at least one row")
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty: name a new folder for the look-alike competition")
    public = read_table(competition / TEST).frame
    rng = np.random.default_rng(seed)
    link_files(competition, out, but=(TEST, SAMPLE))
    test = public.iloc[rng.integers(len(public), size=rows)].reset_index(drop=True)
    _make_odd(test, rng)
    test["id"] = _ids(rows, rng)
    _write(test[test.columns[::-1]], out / TEST)
    if (competition / SAMPLE).is_file():
        first = read_table(competition / SAMPLE).frame.iloc[0]
        _write(pd.DataFrame({column: test["id"] if column == "id" else value for column, value in first.items()}), out / SAMPLE)
    return out


def _make_odd(test: pd.DataFrame, rng: np.random.Generator) -> None:
    """Change texts of a small share of the rows in place, and give some rows all the texts of another."""
    texts = [column for column in test if column != "id"]
    kinds = [*ODDITIES.values()]
    odd = rng.permutation(len(test))[: max(len(kinds) + 1, round(_SHARE * len(test)))]
    for place, row in enumerate(odd):
        if place % (len(kinds) + 1) == len(kinds):
            test.loc[row, texts] = test.loc[rng.integers(len(test)), texts]  # a duplicate
            continue
        chosen = rng.permutation(texts)[: 1 + rng.integers(len(texts))]
        for column in chosen:
            test.loc[row, column] = kinds[place % (len(kinds) + 1)](test.loc[row, column])


def _ids(rows: int, rng: np.random.Generator) -> list[str]:
    """Distinct ids with gaps, in no order: numbers, padded numbers, and texts."""
    numbers = rng.choice(rows * 50 + 1000, size=rows, replace=False)
    return [_IDS[kind](int(number)) for kind, number in zip(rng.integers(len(_IDS), size=rows), numbers, strict=True)]


def _write(frame: pd.DataFrame, path: Path) -> None:
    path.write_bytes(frame.to_csv(index=False, lineterminator="\r\n").encode())


def link_files(source: Path, target: Path, *, but: Collection[str] = ()) -> None:
    """Every file below `source`, except those named, also below `target`: as a hard link where the file system has them, else as a copy."""
    names = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if str(name) not in but:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link((source / name).resolve(), target / name)
            except OSError:
                shutil.copyfile(source / name, target / name)
