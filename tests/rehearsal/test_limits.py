"""kit.rehearsal.limits: what a tree of processes holds, writes and takes, and that none of it is left after the end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kit.rehearsal.limits import Limits, Watch

HOLD = "import sys, time\nheld = b'x' * (int(sys.argv[1]) * 2**20)\nprint('ready', flush=True)\ntime.sleep(60)"
Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a Python program, waits until it has printed a line, and gives its process id."""
    running = []

    def begin(code: str, *arguments: object) -> int:
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout and process.stdout.readline()
        return process.pid

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def watch(root: int | None, *folders: Path, **limits: float) -> Watch:
    return Watch(Limits(**limits), folders, root=root)  # type: ignore[arg-type]


def test_below_every_limit_nothing_is_reached_and_the_peak_is_known(start: Start) -> None:
    looking = watch(start(HOLD, 50))
    assert looking.reached() == ""
    assert 50 <= looking.peak_mb < 90


def test_memory_of_children_is_added(start: Start) -> None:
    code = "import subprocess, sys\n"
    code += f"with subprocess.Popen([sys.executable, '-c', {HOLD!r}, '60'], stdout=subprocess.PIPE) as child:\n    print(child.stdout.readline(), flush=True)"
    looking = watch(start(code), memory_mb=60)
    assert looking.reached().startswith(f"memory limit 60 MB reached (after 0 s, peak {looking.peak_mb} MB): use smaller batches")


def test_pages_shared_by_a_fork_count_once(start: Start) -> None:
    code = "import os, time\nheld = b'x' * 2**26\nif os.fork():\n    print('ready', flush=True)\ntime.sleep(60)"
    looking = watch(start(code))
    looking.reached()
    assert 64 <= looking.peak_mb < 110
    looking.kill()


def test_a_mapped_file_does_not_count(start: Start, tmp_path: Path) -> None:
    (tmp_path / "index").write_bytes(b"x" * 2**26)
    code = "import mmap, sys, time\nfile = open(sys.argv[1], 'rb')\n"
    code += "mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\nprint(sum(mapped[::4096]) > 0, flush=True)\ntime.sleep(60)"
    looking = watch(start(code, tmp_path / "index"))
    looking.reached()
    assert looking.peak_mb < 40


def test_what_is_written_below_all_folders_counts(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(b"x" * 3 * 2**20)
    assert watch(None, tmp_path / "a", tmp_path / "b", disk_mb=6).reached() == ""
    assert watch(None, tmp_path / "a", tmp_path / "b", disk_mb=5).reached().startswith("disk limit 5 MB reached (after 0 s, 6 MB): write less")


def test_the_disk_is_not_looked_at_every_time(tmp_path: Path) -> None:
    looking = watch(None, tmp_path, disk_mb=1)
    assert looking.reached() == ""
    (tmp_path / "file").write_bytes(b"x" * 2**22)
    assert looking.reached() == ""
    time.sleep(1.1)
    assert looking.reached() != ""


def test_time_runs_out() -> None:
    looking = watch(None, wall_s=0.05)
    assert looking.reached() == ""
    time.sleep(0.06)
    assert looking.reached() == "time limit 0 s reached (peak 0 MB): do less, or set a shorter budget"


def test_looking_takes_a_tenth_of_the_time_at_most(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / str(number)).touch()
    looking, begun = watch(None, tmp_path), time.monotonic()
    looking.reached()
    assert looking.pause_s >= min(0.2, 9 * (time.monotonic() - begun))


def test_the_end_reaches_processes_that_lost_their_parent() -> None:
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True)"
    code = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {child!r} + '; import time; time.sleep(1)'])\nprint('ready', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    orphan = int(process.stdout.readline())
    looking = watch(process.pid)
    looking.reached()
    process.stdout.readline()  # its parent has ended
    assert psutil.Process(orphan).is_running()
    looking.kill()
    process.communicate()
    time.sleep(0.1)
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE


def test_ending_what_has_ended_is_fine(start: Start) -> None:
    looking = watch(start("print('ready')"))
    looking.reached()
    time.sleep(0.2)
    looking.kill()
    assert looking.reached() == ""
