"""Whose runs are whose: what a user may touch, by the uid that the kernel tells of a peer.

ZeroMQ asks the kernel for the credentials of whoever is at the other end of a unix socket
(SO_PEERCRED) and puts them, behind the address, into each message's property "Peer-Address".
"""

from __future__ import annotations

import grp
import os
from dataclasses import dataclass

import zmq

#: Of one user: attached at once, and runs that have not ended. More is a mistake, or worse, and
#: must not keep others' ranks out.
SESSIONS_PER_USER_MAX = 4096
RUNS_PER_USER_MAX = 10_000


class NotYours(Exception):
    """A user asks for what is another one's; the text says so, and nothing of the other."""


@dataclass(frozen=True)
class Access:
    """The rules of one daemon.

    Args:
        own_uid: of the daemon itself.
        is_shared: a group of users may reach it; else the file system keeps all others out.
    """

    own_uid: int
    is_shared: bool

    def is_admin(self, uid: int | None) -> bool:
        """Return whether this user may see and do everything."""
        return uid in (0, self.own_uid) or (uid is None and not self.is_shared)

    def may(self, uid: int | None, owner: int | None) -> bool:
        """Return whether a user may write to and read a run.

        Args: owner: None: the run was written before owners were kept, so it is the daemon's own.
        """
        return self.is_admin(uid) or (uid is not None and uid == owner)


def private_access() -> Access:
    """Return the rules of a daemon that one user has for himself."""
    return Access(os.getuid(), is_shared=False)


def gid_of(group: str | None) -> int | None:
    """Return the number of a group that is known by name or number; None: no group."""
    if group is None or group.isdecimal():
        return None if group is None else int(group)
    return grp.getgrnam(group).gr_gid


def peer_uid(frame: zmq.Frame) -> int | None:
    """Return the uid of the process that sent this, None where ZeroMQ cannot tell."""
    try:
        address = str(frame.get("Peer-Address"))
    except (zmq.ZMQError, KeyError):
        return None
    _, *credentials = address.rsplit(":", 3)  # uid, gid, pid
    return int(credentials[0]) if len(credentials) == 3 and credentials[0].isdigit() else None
