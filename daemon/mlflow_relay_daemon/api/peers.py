"""Who is at the other end of a loopback connection: his uid, as the kernel knows it.

All users of a node share loopback, so a request there says nothing of who asks. The kernel is asked
for that one socket (17 µs); where it may not be (systemd's RestrictAddressFamilies), for its table
of all, which takes milliseconds: it walks its whole hash table for that.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from starlette.requests import Request

log = logging.getLogger(__name__)

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h; integers are the machine's own, but ports
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
_HEAD = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
#: inet_diag_req_v2: family, protocol, extensions, states; ports, addresses, interface, cookie
_QUESTION = struct.Struct("=BBBxI 4s 4s12x 4s12x I Q")
_ALL_STATES, _NO_COOKIE = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_OWNER, _OWNER_AT = struct.Struct("=II"), 64  # inet_diag_msg: uid, inode
_ERROR = struct.Struct("=i")  # nlmsgerr

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
    """
    try:
        return diag_uid(client, server)
    except OSError as error:  # netlink is not allowed here, or the kernel was built without it
        log.debug("sock_diag: %s", error)
        return table_uid(client, server)


def diag_uid(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """Ask for the one socket. Source: sock_diag(7). Raises: OSError: it is not answered."""
    question = _QUESTION.pack(
        *(socket.AF_INET, socket.IPPROTO_TCP, 0, _ALL_STATES),
        struct.pack(">HH", client[1], server[1]),
        *(socket.inet_aton(client[0]), socket.inet_aton(server[0]), 0, _NO_COOKIE),
    )
    size = _HEAD.size + len(question)
    head = _HEAD.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        netlink.sendto(head + question, (0, 0))
        answer = netlink.recv(4096)
    if _HEAD.unpack_from(answer)[1] == _SOCK_DIAG_BY_FAMILY:
        uid, inode = _OWNER.unpack_from(answer, _HEAD.size + _OWNER_AT)
        return int(uid) if inode else None
    [code] = _ERROR.unpack_from(answer, _HEAD.size)
    if -code == errno.ENOENT:
        return None
    raise OSError(-code, os.strerror(-code))


def table_uid(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """Look for the socket in the tables of all. Source: proc_net_tcp(5)."""
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
