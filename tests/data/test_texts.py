"""Corpora: what is read, what is kept by words, what stands there already, and what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.data.audit import duplicates
from kit.data.tables import read_table
from kit.data.texts import Kept, write_corpus
from kit.errors import ConfigError, DataError, KitError
from kit.tasks.causal_lm import CausalLM

ROOT = Path(__file__).parents[2]


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def jsonl(path: Path, texts: list[str], **more: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts), "utf-8")
    return path


def sentences(count: int, words: int, seed: int = 0) -> list[str]:
    """Texts of random words, as different as such texts are."""
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(300)]
    return [" ".join(rng.choices(known, k=words)) for _ in range(count)]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder of Python files as an installation has them."""
    folder = tmp_path / "site-packages"
    files = {
        "alone.py": "import torch\n",
        "maths/__init__.py": "",
        "maths/arrays.py": "import numpy as np\nprint(np.zeros(3))\n",
        "maths/inner/frames.py": "from pandas import DataFrame\n",
        "words/plain.py": "print('numpydoc and my_numpy are other words')\n",
        "words/notes.txt": "numpy",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "words" / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nimport numpy  # \xe9\n".encode("latin-1"))
    (folder / "words" / "broken.py").write_bytes(b"import numpy  # \xe9\n")
    return folder


def test_a_folder_gives_its_python_files_by_name_and_package(package: Path, tmp_path: Path) -> None:
    kept = write_corpus([package], tmp_path / "out" / "code.jsonl", words=["numpy", "pandas", "torch"])
    assert kept == Kept(read=7, unreadable=1, blank=1, without_words=1, equal=0, similar=0, written=4, chars=kept.chars)
    written = rows(tmp_path / "out" / "code.jsonl")
    assert [(row["id"], row["source"]) for row in written] == [
        ("site-packages/alone.py", "alone"), ("site-packages/maths/arrays.py", "maths"), ("site-packages/maths/inner/frames.py", "maths"),
        ("site-packages/words/latin.py", "words"),
    ]  # fmt: skip
    assert written[0]["text"] == "import torch\n" and written[3]["text"].endswith("# \xe9\n")
    assert kept.chars == sum(len(row["text"]) for row in written)
    assert kept.summary()["share_with_words"] == pytest.approx(4 / 7) and kept.summary()["share_written"] == pytest.approx(4 / 7)
    assert os.listdir(tmp_path / "out") == ["code.jsonl"]


def test_words_are_whole_and_keep_their_case(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["numpy here", "numpydoc", "Numpy", "a.numpy()", "_numpy", "c++ it is", "numpy"])
    write_corpus([source], tmp_path / "out.jsonl", words=["numpy", "c++"])
    assert [row["text"] for row in rows(tmp_path / "out.jsonl")] == ["numpy here", "a.numpy()", "c++ it is", "numpy"]


def test_without_words_everything_is_kept_as_it_is_and_training_reads_it(tmp_path: Path) -> None:
    texts = [" Größe \u2028 物\n", "a\tb\r\n", "\ufeffx"]
    kept = write_corpus([jsonl(tmp_path / "a.jsonl", [*texts, " \n"], other=1)], tmp_path / "out.jsonl")
    assert (kept.read, kept.blank, kept.written) == (4, 1, 3)
    read = CausalLM().read(read_table(tmp_path / "out.jsonl"))
    assert [(one.id, one.text) for one in read] == [(f"a.jsonl:{line}", text) for line, text in enumerate(texts, 1)]


def test_a_text_file_is_cut_at_blank_lines_and_a_wall_of_lines_too(tmp_path: Path) -> None:
    paragraphs = ["\n".join([*sentences(20, 12, seed), ""]) for seed in range(40)]
    (tmp_path / "book.txt").write_bytes(("\ufeff" + "\n".join(paragraphs)).replace("\n", "\r\n").encode())
    write_corpus([tmp_path / "book.txt"], tmp_path / "out.jsonl")
    written = rows(tmp_path / "out.jsonl")
    assert "".join(row["text"] for row in written) == "\n".join(paragraphs)
    assert len(written) > 2 and all(20_000 <= len(row["text"]) < 22_500 for row in written[:-1])
    lines = "\n".join(paragraphs).split("\n")
    for row in written:
        assert row["text"].split("\n")[0] == lines[int(row["id"].removeprefix("book.txt:")) - 1]
    (tmp_path / "wall.txt").write_text("\n".join(sentences(4000, 12)))
    write_corpus([tmp_path / "wall.txt"], tmp_path / "out.jsonl")
    assert 80_000 <= len(rows(tmp_path / "out.jsonl")[0]["text"]) < 80_200


def test_equal_texts_are_written_once_and_nearly_equal_ones_too_across_sources(tmp_path: Path) -> None:
    first, second, third = sentences(3, 200)
    changed = first.replace(first.split()[50], "other", 1)
    one, other = jsonl(tmp_path / "a.jsonl", [first, second]), jsonl(tmp_path / "b.jsonl", [first, changed, third, second.upper()])
    kept = write_corpus([one, other], tmp_path / "out.jsonl")
    assert (kept.equal, kept.similar, kept.written) == (1, 2, 3)
    assert [row["text"] for row in rows(tmp_path / "out.jsonl")] == [first, second, third]
    strict = write_corpus([one, other], tmp_path / "out.jsonl", similarity=1.0)
    assert (strict.equal, strict.similar, strict.written) == (1, 1, 4), "only what is equal but for case and signs"


@pytest.mark.parametrize("words", [12, 60, 400])
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(words: int, tmp_path: Path) -> None:
    """300 texts and a changed copy of each, from hardly to widely: kit.data.audit says which are similar enough."""
    rng = random.Random(words)
    originals = sentences(300, words, seed=words)
    copies = []
    for text in originals:
        parts = text.split()
        for place in rng.sample(range(words), rng.randint(0, max(1, words // 12))):
            parts[place] = "changed"
        copies.append(" ".join(parts))
    texts = [*originals, *copies]
    expected = {found.right for found in duplicates(texts)}
    write_corpus([jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out.jsonl")
    kept = {int(row["id"].rsplit(":", 1)[1]) - 1 for row in rows(tmp_path / "out.jsonl")}
    found = set(range(len(texts))) - kept
    exact = {number for number, text in enumerate(texts) if text in texts[:number]}
    assert 60 < len(expected) < 300
    assert found <= expected | exact, "nothing is dropped that is not similar"
    assert len(expected - found) <= 1, "and hardly anything is missed"


def test_the_same_sources_give_the_same_bytes(package: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_corpus([package], tmp_path / name, words=["numpy", "torch"])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


MEASURE = """
import resource, sys
from kit.data.texts import write_corpus
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_corpus([sys.argv[1]], sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """90 MB in documents of 100 kB: the peak is that of a few of them."""
    rng = random.Random(0)
    with (tmp_path / "big.jsonl").open("w") as file:
        for _ in range(900):
            file.write(json.dumps({"text": rng.randbytes(50_000).hex()}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "big.jsonl"), str(tmp_path / "out.jsonl")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "out.jsonl").stat().st_size > 90e6
    assert int(done.stdout) < 50


def bad(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


GOOD = '{"text": "good"}\n'
BAD_FILES: dict[str, tuple[str, bytes | str, str]] = {
    "half a line of JSON": ("a.jsonl", GOOD + '{"text": "ha', r"a\.jsonl: line 2: cannot be read as JSON"),
    "a list": ("a.jsonl", GOOD + '["text"]\n', r"a\.jsonl: line 2: is no JSON object"),
    "another key": ("a.jsonl", '{"content": "x"}\n', r"a\.jsonl: line 1: key 'text' is missing \(keys: content\): name the key"),
    "a number": ("a.jsonl", GOOD + '\n{"text": 7}\n', r"a\.jsonl: line 3, key 'text' = 7: give a text"),
    "null": ("a.jsonl", '{"text": null}\n', r"a\.jsonl: line 1, key 'text' = None: give a text"),
    "half a character": ("a.jsonl", '{"text": "a\\ud800"}\n', r"a\.jsonl: line 1, key 'text': half a character, '\\ud800', at 1"),
    "deep nesting": ("a.jsonl", GOOD + "[" * 100_000, r"a\.jsonl: line 2: cannot be read as JSON"),
    "latin letters": ("a.txt", b"one\ntwo \xe9\n", r"a\.txt: line 2: byte 0xe9 is not UTF-8"),
    "a binary": ("a.jsonl", b"\x89PNG\r\n", r"a\.jsonl: line 1: byte 0x89 is not UTF-8"),
    "an empty file": ("a.jsonl", "", r"a\.jsonl: no documents"),
    "blanks only": ("a.txt", " \n\n", r"a\.txt: nothing is left of 1 documents \(1 blank\)"),
    "another kind": ("a.csv", "id,text\n1,x\n", r"a\.csv: the kind of text is unknown from its name: give one that ends in \.jsonl, \.txt, \.py"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_source_is_refused_by_file_and_line_and_nothing_is_left_behind(case: str, tmp_path: Path) -> None:
    name, content, why = BAD_FILES[case]
    refused([bad(tmp_path / name, content)], tmp_path / "out.jsonl", DataError, why)
    assert os.listdir(tmp_path) == [name]


def refused(sources: list[Path], out: Path, kind: type[KitError], why: str, **settings: Any) -> None:
    with pytest.raises(kind, match=why) as error:
        write_corpus(sources, out, **settings)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_sources_and_settings_that_cannot_be_are_refused(package: Path, tmp_path: Path) -> None:
    out, good = tmp_path / "out.jsonl", bad(tmp_path / "good.jsonl", GOOD)
    refused([tmp_path / "nowhere.jsonl"], out, DataError, r"nowhere\.jsonl: no such file or folder")
    refused([], out, ConfigError, "no source to read")
    refused([good], tmp_path / "out.csv", ConfigError, r"out\.csv: a corpus is written as JSON lines: give a name that ends in \.jsonl")
    refused([good], out, ConfigError, r"word ' ' is blank", words=[" "])
    refused([good], out, ConfigError, r"word 'a ' is blank or has blanks around it", words=["a "])
    refused([good], out, ConfigError, r"similarity = 0\.5: give 0\.8 to 1", similarity=0.5)
    refused([good], out, DataError, r"nothing is left of 1 documents \(1 without words\): give other words", words=["bad"])
    (tmp_path / "empty").mkdir()
    refused([tmp_path / "empty"], out, DataError, r"empty: no documents: give sources with \.py files")
    (tmp_path / "empty" / "good.jsonl").write_text(GOOD)
    refused([good, tmp_path / "empty" / "good.jsonl"], out, ConfigError, r"good\.jsonl have the same name, by which documents are told apart")
    with pytest.raises(ConfigError, match=r"good\.jsonl: is also a source"):
        write_corpus([good], good)
    assert good.read_text() == GOOD


def test_a_corpus_that_fails_leaves_the_earlier_one_as_it_was(tmp_path: Path) -> None:
    out = bad(tmp_path / "out.jsonl", GOOD)
    with pytest.raises(DataError, match="line 2"):
        write_corpus([bad(tmp_path / "a.jsonl", GOOD + "{")], out)
    assert out.read_text() == GOOD and sorted(os.listdir(tmp_path)) == ["a.jsonl", "out.jsonl"]
