"""kit.rehearsal.notebook: small notebooks in another process, sealed off; what fails is named and kept."""

from __future__ import annotations

from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kit.rehearsal.notebook import NotebookError, Sealed, run_notebook


def notebook(folder: Path, *cells: str, name: str = "small.ipynb") -> Path:
    path = folder / name
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), *(new_code_cell(cell) for cell in cells)]), path)
    return path


def run(tmp_path: Path, *cells: str, timeout_s: float = 60) -> Sealed:
    return run_notebook(notebook(tmp_path, *cells), tmp_path / "box" / "working", input_folder=tmp_path / "input", timeout_s=timeout_s)


def printed(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells if cell.cell_type == "code" for output in cell.outputs)


def test_it_runs_in_its_own_folder_with_the_mounts_named_and_no_way_out(tmp_path: Path) -> None:
    sealed = run(
        tmp_path,
        "import os, sys, pathlib\nprint(pathlib.Path.cwd())\nprint(os.environ['KIT_INPUT'], os.environ['HF_HUB_OFFLINE'])\nprint(sys.executable)",
        "pathlib.Path('made.txt').write_text('here')",
        "import socket\ntry:\n    socket.create_connection(('example.com', 443))\nexcept OSError as error:\n    print('refused', error)",
        "import subprocess\nprint(subprocess.run([sys.executable, '-c', 'import socket; socket.socket().connect((\"192.0.2.1\", 80))']).returncode)",
    )
    working = tmp_path / "box" / "working"
    assert (working / "made.txt").read_text() == "here"
    assert sealed.executed == working / "small.ipynb"
    text = printed(sealed.executed)
    assert str(working) in text
    assert f"{tmp_path / 'input'} 1" in text
    assert "refused [Errno 101] Network is unreachable: example.com (sealed run)" in text
    assert sealed.attempts == ["socket.getaddrinfo example.com:443", "socket.connect 192.0.2.1:80"]


def test_no_kernel_is_left_running(tmp_path: Path) -> None:
    pids = [int(printed(run(tmp_path, "import os\nprint(os.getpid())").executed))]
    with pytest.raises(NotebookError):
        run(tmp_path, "import os\nprint(os.getpid())", "1 / 0")
    pids.append(int(printed(tmp_path / "box" / "working" / "small.ipynb")))
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_notebook_that_keeps_to_itself_has_no_attempts_and_stays_as_it_was(tmp_path: Path) -> None:
    path = notebook(tmp_path, "print(6 * 7)")
    before = path.read_bytes()
    sealed = run_notebook(path, tmp_path / "box", input_folder=tmp_path, timeout_s=60)
    assert sealed.attempts == []
    assert printed(sealed.executed) == "42\n"
    assert path.read_bytes() == before


def test_a_failing_cell_is_named_and_the_partly_run_notebook_kept(tmp_path: Path) -> None:
    with pytest.raises(NotebookError) as failed:
        run(tmp_path, "print('first')", "{}['no such key']", "print('never')")
    executed = tmp_path / "box" / "working" / "small.ipynb"
    assert str(failed.value) == f"small.ipynb, cell 3: KeyError: 'no such key'; the partly run notebook is {executed}"
    assert printed(executed) == "first\n"


def test_a_cell_that_takes_too_long_is_stopped_and_what_ran_is_kept(tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match=r"small\.ipynb, cell 3: ran longer than 2 s; the partly run notebook is"):
        run(tmp_path, "print('first')", "import time\ntime.sleep(120)", timeout_s=2)
    assert printed(tmp_path / "box" / "working" / "small.ipynb") == "first\n"


def test_a_kernel_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match=r"small\.ipynb, cell 3: the kernel died"):
        run(tmp_path, "print('first')", "import os\nos._exit(1)")
