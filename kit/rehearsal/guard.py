"""Refuses every connection outside this machine, and changes below folders that are to be read only. Imports nothing of the kit.

A copy of it beside which a .pth file imports it (see START), or one named sitecustomize.py in a folder on PYTHONPATH, guards every Python process
started there. It writes the connections that were tried into attempts.log beside it, and takes the read-only folders, one a line, from
mounts.txt there. Uses an audit hook (PEP 578), which no library can undo; but programs that are not Python, and C code, it does not see.
"""

import ipaddress
import os
import sys

NAME = "_kit_guard"  # of the copy
START = f"import {NAME}\n"  # content of the .pth file; a sitecustomize could be hidden by the one that some systems have
LOG, MOUNTS = "attempts.log", "mounts.txt"

_CONNECTING = {"socket.connect", "socket.sendto", "socket.sendmsg"}  # (socket, address)
_LOOKING_UP = {"socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}  # (host,) or (address,)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Event → which of its arguments are paths that it changes. Those that change what a link leads to, and those that change the link itself:
_CHANGING = {"os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "os.setxattr": (0,), "shutil.rmtree": (0,)}
_CHANGING_ENTRY = {"os.mkdir": (0,), "os.rmdir": (0,), "os.remove": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,)}


def block_sockets(log_path: str) -> None:
    """From now on, for the life of this process, connecting to or looking up another machine raises OSError and is logged."""

    def hook(event: str, arguments: tuple) -> None:
        if event in _CONNECTING:
            address = arguments[1]
        elif event == "socket.getaddrinfo":
            address = arguments[:2]
        elif event in _LOOKING_UP:
            address = arguments[0] if isinstance(arguments[0], tuple) else (arguments[0], None)
        else:
            return
        if isinstance(address, tuple) and not _is_local(address[0]):
            with open(log_path, "a", encoding="utf-8") as file:
                file.write(f"{event} {address[0]}:{address[1]}\n")
            if event in _CONNECTING:
                raise OSError(101, f"Network is unreachable: {address[0]} (sealed run)")
            from socket import gaierror  # loaded by then, and not worth loading at every start

            raise gaierror(-3, f"Temporary failure in name resolution: {address[0]} (sealed run)")

    sys.addaudithook(hook)


def block_changes(folders: list[str]) -> None:
    """From now on, for the life of this process, changing anything below these folders raises OSError 30, as on a read-only file system."""
    roots = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            paths = [_followed(arguments[0])] if (arguments[2] or 0) & _WRITING else []
        else:
            paths = [_followed(arguments[place]) for place in _CHANGING.get(event, ())]
            paths += [_entry(arguments[place]) for place in _CHANGING_ENTRY.get(event, ())]
        for path in paths:
            if os.path.join(path, "").startswith(roots):
                raise OSError(30, "Read-only file system", path)

    if roots:
        sys.addaudithook(hook)


def _is_local(host: object) -> bool:
    if host is None or host in ("", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
    except ValueError:
        return False


def _followed(path: str | bytes | os.PathLike | int) -> str:
    """The real path; empty for a file that is open already."""
    return "" if isinstance(path, int) else os.path.realpath(os.fsdecode(path))


def _entry(path: str | bytes | os.PathLike) -> str:
    """The real path of an entry of a folder, itself not followed if it is a link."""
    folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    return os.path.join(os.path.realpath(folder), name)


def _start(folder: str) -> None:
    block_sockets(os.path.join(folder, LOG))
    mounts = os.path.join(folder, MOUNTS)
    if os.path.isfile(mounts):
        with open(mounts, encoding="utf-8") as file:
            block_changes(file.read().splitlines())


if __name__ in (NAME, "sitecustomize"):
    _start(os.path.dirname(os.path.abspath(__file__)))
