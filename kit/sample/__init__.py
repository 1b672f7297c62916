"""The embedded sample competitions, written for this project, in the formats of the LLM Science Exam (five-option questions and a corpus), of
Feedback Prize ELL (essays with six scores) and of SQuAD (questions about texts).

train has answers, test has none; they are in test_answers, which a competitor would not see. passages.jsonl is the corpus of the exam.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from kit.errors import ConfigError, DataError, nearest
from kit.sample.essays import write_essays
from kit.sample.readings import write_readings

FAMILIES = {"essays": write_essays, "readings": write_readings}
FILES = ("train.csv", "test.csv", "test_answers.csv", "sample_submission.csv", "passages.jsonl")


def write_sample(folder: Path, family: str = "exam") -> Path:
    """Write a sample competition into a folder; files that are there already and differ are replaced. Raises ConfigError, DataError."""
    if family in FAMILIES:
        return FAMILIES[family](folder)
    if family != "exam":
        raise ConfigError(f"sample competition {family!r} is unknown{nearest(family, ['exam', *FAMILIES])}")
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
