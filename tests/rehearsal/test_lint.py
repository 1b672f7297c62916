"""kit.rehearsal.lint: every cause of the site's error classes is found, named with its row, value and way out; good files pass."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.errors import ConfigError, DataError
from kit.rehearsal.findings import Finding
from kit.rehearsal.lint import CLUES, COMPUTE, EXCEPTION, NOT_FOUND, SCORING, TIMEOUT, judge, lint, read_log
from kit.tasks.essay_regression import EssayRegression
from kit.tasks.extractive_qa import ExtractiveQA
from tests.packed import write_rows

IDS = ("7", "q-2", "003", "9", "11")
GOOD = [(id_, "A B C") for id_ in IDS]


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "sample_submission.csv", [("id", "prediction"), *GOOD])


@pytest.fixture
def test_set(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "test.csv", [("id", "prompt", *"ABCDE"), *((id_, "why", *"vwxyz") for id_ in IDS)])


def submit(folder: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("id", "prediction")) -> Path:
    return write_rows(folder / "out" / "submission.csv", [header, *rows])


def changed(row: int, prediction: str) -> list[tuple[str, ...]]:
    """The good rows, one of them with another prediction."""
    return [(id_, prediction if at == row else text) for at, (id_, text) in enumerate(GOOD)]


def errors(findings: list[Finding]) -> list[Finding]:
    return [found for found in findings if found.level == "error"]


def the_only_fault(findings: list[Finding], error: str, *words: str, level: str = "error") -> None:
    """There is one finding that is not ok; it is of this class, has these words, and says what to do."""
    faults = [found for found in findings if found.level != "ok"]
    assert [(found.level, found.check) for found in faults] == [(level, error)], faults
    for word in words:
        assert word in faults[0].what
    assert faults[0].todo and "\n" not in faults[0].what


# --- the file --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [(), ("sample",), ("test",), ("sample", "test")])
def test_a_good_submission_passes_whatever_it_is_compared_with(tmp_path: Path, sample: Path, test_set: Path, given: tuple[str, ...]) -> None:
    findings = lint(submit(tmp_path, GOOD), **{name: {"sample": sample, "test": test_set}[name] for name in given})
    assert [found.level for found in findings] == ["ok"]


def test_one_or_two_letters_are_a_prediction_too(tmp_path: Path, sample: Path) -> None:
    assert not errors(lint(submit(tmp_path, changed(1, "E")), sample=sample))
    assert not errors(lint(submit(tmp_path, changed(1, "E D")), sample=sample))


def test_a_missing_file_names_what_lies_there_instead(tmp_path: Path, sample: Path) -> None:
    the_only_fault(lint(tmp_path / "submission.csv", sample=sample), NOT_FOUND, "no such file", "sample_submission.csv")
    the_only_fault(lint(tmp_path / "none" / "submission.csv"), NOT_FOUND, "no CSV is there")
    the_only_fault(lint(tmp_path), NOT_FOUND, "no such file")


def test_a_file_of_another_name_is_not_looked_for(tmp_path: Path) -> None:
    the_only_fault(lint(write_rows(tmp_path / "my_submission.csv", [("id", "prediction"), *GOOD])), NOT_FOUND, "my_submission.csv", level="warning")


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        ("", ("the prediction is empty", "row 3", "'003'")),
        ("NaN", ("the prediction is empty", "'NaN'")),
        ("A B B", ("row 3", "'A B B'", "named twice")),
        ("A B C D", ("'A B C D'", "1 to 3 letters")),
        ("A B F", ("'F' is no option",)),
        ("a b c", ("'a' is no option",)),
        ("A,B,C", ("'A,B,C' is no option",)),
        ("ABC", ("'ABC' is no option",)),
        ("0 1 2", ("'0' is no option",)),
    ],
)
def test_a_wrong_prediction_is_named_with_its_row_and_value(tmp_path: Path, sample: Path, test_set: Path, prediction: str, words: tuple[str, ...]) -> None:
    the_only_fault(lint(submit(tmp_path, changed(2, prediction)), sample=sample, test=test_set), SCORING, *words)


def test_options_are_those_of_the_test_set(tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.csv", [("id", "prompt", *"ABC"), *((id_, "why", *"vwx") for id_ in IDS)])
    the_only_fault(lint(submit(tmp_path, changed(4, "A D")), test=test), SCORING, "row 5", "'D' is no option (A to C)")


def test_every_kind_of_fault_is_named_once_with_its_first_row_and_its_number(tmp_path: Path, sample: Path) -> None:
    rows = [("7", "A A"), ("q-2", ""), ("003", "B B C"), ("9", "A A"), ("11", "F")]
    found = [fault.what for fault in errors(lint(submit(tmp_path, rows), sample=sample))]
    assert len(found) == 3
    assert "row 2" in found[0] and "empty" in found[0]
    assert "row 1" in found[1] and "twice (3 such rows)" in found[1]
    assert "row 5" in found[2] and "'F'" in found[2]


def test_many_kinds_of_faults_are_counted_not_listed(tmp_path: Path) -> None:
    for rows, words in ((40, "35 more kinds"), (400, "395 more kinds")):
        found = errors(lint(submit(tmp_path, [(str(row), f"0.{row}1") for row in range(rows)])))
        assert len(found) == 6 and words in found[-1].what


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (GOOD[:-1], ["4 rows, but", "id '11' of"]),
        ([*GOOD, GOOD[0]], ["id stands in an earlier row too", "6 rows, but"]),
        ([*GOOD[:-1], GOOD[0]], ["row 5", "id '11' of"]),
        ([("8", "A B C"), *GOOD[1:]], ["column 'id' = '8': this id is not in", "id '7' of"]),
        ([(" ", "A B C"), *GOOD[1:]], ["the id is empty", "id '7' of"]),
        ([(str(row), text) for row, (_, text) in enumerate(GOOD)], ["this id is not in", "id '003' of"]),
    ],
)
def test_wrong_ids_are_named(tmp_path: Path, sample: Path, rows: list[tuple[str, ...]], words: list[str]) -> None:
    found = errors(lint(submit(tmp_path, rows), sample=sample))
    assert len(found) == len(words) and all(word in fault.what for word, fault in zip(words, found, strict=True))
    assert {fault.check for fault in found} == {SCORING}


def test_the_number_of_wrong_ids_is_told(tmp_path: Path, sample: Path) -> None:
    found = errors(lint(submit(tmp_path, [(f"{row}.0", "A B C") for row in range(5)]), sample=sample))
    assert "(5 such rows)" in found[0].what and "(5 such rows)" in found[1].what and "texts" in found[0].todo


def test_another_order_is_only_a_warning(tmp_path: Path, sample: Path) -> None:
    the_only_fault(lint(submit(tmp_path, GOOD[::-1]), sample=sample), SCORING, "row 1", "another order", level="warning")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (("ID", "Prediction"), "capitals differ"),
        (("id", "answer"), "columns are 'id', 'answer', not 'id', 'prediction'"),
        (("question", "prediction"), "not 'id', 'prediction'"),
        (("id", " prediction"), "column ' prediction' has blanks around its name"),
    ],
)
def test_wrong_columns_are_named(tmp_path: Path, header: tuple[str, ...], words: str) -> None:
    the_only_fault(lint(submit(tmp_path, GOOD, header)), SCORING, words)


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_a_saved_row_index_is_recognised(tmp_path: Path, name: str) -> None:
    rows = [(str(row), *values) for row, values in enumerate(GOOD)]
    findings = lint(submit(tmp_path, rows, (name, "id", "prediction")))
    the_only_fault(findings, SCORING, "saved row index")
    assert "index=False" in errors(findings)[0].todo


def test_columns_are_those_of_the_sample_submission(tmp_path: Path) -> None:
    sample = write_rows(tmp_path / "sample.csv", [("prediction", "id"), *((text, id_) for id_, text in GOOD)])
    the_only_fault(lint(submit(tmp_path, GOOD), sample=sample), SCORING, "order differs", level="warning")


def test_a_sample_submission_of_another_task_is_told(tmp_path: Path) -> None:
    sample = write_rows(tmp_path / "sample.csv", [("id", "score"), *GOOD])
    the_only_fault(lint(submit(tmp_path, GOOD, ("id", "score")), sample=sample), SCORING, "submission.csv: column 'prediction' is missing")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty (0 bytes)"),
        (b"id,prediction\n", "no rows"),
        (b"id;prediction\n7;A B C\n", "separated by ';'"),
        (b"id\tprediction\n7\tA B C\n", "separated by '\\t'"),
        (b"id,prediction\n7,A,B,C\n", "line 2"),
        (b"id,prediction\n7,\xff\n", "not UTF-8"),
        ("id,prediction\n7,A\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_file_that_is_no_such_csv_is_refused_in_words(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "submission.csv"
    path.write_bytes(content)
    the_only_fault(lint(path), SCORING, words)


def test_a_byte_order_mark_is_a_warning(tmp_path: Path, sample: Path) -> None:
    path = submit(tmp_path, GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    the_only_fault(lint(path, sample=sample), SCORING, "byte order mark", level="warning")


def test_a_sample_submission_of_another_test_set_is_told(tmp_path: Path, sample: Path) -> None:
    test = write_rows(tmp_path / "test.csv", [("id", "prompt", *"ABCDE"), ("other", "why", *"vwxyz")])
    the_only_fault(lint(submit(tmp_path, GOOD), sample=sample, test=test), "sample submission", "differ in 6 ids", level="warning")


def test_what_the_user_gives_wrongly_is_refused(tmp_path: Path) -> None:
    path = submit(tmp_path, GOOD)
    with pytest.raises(DataError, match="no such file"):
        lint(path, sample=tmp_path / "none.csv")
    with pytest.raises(DataError, match="log .* cannot be read"):
        lint(path, log=tmp_path / "none.log")
    with pytest.raises(ConfigError, match="task.kind = 'chess' is unknown"):
        lint(path, task="chess")


# --- the other families ----------------------------------------------------------------------------------------------------------

GRADES = ("cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions")
ESSAYS = ("0A1", "0b2", "1E9")
ANSWERS = {"q1": "1809", "q2": "the sea", "q3": "Ann"}
ESSAY, READER = EssayRegression(), ExtractiveQA()


def write_essays(folder: Path) -> dict[str, Path]:
    """The competition's files, as options of `lint`."""
    test = write_rows(folder / "test.csv", [("text_id", "full_text"), *((id_, "My essay.") for id_ in ESSAYS)])
    return {"test": test, "sample": write_rows(folder / "sample_submission.csv", [("text_id", *GRADES), *((id_, *["3.0"] * 6) for id_ in ESSAYS)])}


