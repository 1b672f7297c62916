"""Scoring processes, seen from the run that directs them.

Owns: what may be asked of a scoring process (Order, Fetch), what it answers (Event), and the processes themselves (Processes).
Does not know: what is worth scoring and when (the planner), how rows are scored (kit.inference.worker), the deadline (kit.budget). Imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from kit import runtime

log = logging.getLogger(__name__)

AUTO = "auto"  # the device of a worker that is to find out
_ANSWER_S = 2.0  # a keeper answers within milliseconds, unless it hangs
_LEAVE_S = 1.0  # what a process that has closed its pipe takes to end by itself, with the exit status that says why
_START_S = 300.0  # torch from a disk that is read for the first time takes minutes
_DEATH_S = 10.0  # a killed process is gone within milliseconds, unless a driver holds it
_TAIL = 2000  # bytes of a log in which the reason of an end is looked for



@dataclass(frozen=True)
class Order:
    """Score these rows (positions in the test table) with one fit of a member in one view; `batch_tokens` are padded tokens per forward pass.

    trial: if the member streams its layers, do not score, but measure what that would cost.
    """

    serial: int
    member: str
    fit: str
    view: str
    rows: tuple[int, ...]
    batch_tokens: int
    precision: str
    trial: bool = False


@dataclass(frozen=True)
class Fetch:
    """Find the contexts of these rows with the retriever `key` and keep them in the run folder."""

    serial: int
    key: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Event:
    """What a scoring process says about an order.

    kind: "beat" (it lives and is one batch further), "scored", "fetched", or "failed" (an exception, or the process ended: see `why`).
    seconds: work without loading; load_s: loading; tokens: real tokens, without padding. prediction: (n, C) float32, a row that did not come out
    finite is NaN. pace: seconds to compute, and to read all layers, if the member streams them. hints: (n, C) each. chars: (n,) characters of the
    contexts found. memory: lack of memory was the cause, or may have been.
    """

    slot: int
    serial: int
    kind: Literal["beat", "scored", "fetched", "failed"]
    seconds: float = 0
    load_s: float = 0
    tokens: int = 0
    rows: tuple[int, ...] = ()
    prediction: np.ndarray | None = None
    pace: tuple[float, float] | None = None
    hints: dict[str, np.ndarray] | None = None
    chars: np.ndarray | None = None
    why: str = ""
    memory: bool = False


class Crew(Protocol):
    """Scoring slots that take one order each at a time."""

    @property
    def slots(self) -> tuple[str, ...]:
        """The device of each slot."""
        ...

    def send(self, slot: int, order: Order | Fetch) -> None:
        """Give an order to a slot that has none. An order for another member or retriever first frees the memory of the one before."""
        ...

    def wait(self, seconds: float) -> list[Event]:
        """What was said since the last call: as soon as there is anything, or nothing after `seconds`."""
        ...

    def dismiss(self, slot: int) -> None:
        """End whatever runs in a slot, hung or not, and forget its order. Returns when its memory is back."""
        ...

    def close(self) -> None:
        """End everything."""
        ...


class Processes:
    """The real crew: in every slot one process at a time, of one member or one retriever.

    A keeper process per slot has imported what scoring needs and forks that process (on the CPU) or becomes it (with CUDA), so that a crash, a lack
    of memory or a hang costs one order, and memory is really given back. They end with the process that opened them, whatever it dies of.
    A failed order ends its process too: the next one starts clean.
    """

    def __init__(self, run: Path, devices: Sequence[str] | None, start_s: float) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._known = devices is not None
        self._start_s = start_s
        self._inbox: _Inbox = queue.SimpleQueue()
        self._slots = [_Slot(run, number, device, self._inbox) for number, device in enumerate(devices or [AUTO])]

    @classmethod
    def open(cls, run: Path, *, devices: Sequence[str] | None = None, start_s: float = _START_S) -> Processes:
        """A crew for a run folder, one slot per device; by default one per GPU that the first process reports, or one on the CPU.

        Returns at once; `slots` waits for that report, `start_s` seconds at most. The folder's setup.json is read when the first order is worked on. To be closed.
        """
        return cls(Path(run), devices, start_s)

    @property
    def slots(self) -> tuple[str, ...]:
        """The device of each slot."""
        if not self._known:
            found = self._slots[0].find_devices(self._start_s)
            self._slots += [_Slot(self._run, number, device, self._inbox) for number, device in enumerate(found[1:], start=1)]
            self._known = True
        return tuple(slot.device for slot in self._slots)

    def send(self, slot: int, order: Order | Fetch) -> None:
        """Give an order to a slot that has none. Another member's process is ended first; where none can be started, a "failed" event says so."""
        assert slot < len(self.slots), f"there is no slot {slot} among {self.slots}"
        self._slots[slot].send(order)

    def wait(self, seconds: float) -> list[Event]:
        """What was said since the last call: as soon as there is anything, or nothing after `seconds`."""
        until = time.monotonic() + seconds
        events: list[Event] = []
        while not events:
            try:
                words = [self._inbox.get(timeout=max(0.0, until - time.monotonic()))]
            except queue.Empty:
                break
            while not self._inbox.empty():
                words.append(self._inbox.get())
            events = [event for slot, pipe, word in words if (event := self._slots[slot].hear(pipe, word))]
        return events

    def dismiss(self, slot: int) -> None:
        """Kill what runs in a slot, hung or not; its order is forgotten. Returns when the process is gone and its memory is back."""
        self._slots[slot].end()

    def close(self) -> None:
        """Kill every process."""
        for slot in self._slots:
            slot.close()


