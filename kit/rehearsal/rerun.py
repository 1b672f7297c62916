"""A competition folder as the hidden rerun may have it: more rows, other ids, odd texts, in the format of the public one. Knows no task and no model.

Every oddity has cost someone a submission or was met in published notebooks. More rows than the public test set: the site's time limit
and memory errors come from the hidden one alone. Other ids in another order: notebooks that number the rows from 0, or count on 200 of
them, score by luck. Columns by place instead of by name; texts that pandas takes for missing ("None", "NA", "nan") and cells that are
missing: the site's scoring and exception errors. Equal texts under several ids: joins by text multiply rows. A text longer than a
model has positions; other scripts, formulas, quotes and line breaks: what a tokenizer, or a CSV that is cut at line ends, breaks on.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable, Collection
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from kit.data.competition import SAMPLE, TESTS
from kit.data.tables import read_table
from kit.errors import DataError

LONG = 20_000  # characters of a very long text
_ANSWERS = {"answer", "answers"}  # columns that a test set made from labelled rows may have, and a hidden one has not
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


def look_alike(competition: Path, out: Path, *, rows: int, seed: int = 0, test: str = TESTS[0], ids: str = "id") -> Path:
    """Make the folder `out` from a competition's: another test set of `rows` rows and its sample submission, all other files as they are.

    Rows are drawn from the public ones with replacement; a tenth of them, and at least one per kind of ODDITIES, get one kind of odd text
    in one or more columns other than `ids`, which names the rows. What is asked for (answers, columns of the sample submission) is left out.
    test: the test set's place in the folder; it is written again in the format it is read in. The same seed gives the same bytes. Gives
    `out`, which must be new or empty. Raises DataError.
    """
    if rows < 1:
        raise DataError(f"rows = {rows}: a look-alike of the hidden test set needs at least one row")
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty: name a new folder for the look-alike competition")
    public, sample = read_table(competition / test, ids=ids).frame, Path(test).with_name(SAMPLE)
    asked = read_table(competition / sample, ids=ids).frame if (competition / sample).is_file() else None
    public = public[[name for name in public if name == ids or name not in _ANSWERS.union([] if asked is None else asked)]]
    if list(public) == [ids]:
        raise DataError(f"{competition / test}: has no column but {ids!r} that is not asked for, so no texts: give the competition's own test set")
    rng = np.random.default_rng(seed)
    link_files(competition, out, but=(test, str(sample)))
    hidden = public.iloc[rng.integers(len(public), size=rows)].reset_index(drop=True)
    _make_odd(hidden, [name for name in hidden if name != ids], rng)
    hidden[ids] = _ids(rows, rng)
    _write(hidden[hidden.columns[::-1]], out / test)
    if asked is not None:
        _write(pd.DataFrame({name: hidden[ids] if name == ids else value for name, value in asked.iloc[0].items()}), out / sample)
    return out


def _make_odd(test: pd.DataFrame, texts: list[str], rng: np.random.Generator) -> None:
    """Change texts of a small share of the rows in place, and give some rows all the texts of another. texts: the columns that have them."""
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
    """A table of texts in the format that the file's name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_packed = path.name.lower().endswith(".gz")
    data = _FORMATS[Path(path.name.lower().removesuffix(".gz")).suffix](frame)
    path.write_bytes(gzip.compress(data, mtime=0) if is_packed else data)


def _csv(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False, lineterminator="\r\n").encode()


def _jsonl(frame: pd.DataFrame) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in frame.to_dict("records")).encode()


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _readings(frame: pd.DataFrame) -> bytes:
    """SQuAD's form, keys in another order than there; neighbouring questions about one text stand together."""
    articles = []
    for (title, context), rows in groupby(frame.to_dict("records"), lambda row: (row["title"], row["context"])):
        asked = [{"question": row["question"], "id": row["id"]} for row in rows]
        articles.append({"paragraphs": [{"qas": asked, "context": context}], "title": title})
    return json.dumps({"data": articles, "version": "1.1"}, ensure_ascii=False).encode()


_FORMATS: dict[str, Callable[[pd.DataFrame], bytes]] = {".csv": _csv, ".jsonl": _jsonl, ".json": _readings, ".parquet": _parquet}
"""What `read_table` reads, gzipped or not, as bytes."""


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