def write_readings(folder: Path) -> dict[str, Path]:
    """The same, the test set as SQuAD's JSON."""
    asked = [{"id": id_, "question": "What?"} for id_ in ANSWERS]
    test = folder / "test.json"
    test.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "Ann saw the sea in 1809. NA", "qas": asked}]}]}), encoding="utf-8")
    return {"test": test, "sample": write_rows(folder / "sample_submission.csv", [("id", "answer"), *((id_, "the sea") for id_ in ANSWERS)])}


def grade(folder: Path, row: int = 0, **changed: str) -> Path:
    """A submission of essays, some grades of one row changed."""
    graded = [dict.fromkeys(GRADES, "2.5") | (changed if at == row else {}) for at in range(len(ESSAYS))]
    return submit(folder, [(id_, *grades.values()) for id_, grades in zip(ESSAYS, graded, strict=True)], ("text_id", *GRADES))


def answer(folder: Path, content: str | dict[str, object], name: str = "predictions.json") -> Path:
    path = folder / "out" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def answer_rows(folder: Path, **changed: str) -> Path:
    return submit(folder, [*(ANSWERS | changed).items()], ("id", "answer"))


def test_good_submissions_of_every_family_pass(tmp_path: Path) -> None:
    (tmp_path / "qa").mkdir()
    essays, readings = write_essays(tmp_path), write_readings(tmp_path / "qa")
    read = [(readings, path, "extractive_qa") for path in (answer_rows(tmp_path / "qa"), answer(tmp_path, ANSWERS))]
    tried = [(essays, grade(tmp_path), "essay_regression"), *read]
    for given, path, task in tried:
        for few in ({}, {"test": given["test"]}, {"sample": given["sample"]}, given):
            assert [found.level for found in lint(path, task=task, **few)] == ["ok"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"syntax": "5.5"}, ("row 2", "text_id '0b2'", "column 'syntax' = '5.5'", "outside the scale from 1 to 5")),
        ({"syntax": "2,5"}, ("column 'syntax' = '2,5'", "is no number")),
        ({"grammar": "inf"}, ("column 'grammar' = 'inf'", "is no number")),
        ({"grammar": "nan"}, ("column 'grammar' = 'nan'", "the prediction is empty")),
        ({"cohesion": ""}, ("column 'cohesion' = ''", "the prediction is empty")),
    ],
)
def test_a_wrong_grade_is_named_with_its_essay_column_and_value(tmp_path: Path, changed: dict[str, str], words: tuple[str, ...]) -> None:
    the_only_fault(lint(grade(tmp_path, 1, **changed), **write_essays(tmp_path), task="essay_regression"), SCORING, *words)


