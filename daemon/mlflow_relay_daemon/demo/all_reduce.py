"""Averages arrays over the ranks of one node, as Gloo or NCCL do: rank 0 adds up and hands out."""

from __future__ import annotations

import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

MEETING_TIMEOUT_S = 30.0


class AllReduce:
    """Every rank makes one; returns when all have met.

    Args:
        address: where they meet; a path of at most 107 bytes.

    Raises: OSError, EOFError: in any method, when another rank is gone.
    """

    def __init__(self, rank: int, world_size: int, address: Path) -> None:
        self.rank, self.world_size = rank, world_size
        if rank == 0:
            with Listener(str(address), "AF_UNIX", backlog=world_size) as listener:
                self._others = [listener.accept() for _ in range(1, world_size)]
        else:
            self._others = [_meet_root(address)]

    def mean(self, values: Array) -> Array:
        """Return the mean of all ranks' arrays: float64s of one length, the same in all ranks."""
        if self.rank > 0:
            self._others[0].send_bytes(values.tobytes())
            return _array(self._others[0].recv_bytes())
        total = values.copy()
        for other in self._others:
            total += _array(other.recv_bytes())
        mean: Array = total / self.world_size
        for other in self._others:
            other.send_bytes(mean.tobytes())
        return mean


def _array(data: bytes) -> Array:
    return np.frombuffer(data, dtype=np.float64)


def _meet_root(address: Path) -> Connection:
    until_s = time.monotonic() + MEETING_TIMEOUT_S
    while True:
        try:
            return Client(str(address), "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):  # rank 0 is not there yet
            if time.monotonic() > until_s:
                raise
            time.sleep(0.02)
