"""kit.rehearsal.notebook: small notebooks in a kernel of their own; what fails is named, and what ran is kept."""

from __future__ import annotations

import _thread
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kit.errors import ConfigError, RehearsalError
from kit.rehearsal.limits import Limits, Watch
from kit.rehearsal.notebook import KERNEL, Executed, execute


def notebook(folder: Path, *cells: str) -> Path:
    path = folder / "small.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), *(new_code_cell(cell) for cell in cells)]), path)
    return path


def run(tmp_path: Path, *cells: str, command: tuple[str, ...] = (sys.executable, *KERNEL), limits: Limits | None = None, **environment: str) -> Executed:
    working = tmp_path / "working"
    working.mkdir(exist_ok=True)
    watch = Watch(limits or Limits(), [working])
    with tempfile.TemporaryDirectory(prefix="kit-") as sockets:
        return execute(notebook(tmp_path, *cells), working, command, sockets=Path(sockets), watch=watch, environment=environment or None)


def failure(tmp_path: Path, *cells: str, **options: object) -> str:
    """The error of a notebook that fails, without its end, which is the same for all."""
    with pytest.raises(RehearsalError) as failed:
        run(tmp_path, *cells, **options)  # type: ignore[arg-type]
    text, _, end = str(failed.value).partition("; the partly run notebook is ")
    assert end == str(tmp_path / "working" / "small.ipynb")
    assert "\n" not in text
    return text


def printed(tmp_path: Path) -> list[str]:
    """What the cells of the executed notebook printed."""
    cells = nbformat.read(tmp_path / "working" / "small.ipynb", as_version=4).cells
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells if cell.cell_type == "code"]


@pytest.fixture(autouse=True)
def no_kernel_is_left() -> Iterator[None]:
    yield
    left = [child.cmdline() for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    assert not any("ipykernel_launcher" in line for line in left)


def test_cells_run_in_the_working_folder_and_the_outputs_go_into_a_copy(tmp_path: Path) -> None:
    done = run(tmp_path, "import pathlib\nprint(pathlib.Path.cwd())", "pathlib.Path('made').touch()", "6 * 7")
    assert done.path == tmp_path / "working" / "small.ipynb"
    assert printed(tmp_path)[0] == f"{tmp_path / 'working'}\n"
    assert nbformat.read(done.path, as_version=4).cells[3].outputs[0].data["text/plain"] == "42"
    assert (tmp_path / "working" / "made").exists()
    assert 0 < done.seconds < 60
    assert not any(cell.get("outputs") for cell in nbformat.read(tmp_path / "small.ipynb", as_version=4).cells)


def test_the_command_has_the_environment_that_it_is_given(tmp_path: Path) -> None:
    run(tmp_path, "import os\nprint(os.environ['ONLY'], os.environ.get('USER'))", ONLY="mine", HOME=str(tmp_path))
    assert printed(tmp_path) == ["mine None\n"]


def test_a_failing_cell_is_named_and_what_ran_is_kept(tmp_path: Path) -> None:
    assert failure(tmp_path, "print('first')", "{}['no such key']", "print('never')") == "small.ipynb, cell 3: KeyError: 'no such key'"
    assert printed(tmp_path) == ["first\n", "", ""]


def test_an_error_of_several_lines_is_told_in_one(tmp_path: Path) -> None:
    assert failure(tmp_path, "raise ValueError('first\\n  second')") == "small.ipynb, cell 2: ValueError: first second"


@pytest.mark.parametrize("word", ["ERROR", "error"])
def test_the_error_that_a_program_in_the_cell_printed_is_told_too(tmp_path: Path, word: str) -> None:
    child = f"import sys; sys.exit('\\x1b[31m{word}: no wheel for nothing\\x1b[0m\\n{word}: again')"
    text = failure(tmp_path, f"import subprocess, sys\nprint('calm')\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)", HOME=str(tmp_path))
    assert text.startswith("small.ipynb, cell 2: CalledProcessError: Command ")
    assert text.endswith(f" returned non-zero exit status 1. ({word}: no wheel for nothing)")


def test_leaving_by_sys_exit_is_a_failure(tmp_path: Path) -> None:
    assert failure(tmp_path, "import sys\nsys.exit(3)") == "small.ipynb, cell 2: SystemExit: 3"


def test_a_kernel_that_dies_is_a_failure(tmp_path: Path) -> None:
    text = failure(tmp_path, "print('first')", "import os\nos._exit(1)")
    assert text.startswith("small.ipynb, cell 3: the kernel died, perhaps for want of memory (peak ")
    assert printed(tmp_path)[0] == "first\n"


def test_a_kernel_that_does_not_start_is_a_failure_and_says_why(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no kernel here')", *KERNEL)
    assert failure(tmp_path, "1", command=command) == "small.ipynb: the kernel did not start: no kernel here"


def test_at_a_limit_the_run_ends_and_what_ran_is_kept(tmp_path: Path) -> None:
    begun = time.monotonic()
    cell = "import pathlib, time\npathlib.Path('big').write_bytes(b'x' * 2**24)\ntime.sleep(120)"
    text = failure(tmp_path, "print('first')", cell, limits=Limits(disk_mb=9))
    assert text.startswith("small.ipynb, cell 3: disk limit 9 MB reached (after ")
    assert printed(tmp_path) == ["first\n", ""]
    assert time.monotonic() - begun < 60


def test_the_time_limit_counts_from_the_start(tmp_path: Path) -> None:
    assert "time limit 2 s reached" in failure(tmp_path, *["import time\ntime.sleep(0.5)"] * 20, limits=Limits(wall_s=2))


def test_an_interrupted_run_ends_and_what_ran_is_kept(tmp_path: Path) -> None:
    reached = tmp_path / "working" / "reached"

    def interrupt() -> None:
        while not reached.exists():
            time.sleep(0.1)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "print('first')", "import pathlib, time\npathlib.Path('reached').touch()\ntime.sleep(120)")
    assert printed(tmp_path) == ["first\n", ""]


def test_what_is_no_notebook_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.ipynb"
    path.write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"table\.ipynb is not a notebook: Notebook does not appear to be JSON"):
        execute(path, tmp_path, ["true"], sockets=tmp_path, watch=Watch(Limits(), []))
