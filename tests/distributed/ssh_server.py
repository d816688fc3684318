"""An sshd of the tests' own on 127.0.0.1, with keys made for one test, and an `ssh` that knows its name."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mlxflow.distributed.rank_start import free_ports

_SERVER = """\
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
"""

_CLIENT = """\
Host {name}
 HostName {address}
 Port {port}
 IdentityFile {folder}/user_key
 IdentitiesOnly yes
 UserKnownHostsFile {folder}/known_hosts
 StrictHostKeyChecking accept-new
"""


def require_sshd() -> str:
    """Return the path of sshd; skip the test if there is none or this user cannot run it."""
    server = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if not server or not shutil.which("ssh"):
        pytest.skip("needs sshd and ssh")
    if os.geteuid() == 0:
        with suppress(OSError):
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd of root wants this empty folder
    return server


@contextmanager
def serving(folder: Path, name: str, *, address: str = "127.0.0.1", inside: tuple[str, ...] = ()) -> Iterator[Path]:
    """Run an sshd, and yield a folder for the front of PATH whose `ssh` reaches it by a name.

    Args:
        folder: for keys and configurations.
        name: of the host.
        address: that it listens on.
        inside: a command before that of sshd, such as one that enters a network namespace.
    """
    server = require_sshd()
    folder.mkdir()
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    port = free_ports(1)[0]
    config = _SERVER.format(folder=folder, port=port, address=address)
    if path := os.environ.get("PYTHONPATH"):  # the code under test there, too
        config += f"SetEnv PYTHONPATH={path}\n"
    (folder / "sshd_config").write_text(config)
    (folder / "ssh_config").write_text(_CLIENT.format(folder=folder, port=port, address=address, name=name))
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    client = bin_folder / "ssh"
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    client.chmod(0o755)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([*inside, server, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        _await(process, address, port, listens=not inside)
        yield bin_folder
    finally:
        process.terminate()
        process.wait()


def _await(process: "subprocess.Popen[bytes]", address: str, port: int, *, listens: bool) -> None:
    until = time.monotonic() + 20
    while listens and time.monotonic() < until:
        if process.poll() is not None:
            pytest.skip(f"sshd cannot be run by this user (exit code {process.returncode})")
        with suppress(OSError), socket.create_connection((address, port), 1):
            return
        time.sleep(0.05)