def test_a_wrong_grade_in_a_row_with_an_empty_one_is_named_too(tmp_path: Path) -> None:
    found = errors(lint(grade(tmp_path, 1, cohesion="9", grammar=""), **write_essays(tmp_path), task="essay_regression"))
    assert ["'grammar' = ''" in found[0].what, "'cohesion' = '9'" in found[1].what, len(found)] == [True, True, 2]


def test_the_ids_of_essays_are_those_of_their_own_column(tmp_path: Path) -> None:
    given = write_essays(tmp_path)
    rows = [("0A1", *["3"] * 6), ("0A1", *["3"] * 6), ("1000000000.0", *["3"] * 6)]  # 1E9 read as a number
    found = errors(lint(submit(tmp_path, rows, ("text_id", *GRADES)), **given, task="essay_regression"))
    assert all(word in fault.what for word, fault in zip(["column 'text_id' = '0A1': this id stands", "'1000000000.0': this id is not in", "'0b2'"], found, strict=True))
    short = [(str(row), *["3"] * 6) for row in range(3)]
    the_only_fault(lint(submit(tmp_path, short, ("id", *GRADES)), **given, task="essay_regression"), SCORING, "not 'text_id', 'cohesion'")


def test_files_of_another_task_are_refused_with_the_column_that_is_missing(tmp_path: Path) -> None:
    given = write_essays(tmp_path)
    with pytest.raises(DataError, match=r"sample_submission\.csv: has no column 'id' \(columns: 'text_id', 'cohesion', .*the task that it belongs to"):
        lint(grade(tmp_path), **given)
    with pytest.raises(DataError, match=r"test\.csv: has no column 'id'"):
        lint(grade(tmp_path), test=given["test"], task="extractive_qa")
    with pytest.raises(ConfigError):
        lint(grade(tmp_path), task="causal_lm")  # which hands nothing in


