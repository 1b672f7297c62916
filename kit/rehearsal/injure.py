"""A run of inference as a process of its own, and what can be done to it from outside: to its bundles before it starts, to its processes while it runs.

Owns the list of faults. Everything is real: signals, limits of the system, files that are damaged; nothing inside the run is replaced.
Does not know how a run is judged.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from kit import manifest, runtime

SUBMISSION, RUN = "submission.csv", "submission.run"
_PAUSE_S = 0.02
_PATIENCE_S = 15.0  # for a scoring process that was forked; where there is a GPU none is
_PERIOD_S = 0.4  # of stopping and going on
_DISK_MB = 4
_SPARE = 16 << 20  # bytes: enough for the stack of a thread, not for a model at work

T = TypeVar("T")


@dataclass
class Run:
    """A started command. folder: its submission is in it, and its run folder. log: all that it says. begun: on the monotonic clock, just before."""

    folder: Path
    log: Path
    process: psutil.Popen
    begun: float

    @classmethod
    def start(cls, command: Sequence[str], folder: Path, log: Path) -> Run:
        """Start it in a session, and so a process group, of its own; what it says is added to `log`."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as said:
            begun = time.monotonic()
            process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        return cls(folder, log, process, begun)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.is_over:  # whoever watches it was interrupted
            self.end()

    @property
    def submission(self) -> Path:
        """What it writes."""
        return self.folder / SUBMISSION

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.begun

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    @property
    def outcome(self) -> dict[str, Any]:
        """What it told of itself at its end, as JSON; empty if it did not."""
        told = [line for line in self.lines() if line.startswith("{")]
        outcome: dict[str, Any] = json.loads(told[-1]) if told else {}
        return outcome

    def lines(self) -> list[str]:
        """The lines of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def family(self) -> list[psutil.Process]:
        """The processes that it started, theirs included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return list(self.process.children(recursive=True))
        return []

    def programs(self) -> list[psutil.Process]:
        """Those of them that are no copies of the run any more."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = self.process.cmdline()
            return [process for process in self.family() if process.cmdline() not in ([], own)]
        return []

    def scorers(self) -> list[psutil.Process]:
        """The processes that score: those that a process of the run has forked, or, where it does not fork, those without children."""
        family = self.family()
        parents = {_parent(process) for process in family}
        leaves = [process for process in family if process.pid not in parents]
        forked = [process for process in leaves if _parent(process) not in (self.process.pid, 0)]
        return forked or (leaves if self.seconds > _PATIENCE_S else [])

    def has_scored(self) -> bool:
        """Whether the scores of some rows are kept in its run folder."""
        return any((self.folder / RUN / "scores").rglob("*.*"))

    def until(self, met: Callable[[], T], within_s: float = float("inf")) -> T | None:
        """The first value of `met` that is true, asked again and again; None when the run is over or the time is."""
        end = time.monotonic() + within_s
        while not self.is_over and time.monotonic() < end:
            if value := met():
                return value
            time.sleep(_PAUSE_S)
        return None

    def next_scorer(self, but: set[int] | None = None) -> psutil.Process | None:
        """A process that scores once some rows are scored, other than those with the ids `but`; None where the run ends without one."""
        self.until(self.has_scored)
        return self.new_scorer(but or set())

    def new_scorer(self, but: set[int]) -> psutil.Process | None:
        """The same, whether or not something is scored."""
        return self.until(lambda: next((process for process in self.scorers() if process.pid not in but), None))

    def end(self) -> None:
        """Kill the run and everything that it started."""
        kill([self.process, *self.family()])
        self.process.wait()


def _parent(process: psutil.Process) -> int:
    """The id of its parent; 0 where it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(process.ppid())
    return 0


