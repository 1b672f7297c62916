"""Runs a notebook as the competition does: another process, its own working folder, no network. Does not know what the notebook does."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from kit import runtime
from kit.errors import KitError
from kit.rehearsal import guard


class NotebookError(KitError):
    """A notebook failed: names the cell and the error. The partly run notebook is kept."""


class Sealed(NamedTuple):
    """executed: the notebook with its outputs. attempts: connections that were tried and refused."""

    executed: Path
    attempts: list[str]


def run_notebook(notebook: Path, working: Path, *, input_folder: Path, timeout_s: float) -> Sealed:
    """Execute a copy of the notebook in `working`, sealed off from the network, with mounts in `input_folder`.

    timeout_s: seconds allowed for each cell. The kernel is reached over IPC, so that not even loopback is needed. Raises NotebookError.
    """
    working.mkdir(parents=True, exist_ok=True)
    executed = working / notebook.name
    with tempfile.TemporaryDirectory(prefix="kit-") as short:  # IPC paths must be short
        seal = Path(short) / "seal"
        seal.mkdir()
        shutil.copyfile(guard.__file__, seal / "sitecustomize.py")
        document = nbformat.read(notebook, as_version=4)
        manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(Path(short) / "kernel"))
        manager.kernel_spec.argv[0] = runtime.python()  # type: ignore[union-attr]
        client = NotebookClient(document, km=manager, timeout=int(timeout_s), resources={"metadata": {"path": str(working)}})
        begun = [0]
        client.on_cell_execute = lambda cell, cell_index: begun.append(cell_index)
        environment = runtime.kernel_environment(input_folder, seal)
        try:
            asyncio.run(client.async_execute(env=environment, cleanup_kc=True))  # nbclient leaves a manager's kernel running otherwise
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(f"{notebook.name}, cell {begun[-1] + 1}: {_reason(error, timeout_s)}; the partly run notebook is {executed}") from None
        finally:
            nbformat.write(document, executed)
        log = seal / "attempts.log"
        return Sealed(executed, log.read_text().splitlines() if log.is_file() else [])


def _reason(error: Exception, timeout_s: float) -> str:
    if isinstance(error, CellExecutionError):
        return " ".join(f"{error.ename}: {error.evalue}".split())
    if isinstance(error, CellTimeoutError):
        return f"ran longer than {timeout_s:g} s"
    return "the kernel died, perhaps for want of memory"
