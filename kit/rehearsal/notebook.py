"""Executes a notebook cell by cell from outside its kernel, under limits. Does not know what the notebook does, nor how its kernel is sealed off."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from kit.errors import ConfigError, RehearsalError
from kit.rehearsal.limits import Watch

KERNEL = ("-m", "ipykernel_launcher", "-f", "{connection_file}")  # arguments of an interpreter
_START_S = 120
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_COMPLAINT = re.compile(r"^\s*((?:ERROR|error):.*)", re.MULTILINE)
_UNHEARD = logging.getLogger(f"{__name__}.client")  # of nbclient: what happened is told by the error raised here
_UNHEARD.setLevel(logging.CRITICAL + 1)


class Executed(NamedTuple):
    """path: the notebook with its outputs. seconds: from start to end."""

    path: Path
    seconds: float


def execute(
    notebook: Path, working: Path, command: Sequence[str], *, sockets: Path, watch: Watch, environment: dict[str, str] | None = None
) -> Executed:  # fmt: skip
    """Run the cells of a notebook in the kernel that `command` starts; a copy with the outputs is written into `working` in any case.

    command: starts a kernel, see KERNEL. sockets: a folder with a short path, at the same place for the kernel, for talking to it over IPC, so
    that not even loopback is needed. environment: of the command; None: as here. Raises RehearsalError with the cell and what happened there,
    ConfigError for a file that is no notebook.
    """
    document, executed, begun = _read(notebook), working / notebook.name, list[int]()

    def failure(reason: str) -> RehearsalError:
        where = f"{notebook.name}, cell {begun[-1] + 1}" if begun else notebook.name
        return RehearsalError(f"{where}: {reason}; the partly run notebook is {executed}")

    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(sockets / "k"), connection_file=str(sockets / "kernel.json"))
    manager.kernel_spec.argv = [*command]  # type: ignore[union-attr]
    client = NotebookClient(document, km=manager, timeout=None, startup_timeout=_START_S, log=_UNHEARD)
    client.on_cell_execute = lambda cell, cell_index: begun.append(cell_index)
    log = sockets / "log"
    try:
        with log.open("wb") as errors:
            options = {"cwd": str(working), "stdout": subprocess.DEVNULL, "stderr": errors}
            _run(client, manager, options if environment is None else {**options, "env": environment}, watch)
    except _LimitReached as limit:
        raise failure(str(limit)) from None
    except CellExecutionError as error:
        raise failure(_complaint(error, document.cells[begun[-1]])) from None
    except RuntimeError:
        end = f"died, perhaps for want of memory (peak {watch.peak_mb:,} MB)" if begun else "did not start"
        raise failure(f"the kernel {end}{_last_words(log)}") from None
    finally:
        nbformat.write(document, executed)
    return Executed(executed, round(watch.seconds, 1))


class _LimitReached(Exception):  # noqa: N818
    pass


def _read(notebook: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(notebook, as_version=4)
    except ValueError as error:
        raise ConfigError(f"{notebook} is not a notebook: {str(error).splitlines()[0][:100]}") from None


def _run(client: NotebookClient, manager: AsyncKernelManager, options: dict[str, object], watch: Watch) -> None:
    """Execute in another thread, so that this one can look at the limits and be interrupted. Leaves no process behind."""
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(asyncio.run, _talk(client, options))
        try:
            while not _ends(work, watch.pause_s):
                watch.root = _process(manager)
                if limit := watch.reached():
                    raise _LimitReached(limit)
        finally:
            watch.kill()
            while not _ends(work, watch.pause_s):  # it may have been about to start a process
                watch.root = _process(manager)
                watch.kill()
    work.result()


async def _talk(client: NotebookClient, options: dict[str, object]) -> None:
    await client.async_start_new_kernel(**options)
    await client.async_start_new_kernel_client()
    await client.async_execute(cleanup_kc=True)  # nbclient leaves a manager's kernel running otherwise


def _process(manager: AsyncKernelManager) -> int | None:
    return getattr(manager.provisioner, "pid", None)


def _ends(work: Future[None], seconds: float) -> bool:
    """Whether it ends within that time."""
    try:
        work.exception(seconds)
    except TimeoutError:
        return False
    return True


def _complaint(error: CellExecutionError, cell: nbformat.NotebookNode) -> str:
    """The error, and what a program in the cell, such as pip, printed as one."""
    text = "\n".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")
    printed = _COMPLAINT.findall(_COLOURS.sub("", text))
    return " ".join(" ".join([f"{error.ename}: {error.evalue}", *(f"({line})" for line in printed[:1])]).split())


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()}" if lines else ""
