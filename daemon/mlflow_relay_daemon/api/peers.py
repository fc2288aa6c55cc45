"""Who is at the other end of a loopback connection: his uid, by the kernel's table of sockets.

All users of a node share loopback, so a request there says nothing of who asks.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from starlette.requests import Request

TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_PREFIXES = {"tcp": "", "tcp6": "0000000000000000FFFF0000"}  # ::ffff:127.0.0.1


def request_uid(request: Request) -> int:
    """Return the uid of the process that sent a request.

    Raises: HTTPException: 403: it cannot be told.
    """
    uid = peer_uid(request)
    if uid is None:
        raise HTTPException(403, "the kernel does not tell whose connection this is: ask again")
    return uid


def peer_uid(request: Request) -> int | None:
    """Return the uid of the process that sent a request; None: it cannot be told."""
    server = request.scope.get("server")
    if request.client is None or server is None:
        return None
    return connection_uid(request.client, (str(server[0]), int(server[1])))


def connection_uid(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """Return who owns the client's end of a loopback connection; None: nobody any more.

    A socket that its process has closed has no inode, and its uid says 0: that is nobody, not root.
    Source: proc_net_tcp(5).
    """
    for table in TABLES:
        prefix = _PREFIXES[table.name]
        wanted = [prefix + _hex(client), prefix + _hex(server)]
        try:
            lines = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[1:3] == wanted and fields[9] != "0":
                return int(fields[7])
    return None


def _hex(address: tuple[str, int]) -> str:
    """Return an address as the table shows it: in the machine's own order."""
    [number] = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{number:08X}:{address[1]:04X}"