@pytest.mark.parametrize(
    ("content", "words", "todo"),
    [
        ({"q1": "1809", "q2": "the sea"}, ["2 rows, but", "id 'q3' of"], "one row per row"),
        (ANSWERS | {"q9": "Bo"}, ["column 'id' = 'q9': this id is not in", "4 rows, but"], "copy the ids"),
        (ANSWERS | {"q1": None}, ["the answer of id 'q1' = None is no text"], "one JSON object"),
        (ANSWERS | {"q1": ["1809"]}, ["the answer of id 'q1' = ['1809'] is no text"], "one JSON object"),
        (ANSWERS | {"q1": " "}, ["row 1 (answer 1, id 'q1'), column 'answer' = ' ': the prediction is empty"], "write one in every row"),
        ('{"q1": "1809", "q1": "1810"}', ["key 'q1' stands twice"], "one JSON object"),
        ('{"q1": "1809", ', ["cannot be read as JSON"], "one JSON object"),
        ('["1809", "the sea", "Ann"]', ["holds neither readings nor answers"], "one JSON object"),
        ("", ["is empty (0 bytes)"], "one JSON object"),
    ],
)
def test_wrong_answers_in_json_are_named(tmp_path: Path, content: Any, words: list[str], todo: str) -> None:
    found = errors(lint(answer(tmp_path, content), **write_readings(tmp_path), task="extractive_qa"))
    assert len(found) == len(words) and all(word in fault.what for word, fault in zip(words, found, strict=True))
    assert todo in found[0].todo


