"""Wall clock, memory and disk limits for a tree of processes. Does not know what they do, nor how they were sealed off."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MB = 2**20
_PAUSE_S = 0.2
_SHARE = 0.1  # of the time that looking may take
_COUNTED = re.compile(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class Limits:
    """What a run may take. wall_s: seconds from its start. memory_mb, disk_mb: MiB, of all of its processes, of all that it writes."""

    wall_s: float = 9 * 3600
    memory_mb: int = 30_000
    disk_mb: int = 20_000


@dataclass
class Watch:
    """Measures a running tree of processes against its limits.

    folders: where it writes. root: its first process, once there is one. peak_mb: the most memory met.
    """

    limits: Limits
    folders: Sequence[Path]
    root: int | None = None
    peak_mb: int = 0
    pause_s: float = _PAUSE_S
    begun: float = field(default_factory=time.monotonic)
    _met: set[psutil.Process] = field(default_factory=set)
    _next_disk: float = 0.0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.begun

    def reached(self) -> str:
        """The limit that is reached, in words; empty if none is. Call again after pause_s."""
        limits, looked = self.limits, time.monotonic()
        memory_mb = sum(map(_held, self._tree())) // MB
        self.peak_mb = max(self.peak_mb, memory_mb)
        disk_mb = self._disk_mb()
        self.pause_s = max(_PAUSE_S, (time.monotonic() - looked) / _SHARE)
        spent = f"after {self.seconds:,.0f} s"
        if memory_mb > limits.memory_mb:
            return f"memory limit {limits.memory_mb:,} MB reached ({spent}, peak {self.peak_mb:,} MB): use smaller batches, or fewer models at a time"
        if disk_mb > limits.disk_mb:
            return f"disk limit {limits.disk_mb:,} MB reached ({spent}, {disk_mb:,} MB): write less below the working folder and the temporary folder"
        if self.seconds > limits.wall_s:
            return f"time limit {limits.wall_s:,.0f} s reached (peak {self.peak_mb:,} MB): do less, or set a shorter budget"
        return ""

    def kill(self) -> None:
        """End every process that was met and still runs."""
        for process in [*self._tree(), *self._met]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil does not kill another process that has got the same id since

    def _tree(self) -> set[psutil.Process]:
        """The first process and its descendants; those of earlier looks are remembered, for they may have lost their parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.root:
                first = psutil.Process(self.root)
                self._met |= {first, *first.children(recursive=True)}
        self._met = {process for process in self._met if process.is_running()}
        return self._met

    def _disk_mb(self) -> int:
        """MiB on disk, looked at less often than memory: it takes longer and grows more slowly."""
        now = time.monotonic()
        if now < self._next_disk:
            return 0
        size = sum(map(_size, self.folders))
        self._next_disk = now + max(1.0, (time.monotonic() - now) / _SHARE)
        return size // MB


def _held(process: psutil.Process) -> int:
    """Bytes that cannot be dropped: anonymous and shared memory, each page divided among those who share it.

    Pages of mapped files, such as an index or weights, are given back under pressure, on the real machine too, so they do not count.
    """
    with contextlib.suppress(OSError):
        counted = _COUNTED.findall(Path(f"/proc/{process.pid}/smaps_rollup").read_text())
        if counted:
            return 1024 * sum(map(int, counted))
    with contextlib.suppress(psutil.Error):
        memory = process.memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))
    return 0


def _size(folder: Path) -> int:
    """Bytes that files below a folder take on disk."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone since
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total
