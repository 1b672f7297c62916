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
    assert "Network is unreachable" in done.stderr
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
    assert "Network is unreachable: example.com (sealed run)" in done.stderr
    assert log.read_text() == "socket.getaddrinfo example.com:443\n"


def test_importing_the_guard_blocks_nothing() -> None:
    code = f"import socket, kit.rehearsal.guard\ns = socket.socket()\ns.settimeout(0.05)\nprint(s.connect_ex(({OUTSIDE!r}, 9)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(guard.__file__).parents[2], capture_output=True, text=True, timeout=60, check=False)
    assert "sealed run" not in done.stderr
