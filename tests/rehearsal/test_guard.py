"""kit.rehearsal.guard: outside addresses are refused and logged, this machine's own are not; in child processes too."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.rehearsal import guard

OUTSIDE = "192.0.2.1"  # TEST-NET-1, RFC 5737: nobody's address


@pytest.fixture
def server() -> Iterator[int]:
    """The port of a server on this machine that answers every connection with b"hello"."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"hello")

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def seal(tmp_path: Path) -> Path:
    """A folder that guards every Python process which has it on PYTHONPATH."""
    folder = tmp_path / "seal"
    folder.mkdir()
    shutil.copyfile(guard.__file__, folder / "sitecustomize.py")
    return folder


def run(seal: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(seal)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False)


def attempts(seal: Path) -> list[str]:
    log = seal / "attempts.log"
    return log.read_text().splitlines() if log.is_file() else []


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("socket.create_connection((host, 443), timeout=5)", "socket.getaddrinfo"),
        ("socket.socket().connect((host, 443))", "socket.connect"),
        ("socket.socket().connect_ex((host, 443))", "socket.connect"),
        ("socket.socket(socket.AF_INET6).connect(('2001:db8::1', 443))", "socket.connect"),
        ("socket.getaddrinfo('example.com', 443)", "socket.getaddrinfo"),
        ("socket.getaddrinfo(b'example.com', 443)", "socket.getaddrinfo"),
        ("socket.gethostbyname('example.com')", "socket.gethostbyname"),
        ("socket.gethostbyname_ex('example.com')", "socket.gethostbyname"),
        ("socket.gethostbyaddr(host)", "socket.gethostbyaddr"),
        ("socket.getnameinfo((host, 443), 0)", "socket.getnameinfo"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', (host, 53))", "socket.sendto"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendmsg([b'x'], [], 0, (host, 53))", "socket.sendmsg"),
        ("urllib.request.urlopen('https://example.com', timeout=5)", "socket.getaddrinfo"),
    ],
)
def test_reaching_or_looking_up_another_machine_is_refused_and_logged(seal: Path, code: str, event: str) -> None:
    done = run(seal, f"import socket, sys, urllib.request\nhost = sys.argv[1]\n{code}", OUTSIDE)
    assert done.returncode == 1
    connecting = event in ("socket.connect", "socket.sendto", "socket.sendmsg")
    assert ("[Errno 101] Network is unreachable: " if connecting else "[Errno -3] Temporary failure in name resolution: ") in done.stderr
    assert "sealed run" in done.stderr
    assert [line.split()[0] for line in attempts(seal)] == [event]


