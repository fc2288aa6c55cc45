"""An ext4 of a few megabytes in a file, on a loop device, whose power can fail. Needs root."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN: _IOR('X', 125, __u32)
#: How the power fails, by ext4's names. "flush": what is in memory is written first; "log flush":
#: the journal is, with the data that it is ordered behind; "no log flush": nothing is.
FLAGS = {"flush": 0, "log flush": 1, "no log flush": 2}


class Ext4:
    """A context manager: mounted within, and nothing left of it behind.

    Attributes: folder: where it is mounted.
    """

    def __init__(self, place: Path, megabytes: int) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.image, self.folder = place / "image", place / "ext4"
        self.folder.mkdir()
        with self.image.open("wb") as file:
            file.truncate(megabytes << 20)
        # Nothing is left to be initialised in the background.
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", self.image)

    def __enter__(self) -> Ext4:
        self.mount()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if os.path.ismount(self.folder):
            # Lazily: what a failed test left open must not keep the mount.
            _run("umount", "-l", self.folder)
        self.image.unlink()

    def mount(self) -> None:
        """The loop device goes with the mount."""
        _run("mount", "-o", "loop", self.image, self.folder)

    def unmount(self) -> None:
        _run("umount", self.folder)

    def fail(self, flag: str) -> None:
        """Let the power fail: from now on every access is EIO. Unmount and mount: it is back."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", FLAGS[flag]))
        finally:
            os.close(fd)


def why_not() -> str:
    """Return why there can be none here; "" if there can."""
    if os.geteuid() != 0:
        return "an ext4 of its own needs root"
    missing = [each for each in ("mkfs.ext4", "mount", "umount") if _which(each) is None]
    if missing:
        return f"{missing[0]} is not installed"
    with tempfile.TemporaryDirectory(prefix="relay-ext4-") as path:
        try:
            with Ext4(Path(path), 8) as disk:
                disk.fail("no log flush")
        except subprocess.CalledProcessError as error:
            return f"no ext4 can be mounted on a loop device here: {error.stderr.strip()}"
        except OSError as error:
            return f"ext4 cannot be shut down here: {error.strerror}"
    return ""


def _which(name: str) -> str | None:
    """Return where a command is; mkfs is in no user's PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))


def _run(name: str, *arguments: str | Path) -> None:
    """Raises: CalledProcessError: with what it said."""
    command = [_which(name) or name, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)
