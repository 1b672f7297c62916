"""Maps the site's error classes to what in a submission or in a run's log causes them, with the way out.

The site tells only the class. Owns the table of clues in logs and the checks of the file; what a valid prediction is, the task says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kit import assemble
from kit.budget import NINE_HOURS_S
from kit.data.tables import Table, read_table
from kit.errors import DataError
from kit.rehearsal.doctor import judge_sample
from kit.rehearsal.findings import Finding
from kit.tasks import MISSING, Task

NAME = "submission.csv"
TIMEOUT = "Notebook Timeout"
EXCEPTION = "Notebook Threw Exception"
COMPUTE = "Notebook Exceeded Allowed Compute"
NOT_FOUND = "Submission CSV Not Found"
SCORING = "Submission Scoring Error"

_SHOWN = 5  # kinds of faulty predictions
_AS_SAMPLE = "write predictions in the form of the sample submission"
_EMPTY = {"", "nan", "none", "null", "na", "n/a", "<na>"}
_BOM = b"\xef\xbb\xbf"
_NEAR = 0.9  # of the nine hours: the hidden test set may take the rest


class Clue(NamedTuple):
    """Words in a log, the site's class for what they mean, what it is, and the way out."""

    pattern: str
    error: str
    cause: str
    todo: str


CLUES = (
    Clue(
        r"CellTimeoutError|exceeded the max allowed execution duration",
        TIMEOUT, "the time limit was reached",
        "give a smaller Budget, or leave the slowest member out; the hidden test set may be larger than the public one",
    ),
    Clue(
        r"DeadKernelError|Kernel died|kernel appears to have died|tried to allocate more memory than is available|(?:code|status):? (?:137|-9)\b|SIGKILL|^Killed$",
        COMPUTE, "the process was killed, nearly always because RAM ran out",
        "lower infer.batch_tokens, or leave the largest member out; rehearse with the hidden number of rows and a memory limit",
    ),
    Clue(
        r"No space left on device|Errno 28\b|Disk quota exceeded",
        COMPUTE, "the disk is full",
        "write less into /kaggle/working (20 GB), read indexes from /kaggle/input instead of copying them",
    ),
    Clue(
        r"CUDA out of memory|CUDA error: out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        COMPUTE, "the GPU's memory ran out",
        "lower infer.batch_tokens, or leave the largest member out",
    ),
    Clue(
        r"^MemoryError\b|Unable to allocate .* for an array|DefaultCPUAllocator: (?:can't|not enough)|std::bad_alloc|Cannot allocate memory",
        COMPUTE, "RAM ran out",
        "lower infer.batch_tokens, or leave the largest member out",
    ),
    Clue(
        r"no kernel image is available|cudaErrorNoKernelImageForDevice|is not compatible with the current PyTorch",
        EXCEPTION, "this torch has no kernels for the GPU that was chosen (P100)",
        "choose T4: accelerator in the notebook's settings, or machine_shape NvidiaTeslaT4 in kernel-metadata.json",
    ),
    Clue(
        r"Found no NVIDIA driver|Torch not compiled with CUDA enabled|No CUDA GPUs are available|CUDA driver version is insufficient",
        EXCEPTION, "a GPU was asked for, but there is none",
        "choose an accelerator in the notebook's settings; is the week's GPU quota used up?",
    ),
    Clue(
        r"device-side assert triggered",
        EXCEPTION, "a number outside its table reached the GPU, such as a token id of another tokenizer",
        "check that tokenizer.json belongs to the weights (kit doctor), and run once on the CPU to see where it happens",
    ),
    Clue(
        r"THESE PACKAGES DO NOT MATCH THE HASHES",
        EXCEPTION, "a wheel is another than the one that was locked",
        "make kit-wheels and kit-code again and upload both: kit vendor wheels, kit push",
    ),
    Clue(
        r"is not a supported wheel on this platform",
        EXCEPTION, "a wheel was made for another Python or platform than the image's",
        "make the wheels for the image's profile: kit vendor wheels --profile",
    ),
    Clue(
        r"No matching distribution found|Could not find a version that satisfies",
        EXCEPTION, "a locked package is not among the mounted wheels, or not for this Python",
        "attach kit-wheels and kit-code in the same version, and make them for the image's profile: kit vendor wheels --profile",
    ),
    Clue(
        r"couldn't connect to|LocalEntryNotFoundError|OfflineModeIsEnabled|outgoing traffic has been disabled|Temporary failure in name resolution"
        r"|Name or service not known|Network is unreachable|Max retries exceeded with url|Failed to resolve",
        EXCEPTION, "something asked the internet, which the competition machine does not have",
        "give every model, tokenizer and adapter's base as a mounted folder, and import kit first",
    ),
    Clue(
        r"No such file or directory: ['\"]?/kaggle/input|/kaggle/input\S* does not exist|nor mounted under|is not below /kaggle/input|is not mounted",
        NOT_FOUND, "a dataset is not attached, not ready yet, or mounted under another path",
        "attach it; name bundles instead of paths, as the site has two mount layouts: /kaggle/input/<slug> and /kaggle/input/datasets/<owner>/<slug>",
    ),
    Clue(
        r"Read-only file system|Permission denied: ['\"]?/kaggle/input",
        EXCEPTION, "something was written into /kaggle/input",
        "write to /kaggle/working or /tmp",
    ),
    Clue(
        r"its sha256 differs|bytes instead of \d+|incomplete metadata, file not fully covered|MetadataIncompleteBuffer|HeaderTooLarge",
        EXCEPTION, "a mounted file is damaged, or was not uploaded to its end",
        "wait until the dataset is ready; otherwise upload it again: kit push",
    ),
    Clue(
        r"ModuleNotFoundError|cannot import name",
        EXCEPTION, "a package is missing, or has another version than the code expects",
        "run the install cell first, and add the package to wheels/requirements.in: kit vendor wheels",
    ),
    Clue(
        r"Segmentation fault|SIGSEGV|core dumped|(?:code|status):? (?:139|-11)\b",
        EXCEPTION, "compiled code crashed, often a wheel built for another version of torch or numpy",
        "make the wheels for the image's profile: kit vendor wheels --profile; run kit doctor there",
    ),
    Clue(
        r"Traceback \(most recent call last\)|Exception encountered at|^SystemExit",
        EXCEPTION, "a cell raised an exception",
        "rehearse with a look-alike of the hidden test set: other rows, ids, order and texts",
    ),
)  # fmt: skip
"""What a log may say, the surest sign first: the first row that is found anywhere in the log is the answer."""

