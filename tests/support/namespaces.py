"""Networks of their own for single processes of a test: what one machine has for several nodes.

For a process that is alone in a network namespace (`unshare --net`): its links are here, and go with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess


def why_not() -> str:
    """Return why there can be no namespaces here; "" if there can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: apt install iproute2 util-linux"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "relay0", "type", "veth"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no links can be made here: {tried.stderr.strip()}" if tried.returncode else ""


class Island:
    """A namespace with one link to ours, that can be cut: packets vanish then, nobody is told."""

    def __init__(self, number: int) -> None:
        self._link = f"relay{number}"
        self.our_address, its_address = f"10.77.{number}.1", f"10.77.{number}.2"
        # A namespace lives as long as somebody is in it.
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        self.enter = ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net")
        self._wait_until_it_is_apart()
        far = f"far{number}"
        _ip("link", "add", self._link, "type", "veth", "peer", "name", far)
        _ip("link", "set", far, "netns", str(self._holder.pid))
        _ip("addr", "add", f"{self.our_address}/24", "dev", self._link)
        _ip("link", "set", self._link, "up")
        subprocess.run(
            [*self.enter, "ip", "addr", "add", f"{its_address}/24", "dev", far], check=True
        )
        for link in ("lo", far):
            subprocess.run([*self.enter, "ip", "link", "set", link, "up"], check=True)

    def __enter__(self) -> Island:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.communicate()

    def cut(self) -> None:
        """From now on nothing gets through."""
        _ip("link", "set", self._link, "down")

    def heal(self) -> None:
        """All gets through again."""
        _ip("link", "set", self._link, "up")

    def _wait_until_it_is_apart(self) -> None:
        from tests.support.relay import wait_until

        ours = os.readlink("/proc/self/ns/net")
        its = f"/proc/{self._holder.pid}/ns/net"
        wait_until(lambda: os.readlink(its) != ours, "there is a namespace of its own")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