_Inbox = queue.SimpleQueue[tuple[int, Connection | None, Event | None]]
"""Slot, the pipe that was read, and what was said (None: the pipe has ended)."""


class _Slot:
    """A device, its keeper, the process of a member with its pipe, and the order that it has."""

    def __init__(self, run: Path, number: int, device: str, inbox: _Inbox) -> None:
        self.device = device
        self._run, self._number, self._inbox = run, number, inbox
        self._log = run / f"worker-{number}.log"
        self._keeper: _Keeper | None = None
        self._name: tuple[type, str] | None = None
        self._pipe: Connection | None = None
        self._listener = threading.Thread()
        self._order: Order | Fetch | None = None
        with contextlib.suppress(OSError):  # the first order tries again, and says why not
            self._keeper = _Keeper(run, device, self._log)

    def find_devices(self, seconds: float) -> list[str]:
        """The devices that the keeper sees, of which this slot takes the first; the CPU, if it does not say within these seconds."""
        found = self._keeper.report(seconds) if self._keeper else None
        if self._keeper and not found:
            self._keeper.kill()  # the first order starts another one
        self.device = (found or ["cpu"])[0]
        return found or ["cpu"]

    def send(self, order: Order | Fetch) -> None:
        """Hand an order to the process of its member, started where there is none."""
        assert self._order is None, f"slot {self._number} still works on {self._order}"
        name = (Order, order.member) if isinstance(order, Order) else (Fetch, order.key)
        try:
            if name != self._name or not self._listener.is_alive():
                self.end()
                self._start(name)
            self._order = order
            assert self._pipe is not None
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended: the listener says so
                self._pipe.send(order)
        except OSError as error:  # no process, pipe or file is to be had
            self.close()
            why = f"the scoring process cannot be started: {error}"
            self._inbox.put((self._number, None, Event(self._number, order.serial, "failed", why=why, memory=runtime.tells_of_memory(why))))

    def hear(self, pipe: Connection | None, word: Event | None) -> Event | None:
        """What a word means to the run: nothing, if its process was ended before, or ended without an order."""
        if pipe is not self._pipe:
            return None
        if word is None:
            order, status = self._order, self.end(patience_s=_LEAVE_S)
            why, memory = _explain(status, self._keeper.last_words() if self._keeper else "")
            return Event(self._number, order.serial, "failed", why=why, memory=memory) if order else None
        if word.kind != "beat":
            self._order = None
        if word.kind == "failed":
            self.end()
        return replace(word, slot=self._number)

    def end(self, *, patience_s: float = 0) -> int:
        """Kill the process, if there is one that has not ended by then, and wait until it is gone; its exit status, negative for a signal."""
        status = 0
        if self._keeper and self._pipe:
            status = self._keeper.end_worker(patience_s, forked=self.device == "cpu")
            self._listener.join(_DEATH_S)
            self._pipe.close()
        self._order = self._name = self._pipe = None
        return status

    def close(self) -> None:
        """Kill the keeper too."""
        if self._keeper:
            self._keeper.kill()
        self.end()

    def _start(self, name: tuple[type, str]) -> None:
        if self._keeper and self._keeper.has_ended:
            self._keeper.kill()
        if self._keeper is None or self._keeper.is_gone:
            self._keeper = _Keeper(self._run, self.device, self._log)
        self._pipe, theirs = Pipe()
        with theirs:
            self._keeper.start_worker(theirs)
        self._name = name
        self._listener = threading.Thread(target=_listen, args=(self._number, self._pipe, self._inbox), daemon=True)
        self._listener.start()