_STOPPED = re.compile(r"PapermillExecutionError|CellExecutionError|DeadKernelError|CellTimeoutError|Kernel died|exceeded the max allowed")
_EXCEPTION_LINE = re.compile(r"^(?!\S*(?:Papermill|Cell)ExecutionError)[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)(?::.*|[ \t]*)$", re.MULTILINE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def lint(
    submission: Path,
    *,
    sample: Path | None = None,
    test: Path | None = None,
    log: Path | None = None,
    task: str = "multiple_choice",
) -> list[Finding]:
    """What the site would say of a submission file, and of the run with this log; the check of each finding is the site's error class.

    sample, test: the competition's own files, to compare ids and columns with. log: as `kaggle kernels output` saves it, or plain text.
    task: the kind, with its own defaults. Raises DataError where sample, test or log cannot be read, ConfigError for an unknown task.
    """
    return judge(submission, assemble.task_of_kind(task), sample=sample, test=test, log=log)


def judge(submission: Path, task: Task, *, sample: Path | None = None, test: Path | None = None, log: Path | None = None) -> list[Finding]:
    """`lint` by the task that a recipe sets up. A file named *.json holds answers by question id, as the official evaluation of SQuAD takes them."""
    asked, questions = (_read(path, task) if path else None for path in (sample, test))
    findings = list(_check_file(Path(submission), _Wanted.of(asked, questions, task)))
    is_valid = not any(found.level == "error" for found in findings)
    if is_valid:
        findings.insert(0, Finding("ok", "submission", f"{submission}: the site can score it"))
    if asked and questions and (said := judge_sample(asked, questions, task.id_column)).level != "ok":
        findings.append(Finding(said.level, "sample submission", said.what, said.todo))
    return findings + (list(_check_log(Path(log), is_valid)) if log else [])


def _read(path: Path, task: Task) -> Table:
    """One of the competition's own files. Raises DataError."""
    table = read_table(path, ids=None)
    if task.id_column not in table.frame:
        columns = ", ".join(map(repr, table.frame))
        raise DataError(f"{path}: has no column {task.id_column!r} (columns: {columns}): give the competition's own file, and the task that it belongs to")
    return read_table(path, ids=task.id_column)


# --- the file --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What a submission is compared with. ids: none where it is not known which are wanted; source: the file they come from."""

    task: Task
    columns: list[str]
    ids: list[str]
    source: str
    test: Table | None

    @classmethod
    def of(cls, sample: Table | None, test: Table | None, task: Task) -> _Wanted:
        """The columns of the sample submission, or else of the task; the ids of the sample submission, or else of the test set."""
        columns = list(sample.frame if sample else task.rows(np.zeros((0, task.width([])), np.float32), []))
        known = sample or test
        return cls(task, columns, known.frame[task.id_column].tolist() if known else [], known.source if known else "", test)

    @property
    def id_column(self) -> str:
        """The column that names the rows."""
        return self.task.id_column


def _check_file(path: Path, wanted: _Wanted) -> Iterator[Finding]:
    form = _form(path)
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob(f"*{form.suffix}")) if path.parent.is_dir() else []
        there = f"files there: {', '.join(others)}" if others else f"no {form.name} is there"
        yield Finding("error", NOT_FOUND, f"{path}: no such file ({there})", f"write {NAME} into /kaggle/working; see the log for what stopped the run before")
        return
    if path.name != NAME and form is not _JSON:
        yield Finding("warning", NOT_FOUND, f"the file is named {path.name}", f"name it {NAME}: the site looks for no other")
    try:
        table = replace(read_table(path, ids=None), ids=wanted.id_column)
        form.check_header(path)
    except DataError as error:
        yield Finding("error", SCORING, str(error), f"write the file again, as {form.todo}")
        return
    if path.read_bytes().startswith(_BOM):
        yield Finding("warning", SCORING, f"{path}: begins with a byte order mark, which may be taken for a part of the text", "write it as utf-8, not utf-8-sig")
    wrong = list(_check_columns(table, wanted.columns))
    yield from wrong
    if not any(found.level == "error" for found in wrong):
        yield from _check_ids(table, wanted)
        yield from _check_predictions(table, wanted, form.missing)