def test_the_test_set_handed_in_and_json_for_another_task_have_the_wrong_columns(tmp_path: Path) -> None:
    given = write_readings(tmp_path)
    the_only_fault(lint(given["test"], task="extractive_qa"), SCORING, "'context', 'question', not 'id', 'answer'")
    the_only_fault(lint(answer(tmp_path, ANSWERS)), SCORING, "columns are 'id', 'answer', not 'id', 'prediction'")


def test_no_answer_is_a_prediction_where_the_recipe_says_so(tmp_path: Path) -> None:
    given, none = write_readings(tmp_path), {"q1": ""}
    for path in (answer_rows(tmp_path, **none), answer(tmp_path, ANSWERS | none)):
        the_only_fault(judge(path, READER, **given), SCORING, "column 'answer' = ''", "empty")
        assert [found.level for found in judge(path, replace(READER, no_answer=True), **given)] == ["ok"]


def test_a_word_that_is_read_as_a_missing_value_is_a_warning_in_csv_only(tmp_path: Path) -> None:
    given = write_readings(tmp_path)
    found = judge(answer_rows(tmp_path, q2="NA"), READER, **given)
    the_only_fault(found, SCORING, "column 'answer' = 'NA'", "no value", level="warning")
    for path in (answer_rows(tmp_path, q2="NA."), answer_rows(tmp_path, q2="none"), answer(tmp_path, ANSWERS | {"q2": "NA"})):
        assert [found.level for found in judge(path, READER, **given)] == ["ok"]


def test_a_byte_order_mark_in_json_is_a_warning_and_other_formats_do_not_stop_the_check(tmp_path: Path) -> None:
    marked = answer(tmp_path, "\ufeff" + json.dumps(ANSWERS))
    the_only_fault(lint(marked, task="extractive_qa"), SCORING, "byte order mark", level="warning")
    packed = tmp_path / "submission.csv.gz"
    packed.write_bytes(gzip.compress(grade(tmp_path).read_bytes()))
    the_only_fault(lint(packed, task="essay_regression"), NOT_FOUND, "submission.csv.gz", level="warning")


def test_a_missing_file_names_those_of_its_kind(tmp_path: Path) -> None:
    answer(tmp_path, ANSWERS, "answers.json")
    the_only_fault(lint(tmp_path / "out" / "predictions.json", task="extractive_qa"), NOT_FOUND, "files there: answers.json")
    the_only_fault(lint(tmp_path / "predictions.json", task="extractive_qa"), NOT_FOUND, "no JSON is there")


def test_a_sample_submission_without_the_ids_of_the_test_set_is_told_by_the_tasks_column(tmp_path: Path) -> None:
    given = write_essays(tmp_path)
    write_rows(given["test"], [("text_id", "full_text"), ("other", "My essay.")])
    the_only_fault(judge(grade(tmp_path), ESSAY, **given), "sample submission", "differ in 4 ids", level="warning")


# --- the log ---------------------------------------------------------------------------------------------------------------------

