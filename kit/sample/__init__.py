"""The embedded sample competition: passages and five-option questions written for this project, in the format of the LLM Science Exam.

train.csv has answers, test.csv has none; they are in test_answers.csv, which a competitor would not see. passages.jsonl is the corpus.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from kit.errors import DataError

FILES = ("train.csv", "test.csv", "test_answers.csv", "sample_submission.csv", "passages.jsonl")


def write_sample(folder: Path) -> Path:
    """Write the sample competition into a folder; files that are there already and differ are replaced. Raises DataError."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file: name a folder to write the sample competition into")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with resources.as_file(resources.files(__package__) / name) as source:
            part = folder / f".{name}.part"
            shutil.copyfile(source, part)
            part.replace(folder / name)
    return folder
