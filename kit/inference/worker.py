"""The life of a scoring process: `python -m kit.inference.worker RUN DEVICE FD PARENT`, started by kit.inference.crew.

It is a *keeper*: it imports once what scoring needs, without a thread or CUDA, and forks a worker for every member. With CUDA, which does not
survive a fork, it becomes the worker itself. No process outlives the one that started it.
Does not know how rows are scored (kit.inference.scorer), nor which and when.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle
from pathlib import Path
from types import ModuleType

from kit import runtime
from kit.inference.crew import AUTO

_LOOK_S = 0.1  # between two looks whether the parent lives
_VICTIM = "800"  # of -1000 to 1000: whom the system kills first when memory runs out


def main(run: Path, device: str, control: Connection, parent: int) -> None:
    """Import, report the devices, and make workers as the run asks, until it is gone."""
    watch = _Watch(parent)  # the imports take seconds
    scorer = importlib.import_module("kit.inference.scorer")
    gc.freeze()  # what was imported stays: looking through it for garbage takes half a second after every fork, and copies its memory
    devices = runtime.devices() if device == AUTO else [device]
    with contextlib.suppress(EOFError, OSError):  # the run is gone
        control.send(devices)
        if devices[0] == "cpu":
            watch.stop()
            _keep(run, control, scorer)
        else:
            _, asked = control.recv()
            _work(run, devices[0], Connection(recv_handle(control)), asked, scorer)


class _Watch:
    """A thread that ends this process when its parent is gone."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        while os.getppid() == self._parent:
            if self._stopped.wait(_LOOK_S):
                return
        os._exit(1)


def _keep(run: Path, control: Connection, scorer: ModuleType) -> None:
    """("start", time) and a pipe: fork a worker. ("end", seconds): wait for its end, kill it, and answer with its exit status."""
    worker: BaseProcess | None = None
    try:
        while True:
            verb, value = control.recv()
            if verb == "end":
                control.send(_end(worker, value))
            else:
                with Connection(recv_handle(control)) as pipe:
                    worker = multiprocessing.get_context("fork").Process(target=_forked, args=(run, control, pipe, os.getpid(), scorer))
                    worker.start()
    finally:
        _end(worker)


def _end(worker: BaseProcess | None, patience_s: float = 0) -> int | None:
    if worker is None:
        return 0
    worker.join(patience_s)
    worker.kill()
    worker.join()
    return worker.exitcode


def _forked(run: Path, control: Connection, pipe: Connection, keeper: int, scorer: ModuleType) -> None:
    began = time.monotonic()
    control.close()
    _Watch(keeper)
    _work(run, "cpu", pipe, began, scorer)


def _work(run: Path, device: str, pipe: Connection, began: float, scorer: ModuleType) -> None:
    with contextlib.suppress(OSError):  # where the system has no such file
        Path("/proc/self/oom_score_adj").write_text(_VICTIM)
    scorer.serve(run, device, pipe, began)


if __name__ == "__main__":
    faulthandler.enable()
    folder, place, fd, parent_id = sys.argv[1:]
    os.set_inheritable(int(fd), False)
    main(Path(folder), place, Connection(int(fd)), int(parent_id))