class _Keeper:
    """A process `python -m kit.inference.worker`, leader of a process group. It makes one worker at a time, or (with CUDA) turns into one."""

    def __init__(self, run: Path, device: str, log_file: Path) -> None:
        self.is_gone = False
        self._devices: list[str] | None = None
        self._log, self._log_start, self._has_worked = log_file, _size(log_file), False
        self._control, theirs = Pipe()
        command = [runtime.python(), "-P", "-m", "kit.inference.worker", str(run), device, str(theirs.fileno()), str(os.getpid())]
        with theirs, open(log_file, "ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,  # libraries print
                stderr=out,
                env=runtime.worker_environment(device),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        """Whether its process has ended."""
        return self._process.poll() is not None

    def report(self, seconds: float) -> list[str] | None:
        """The devices that it sees, once it has imported what scoring needs; None before that (after `seconds`), or if it has ended."""
        with contextlib.suppress(OSError, EOFError):
            if self._devices is None and self._control.poll(seconds):
                self._devices = self._control.recv()
        return self._devices

    def start_worker(self, pipe: Connection) -> None:
        """Have a worker made that reads orders from the pipe. Does not wait for it; if it fails, the pipe ends."""
        if self._has_worked:
            self._log_start = _size(self._log)
        self._has_worked = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(("start", time.monotonic()))
            send_handle(self._control, pipe.fileno(), self._process.pid)

    def end_worker(self, patience_s: float, *, forked: bool) -> int:
        """Kill the worker, unless it ends by itself, and wait until it is gone; its exit status. The keeper survives if it forked it and answers."""
        if forked and self.report(0):
            with contextlib.suppress(OSError, EOFError):
                self._control.send(("end", patience_s))
                if self._control.poll(patience_s + _ANSWER_S):
                    return self._control.recv()
        return self.kill(patience_s)

    def kill(self, patience_s: float = 0) -> int:
        """Kill keeper and worker, stopped or not, and wait until the keeper is gone; its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            status = self._process.wait(_DEATH_S)
        except subprocess.TimeoutExpired:
            log.warning("process %s was killed %s s ago and is not gone", self._process.pid, _DEATH_S)
            status = -signal.SIGKILL
        self._control.close()
        self.is_gone = True
        return status

    def last_words(self) -> str:
        """The end of what the last worker, or the keeper before there was one, wrote into the log."""
        try:
            with open(self._log, "rb") as file:
                file.seek(max(self._log_start, _size(self._log) - _TAIL))
                return file.read().decode(errors="replace").strip()
        except OSError:
            return ""


def _listen(slot: int, pipe: Connection, inbox: _Inbox) -> None:
    """Pass on all that is said on a pipe, and its end. In a thread of its own: a process may stop in the middle of a long word."""
    try:
        with contextlib.suppress(EOFError, OSError):
            while True:
                inbox.put((slot, pipe, pipe.recv()))
    finally:
        inbox.put((slot, pipe, None))


def _explain(status: int, last_words: str) -> tuple[str, bool]:
    """Why a process ended, in one line, and whether it may have been for lack of memory."""
    if status == -signal.SIGKILL:
        return "killed by signal 9 (out of memory?)", True
    line = last_words.splitlines()[-1].strip() if last_words else "its log is empty"
    if status < 0:
        return f"killed by signal {-status} ({signal.strsignal(-status)}): {line}", runtime.tells_of_memory(last_words)
    return f"ended with exit code {status}: {line}", runtime.tells_of_memory(last_words)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
