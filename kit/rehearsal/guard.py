"""Refuses every connection outside this machine. Imports nothing of the kit: it is also copied as a sitecustomize.py.

As `sitecustomize` in a folder on PYTHONPATH it guards every Python process started there, and writes what was tried into attempts.log
beside it. Uses an audit hook (PEP 578), which no library can undo.
"""

import ipaddress
import os
import sys

_CONNECTING = {"socket.connect", "socket.sendto", "socket.sendmsg"}  # (socket, address)
_LOOKING_UP = {"socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}  # (host,) or (address,)


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
            raise OSError(101, f"Network is unreachable: {address[0]} (sealed run)")

    sys.addaudithook(hook)


def _is_local(host: object) -> bool:
    if host is None or host in ("", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
    except ValueError:
        return False


if __name__ == "sitecustomize":
    block_sockets(os.path.join(os.path.dirname(os.path.abspath(__file__)), "attempts.log"))