def test_the_log_names_the_address(seal: Path) -> None:
    run(seal, f"import socket\ntry: socket.socket().connect(({OUTSIDE!r}, 443))\nexcept OSError as error: print(error.errno)")
    assert attempts(seal) == [f"socket.connect {OUTSIDE}:443"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_this_machine_is_reached(seal: Path, server: int, host: str) -> None:
    done = run(seal, "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).recv(9))", host, str(server))
    assert (done.stdout.strip(), done.returncode) == ("b'hello'", 0), done.stderr
    assert attempts(seal) == []


def test_unix_sockets_and_socket_pairs_work(seal: Path, tmp_path: Path) -> None:
    code = (
        "import socket, sys\na, b = socket.socketpair(); a.sendall(b'x'); assert b.recv(1) == b'x'\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\nsocket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    )
    done = run(seal, code, str(tmp_path / "s"))
    assert done.returncode == 0, done.stderr
    assert attempts(seal) == []


def test_child_processes_are_guarded_too(seal: Path) -> None:
    child = f"import socket; socket.socket().connect(({OUTSIDE!r}, 80))"
    done = run(seal, f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)")
    assert done.returncode == 1
    assert attempts(seal) == [f"socket.connect {OUTSIDE}:80"]


def test_block_sockets_holds_for_the_process_it_is_called_in(tmp_path: Path, server: int) -> None:
    log = tmp_path / "log"
    code = (
        "import socket, sys\nfrom kit.rehearsal.guard import block_sockets\nblock_sockets(sys.argv[1])\n"
        "socket.create_connection(('127.0.0.1', int(sys.argv[2])), 5)\nsocket.getaddrinfo('example.com', 443)"
    )
    root = Path(guard.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(log), str(server)], cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert "gaierror: [Errno -3] Temporary failure in name resolution: example.com (sealed run)" in done.stderr
    assert log.read_text() == "socket.getaddrinfo example.com:443\n"


@pytest.fixture
def mounts(tmp_path: Path, seal: Path) -> Path:
    """A folder that the guard keeps unchanged, with a file in a folder."""
    folder = tmp_path / "input"
    (folder / "bundle").mkdir(parents=True)
    (folder / "bundle" / "file").write_text("content")
    (seal / guard.MOUNTS).write_text(f"{folder}\n")
    return folder


@pytest.mark.parametrize(
    "code",
    [
        "open(inside / 'file', 'w')",
        "open(inside / 'file', 'ab')",
        "open(inside / 'file', 'r+')",
        "open(inside / 'new', 'x')",
        "open(os.fsencode(inside / 'new'), 'w')",
        "os.open(inside / 'new', os.O_CREAT | os.O_RDONLY)",
        "(inside / 'new').touch()",
        "(inside / 'new').mkdir()",
        "os.makedirs(inside / 'a' / 'b')",
        "(inside / 'file').unlink()",
        "(inside / 'file').rename(outside / 'file')",
        "os.replace(outside / 'mine', inside / 'file')",
        "(inside / 'link').symlink_to(outside)",
        "os.link(outside / 'mine', inside / 'link')",
        "inside.rmdir()",
        "shutil.rmtree(inside)",
        "shutil.rmtree(inside.parent)",
        "shutil.copy(outside / 'mine', inside)",
        "shutil.move(outside / 'mine', inside)",
        "(inside / 'file').chmod(0o777)",
        "os.utime(inside / 'file')",
        "os.truncate(inside / 'file', 0)",
        "os.chdir(inside); open('new', 'w')",
        "open(outside / 'to inside' / 'new', 'w')",
        "open(outside / 'to file', 'w')",
        "tempfile.TemporaryFile(dir=inside)",
    ],
)
def test_changing_what_is_mounted_is_refused(seal: Path, mounts: Path, tmp_path: Path, code: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").touch()
    (outside / "to inside").symlink_to(mounts / "bundle")
    (outside / "to file").symlink_to(mounts / "bundle" / "file")
    begin = "import os, pathlib, shutil, sys, tempfile\ninside, outside = map(pathlib.Path, sys.argv[1:])\n"
    done = run(seal, begin + code, str(mounts / "bundle"), str(outside))
    assert done.returncode == 1
    assert f"OSError: [Errno 30] Read-only file system: '{mounts}" in done.stderr
    assert [str(path.relative_to(mounts)) for path in sorted(mounts.rglob("*"))] == ["bundle", "bundle/file"]
    assert (mounts / "bundle" / "file").read_text() == "content"


def test_reading_what_is_mounted_and_changing_what_is_beside_it_work(seal: Path, mounts: Path) -> None:
    code = (
        "import os, pathlib, shutil, sys\ninside, beside = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1] + '-mine')\n"
        "assert (inside / 'bundle' / 'file').read_text() == 'content' and len(list(inside.rglob('*'))) == 2\n"
        "shutil.copytree(inside, beside); (beside / 'bundle' / 'file').write_text('changed')\n"
        "(beside / 'link').symlink_to(inside / 'bundle'); (beside / 'link').rename(beside / 'other'); (beside / 'other').unlink()\n"
        "os.truncate(os.open(beside / 'bundle' / 'file', os.O_RDWR), 2); shutil.rmtree(beside / 'bundle')"
    )
    done = run(seal, code, str(mounts))
    assert (done.returncode, done.stderr) == (0, "")
    assert (mounts / "bundle" / "file").read_text() == "content"


def test_without_mounts_everything_can_be_changed(seal: Path, mounts: Path) -> None:
    (seal / guard.MOUNTS).write_text("")
    assert run(seal, "import pathlib, sys; pathlib.Path(sys.argv[1], 'bundle', 'file').unlink()", str(mounts)).returncode == 0


def test_a_pth_file_starts_it_where_a_sitecustomize_of_the_system_comes_first(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    shutil.copyfile(guard.__file__, site / f"{guard.NAME}.py")
    (site / f"{guard.NAME}.pth").write_text(guard.START)
    code = f"import site, socket, sys\nsite.addsitedir(sys.argv[1])\nsocket.socket().connect(({OUTSIDE!r}, 80))"
    done = subprocess.run([sys.executable, "-c", code, str(site)], capture_output=True, text=True, timeout=60, check=False)
    assert "sealed run" in done.stderr
    assert attempts(site) == [f"socket.connect {OUTSIDE}:80"]


def test_importing_the_guard_blocks_nothing() -> None:
    code = f"import socket, kit.rehearsal.guard\ns = socket.socket()\ns.settimeout(0.05)\nprint(s.connect_ex(({OUTSIDE!r}, 9)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(guard.__file__).parents[2], capture_output=True, text=True, timeout=60, check=False)
    assert "sealed run" not in done.stderr