def _check_header(path: Path) -> None:
    """Refuse what `read_table` lets pass: another separator, blanks around names."""
    header = path.read_bytes().removeprefix(_BOM).decode("utf-8").splitlines()[0]
    separator = next((mark for mark in (";", "\t", "|") if mark in header and "," not in header), None)
    if separator:
        raise DataError(f"{path}: columns are separated by {separator!r}")
    padded = next((name for name in header.split(",") if name != name.strip()), None)
    if padded is not None:
        raise DataError(f"{path}: column {padded!r} has blanks around its name")


@dataclass(frozen=True)
class _Form:
    """A format of submissions. todo: what to write. missing: texts that its readers take for no value."""

    name: str
    suffix: str
    todo: str
    missing: frozenset[str] = frozenset()
    check_header: Callable[[Path], None] = lambda path: None


_CSV = _Form("CSV", ".csv", "CSV with commas and without an index", frozenset(MISSING), _check_header)
_JSON = _Form("JSON", ".json", 'one JSON object, {"question id": "answer", …}, with a text for every id')
_OTHER = _Form("CSV", ".csv", _CSV.todo)


def _form(path: Path) -> _Form:
    """By the end of the name."""
    return next((form for form in (_CSV, _JSON) if path.suffix.lower() == form.suffix), _OTHER)


def _check_columns(table: Table, wanted: Sequence[str]) -> Iterator[Finding]:
    found = list(table.frame)
    missing, extra = [name for name in wanted if name not in found], [name for name in found if name not in wanted]
    where = f"{table.source}: columns are {', '.join(map(repr, found))}, not {', '.join(map(repr, wanted))}"
    if not missing and extra and extra == found[:1] and extra[0] in ("", "Unnamed: 0", "index", "level_0"):
        yield Finding("error", SCORING, f"{where}: the first is a saved row index", "write it with to_csv(index=False)")
    elif missing and {name.lower() for name in missing} <= {name.lower() for name in extra}:
        yield Finding("error", SCORING, f"{where}: capitals differ", "name the columns as in the sample submission")
    elif missing or extra:
        yield Finding("error", SCORING, where, "write exactly the columns of the sample submission, and give the task that it belongs to")
    elif found != list(wanted):
        yield Finding("warning", SCORING, f"{where}: their order differs", "write the columns in the order of the sample submission")


def _check_ids(table: Table, wanted: _Wanted) -> Iterator[Finding]:
    """Ids: none blank, each once; where it is known which are wanted: all of them, and no others."""
    column, ids = wanted.id_column, table.frame[wanted.id_column]
    blank = ids.str.strip() == ""
    yield from _first(table, column, blank, "the id is empty", "copy every id from the test set")
    yield from _first(table, column, ids.duplicated() & ~blank, "this id stands in an earlier row too", "write one row per id")
    if not wanted.ids:
        return
    unknown = ~ids.isin(wanted.ids) & ~blank
    yield from _first(table, column, unknown, f"this id is not in {wanted.source}", "copy the ids from the test set as texts; do not number the rows")
    if len(ids) != len(wanted.ids):
        what = f"{table.source}: {len(ids)} rows, but {wanted.source} has {len(wanted.ids)}"
        yield Finding("error", SCORING, what, "write one row per row of the test set, and never count on its length")
    missing = sorted(set(wanted.ids) - set(ids))
    if missing:
        what = f"{table.source}: id {missing[0]!r} of {wanted.source} is missing{_count(len(missing))}"
        yield Finding("error", SCORING, what, "write one row per row of the test set")
    elif sorted(ids) == sorted(wanted.ids):
        moved = ids != pd.Series(wanted.ids)
        yield from _first(table, column, moved, f"the rows are in another order than in {wanted.source}", "nothing: rows are matched by id", level="warning")


