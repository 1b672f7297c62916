"""A competition's own files, by the names that they have: the test set, and the sample submission beside it. Does not read them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from kit import manifest
from kit.config import Recipe
from kit.errors import DataError, KitError
from kit.paths import find_competition

TESTS = ("test.csv", "test.json", "test.csv.gz", "test.json.gz", "test.parquet", "test.jsonl")
SAMPLE = "sample_submission.csv"
_TABLES = (".csv", ".csv.gz", ".json", ".json.gz", ".parquet", ".jsonl")
_SHOWN = 10  # files named in an error


def find_test(root: Path, named: Iterable[str] = ()) -> Path:
    """The test set of the competition below `root`, outside of bundles: the first of these names, and then of TESTS, that is there.

    named: as `named_in` gives them. Raises DataError with all names that were looked for, and the tables that are there.
    """
    names = list(dict.fromkeys([*(Path(name).name for name in named), *TESTS]))
    for name in names:
        with suppress(DataError):
            return find_competition(root, name) / name
    found = list(_tables(root))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    there = f"tables there: {', '.join(found[:_SHOWN])}{more}" if found else "no table is there" if root.is_dir() else "no such folder"
    raise DataError(
        f"no test set below {root}: looked for {', '.join(names)} ({there}): attach the competition's data, or name the file, in the recipe as data.test "
        "or as `test` of kit.infer"
    )


def named_in(recipes: Iterable[Path]) -> list[str]:
    """What recipe files call the test set; one that cannot be read has no say."""
    names = []
    for recipe in recipes:
        with suppress(KitError):
            names.append(Recipe.load(recipe).data.test)
    return names


def sample_beside(test: Path) -> Path | None:
    """The sample submission beside a test set, if there is one."""
    sample = test.with_name(SAMPLE)
    return sample if sample.is_file() else None


def _tables(root: Path) -> Iterator[str]:
    """Files below root that may be tables, bundles left out."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [] if manifest.FILE in files else sorted(subfolders)
        if manifest.FILE not in files:
            yield from (str((Path(folder) / name).relative_to(root)) for name in sorted(files) if name.lower().endswith(_TABLES))
