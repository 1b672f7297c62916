"""The sealed box: an unchanged notebook runs in it as it will on the competition machine.

Real paths (/kaggle/input read-only, /kaggle/working), no network, an empty home, a clean environment, only the look-alike's packages, limits.
How well it can be sealed depends on the machine: LADDER has the ways, best first. A box is there to be like the real machine, not to hold a
hostile notebook: working folder, look-alike and devices are shared with this machine. Does not know what the notebook does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kit import runtime
from kit.errors import ConfigError, RehearsalError, nearest
from kit.rehearsal import guard
from kit.rehearsal.limits import Limits, Watch
from kit.rehearsal.notebook import KERNEL, execute
from kit.vendor.lookalike import Lookalike

INPUT, WORKING = str(runtime.COMPETITION_INPUT), "/kaggle/working"
IMAGE = "kit-box"  # for docker; may be empty, as everything is mounted into it
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "opt", "sys")
_EMPTY = ("/home", "/root", "/run", "/var/tmp")
_TRIAL = f"touch {WORKING}/made && test -e {INPUT}/there && ! touch {INPUT}/there 2>/dev/null"
_TRIAL_S = 20


class Boxed(NamedTuple):
    """level: how it was sealed. executed: the notebook with its outputs. peak_mb: most memory met, in MiB. attempts: refused connections."""

    level: str
    executed: Path
    seconds: float
    peak_mb: int
    attempts: list[str]


def run(
    notebook: Path, *, mounts: Path, working: Path, lookalike: Lookalike, limits: Limits | None = None, level: str | None = None, rerun: bool = False
) -> Boxed:  # fmt: skip
    """Execute a copy of a notebook in `working`, sealed off.

    mounts: what is at /kaggle/input; links in it are shown as what they lead to. level: of LADDER; None: the best that works here.
    rerun: set the marker of the hidden-test execution. Raises RehearsalError with cell and reason, the partly run notebook being kept in
    `working`; ConfigError if it cannot begin.
    """
    for path, is_there in ((notebook, notebook.is_file()), (mounts, mounts.is_dir())):
        if not is_there:
            raise ConfigError(f"{path} is missing: give a notebook, and a folder with what is to be at {INPUT}")
    level = _usable(level)
    limits = limits or Limits()
    working.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kit-", ignore_cleanup_errors=True) as short:  # a socket's path must be
        room = _furnish(Path(short), mounts, working, [*lookalike.exposes], lookalike.folder, limits.memory_mb)
        environment = _environment(lookalike.python.parent, rerun) | ({} if LADDER[level] else _instead_of_paths(room))
        log = _post_guard(lookalike.site, [] if LADDER[level] else [str(room.mounts), *(b.source for b in room.binds if b.place.startswith(INPUT))])
        watch = Watch(limits, [room.working, room.temporary])
        command = [*_launcher(level, room, environment), str(lookalike.python), *KERNEL]
        try:
            done = execute(notebook, room.working, command, sockets=room.sockets, watch=watch, environment=None if LADDER[level] else environment)
        except RehearsalError as error:
            error.attempts = tuple(_attempts(log))
            raise
        finally:
            _dismantle(level, room)
    return Boxed(level, done.path, done.seconds, watch.peak_mb, _attempts(log))


def available_levels() -> dict[str, str]:
    """Level, best first → empty if it works here, else why not."""
    return {level: _objection(level) for level in LADDER}


class Bind(NamedTuple):
    """A part of the box. kind: "ro" and "rw" show the folder or file `source` at `place`, "link" makes a link to `source` there."""

    kind: str
    source: str
    place: str


@dataclass(frozen=True)
class Room:
    """What a box is made of. temporary: its /tmp, with the home. sockets: at the same place inside. root: empty, to build in."""

    mounts: Path
    working: Path
    temporary: Path
    sockets: Path
    root: Path
    binds: tuple[Bind, ...]
    memory_mb: int


def _furnish(short: Path, mounts: Path, working: Path, reads: Iterable[Path], writes: Path | None, memory_mb: int) -> Room:
    """A room in the new folder `short`, where the folders `reads` and `writes` keep their places."""
    temporary, sockets, root, skeleton = (short / name for name in ("tmp", "ipc", "root", "input"))
    for folder in (temporary / "home", sockets, root, skeleton):
        folder.mkdir(parents=True)
    mounts, working = mounts.resolve(), working.resolve()
    kept = [("ro", path) for path in reads] + [("rw", path) for path in (writes, writes and writes.resolve(), sockets) if path]
    binds = [
        *_system(), Bind("rw", "/dev", "/dev"), Bind("rw", str(temporary), "/tmp"),
        *(Bind(kind, str(path), str(path)) for kind, path in dict.fromkeys(kept)),
        *_input(mounts, skeleton, INPUT), Bind("rw", str(working), WORKING),
    ]  # fmt: skip
    return Room(mounts, working, temporary, sockets, root, tuple(binds), memory_mb)


def _system() -> Iterator[Bind]:
    """The programs, libraries and drivers of this machine."""
    for path in [Path("/", name) for name in _SYSTEM] + sorted(Path("/run").glob("nvidia*")):
        if path.is_symlink():
            yield Bind("link", str(path.readlink()), str(path))
        elif path.exists():
            yield Bind("ro", str(path), str(path))


def _input(folder: Path, skeleton: Path, place: str) -> Iterator[Bind]:
    """A folder, read-only, with everything that links in it lead to at the place of the link."""
    if not _has_links(folder):
        yield Bind("ro", str(folder), place)
        return
    yield Bind("ro", str(skeleton), place)
    for entry in sorted(folder.iterdir()):
        source, target = entry.resolve(), skeleton / entry.name
        if not source.exists():
            raise ConfigError(f"{entry} leads to {source}, which does not exist: mount a folder without broken links")
        if source.is_dir():
            target.mkdir()
            yield from _input(source, target, f"{place}/{entry.name}")
        else:
            target.touch()
            yield Bind("ro", str(source), f"{place}/{entry.name}")


def _has_links(folder: Path) -> bool:
    return any(os.path.islink(os.path.join(place, name)) for place, folders, files in os.walk(folder) for name in folders + files)


# --- the ladder ------------------------------------------------------------------------------------------------------------------


def _namespaces(room: Room, *options: str) -> list[str]:
    """Linux namespaces, by util-linux; without options for root only. Ends with the thread that starts it."""
    unshare = ["setpriv", "--pdeathsig=KILL", "--", "unshare", *options, "--net", "--mount", "--pid", "--ipc", "--uts", "--mount-proc"]
    table = [text for bind in room.binds for text in bind]
    return [*unshare, "--fork", "--kill-child=SIGKILL", "sh", str(Path(__file__).with_name("box.sh")), str(room.root), *table, "--"]


def _user_namespaces(room: Room) -> list[str]:
    """The same for an ordinary user, who is root inside; files he makes there are his."""
    return _namespaces(room, "--user", "--map-root-user")


def _bubblewrap(room: Room) -> list[str]:
    options = {"ro": "--ro-bind", "rw": "--dev-bind", "link": "--symlink"}
    table = [text for bind in room.binds for text in (options[bind.kind], bind.source, bind.place)]
    empty = [text for place in _EMPTY for text in ("--dir", place)]
    return ["bwrap", "--unshare-all", "--die-with-parent", *table, *empty, "--proc", "/proc", "--tmpfs", "/dev/shm", "--"]


def _docker(room: Room) -> list[str]:
    """A container, which has its own /dev and /sys. Its processes are the daemon's, so the daemon holds the memory limit and no peak is known."""
    binds = [bind for bind in room.binds if bind.place not in ("/dev", "/sys")]
    table = [f"--volume={os.path.realpath(b.place) if b.kind == 'link' else b.source}:{b.place}{'' if b.kind == 'rw' else ':ro'}" for b in binds]
    owner = f"--user={os.getuid()}:{os.getgid()}"
    options = ["--rm", "--pull=never", f"--name={_container(room)}", "--init", "--network=none", "--hostname=localhost", "--shm-size=2g", owner]
    gpus = ["--gpus=all"] if shutil.which("nvidia-smi") else []
    return ["docker", "run", *options, *gpus, f"--memory={room.memory_mb}m", *table, IMAGE]


