"""Exchange of small arrays between ranks over TCP, for backends whose collectives run on a GPU.

On CUDA the host would wait for the GPU's work before a collective, and MLX passes results of the CPU on by a kernel of
the GPU. Numbers that the host needs take this way instead: one rank, the hub, receives those of all and sends them
back. Connections are authenticated by a key of the run.
"""

import json
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import NamedTuple, Self

#: How errors of a lost connection begin.
LOST = "[exchange]"

# How long a rank tries to reach the hub, which starts about as long as this rank
_JOIN_SECONDS = 60.0


class Meeting(NamedTuple):
    """Where the ranks of a run meet.

    Attributes:
        hub: number of the rank that listens.
        host: its address.
        port: of it.
        key: of the run, hexadecimal.
    """

    hub: int
    host: str
    port: int
    key: str

    @classmethod
    def read(cls, text: str) -> Self:
        """Return what `write` wrote."""
        return cls(*json.loads(text))

    def write(self) -> str:
        """Return it as text."""
        return json.dumps(self)


class NumberExchange:
    """The connections of a rank; they are made here.

    Args:
        meeting: where the ranks meet.
        number: of this rank.
        size: number of ranks.

    Raises:
        OSError: the port is taken, or the hub cannot be reached.
    """

    def __init__(self, meeting: Meeting, number: int, size: int) -> None:
        self._number, self._is_hub = number, number == meeting.hub
        self._peers: dict[int, Connection] = {}
        try:
            if self._is_hub:
                self._accept(meeting, size)
            else:
                self._peers[meeting.hub] = _connect(meeting)
                self._peers[meeting.hub].send_bytes(number.to_bytes(4, "little"))
        except (EOFError, AuthenticationError) as error:
            raise OSError(f"{LOST} {type(error).__name__} while the ranks met") from error

    def _accept(self, meeting: Meeting, size: int) -> None:
        family = "AF_INET6" if ":" in meeting.host else "AF_INET"
        with Listener((meeting.host, meeting.port), family, size, authkey=meeting.key.encode()) as listener:
            while len(self._peers) < size - 1:
                connection = listener.accept()
                self._peers[int.from_bytes(connection.recv_bytes(4), "little")] = connection

    def gather(self, mine: bytes) -> list[bytes]:
        """Return the bytes of all ranks by rank; waits for them.

        Args:
            mine: of this rank; as many on all ranks.

        Raises:
            RuntimeError: the connection to another rank was lost.
        """
        try:
            if not self._is_hub:
                (hub,) = self._peers.values()
                hub.send_bytes(mine)
                everyone = hub.recv_bytes()
                return [everyone[begin : begin + len(mine)] for begin in range(0, len(everyone), len(mine))]
            found = {number: peer.recv_bytes() for number, peer in self._peers.items()} | {self._number: mine}
            parts = [found[number] for number in sorted(found)]
            for peer in self._peers.values():
                peer.send_bytes(b"".join(parts))
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{LOST} connection to another rank was lost ({type(error).__name__})") from error
        return parts


def _connect(meeting: Meeting) -> Connection:
    deadline = time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            family = "AF_INET6" if ":" in meeting.host else "AF_INET"
            return Client((meeting.host, meeting.port), family, authkey=meeting.key.encode())
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
