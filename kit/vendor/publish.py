"""Staged datasets and a notebook → the competition site: create or version, push, follow, fetch, submit.

Owns the order of these steps, and what was sent before. Does not know what a dataset holds, how it is staged (dataset.py), nor how the site is
asked (session.py). A *delivery* (dataset, notebook version, submission) is there when the site says so: it knows a dataset by the MANIFEST.json
it holds, a notebook by `kit-<digest>` in its metadata, a submission by the same in its description. So everything can be repeated after an
interruption. The state file spares these questions and says which uploads may be resumed; the site outranks it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kit import manifest
from kit.errors import ConfigError, PublishError
from kit.vendor import site
from kit.vendor.session import PassingError, RefusalError, Session
from kit.vendor.staged import Dataset, Notebook

SUBMISSION = "submission.csv"
TWELVE_HOURS_S = 12 * 3600.0  # the longest that a notebook may run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """A dataset and what was done: "created", "versioned", "unchanged"; in a dry run "create", "version", "unchanged". mb: of all its files."""

    ref: str
    action: str
    version: int
    files: int
    mb: float

    @classmethod
    def of(cls, dataset: Dataset, action: str, version: int) -> Sent:
        """With the size of what was staged."""
        return cls(dataset.ref, action, version, len(dataset.names), dataset.mb)


@dataclass(frozen=True)
class Run:
    """A notebook version on the site. sources: its datasets, pinned. status: "pushed" or "complete"; in a dry run "push", and no version."""

    ref: str
    version: int | None
    sources: tuple[str, ...]
    status: str


@dataclass(frozen=True)
class Report:
    """What publish() did or, in a dry run, would do. output: the fetched submission. submission: its line in the site's list."""

    datasets: tuple[Sent, ...]
    kernel: Run | None = None
    output: Path | None = None
    submission: str | None = None

    def summary(self) -> dict[str, Any]:
        """Plain values, to be shown."""
        datasets = {sent.ref: {name: value for name, value in asdict(sent).items() if name != "ref"} for sent in self.datasets}
        return {"datasets": datasets, "kernel": self.kernel and asdict(self.kernel), "output": self.output, "submission": self.submission}