def _container(room: Room) -> str:
    return room.root.parent.name


# Level → what stands before the command to be run in the room; None: nothing does, and the guard also keeps the mounts unchanged.
LADDER: dict[str, Callable[[Room], list[str]] | None] = {
    "namespaces": _namespaces,
    "user-namespaces": _user_namespaces,
    "bubblewrap": _bubblewrap,
    "docker": _docker,
    "guard": None,
}
_ADVICE = {"docker": f" (it needs an image, which may be empty: tar -cT /dev/null | docker import - {IMAGE})"}


def _launcher(level: str, room: Room, environment: dict[str, str]) -> list[str]:
    """What starts a command in the room with just this environment."""
    seal = LADDER[level]
    return [*seal(room), "/usr/bin/env", "-i", "-C", WORKING, *(f"{name}={value}" for name, value in environment.items())] if seal else []


def _environment(programs: Path, rerun: bool) -> dict[str, str]:
    """As on the competition machine."""
    marks = {runtime.RUN_TYPE: "Batch"} | ({runtime.RERUN_MARKER: "1"} if rerun else {})
    return {"HOME": "/tmp/home", "LANG": "C.UTF-8", "PATH": f"{programs}:{_PATH}", **marks, **runtime.gpu_choice()}


def _instead_of_paths(room: Room) -> dict[str, str]:
    """Where the paths are this machine's own, variables that name them."""
    return {runtime.INPUT_ROOT: str(room.mounts), "TMPDIR": str(room.temporary), "HOME": str(room.temporary / "home")}


