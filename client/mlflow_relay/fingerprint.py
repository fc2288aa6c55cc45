"""Which file it is: what rank and daemon both look at, to know that it has not changed."""

from __future__ import annotations

import os
import stat

#: A digest is of the whole file up to this size, else of 16 pieces that are as long together: what
#: reads a terabyte has no place in training.
DIGEST_BYTES_MAX = 1 << 20
DIGEST_PIECES = 16

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | bytes) -> int:
    """Return a descriptor to read from. Raises: ValueError: a FIFO, a device, ...; OSError."""
    # Without O_NONBLOCK the opening of a FIFO waits for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind != stat.S_IFREG:
        os.close(fd)
        name = os.fsdecode(path)
        raise ValueError(f"{name!r} is {_KINDS.get(kind, 'no file')}, not a regular file")
    return fd


def sample_digest(fd: int, size: int) -> bytes:
    """Return 16 bytes that differ if the file does: of all of it, or of pieces if it is large."""
    from hashlib import blake2b  # only processes that have artifacts need it

    digest = blake2b(size.to_bytes(8, "little"), digest_size=16)
    if size <= DIGEST_BYTES_MAX:
        digest.update(os.pread(fd, size, 0))
        return digest.digest()
    piece = DIGEST_BYTES_MAX // DIGEST_PIECES
    for index in range(DIGEST_PIECES):
        digest.update(os.pread(fd, piece, (size - piece) * index // (DIGEST_PIECES - 1)))
    return digest.digest()
