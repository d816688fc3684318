"""The hostfile of `mlx.distributed_config`: which hosts run the ranks, one entry for each rank. Imports no MLX.

    [{"ssh": "mac-a", "ips": ["10.0.0.1"]}, {"ssh": "mac-b", "ips": ["10.0.0.2"]}]

or the same list under "hosts" of an object that may also have "backend" and "envs", variables of all ranks. "rdma" of
an entry lists the RDMA device to the host of each entry, null for its own.
"""

import ipaddress
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from mlxflow.distributed.rank import BACKENDS, MAX_PROCESSES

#: The most bytes of a hostfile.
MAX_BYTES = 1 << 20

# jaccl connects every pair of hosts
_MAX_JACCL = 32

_SPACE = re.compile(r"[ \t\n\r]*")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@:%-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*")
_THIS_HOST = ("localhost", "127.0.0.1", "::1")
_DECODER = json.JSONDecoder()


class Host(NamedTuple):
    """One entry: the host of one rank.

    Attributes:
        line: of the entry in the hostfile.
        ssh: the name to which ssh connects.
        ips: its addresses for the other ranks.
        rdma: its RDMA devices to the host of each entry, as MLX reads them.
    """

    line: int
    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[Any, ...] = ()

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        name = socket.gethostname()
        if self.ssh in (*_THIS_HOST, name, name.partition(".")[0], f"{name}.local"):
            return True
        import psutil

        addresses = (address.address for several in psutil.net_if_addrs().values() for address in several)
        return _is_address(self.ssh) and self.ssh in addresses


class Hostfile(NamedTuple):
    """The hosts of a run.

    Attributes:
        file: its name, for messages.
        hosts: by rank.
        backend: that it asks for; empty if none.
        environment: variables of every rank.
    """

    file: str
    hosts: tuple[Host, ...]
    backend: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def num_hosts(self) -> int:
        """The number of different hosts."""
        return len({host.ssh for host in self.hosts})

    def place_on_host(self, number: int) -> tuple[int, int]:
        """Return which of the ranks on its host a rank is, from 0, and how many these are."""
        names = [host.ssh for host in self.hosts]
        return names[:number].count(names[number]), names.count(names[number])