def publish(
    datasets: Path,
    kernels: Path,
    *,
    state: Path,
    output: Path,
    kernel: str | None = "infer",
    competition: str | None = None,
    submit: bool = False,
    message: str = "sent by kit",
    follow: bool = True,
    timeout_s: float = TWELVE_HOURS_S,
    dry_run: bool = False,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Send what the site does not have yet: datasets, then a notebook pinned to their versions; follow its run, fetch its output, submit it.

    datasets, kernels: folders of what is staged. state: file that remembers what was sent. output: folder for the submission and the log.
    kernel: the notebook, by its folder's name or its file's; None: datasets only. competition: by default the notebook's only source of
    that kind. message: notes of new versions, description of the submission. timeout_s: the longest to wait for the notebook's run.
    dry_run: only tell what would be sent, by the folders and the state file. Called again after an interruption or a failure, it goes on
    where it stopped. Raises ConfigError and BundleError for what is staged wrongly (a file's contents when its dataset's turn comes, all else
    before anything is sent), DependencyError without the client, and PublishError for whatever the site refuses.
    """
    plan = [Dataset.read(path.parent) for path in sorted(datasets.glob(f"*/{manifest.FILE}"))]
    notebook = Notebook.read(kernels, kernel) if kernel else None
    if not plan and notebook is None:
        raise ConfigError(f"{datasets}: no staged dataset (a folder with {manifest.FILE}): run `kit vendor bundle` first")
    target = _competition(competition, notebook, follow) if submit else None
    record = Record(state)
    if dry_run:
        return _preview(plan, notebook, target, record)
    session = Session(timeout_s, sleep, clock)
    sent = tuple(session.deliver(Upload(dataset, session, record, message)) for dataset in plan)
    if notebook is None:
        return Report(sent)
    notebook = notebook.pinned([_pin(source, sent, session) for source in notebook.sources])
    version = session.deliver(Push(notebook, session, record))
    run = Run(notebook.ref, version, notebook.sources, "pushed")
    if not follow:
        return Report(sent, run)
    file = _fetch(run, session, record, output)
    line = session.deliver(Submit(notebook, version, target, message, session)) if target else None
    return Report(sent, Run(run.ref, version, run.sources, "complete"), file, line)


def _competition(competition: str | None, notebook: Notebook | None, follow: bool) -> str:
    """The competition to submit to. Raises ConfigError where it is not known, or there will be nothing to submit."""
    if notebook is None or not follow:
        raise ConfigError("a submission needs a finished run: give --kernel, and follow it")
    sources = notebook.metadata["competition_sources"]
    if not competition and len(sources) != 1:
        raise ConfigError(f"notebook {notebook.ref} has competition_sources {sources}: name the one to submit to with --competition")
    return str(competition or sources[0])


def _preview(plan: Sequence[Dataset], notebook: Notebook | None, target: str | None, record: Record) -> Report:
    """What would be sent, without asking the site."""
    sent = []
    for dataset in plan:
        known = record.get(f"dataset {dataset.ref}")
        is_there = (known.digest, known.step) == (dataset.digest, "ready")
        action = "unchanged" if is_there else "version" if known.version else "create"
        sent.append(Sent.of(dataset, action, known.version + (not is_there)))
    if notebook is None:
        return Report(tuple(sent))
    versions = {item.ref: item.version for item in sent}
    sources = tuple(source if source.count("/") == 2 else f"{source}/{versions.get(source, '?')}" for source in notebook.sources)
    line = f"would submit {SUBMISSION} of {notebook.ref} to {target}" if target else None
    return Report(tuple(sent), Run(notebook.ref, None, sources, "push"), None, line)


def _pin(source: str, sent: Sequence[Sent], session: Session) -> str:
    """A dataset source with its version: as just sent, or as the site has it now."""
    if source.count("/") == 2:
        return source
    versions = [item.version for item in sent if item.ref == source] or [session.dataset(source).version]
    if not versions[0]:
        raise PublishError(f"dataset source {source}: neither staged nor on the site for {session.user}: stage it, or correct {site.KERNEL_METADATA}")
    return f"{source}/{versions[0]}"


# --- what is remembered -----------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """digest: of what was sent. version: on the site. step: "sending", "sent", "ready", "failed"; of a notebook "pushed", "complete", "failed"."""

    digest: str = ""
    version: int = 0
    step: str = ""


class Record:
    """The state file: "dataset owner/slug" or "notebook owner/slug" → Entry, rewritten atomically after every step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Entry] = {}
        try:
            self._entries = {name: Entry(**entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
        except FileNotFoundError:
            log.debug("%s: nothing was sent from here yet", path)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("%s: unreadable (%s): going by what the site has", path, error)

    def get(self, name: str) -> Entry:
        """What is known; an empty entry where nothing is."""
        return self._entries.get(name, Entry())

    def put(self, name: str, *entry: Any) -> None:
        """Remember the fields of an Entry, on disk before the next step begins."""
        if self.get(name) == entry:
            return
        self._entries[name] = Entry(*entry)
        body = {name: entry._asdict() for name, entry in sorted(self._entries.items())}
        manifest.write_atomically(self._path, json.dumps(body, indent=1) + "\n")


# --- deliveries -------------------------------------------------------------------------------------------------------------------------


class Upload:
    """A dataset: arrived when the site's current version is ready and holds our manifest."""

    def __init__(self, dataset: Dataset, session: Session, record: Record, notes: str) -> None:
        self.name = f"dataset {dataset.ref}"
        self._dataset, self._session, self._record, self._notes = dataset, session, record, notes
        self._action = "unchanged"
        self._version = 0  # on the site before we send

    def arrived(self) -> Sent | None:
        """What was done, once it is there."""
        digest, known = self._dataset.digest, self._record.get(self.name)
        state = self._session.settled_dataset(self._dataset.ref, known.version if known.step == "sent" else 0)
        self._version = state.version
        if state.status == "failed" and known.step == "sent":
            self._record.put(self.name, known.digest, state.version, "failed")
            raise PublishError(f"{self.name}: the site could not process version {known.version}: see its page there, then run the same command again")
        if state.status != "ready" or self._digest_there(known) != digest:
            return None
        self._record.put(self.name, digest, state.version, "ready")
        return Sent.of(self._dataset, self._action, state.version)

    def _digest_there(self, known: Entry) -> str:
        if known.version == self._version and known.step in ("sent", "ready"):
            return known.digest
        return self._session.digest(self._dataset.ref, self._version)

    def send(self) -> None:
        """Upload all files, and make them a new dataset or a new version. Only uploads of this very content are resumed."""
        dataset, client, before = self._dataset, self._session.client, self._version
        manifest.verify(dataset.folder)
        client.may_resume = self._record.get(self.name) == (dataset.digest, before, "sending")
        self._record.put(self.name, dataset.digest, before, "sending")
        answer = self._create_version() if before else self._create()
        if answer.error or not answer.url or (answer.status or "").lower() != "ok":
            why = answer.error or f"status {answer.status!r}, address {answer.url!r}"
            raise PublishError(f"{self.name}: the site refused it: {why}; if title or slug are taken, change both in {dataset.folder / site.DATASET_METADATA}")
        if answer.invalid_tags:
            log.warning("%s: the site does not know the keywords %s", self.name, answer.invalid_tags)
        self._record.put(self.name, dataset.digest, before + 1, "sent")

    def _create(self) -> Any:
        self._action = "created"
        folder, public = str(self._dataset.folder), self._dataset.public
        return self._session.call(self.name, self._session.client.dataset_create_new, folder, public=public, quiet=_is_quiet())

    def _create_version(self) -> Any:
        self._action = "versioned"
        try:
            return self._session.call(
                self.name, self._session.client.dataset_create_version, str(self._dataset.folder), self._notes, quiet=_is_quiet()
            )
        except RefusalError as error:
            if error.status == 403 and self._dataset.ref.startswith(f"{self._session.user}/"):  # while the last version is in processing
                raise PassingError(str(error)) from None
            raise PublishError(f"{error} (signed in as {self._session.user})") from None


def _is_quiet() -> bool:
    """Whether the client's bars of progress would go to a file."""
    return not sys.stderr.isatty()


class Push:
    """A notebook version: arrived when the site's current version bears our mark, unless its run is known to have failed."""

    def __init__(self, notebook: Notebook, session: Session, record: Record) -> None:
        self.name = f"notebook {notebook.ref}"
        self._notebook, self._session, self._record = notebook, session, record

    def arrived(self) -> int | None:
        """The version, once it is there."""
        mark, known = self._notebook.mark, self._record.get(self.name)
        there = self._session.notebook(self._notebook.ref)
        if there is None:
            return None
        version = there[0] or known.version
        is_known = (known.digest, known.version) == (mark, version)
        if known.step == "failed" if is_known else mark not in there[1]:
            return None
        self._record.put(self.name, mark, version, known.step if is_known else "pushed")
        return version

    def send(self) -> None:
        """Save and run it. What the site did not like is an error, though it may run already."""
        notebook = self._notebook
        with tempfile.TemporaryDirectory() as folder:
            notebook.write(Path(folder))
            answer = self._session.call(self.name, self._session.client.kernels_push, folder)
        faults = _faults_of_push(answer, notebook.ref)
        self._record.put(self.name, notebook.mark, answer.version_number or 0, "failed" if faults else "pushed")
        if faults:
            raise PublishError(f"{self.name}: the site refused it: {'; '.join(faults)}: mend that, then run the same command again")


def _faults_of_push(answer: Any, ref: str) -> list[str]:
    """What the client would only print, or not notice."""
    kinds = ("dataset_sources", "competition_sources", "kernel_sources", "model_sources", "tags")
    faults = [f"invalid {kind.replace('_', ' ')} {names}" for kind in kinds if (names := getattr(answer, f"invalid_{kind}"))]
    if answer.error:
        return [answer.error, *faults]
    if not answer.version_number or not answer.url:
        return [f"version {answer.version_number}, address {answer.url!r}", *faults]
    if not urlsplit(answer.url).path.lower().endswith(f"/{ref.lower()}"):
        return [f"it was saved as {answer.url}", *faults]
    return faults


def _fetch(run: Run, session: Session, record: Record, output: Path) -> Path:
    """Wait for a notebook's run, keep its log, and fetch its submission. Raises PublishError with the log's last error where there is none."""
    end = session.finished_run(run.ref)
    files, text = session.outputs(run.ref)
    kept = output / f"{run.ref.partition('/')[2]}.log"
    manifest.write_atomically(kept, text)
    name = f"notebook {run.ref}"
    mark = record.get(name).digest
    if end.status != "complete" or SUBMISSION not in files:
        record.put(name, mark, run.version, "failed")
        why = end.reason or (f"no {SUBMISSION} among {sorted(files)[:5]}" if end.status == "complete" else f"status {end.status}")
        raise PublishError(f"{name} version {run.version}: {why}; last error in its log ({kept}): {_last_error(text)}")
    current, _ = session.notebook(run.ref) or (0, "")
    if current not in (0, run.version):
        raise PublishError(f"{name}: version {current} has replaced our version {run.version}: run the same command again to push ours")
    manifest.write_atomically(output / SUBMISSION, session.download(f"output of {run.ref}", files[SUBMISSION]))
    record.put(name, mark, run.version, "complete")
    return output / SUBMISSION


def _last_error(text: str) -> str:
    """The last line of a run's log that names an error, or else its last line. The log is JSON: a list of pieces of output."""
    try:
        text = "".join(piece["data"] for piece in json.loads(text))
    except (ValueError, TypeError, LookupError):
        log.debug("the log is plain text")
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"Error\b|Exception\b|Killed|Exceeded|Interrupt", line)]
    return (named or lines or ["it is empty"])[-1]