def kill(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """SIGKILL; gives those that were alive. psutil does not kill another process that has got the same id since."""
    alive = [process for process in processes if lives(process)]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return alive


def lives(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


# --- to the bundles, before the run starts ---------------------------------------------------------------------------------------


def _leave(thing: Path | Run) -> None:
    """Do nothing."""


def poison(bundle: Path) -> None:
    """Make every weight of a member NaN, in a bundle that verifies: all bits of a floating-point number set is NaN, in every width."""
    for path in bundle.rglob("*.safetensors"):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")  # length of the header, header, numbers
        path.write_bytes(data[:begin] + b"\xff" * (len(data) - begin))
    _seal(bundle)


def garble(bundle: Path) -> None:
    """Make the configuration and the tokenizer of every fit unreadable, in a bundle that verifies."""
    for name in ("config.json", "tokenizer.json"):
        for path in bundle.rglob(name):
            path.write_text('{"model', encoding="utf-8")
    _seal(bundle)


def flip(bundle: Path) -> None:
    """Turn one bit in the middle of a member's weights."""
    path = _weights(bundle)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(bundle: Path) -> None:
    """Cut a member's weights off in the middle."""
    os.truncate(_weights(bundle), _weights(bundle).stat().st_size // 2)


def remove_index(bundle: Path) -> None:
    """Remove every index beside a member."""
    for path in bundle.parent.iterdir():
        if manifest.read(path).kind == "index":
            shutil.rmtree(path)


def _weights(bundle: Path) -> Path:
    return max(sorted(bundle.rglob("*.safetensors")), key=lambda path: path.stat().st_size)


def _seal(bundle: Path) -> None:
    """A manifest that fits what is there now."""
    old = manifest.read(bundle)
    manifest.write(bundle, old.name, old.kind, **old.meta)


# --- to the processes, while it runs ---------------------------------------------------------------------------------------------


def starve(run: Run) -> None:
    """Give three scoring processes, one after the other, hardly more address space than they have."""
    met: set[int] = set()
    while len(met) < 3 and (process := run.next_scorer(met)):
        met.add(process.pid)
        with contextlib.suppress(psutil.Error):
            allowed = process.memory_info().vms + _SPARE
            process.rlimit(psutil.RLIMIT_AS, (allowed, allowed))


def kill_twice(run: Run) -> None:
    """SIGKILL the first scoring process, and the one that takes its place."""
    met: set[int] = set()
    while len(met) < 2 and (process := run.new_scorer(met)):
        met.add(process.pid)
        kill([process])


def stop(run: Run) -> None:
    """SIGSTOP a scoring process for good."""
    if process := run.next_scorer():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()


def stop_early(run: Run) -> None:
    """SIGSTOP the first process that the run starts, before it has imported what it needs, for good.

    Once it is a program of its own: stopped in the instant between fork and exec, it would hold the run in the kernel, which nothing else does.
    """
    for process in run.until(run.programs) or ():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()


def slow_down(run: Run) -> None:
    """Stop the scoring processes nine tenths of the time, once some rows are scored."""
    run.until(run.has_scored)
    _throttle(run.family, 0.9, until=lambda: run.is_over)


def slow_down_loading(run: Run) -> None:
    """Stop the whole run four fifths of the time until it has scored some rows."""
    _throttle(lambda: [run.process, *run.family()], 0.8, until=lambda: run.is_over or run.has_scored())


def _throttle(processes: Callable[[], Sequence[psutil.Process]], share: float, *, until: Callable[[], bool]) -> None:
    while not until():
        stopped = processes()
        _signal(stopped, signal.SIGSTOP)
        time.sleep(share * _PERIOD_S)
        _signal(stopped, signal.SIGCONT)
        time.sleep((1 - share) * _PERIOD_S)


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def fill_disk(run: Run) -> None:
    """Leave no byte free where the run writes, once its first submission is there."""
    run.until(run.submission.is_file)
    _fill(run)


def fill_disk_later(run: Run) -> None:
    """Leave no byte free where the run writes, once some rows are scored."""
    run.until(run.has_scored)
    _fill(run)


def _fill(run: Run) -> None:
    """Fill the disk until the run is over; where it is not its own, forbid the run to write."""
    if not os.path.ismount(run.folder):
        for process in [run.process, *run.family()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, (0, 0))
        return
    while not run.is_over:
        with contextlib.suppress(OSError), open(run.folder / "filler", "ab", buffering=0) as filler:
            while filler.write(b"\0" * 4096):
                pass
        time.sleep(_PAUSE_S)


@contextlib.contextmanager
def own_disk(folder: Path, size_mb: int) -> Iterator[None]:
    """A folder on a disk of its own of this size, in memory, where this machine lets us make one; else an ordinary one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "kit-chaos", str(folder)]
    is_mounted = bool(size_mb) and shutil.which("mount") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


# --- the list --------------------------------------------------------------------------------------------------------------------

WITH_CLOCK = """
import json, sys, time
from pathlib import Path
from kit import Budget, infer
bundles, test, sample, out, seconds = json.loads(sys.argv[1])
begun = time.monotonic()
def clock():
    t = time.monotonic() - begun
    return {clock}
done = infer([Path(bundle) for bundle in bundles], test=Path(test), sample=sample and Path(sample), out=Path(out), root=Path(bundles[0]).parent,
             budget=Budget(seconds, used_s=0.0, clock=clock))
print(json.dumps(done.summary(), default=str))
sys.exit(not done.finished)
"""
"""Inference by a clock that is a function of the seconds `t` since it began."""


class Fault(NamedTuple):
    """what: is done, in one line. before: to the bundle of one member; during: to the run. seconds: that it has, reserve_s: of them kept back.

    clock: see WITH_CLOCK. limit_s: when it must have ended, if not after its seconds. disk_mb: size of a disk of its own.
    """

    what: str
    before: Callable[[Path], object] = _leave
    during: Callable[[Run], object] = _leave
    seconds: float = 240.0
    reserve_s: float | None = None
    clock: str = ""
    limit_s: float | None = None
    disk_mb: int = 0

    def command(self, bundles: Sequence[Path], test: Path, sample: Path | None, out: Path) -> list[str]:
        """What starts the run."""
        if self.clock:
            values = json.dumps([list(map(str, bundles)), str(test), str(sample) if sample else None, str(out), self.seconds])
            return [runtime.python(), "-c", WITH_CLOCK.format(clock=self.clock), values]
        return infer_command(bundles, test, sample, out, seconds=self.seconds, reserve_s=self.reserve_s)


def infer_command(bundles: Sequence[Path], test: Path, sample: Path | None, out: Path, *, seconds: float, reserve_s: float | None = None) -> list[str]:
    """`kit infer` of these member bundles with this much time."""
    command = [runtime.python(), "-m", "kit", "infer", *map(str, bundles), "--test", str(test), "--out", str(out), "--json"]
    command += ["--hours", str(seconds / 3600)]
    command += ["--sample-submission", str(sample)] if sample else []
    return command + (["--reserve", str(reserve_s)] if reserve_s is not None else [])


FAULTS: dict[str, Fault] = {
    "out-of-memory": Fault("three scoring processes in turn get 16 MB more address space than they have, and no more (RLIMIT_AS)", during=starve),
    "killed-twice": Fault("SIGKILL to the first scoring process, and to the one that takes its place", during=kill_twice),
    "hang": Fault("SIGSTOP to a scoring process, and never SIGCONT", during=stop),
    "hang-at-start": Fault("SIGSTOP to the first process that the run starts, and never SIGCONT; it has 40 s", during=stop_early, seconds=40, reserve_s=3),
    "nan": Fault("every weight of a member is NaN, in a bundle that verifies", poison),
    "exception": Fault("config.json and tokenizer.json of a member are cut off, in a bundle that verifies", garble),
    "slow-device": Fault("scoring processes are stopped 90 % of the time once some rows are scored; it has 40 s", during=slow_down, seconds=40, reserve_s=3),
    "slow-disk": Fault(
        "the whole run is stopped 80 % of the time until the first rows are scored, as where reading takes five times as long; it has 60 s",
        during=slow_down_loading, seconds=60, reserve_s=3,
    ),
    "disk-full": Fault("the disk with submission and run folder is filled up after the first submission", during=fill_disk, disk_mb=_DISK_MB),
    "disk-fills": Fault("the disk with submission and run folder is filled up after the first scores", during=fill_disk_later, disk_mb=_DISK_MB),
    "flipped-byte": Fault("one bit of a member's weights is turned", flip),
    "truncated-file": Fault("the weights of a member are cut off in the middle", truncate),
    "member-missing": Fault("the bundle of a member is not there", shutil.rmtree),
    "index-missing": Fault("the index that members use is not there", remove_index),
    "clock-forward": Fault("the clock jumps forward by an hour after 6 s of a budget of half an hour", clock="t + 3600 * (t > 6)", seconds=1800, limit_s=30),
    "clock-still": Fault("the clock stands still for 8 s", clock="t if t < 4 else max(4, t - 8)"),
    "clock-back": Fault("the clock goes back by an hour after 6 s", clock="t - 3600 * (t > 6)"),
    "no-time": Fault("it has 3 s, of which it usually needs half to start", seconds=3),
}  # fmt: skip