def read_hostfile(text: str, file: str) -> tuple[Hostfile | None, list[str]]:
    """Return the content of a hostfile, None if it has mistakes, and a line for each mistake.

    Args:
        text: of the file.
        file: its name, for messages.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        return None, [f"{file}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}). Fix the line."]
    except (ValueError, RecursionError):
        return None, [f"{file}: not valid JSON. Write it as mlx.distributed_config does."]
    reader = _HostfileReader(text, file)
    begin = _skip(text, 0)
    if isinstance(document, list):
        entries: int | None = begin
    elif isinstance(document, dict):
        entries = reader.read_object(begin)
    else:
        return None, [f"{file}: expected a list of hosts. Write it as mlx.distributed_config does."]
    if entries is not None:
        reader.read_hosts(entries)
    found = Hostfile(file, tuple(reader.hosts), reader.backend, tuple(reader.environment))
    return (None if reader.lines else found), reader.lines


def backend_mistakes(found: Hostfile, backend: str) -> Iterator[str]:
    """Yield a line for each entry that lacks what a backend needs.

    Args:
        found: without mistakes of its own.
        backend: resolved.
    """
    hosts, file = found.hosts, found.file
    if backend == "jaccl" and len(hosts) > _MAX_JACCL:
        yield f'{file}: {len(hosts)} hosts: expected at most {_MAX_JACCL} for backend "jaccl".'
        return
    for number, host in enumerate(hosts):
        place = f"{file}:{host.line}: entry {number + 1}"
        if not host.ips and (backend == "ring" or number == 0):
            yield f'{place}: ips: missing, and backend "{backend}" needs an address of {host.ssh}. Add "ips".'
        elif backend == "ring" and len(host.ips) != len(hosts[0].ips or host.ips):
            yield f"{place}: ips: {len(host.ips)} of them: expected as many as entry 1 has, {len(hosts[0].ips)}."
        if backend == "jaccl":
            yield from _rdma_mistakes(found, number, place)


def _rdma_mistakes(found: Hostfile, number: int, place: str) -> Iterator[str]:
    host, hosts = found.hosts[number], found.hosts
    if len(host.rdma) != len(hosts):
        yield (
            f"{place}: rdma: {len(host.rdma)} of them: expected {len(hosts)}, the device to the host of each entry and "
            "null for its own."
        )
        return
    if host.rdma[number] is not None:
        yield f"{place}: rdma[{number}]: expected null, for the entry's own host."
    is_ring = dict(found.environment).get("MLX_JACCL_RING", "0") not in ("", "0")
    neighbours = {(number - 1) % len(hosts), (number + 1) % len(hosts)} if is_ring else set(range(len(hosts)))
    for other in sorted(neighbours - {number}):
        if host.rdma[other] is None:
            yield f"{place}: rdma[{other}] = null: expected the RDMA device to {hosts[other].ssh}."


class _HostfileReader:
    """Reads a hostfile that is valid JSON, and notes its mistakes with their lines."""

    def __init__(self, text: str, file: str) -> None:
        self.hosts: list[Host] = []
        self.backend = ""
        self.environment: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self._text = text
        self._file = file

    def read_object(self, begin: int) -> int | None:
        """Read an object with the list of hosts; return where that begins, None if there is none."""
        entries = None
        for at, key, value in _members(self._text, begin):
            if key == "hosts" and isinstance(value, list):
                entries = at
            elif key == "hosts":
                self._note(at, "hosts", value, "expected a list of hosts.")
                return None
            elif key == "backend" and (value == "" or value in BACKENDS):
                self.backend = "" if value == "auto" else str(value)
            elif key == "backend":
                self._note(at, "backend", value, f"expected one of {', '.join(BACKENDS)}.")
            elif key == "envs":
                self._read_variables(at, value)
            else:
                self._note(at, key, value, "unknown key. Expected hosts, backend and envs.")
        if entries is None:
            self.lines.append(f"{self._file}: hosts: missing. Write it as mlx.distributed_config does.")
        return entries

    def _read_variables(self, at: int, value: object) -> None:
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str) or not _VARIABLE.fullmatch(text) or "\0" in text:
                self._note(at, "envs", text, 'expected a list of texts such as "NAME=value".')
            elif text.startswith(("MLXFLOW_", "MLX_RANK=", "MLX_WORLD_SIZE=", "MLX_HOSTFILE=")):
                self._note(at, "envs", text, "mlxflow sets this variable itself. Remove it.")
            else:
                name, _, content = text.partition("=")
                self.environment.append((name, content))

    def read_hosts(self, begin: int) -> None:
        """Read the list of hosts that begins at a place of the text."""
        owners: dict[str, str] = {}
        for number, (at, value) in enumerate(_elements(self._text, begin)):
            entry = f"entry {number + 1}"
            if not isinstance(value, dict):
                self._note(at, entry, value, 'expected an object such as {"ssh": "mac-b", "ips": ["10.0.0.2"]}.')
                continue
            for key in value.keys() - {"ssh", "ips", "rdma"}:
                self._note(at, f"{entry}: {key}", value[key], "unknown key. Expected ssh, ips and rdma.")
            ssh, ips, rdma = value.get("ssh"), value.get("ips", []), value.get("rdma", [])
            if "ssh" not in value:
                self.lines.append(f'{self._file}:{self._line(at)}: {entry}: ssh: missing. Add the name for "ssh".')
            elif not isinstance(ssh, str) or not _NAME.fullmatch(ssh):
                self._note(at, f"{entry}: ssh", ssh, "expected a name to which ssh connects.")
            ssh = ssh if isinstance(ssh, str) else entry
            self._check_addresses(at, entry, ssh, ips, owners)
            if not _are_devices(rdma):
                self._note(at, f"{entry}: rdma", rdma, "expected a list of device names, and null for its own host.")
            elif isinstance(ips, list):
                self.hosts.append(Host(self._line(at), ssh, tuple(map(str, ips)), tuple(rdma)))
        if not 1 <= len(self.hosts) <= MAX_PROCESSES and not self.lines:
            self.lines.append(f"{self._file}: {len(self.hosts)} entries: expected 1 to {MAX_PROCESSES}.")

    def _check_addresses(self, at: int, entry: str, ssh: str, ips: object, owners: dict[str, str]) -> None:
        if not isinstance(ips, list):
            self._note(at, f"{entry}: ips", ips, "expected a list of IP addresses.")
            return
        for index, address in enumerate(ips):
            key = f"{entry}: ips[{index}]"
            if not isinstance(address, str) or not _is_address(address):
                self._note(at, key, address, "expected an IP address, such as 10.0.0.2.")
            elif owners.setdefault(address, ssh) != ssh:
                self._note(at, key, address, f"is an address of {owners[address]}, too. Each host has its own.")
        for address, count in Counter(map(str, ips)).items():
            if count > 1:
                self._note(at, f"{entry}: ips", address, "is listed twice. Remove one.")

    def _note(self, at: int, key: str, value: object, expected: str) -> None:
        shown = json.dumps(value)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        self.lines.append(f"{self._file}:{self._line(at)}: {key} = {shown}: {expected}")

    def _line(self, at: int) -> int:
        return self._text.count("\n", 0, at) + 1


def _are_devices(rdma: object) -> bool:
    def is_device(one: object) -> bool:
        return one is None or isinstance(one, str) or (isinstance(one, list) and all(isinstance(x, str) for x in one))

    return isinstance(rdma, list) and all(map(is_device, rdma))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _skip(text: str, at: int) -> int:
    """Return the next place that is no white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _elements(text: str, begin: int) -> Iterator[tuple[int, Any]]:
    """Yield the place and the value of each element of a valid JSON list that begins at a place."""
    at = _skip(text, begin + 1)
    while text[at] != "]":
        value, end = _DECODER.raw_decode(text, at)
        yield at, value
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _members(text: str, begin: int) -> Iterator[tuple[int, str, Any]]:
    """Yield the place of the value, the key and the value of each member of a valid JSON object."""
    at = _skip(text, begin + 1)
    while text[at] != "}":
        key, end = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, end) + 1)
        value, end = _DECODER.raw_decode(text, at)
        yield at, key, value
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