LOGS = {
    "nbclient.exceptions.CellTimeoutError: A cell timed out while it was being executed, after 43200 seconds.": (TIMEOUT, "time limit"),
    "Your notebook was stopped because it exceeded the max allowed execution duration.": (TIMEOUT, "time limit"),
    "Kernel died while waiting for execute reply.\nTraceback (most recent call last):\nnbclient.exceptions.DeadKernelError: Kernel died": (COMPUTE, "killed"),
    "Your notebook tried to allocate more memory than is available. It has restarted.": (COMPUTE, "killed"),
    "run.sh: line 3:    42 Killed                  python infer.py\nexit code 137": (COMPUTE, "killed"),
    "subprocess.CalledProcessError: Command '['python', 'a.py']' died with <Signals.SIGKILL: 9>.": (COMPUTE, "killed"),
    "OSError: [Errno 28] No space left on device: '/kaggle/working/index'": (COMPUTE, "disk is full"),
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.74 GiB": (COMPUTE, "GPU's memory"),
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": (COMPUTE, "GPU's memory"),
    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 27.1 GiB for an array with shape (26550, 136966) and data type float64": (COMPUTE, "RAM ran out"),
    "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.": (COMPUTE, "RAM ran out"),
    "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device": (EXCEPTION, "no kernels for the GPU"),
    "UserWarning: \nTesla P100-PCIE-16GB with CUDA capability sm_60 is not compatible with the current PyTorch installation.": (EXCEPTION, "no kernels for the GPU"),
    "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU": (EXCEPTION, "there is none"),
    "AssertionError: Torch not compiled with CUDA enabled": (EXCEPTION, "there is none"),
    "RuntimeError: CUDA error: device-side assert triggered": (EXCEPTION, "number outside its table"),
    "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the package versions": (EXCEPTION, "wheel is another"),
    "ERROR: faiss_cpu-1.15.1-cp310-cp310-manylinux_2_28_x86_64.whl is not a supported wheel on this platform.": (EXCEPTION, "another Python"),
    "ERROR: No matching distribution found for bm25s==0.3.16": (EXCEPTION, "locked package"),
    "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.": (EXCEPTION, "internet"),
    "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder": (EXCEPTION, "internet"),
    "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='pypi.org', port=443): Max retries exceeded with url: /simple/": (EXCEPTION, "internet"),
    "socket.gaierror: [Errno -3] Temporary failure in name resolution": (EXCEPTION, "internet"),
    "FileNotFoundError: [Errno 2] No such file or directory: '/kaggle/input/my-weights/model.safetensors'": (NOT_FOUND, "not attached"),
    "kit.errors.BundleError: bundle 'passages-1' is neither a folder with a MANIFEST.json nor mounted under /kaggle/input: found bundles []": (NOT_FOUND, "not attached"),
    "OSError: [Errno 30] Read-only file system: '/kaggle/input/index/cache.npy'": (EXCEPTION, "written into /kaggle/input"),
    "kit.errors.BundleError: bundle 'm' at /kaggle/input/m: file fold0/model.safetensors is damaged (its sha256 differs)": (EXCEPTION, "damaged"),
    "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered": (EXCEPTION, "damaged"),
    "ModuleNotFoundError: No module named 'bitsandbytes'": (EXCEPTION, "package is missing"),
    "ImportError: cannot import name 'EncoderDecoderCache' from 'transformers'": (EXCEPTION, "package is missing"),
    "Fatal Python error: Segmentation fault": (EXCEPTION, "compiled code crashed"),
    "Traceback (most recent call last):\n  File \"<string>\", line 1, in <module>\nKeyError: 'answer'": (EXCEPTION, "raised an exception"),
    "Exception encountered at \"In [1]\":\nAn exception has occurred, use %tb to see the full traceback.\n\nSystemExit: 2": (EXCEPTION, "raised an exception"),
}


@pytest.mark.parametrize("text", LOGS, ids=lambda text: text[:40])
def test_a_log_is_mapped_to_the_error_class_and_the_cause(tmp_path: Path, text: str) -> None:
    error, cause = LOGS[text]
    log = write_log(tmp_path / "run.log", f"installing\n\x1b[31m{text}\x1b[0m\n", "array")
    found = lint(tmp_path / "submission.csv", log=log)
    assert [(fault.level, fault.check) for fault in found] == [("error", NOT_FOUND), ("error", error)]
    assert cause in found[1].what and "line " in found[1].what and found[1].todo