class Submit:
    """A submission: arrived when the site lists one that bears our notebook's mark and version."""

    def __init__(self, notebook: Notebook, version: int, competition: str, message: str, session: Session) -> None:
        self.name = f"submission to {competition}"
        self._ref, self._version, self._competition, self._session = notebook.ref, version, competition, session
        self._mark = f"[{notebook.mark} v{version}]"
        self._message = f"{message} {self._mark}"

    def arrived(self) -> str | None:
        """Its line in the site's list, once it is there."""
        listed = self._session.ask(self.name, self._session.client.competition_submissions, self._competition, page_size=100)
        found = next((item for item in listed or () if item and self._mark in (item.description or "")), None)
        if found is None:
            return None
        score = f", public score {found.public_score}" if found.public_score else ""
        fault = f", {found.error_description}" if found.error_description else ""
        return f"{found.description}: {found.status.name.lower()}{score}{fault}"

    def send(self) -> None:
        """Submit the file that the notebook's version wrote."""
        submit = self._session.client.competition_submit_code
        answer = self._session.call(self.name, submit, SUBMISSION, self._message, self._competition, self._ref, self._version, quiet=True)
        log.info("%s: %s", self.name, answer.message)
        if not answer.ref and not (answer.message or "").lower().startswith("success"):
            raise PublishError(f"{self.name}: the site refused it: {answer.message or 'no reason given'}")