def _check_predictions(table: Table, wanted: _Wanted, missing: Collection[str]) -> Iterator[Finding]:
    """Values that the task refuses, those that are empty apart: every kind of fault once, at its first row. missing: texts that are read as none."""
    names = [name for name in wanted.columns if name != wanted.id_column]
    try:
        faults = wanted.task.check(table, wanted.test)
    except DataError as error:
        yield Finding("error", SCORING, str(error), "give a sample submission and a task that belong together")
        return
    texts = table.frame[names]
    is_faulty = np.isin(np.arange(len(texts)), [fault.row for fault in faults])
    empty = texts.apply(lambda column: column.str.strip().str.lower()).isin(_EMPTY) & is_faulty[:, None]
    for name in names:
        yield from _first(table, name, empty[name], "the prediction is empty", "write one in every row, at worst what the sample submission has")
        why = "the site may read this word as no value at all"
        yield from _first(table, name, texts[name].isin(missing) & ~is_faulty, why, "write it with a full stop behind it", level="warning")
    kinds: dict[tuple[str, str], list[int]] = {}
    for fault in faults:
        if not empty.at[fault.row, fault.column]:
            kinds.setdefault((fault.column, fault.why), []).append(fault.row)
    for (column, why), rows in list(kinds.items())[:_SHOWN]:
        yield from _first(table, column, table.frame.index.isin(rows), why, _AS_SAMPLE)
    if len(kinds) > _SHOWN:
        yield Finding("error", SCORING, f"{table.source}: {len(kinds) - _SHOWN} more kinds of faulty predictions", _AS_SAMPLE)


def _first(table: Table, column: str, rows: Any, why: str, todo: str, level: str = "error") -> Iterator[Finding]:
    """The finding for the first of the marked rows (N,) bool, and how many there are; none where none is marked."""
    if rows.any():
        yield Finding(level, SCORING, f"{table.error(why, row=int(np.argmax(rows)), column=column)}{_count(int(rows.sum()))}", todo)


def _count(number: int) -> str:
    return f" ({number} such rows)" if number > 1 else ""


# --- the log ---------------------------------------------------------------------------------------------------------------------


def _check_log(path: Path, is_valid: bool) -> Iterator[Finding]:
    """The first clue of the table that the log holds; a warning where the run went on to write a valid submission."""
    text, seconds = read_log(path)
    if seconds > _NEAR * NINE_HOURS_S:
        level = "error" if seconds >= NINE_HOURS_S else "warning"
        yield Finding(level, TIMEOUT, f"{path}: the run took {seconds / 3600:.1f} h of {NINE_HOURS_S / 3600:.0f}", "give a smaller Budget")
    for clue in CLUES:
        if found := re.search(clue.pattern, text, re.MULTILINE):
            went_on = is_valid and not _STOPPED.search(text)
            cause = f"{clue.cause}, but the run went on" if went_on else clue.cause
            yield Finding("warning" if went_on else "error", clue.error, f"{path}, {_quote(text, found)}: {cause}", clue.todo)
            return
    yield Finding("ok", "log", f"{path}: no known cause of a failure in {len(text.splitlines())} lines")


def read_log(path: Path) -> tuple[str, float]:
    """Text of a log, and the seconds at which its last line was written (0 where it does not say). Raises DataError.

    The site's logs are a JSON array, or a line per entry: {"stream_name": "stderr", "time": 12.3, "data": "…"}.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"log {path}: cannot be read: {error.strerror}") from None
    entries = list(_entries(text)) if re.match(r'[\s\[]*\{\s*"(?:stream_name|time|data)"', text) else []
    if entries:
        text = "".join(str(entry.get("data", "")) for entry in entries)
    return _COLOURS.sub("", text), max((float(entry.get("time", 0)) for entry in entries), default=0.0)


def _entries(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a text, whatever stands between them; a last one that was cut off is left out."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            entry, end = decoder.raw_decode(text, start)
        except ValueError:
            return
        yield entry
        start = text.find("{", end)


def _quote(text: str, found: re.Match[str]) -> str:
    """Number and words of the line that was found, and the last exception of the log if that is another line."""
    number = text.count("\n", 0, found.start()) + 1
    line = text.splitlines()[number - 1].strip()
    last = _EXCEPTION_LINE.findall(text)
    return f"line {number} {line[:160]!r}" + (f", last exception {last[-1].strip()[:160]!r}" if last and last[-1].strip() != line else "")