def test_every_row_of_the_table_is_needed() -> None:
    met = {next(row for row, clue in enumerate(CLUES) if re.search(clue.pattern, text, re.MULTILINE)) for text in LOGS}
    assert met == set(range(len(CLUES))), "a log above for every row, and no row that an earlier one hides"


def write_log(path: Path, text: str, form: str = "plain") -> Path:
    """A log of this text: as it is, or as the site's JSON."""
    entries = [json.dumps({"stream_name": "stderr", "time": 1.5 * n, "data": line}) for n, line in enumerate(text.splitlines(keepends=True), 1)]
    forms = {"plain": text, "array": "[" + "\n,".join(entries) + "\n]", "lines": "\n".join(entries)}
    path.write_text(forms.get(form) or f'{forms["array"][:-2]}\n,{{"stream_name":"std', encoding="utf-8")
    return path


def test_the_sites_log_is_read_as_text_and_seconds(tmp_path: Path) -> None:
    assert read_log(write_log(tmp_path / "a.log", "one {\n\x1b[0;31mtwo\x1b[0m ]\n")) == ("one {\ntwo ]\n", 0.0)
    for form in ("array", "lines", "cut off"):
        assert read_log(write_log(tmp_path / "a.log", "one {\ntwo ]\n", form)) == ("one {\ntwo ]\n", 3.0)
    assert read_log(write_log(tmp_path / "a.log", '{"map@3": 0.9}\n')) == ('{"map@3": 0.9}\n', 0.0), "other JSON is text"


def test_the_last_exception_is_quoted_beside_the_clue(tmp_path: Path) -> None:
    text = (
        "Traceback (most recent call last):\n  File \"execute.py\", line 251, in raise_for_execution_errors\npapermill.exceptions.PapermillExecutionError: \n"
        "-----\nException encountered at \"In [4]\":\n-----\nKeyError                                  Traceback (most recent call last)\nKeyError: 'answer'\n"
    )
    found = lint(tmp_path / "submission.csv", log=write_log(tmp_path / "run.log", text, "array"))[1]
    assert found.check == EXCEPTION and "last exception \"KeyError: 'answer'\"" in found.what


def test_what_the_run_survived_is_only_a_warning(tmp_path: Path) -> None:
    survived = "ERROR kit: member a failed\nTraceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory.\nmember b: done\n"
    found = lint(submit(tmp_path, GOOD), log=write_log(tmp_path / "run.log", survived))
    the_only_fault(found, COMPUTE, "line 3", "but the run went on", level="warning")
    stopped = f"{survived}papermill.exceptions.PapermillExecutionError: \n"
    the_only_fault(lint(submit(tmp_path, GOOD), log=write_log(tmp_path / "run.log", stopped)), COMPUTE, "line 3")
    damaged = lint(submit(tmp_path, changed(0, "A A")), log=write_log(tmp_path / "run.log", survived))
    assert [fault.level for fault in damaged] == ["error", "error"]


def test_a_quiet_log_is_fine(tmp_path: Path) -> None:
    quiet = "Requirement already satisfied: numpy\nscoring: 100%\nsee https://huggingface.co/docs for details\n"
    assert [found.level for found in lint(submit(tmp_path, GOOD), log=write_log(tmp_path / "run.log", quiet))] == ["ok", "ok"]


@pytest.mark.parametrize(("seconds", "level"), [(8 * 3600, None), (8.5 * 3600, "warning"), (9 * 3600 + 5, "error")])
def test_a_run_near_the_time_limit_is_told(tmp_path: Path, seconds: float, level: str | None) -> None:
    log = tmp_path / "run.log"
    log.write_text(json.dumps([{"stream_name": "stdout", "time": seconds, "data": "done\n"}]), encoding="utf-8")
    found = [fault.level for fault in lint(submit(tmp_path, GOOD), log=log) if fault.check == TIMEOUT]
    assert found == ([level] if level else [])
