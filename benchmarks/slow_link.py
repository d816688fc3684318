"""A slow network between two ranks: two network namespaces, and a link with a delay and a rate between them.

The link is two TUN devices and a process that passes on their packets, as netem does in kernels that have it. It needs
root.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

ADDRESSES = ("10.78.0.1", "10.78.0.2")

_MTU = 9000

# Of both ends; the first one is not counted
_EXCHANGES = 10

# Packets that wait for the link, as many as netem keeps
_MOST_WAITING = 1000

_NEW_NET, _TUNSETIFF, _IS_TUN, _NO_HEADER = 0x40000000, 0x400454CA, 0x0001, 0x1000


class Link(NamedTuple):
    """A link.

    Attributes:
        namespaces: its two ends.
        delay_seconds: of each direction.
        bits_per_second: of each direction.
    """

    namespaces: tuple[str, str]
    delay_seconds: float
    bits_per_second: float


@contextlib.contextmanager
def linked(delay_seconds: float, bits_per_second: float) -> Iterator[Link]:
    """Make two namespaces and the link between them for the time of a block."""
    names = (f"link{os.getpid()}a", f"link{os.getpid()}b")
    for name in names:
        _ip("netns", "add", name)
    relay = subprocess.Popen(
        [sys.executable, __file__, *names, str(delay_seconds), str(bits_per_second)], stdout=subprocess.PIPE
    )
    try:
        assert relay.stdout
        assert relay.stdout.readline() == b"ready\n"
        yield Link(names, delay_seconds, bits_per_second)
    finally:
        relay.kill()
        relay.communicate()
        for name in names:
            _ip("netns", "del", name)


def enter(namespace: str) -> None:
    """Move this thread into a network namespace; the threads that it starts later are there, too."""
    with open(f"/run/netns/{namespace}") as file:  # noqa: PTH123
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEW_NET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)


def exchange_seconds(link: Link, num_bytes: int) -> float:
    """Return the median time in which both ends send each other so many bytes over a warm TCP connection."""
    code = "from benchmarks.slow_link import peer; peer({!r}, {})"
    commands = [[sys.executable, "-c", code.format(name, num_bytes)] for name in link.namespaces]
    second = subprocess.Popen(commands[1], stdout=subprocess.PIPE)
    assert second.stdout
    assert second.stdout.readline() == b"ready\n"
    first = subprocess.run(commands[0], check=True, capture_output=True, text=True)
    second.communicate()
    return float(json.loads(first.stdout))


def peer(namespace: str, num_bytes: int) -> None:
    """Be one end of `exchange_seconds`: the end in the second namespace listens, the other one prints the time."""
    enter(namespace)
    if namespace.endswith("b"):
        with socket.create_server((ADDRESSES[1], 7000)) as server:
            print("ready", flush=True)
            connection = server.accept()[0]
    else:
        connection = socket.create_connection((ADDRESSES[1], 7000))
    with connection:
        seconds = [_exchange(connection, num_bytes) for _ in range(_EXCHANGES)]
    if namespace.endswith("a"):
        print(statistics.median(seconds[1:]))


def _exchange(connection: socket.socket, num_bytes: int) -> float:
    """Send and receive so many bytes, and return how long that took."""
    connection.sendall(b"x")
    connection.recv(1)
    begin = time.perf_counter()
    sending = threading.Thread(target=connection.sendall, args=(bytes(num_bytes),))
    sending.start()
    left = num_bytes
    while left:
        left -= len(connection.recv(min(left, 1 << 20)))
    seconds = time.perf_counter() - begin
    sending.join()
    return seconds


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _open_tun(namespace: str, address: str) -> int:
    """Return the descriptor of a TUN device in a namespace."""
    enter(namespace)
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22s", b"slow", _IS_TUN | _NO_HEADER, b""))
    for arguments in (
        ("addr", "add", f"{address}/24", "dev", "slow"),
        ("link", "set", "slow", "mtu", str(_MTU), "up"),
        ("link", "set", "lo", "up"),
    ):
        _ip("-n", namespace, *arguments)
    return device


def _relay(devices: tuple[int, int], delay_seconds: float, bits_per_second: float) -> None:
    """Pass packets on for ever, each after the ones before it, by the rate, and then after the delay."""
    waiting: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())
    free_at = [0.0, 0.0]
    while True:
        now = time.perf_counter()
        for end, packets in enumerate(waiting):
            while packets and packets[0][0] <= now:
                with contextlib.suppress(OSError):
                    os.write(devices[1 - end], packets.popleft()[1])
        due = min((packets[0][0] for packets in waiting if packets), default=now + 1.0)
        ready, _, _ = select.select(devices, [], [], max(0.0, due - time.perf_counter()))
        for end, device in enumerate(devices):
            if device not in ready:
                continue
            packet = os.read(device, _MTU + 100)
            if len(waiting[end]) < _MOST_WAITING:
                free_at[end] = max(free_at[end], time.perf_counter()) + 8 * len(packet) / bits_per_second
                waiting[end].append((free_at[end] + delay_seconds, packet))


if __name__ == "__main__":
    first, second, delay, rate = sys.argv[1:]
    opened = (_open_tun(first, ADDRESSES[0]), _open_tun(second, ADDRESSES[1]))
    print("ready", flush=True)
    _relay(opened, float(delay), float(rate))