def _post_guard(site: Path, read_only: list[str]) -> Path:
    """Have every Python process of the look-alike guarded; gives the log."""
    shutil.copyfile(guard.__file__, site / f"{guard.NAME}.py")
    (site / f"{guard.NAME}.pth").write_text(guard.START)
    (site / guard.MOUNTS).write_text("\n".join(read_only))
    (site / guard.LOG).unlink(missing_ok=True)
    return site / guard.LOG


def _attempts(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.is_file() else []


def _usable(level: str | None) -> str:
    """The level, or the best one. Raises ConfigError if it does not work here."""
    if level is None:
        return next(each for each in LADDER if not _objection(each))
    if level not in LADDER:
        raise ConfigError(f"box level {level!r} is unknown{nearest(level, LADDER)}")
    if objection := _objection(level):
        raise ConfigError(f"box level {level!r} does not work here: {objection}")
    return level


@cache
def _objection(level: str) -> str:
    """Why a level does not work here, found by trying; empty if it does."""
    if not LADDER[level]:
        return ""
    with tempfile.TemporaryDirectory(prefix="kit-") as short:
        mounts, working = Path(short, "mounts"), Path(short, "working")
        for folder in (mounts, working):
            folder.mkdir()
        (mounts / "there").touch()
        room = _furnish(Path(short, "room"), mounts, working, [], None, memory_mb=1000)
        command = [*_launcher(level, room, {"PATH": _PATH}), "sh", "-c", _TRIAL]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TRIAL_S, check=False)
        except FileNotFoundError:
            return f"{command[0]} is not installed"
        except subprocess.TimeoutExpired:
            return f"a trial did not end within {_TRIAL_S} s"
        finally:
            _dismantle(level, room)
        if done.returncode == 0 and (working / "made").is_file():
            return ""
    said = done.stderr.strip().splitlines() or [f"a trial ended with exit code {done.returncode}"]
    return said[0] + _ADVICE.get(level, "")


def _dismantle(level: str, room: Room) -> None:
    """A container does not end with the client that started it."""
    if level == "docker" and shutil.which("docker"):
        subprocess.run(["docker", "rm", "--force", _container(room)], capture_output=True, check=False)
