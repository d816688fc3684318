"""Two network namespaces with a link between them, as two hosts have it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest


class Namespaces(NamedTuple):
    """Two namespaces.

    Attributes:
        names: of both.
        addresses: of both ends of the link.
    """

    names: tuple[str, str]
    addresses: tuple[str, str]

    def inside(self, which: int) -> tuple[str, ...]:
        """Return the beginning of a command that runs in one of them."""
        return ("ip", "netns", "exec", self.names[which])

    def set_link(self, state: str) -> None:
        """Set the link "up" or "down"."""
        ip("-n", self.names[0], "link", "set", self.names[0], state)


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def namespaces() -> Iterator[Namespaces]:
    """Make two namespaces with a link, for the time of a block; skip the test if this user cannot."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and ip: it makes network namespaces")
    names = (f"mx{os.getpid()}a", f"mx{os.getpid()}b")
    addresses = ("10.77.0.1", "10.77.0.2")
    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here ({error.stderr.decode().strip()})")
            made.append(name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Namespaces(names, addresses)
    finally:
        for name in made:
            ip("netns", "del", name)
