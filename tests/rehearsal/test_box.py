"""kit.rehearsal.box: what a notebook meets in the box at every level that works here, and that nothing of it is left outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kit.errors import ConfigError, RehearsalError
from kit.rehearsal.box import INPUT, LADDER, WORKING, Bind, Boxed, Room, available_levels, run
from kit.rehearsal.limits import Limits
from kit.vendor.lookalike import Lookalike

ROOT = Path(__file__).parents[2]
OUTSIDE = "192.0.2.1"  # TEST-NET-1, RFC 5737: nobody's address
WHERE = f"import os, pathlib\nMOUNTED = pathlib.Path(os.environ.get('KIT_INPUT', {INPUT!r}))"
every_level = pytest.mark.parametrize("level", LADDER)
best_and_guard = pytest.mark.parametrize("level", [None, "guard"], ids=["best", "guard"])


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> Lookalike:
    return Lookalike.create(tmp_path_factory.mktemp("look") / "alike", hide={"submission-kit"})


@pytest.fixture(autouse=True)
def nothing_is_left(look: Lookalike) -> Iterator[None]:
    """No mounts, no /kaggle, no processes of the look-alike's interpreter."""
    mounts, is_there = Path("/proc/self/mounts"), Path("/kaggle").exists()
    before = mounts.read_text() if mounts.exists() else ""
    yield
    assert (mounts.read_text() if mounts.exists() else "") == before
    assert Path("/kaggle").exists() == is_there
    assert processes(look) == []


def processes(look: Lookalike, *, wait_s: float = 2) -> list[str]:
    """Command lines of what still runs in a box; waits a little for it to end."""
    until = time.monotonic() + wait_s
    while found := [line for line in map(command_line, psutil.process_iter()) if str(look.folder) in line and "pytest" not in line]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    return found


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def skip_unless_it_works(level: str) -> None:
    if objection := available_levels()[level]:
        pytest.skip(f"{level}: {objection}")


def write(path: Path, *cells: str) -> Path:
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), path)
    return path


def boxed(folder: Path, look: Lookalike, *cells: str, level: str | None = None, **options: Any) -> Boxed:
    """Run cells in a box with a file in a bundle mounted."""
    if level:
        skip_unless_it_works(level)
    (folder / "mounts" / "bundle").mkdir(parents=True, exist_ok=True)
    (folder / "mounts" / "bundle" / "file").write_text("content")
    notebook = write(folder / "small.ipynb", *cells)
    return run(notebook, mounts=folder / "mounts", working=folder / "working", lookalike=look, level=level, **options)


def failure(folder: Path, look: Lookalike, *cells: str, **options: Any) -> str:
    with pytest.raises(RehearsalError) as failed:
        boxed(folder, look, *cells, **options)
    text, _, end = str(failed.value).partition("; the partly run notebook is ")
    assert end == str(folder / "working" / "small.ipynb")
    return text


def printed(folder: Path) -> list[str]:
    """What each cell printed."""
    cells = nbformat.read(folder / "working" / "small.ipynb", as_version=4).cells
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


