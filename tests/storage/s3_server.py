"""A real S3 server on this machine, in a process of its own, and a proxy before it that can cut connections."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

_SERVER = """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

KEY, SECRET = "the-access-key-of-a-test", "the-secret-of-a-test-9f31"
BUCKET = "artifacts-of-a-test"


class S3Server(NamedTuple):
    """A running server with a bucket."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find it."""
        return environment(self.port)


def environment(port: int) -> dict[str, str]:
    """Return the variables of a client, without those of the one who runs the tests."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL")
    return dict(zip(names, (KEY, SECRET, "us-east-1", f"http://127.0.0.1:{port}"), strict=True))


@contextmanager
def s3_server(*, checks_credentials: bool = False) -> Iterator[S3Server]:
    """Start the server; it ends with this process."""
    variables = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "0" if checks_credentials else "inf"}
    pipe = subprocess.PIPE
    command = [sys.executable, "-W", "ignore", "-c", _SERVER]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=variables)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            server = S3Server(int(process.stdout.readline()))
            if not checks_credentials:
                create_bucket(server)
            yield server
        finally:
            process.stdin.close()
            process.kill()


def create_bucket(server: S3Server) -> None:
    """Make the bucket, by boto3, which is not the client under test."""
    client(server).create_bucket(Bucket=BUCKET)


def client(server: S3Server):  # type: ignore[no-untyped-def]  # boto3 has no types
    """Return a client of boto3 for a server."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server.port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )


def use(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients in this process find a server."""
    for name, value in environment(port).items():
        monkeypatch.setenv(name, value)


def file_of(folder: Path, data: bytes) -> Path:
    """Write a file of some bytes and return its path."""
    folder.mkdir(exist_ok=True)
    path = folder / f"of-{len(data)}"
    path.write_bytes(data)
    return path


def nothing() -> None:
    """No file changed."""


class CuttingProxy:
    """A TCP proxy that closes every connection after some bytes from the client, or from the server.

    Args:
        port: of the server.
        from_client: bytes of a connection from the client after which it is cut; None for no limit.
        from_server: the same of the server's answers.
        stalls: instead of cutting, nothing more is passed on, and this is set.
    """

    def __init__(
        self,
        port: int,
        *,
        from_client: int | None = None,
        from_server: int | None = None,
        stalls: threading.Event | None = None,
    ) -> None:
        self._stalls = stalls
        self._target = port
        self.from_client, self.from_server = from_client, from_server
        self.num_cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for source, sink, limit in ((near, far, self.from_client), (far, near, self.from_server)):
                    threading.Thread(target=self._copy, args=(source, sink, limit), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        num_bytes = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                num_bytes += len(data)
                if limit is not None and num_bytes > limit:
                    self.num_cuts += 1
                    if self._stalls is None:
                        break
                    self._stalls.set()
                    continue
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