FACTS = """
import importlib.util, json, socket, subprocess, sys

def refusal(work):
    try:
        work()
    except OSError as error:
        return [type(error).__name__, error.errno]
    return "done"

child = f"import socket; socket.socket().connect(({OUTSIDE!r}, 81))"
server = socket.create_server(("127.0.0.1", 0))
print(json.dumps({
    "cwd": os.getcwd(), "mounted": sorted(str(path.relative_to(MOUNTED)) for path in MOUNTED.rglob("*")),
    "content": (MOUNTED / "bundle" / "file").read_text(),
    "write": refusal(lambda: (MOUNTED / "bundle" / "file").write_text("changed")), "mkdir": refusal((MOUNTED / "new").mkdir),
    "remove": refusal((MOUNTED / "bundle" / "file").unlink),
    "connect": refusal(lambda: socket.socket().connect((OUTSIDE, 80))), "resolve": refusal(lambda: socket.getaddrinfo("example.com", 443)),
    "child": subprocess.run([sys.executable, "-c", child], capture_output=True).returncode,
    "interfaces": [name for _, name in socket.if_nameindex()], "server": refusal(lambda: socket.create_connection(server.getsockname(), 5)),
    "home": os.listdir(os.path.expanduser("~")), "environment": dict(os.environ), "python": sys.executable,
    "others": [os.path.exists(path) for path in ELSEWHERE], "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
    "system": refusal(pathlib.Path("/usr/made").touch),
    "kit": importlib.util.find_spec("kit") is not None, "numpy": importlib.util.find_spec("numpy") is not None,
}))
"""
FROM_KERNEL = {"PYDEVD_USE_FRAME_EVAL", "TERM", "CLICOLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "PAGER", "GIT_PAGER", "MPLBACKEND", "JPY_PARENT_PID"}


@every_level
def test_the_notebook_meets_what_it_will_meet_on_the_competition_machine(
    level: str, look: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    given = f"OUTSIDE, ELSEWHERE = {OUTSIDE!r}, {[str(tmp_path / 'mounts'), str(ROOT / 'kit')]!r}"
    done = boxed(tmp_path, look, f"{WHERE}\n{given}\n{FACTS}", "pathlib.Path('made').write_text('here')", level=level)
    facts = json.loads(printed(tmp_path)[0])
    sealed = level != "guard"
    if sealed:
        assert (facts["others"], facts["system"]) == ([False, False], ["OSError", 30])
        assert facts["processes"] < 10
        assert facts["interfaces"] == ["lo"]
    assert facts["cwd"] == (WORKING if sealed else str(tmp_path / "working"))
    assert (facts["mounted"], facts["content"]) == (["bundle", "bundle/file"], "content")
    assert [facts[name] for name in ("write", "mkdir", "remove")] == [["OSError", 30]] * 3
    assert (facts["connect"], facts["resolve"], facts["child"], facts["server"]) == (["OSError", 101], ["gaierror", -3], 1, "done")
    assert set(facts["home"]) <= {".ipython"}
    assert (facts["python"], facts["kit"], facts["numpy"]) == (str(look.python), False, True)
    environment = {name: value for name, value in facts["environment"].items() if name not in FROM_KERNEL}
    assert environment.pop("PATH").split(":")[0] == str(look.python.parent)
    assert set(environment) == {"HOME", "LANG", "KAGGLE_KERNEL_RUN_TYPE"} | (set() if sealed else {"KIT_INPUT", "TMPDIR"})
    assert environment["KAGGLE_KERNEL_RUN_TYPE"] == "Batch"

    assert (done.level, done.executed) == (level, tmp_path / "working" / "small.ipynb")
    assert done.attempts == [f"socket.connect {OUTSIDE}:80", "socket.getaddrinfo example.com:443", f"socket.connect {OUTSIDE}:81"]
    assert (tmp_path / "working" / "made").read_text() == "here"
    assert (tmp_path / "working" / "made").stat().st_uid == os.getuid()
    assert (tmp_path / "mounts" / "bundle" / "file").read_text() == "content"
    assert 0 < done.seconds < 60
    assert 10 < done.peak_mb < 1000 or level == "docker"


def test_packages_can_be_installed_into_the_lookalike(look: Lookalike, tmp_path: Path) -> None:
    cell = "import pathlib, site\npathlib.Path(site.getsitepackages()[0], 'installed.py').touch()\nimport installed\nprint(installed.__file__)"
    boxed(tmp_path, look, cell)
    assert printed(tmp_path) == [f"{look.site / 'installed.py'}\n"]
    (look.site / "installed.py").unlink()


@best_and_guard
def test_links_in_the_mounts_are_shown_as_what_they_lead_to(level: str | None, look: Lookalike, tmp_path: Path) -> None:
    for name in ("elsewhere/deep", "mounts/datasets/owner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a").write_text("A")
    (tmp_path / "elsewhere" / "b").write_text("B")
    (tmp_path / "mounts" / "datasets" / "owner" / "folder").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "mounts" / "datasets" / "file").symlink_to("../../elsewhere/b")
    (tmp_path / "elsewhere" / "again").symlink_to("deep")
    (tmp_path / "mounts" / "all").symlink_to("../elsewhere")
    files = ["all/again/a", "all/b", "all/deep/a", "bundle/file", "datasets/file", "datasets/owner/folder/a"]
    refused = "try:\n    {}\nexcept OSError as error:\n    print(error.errno)"
    cell = f"{WHERE}\nprint([(MOUNTED / name).read_text() for name in {files!r}])\n" + refused.format("(MOUNTED / 'all' / 'b').write_text('')")
    boxed(tmp_path, look, cell, refused.format("(MOUNTED / 'datasets' / 'new').mkdir()"), level=level)
    assert printed(tmp_path) == ["['A', 'B', 'A', 'content', 'B', 'A']\n30\n", "30\n"]


def test_a_broken_link_in_the_mounts_is_refused(look: Lookalike, tmp_path: Path) -> None:
    (tmp_path / "mounts").mkdir()
    (tmp_path / "mounts" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"mounts/gone leads to .*/nowhere, which does not exist"):
        boxed(tmp_path, look, "1")


def test_the_marker_of_the_rerun_is_set_when_asked_for(look: Lookalike, tmp_path: Path) -> None:
    boxed(tmp_path, look, "import os\nprint(os.environ['KAGGLE_IS_COMPETITION_RERUN'])", rerun=True)
    assert printed(tmp_path) == ["1\n"]


def test_without_a_level_the_best_that_works_is_taken(look: Lookalike, tmp_path: Path) -> None:
    levels = available_levels()
    assert list(levels) == ["namespaces", "user-namespaces", "bubblewrap", "docker", "guard"]
    assert levels["guard"] == ""
    assert boxed(tmp_path, look, "1").level == next(level for level, objection in levels.items() if not objection)


@pytest.mark.parametrize(
    ("level", "tool"),
    [
        ("namespaces", "unshare --net --mount --pid --fork true"),
        ("user-namespaces", "unshare --user --map-root-user --net --mount --pid --fork true"),
        ("bubblewrap", "bwrap --unshare-all --ro-bind / / true"),
    ],
)
def test_a_level_works_where_its_tool_does(level: str, tool: str) -> None:
    if not shutil.which(tool.split()[0]) or subprocess.run(tool.split(), capture_output=True).returncode:
        pytest.skip(f"{tool} does not work here")
    assert available_levels()[level] == ""


@every_level
def test_at_the_memory_limit_the_run_ends(level: str | None, look: Lookalike, tmp_path: Path) -> None:
    if level == "docker":
        pytest.skip("there the daemon holds the limit")
    cell = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', \"x = b'x' * 2**29; import time; time.sleep(60)\"])"
    text = failure(tmp_path, look, "print('first')", cell, level=level, limits=Limits(memory_mb=300))
    assert text.startswith("small.ipynb, cell 2: memory limit 300 MB reached (after ")
    assert printed(tmp_path)[0] == "first\n"


@best_and_guard
def test_at_the_time_limit_the_run_ends(level: str | None, look: Lookalike, tmp_path: Path) -> None:
    assert "time limit 2 s reached (peak " in failure(tmp_path, look, "import time\ntime.sleep(60)", level=level, limits=Limits(wall_s=2))


@pytest.mark.parametrize(("level", "folder"), [(None, "os.getcwd()"), (None, "tempfile.gettempdir()"), ("guard", "tempfile.gettempdir()")])
def test_at_the_disk_limit_the_run_ends(level: str | None, look: Lookalike, tmp_path: Path, folder: str) -> None:
    cell = f"import os, tempfile, time\nwith open(os.path.join({folder}, 'big'), 'wb') as file:\n    file.write(b'x' * 2**25)\ntime.sleep(60)"
    text = failure(tmp_path, look, cell, level=level, limits=Limits(disk_mb=30))
    assert text.startswith("small.ipynb, cell 1: disk limit 30 MB reached (after ")


def test_a_failing_cell_is_named_with_what_a_program_said(look: Lookalike, tmp_path: Path) -> None:
    cell = "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'pip', 'install', '--no-index', 'no-such-package'], check=True)"
    text = failure(tmp_path, look, "print('first')", cell)
    assert text.startswith("small.ipynb, cell 2: CalledProcessError: ")
    assert "(ERROR: Could not find a version that satisfies the requirement no-such-package" in text
    assert printed(tmp_path)[0] == "first\n"


@best_and_guard
def test_a_kernel_that_dies_is_a_failure(level: str | None, look: Lookalike, tmp_path: Path) -> None:
    text = failure(tmp_path, look, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", level=level)
    assert text.startswith("small.ipynb, cell 1: the kernel died, perhaps for want of memory (peak ")


@best_and_guard
def test_processes_that_the_notebook_leaves_end_with_it(level: str | None, look: Lookalike, tmp_path: Path) -> None:
    cell = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\ntime.sleep(0.5)"
    boxed(tmp_path, look, cell, level=level)
    assert processes(look) == []


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_the_box_ends_with_the_process_that_made_it(ending: signal.Signals, look: Lookalike, tmp_path: Path) -> None:
    notebook = write(tmp_path / "small.ipynb", "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(100)")
    (tmp_path / "mounts").mkdir()
    code = (
        "import pathlib, sys\nfrom kit.rehearsal.box import run\nfrom kit.vendor.lookalike import Lookalike\n"
        "folder, notebook, *look = map(pathlib.Path, sys.argv[1:])\n"
        "run(notebook, mounts=folder / 'mounts', working=folder / 'working', lookalike=Lookalike(*look[:3], exposes=tuple(look[3:])))"
    )
    places = [tmp_path, notebook, look.folder, look.python, look.site, *look.exposes]
    with tempfile.TemporaryDirectory(prefix="kit-", ignore_cleanup_errors=True) as short:  # what a killed process cannot tidy up
        environment = {**os.environ, "TMPDIR": short}
        maker = subprocess.Popen([sys.executable, "-c", code, *map(str, places)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while not (tmp_path / "working" / "begun").exists():
            assert time.monotonic() < until and maker.poll() is None
            time.sleep(0.1)
        maker.send_signal(ending)
        errors = maker.communicate(timeout=60)[1]
    assert maker.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (ending == signal.SIGINT)
    assert processes(look) == []


@pytest.mark.gpu
def test_the_gpus_of_this_machine_are_visible(look: Lookalike, tmp_path: Path) -> None:
    boxed(tmp_path, look, "import torch\nprint(torch.ones(2, device='cuda').sum().item())")
    assert printed(tmp_path) == ["2.0\n"]


ORDINARY = """
import json, os, pathlib, sys
import nbformat
from kit.rehearsal.box import available_levels, run
from kit.vendor.lookalike import Lookalike
folder = pathlib.Path(sys.argv[1])
(folder / "mounts").mkdir()
(folder / "mounts" / "file").touch()
look = Lookalike.create(folder / "alike")
cell = "import pathlib\\ntry:\\n    pathlib.Path('/kaggle/input/file').write_text('x')\\nexcept OSError as error:\\n    pathlib.Path('made').write_text(str(error.errno))"
nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), folder / "small.ipynb")
levels = [level for level, objection in available_levels().items() if not objection and level != "guard"]
for level in levels:
    run(folder / "small.ipynb", mounts=folder / "mounts", working=folder / level, lookalike=look, level=level)
print(json.dumps({level: [(folder / level / "made").read_text(), (folder / level / "made").stat().st_uid] for level in levels}))
"""


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become somebody else")
def test_it_works_as_an_ordinary_user() -> None:
    user, folder = 65534, Path("/tmp", f"kit-ordinary-{os.getpid()}")
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "env", "-i", f"PATH={os.environ['PATH']}", f"HOME={folder}"]
    become += [f"PYTHONPATH={ROOT}:{Path(nbformat.__file__).parents[1]}"]
    version = "import sys, nbformat; assert sys.version_info[:2] == ({}, {})".format(*sys.version_info)
    pythons = [path for path in (sys.executable, "/usr/bin/python3") if subprocess.run([*become, path, "-c", version], capture_output=True).returncode == 0]
    if not pythons:
        pytest.skip("no interpreter that an ordinary user may run has the packages")
    folder.mkdir()
    os.chown(folder, user, user)
    try:
        done = subprocess.run([*become, pythons[0], "-c", ORDINARY, str(folder)], capture_output=True, text=True, cwd="/")
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if not found:
        pytest.skip("an ordinary user may not make namespaces here")
    assert "namespaces" not in found
    assert set(map(tuple, found.values())) == {("30", user)}


# --- what is refused before anything is done -------------------------------------------------------------------------------------


def test_unknown_and_unusable_levels_are_refused(look: Lookalike, tmp_path: Path) -> None:
    write(tmp_path / "small.ipynb", "1")
    options: dict[str, Any] = {"mounts": tmp_path, "working": tmp_path / "working", "lookalike": look}
    with pytest.raises(ConfigError, match=r"box level 'bublewrap' is unknown \(did you mean 'bubblewrap'\?\)"):
        run(tmp_path / "small.ipynb", level="bublewrap", **options)
    for level, objection in available_levels().items():
        if objection:
            with pytest.raises(ConfigError) as refused:
                run(tmp_path / "small.ipynb", level=level, **options)
            assert str(refused.value) == f"box level {level!r} does not work here: {objection}"
    assert not (tmp_path / "working").exists()


def test_missing_notebook_and_mounts_are_named(look: Lookalike, tmp_path: Path) -> None:
    options: dict[str, Any] = {"working": tmp_path / "working", "lookalike": look}
    with pytest.raises(ConfigError, match=r"none\.ipynb is missing"):
        run(tmp_path / "none.ipynb", mounts=tmp_path, **options)
    with pytest.raises(ConfigError, match=r"nowhere is missing"):
        run(write(tmp_path / "small.ipynb", "1"), mounts=tmp_path / "nowhere", **options)


# --- commands of levels that may not be installed --------------------------------------------------------------------------------


def room(tmp_path: Path) -> Room:
    """With one part of each kind."""
    binds = (Bind("link", "usr/bin", "/bin"), Bind("rw", "/dev", "/dev"), Bind("ro", "/data/in", INPUT), Bind("rw", "/data/out", WORKING))
    folders = {name: tmp_path / "kit-x1" / name for name in ("mounts", "working", "temporary", "sockets", "root")}
    return Room(**folders, binds=binds, memory_mb=300)


def command(level: str, tmp_path: Path) -> str:
    make = LADDER[level]
    assert make
    return " ".join(make(room(tmp_path)))


def test_the_command_for_bubblewrap(tmp_path: Path) -> None:
    text = command("bubblewrap", tmp_path)
    assert text.startswith("bwrap --unshare-all --die-with-parent --symlink usr/bin /bin --dev-bind /dev /dev --ro-bind /data/in /kaggle/input ")
    assert " --dev-bind /data/out /kaggle/working " in text
    assert text.endswith(" --proc /proc --tmpfs /dev/shm --")


def test_the_command_for_docker(tmp_path: Path) -> None:
    text = command("docker", tmp_path)
    assert text.startswith("docker run --rm --pull=never --name=kit-x1 --init --network=none --hostname=localhost ")
    assert " --volume=/data/in:/kaggle/input:ro --volume=/data/out:/kaggle/working kit-box" in text
    assert " --memory=300m " in text
    assert f" --volume={Path('/bin').resolve()}:/bin:ro " in text
    assert "/dev:" not in text


def test_the_commands_for_namespaces_differ_in_the_user_only(tmp_path: Path) -> None:
    text = command("user-namespaces", tmp_path)
    assert text.startswith("setpriv --pdeathsig=KILL -- unshare --user --map-root-user --net --mount --pid ")
    assert text.endswith(" ro /data/in /kaggle/input rw /data/out /kaggle/working --")
    assert text.replace("--user --map-root-user ", "") == command("namespaces", tmp_path)
