import json
import re
import socket

import pytest

from mlxflow.distributed.hosts import Host, Hostfile, backend_mistakes, read_hostfile

TWO = """[
 {"ssh": "a", "ips": ["10.0.0.1"]},
 {"ssh": "me@b.local", "ips": ["10.0.0.2", "fe80::1"], "rdma": ["x", null]}
]"""
HOSTS = (Host(2, "a", ("10.0.0.1",)), Host(3, "me@b.local", ("10.0.0.2", "fe80::1"), ("x", None)))


def test_both_forms_of_a_hostfile() -> None:
    assert read_hostfile(TWO, "h") == (Hostfile("h", HOSTS), [])
    text = f'{{"backend": "jaccl", "envs": ["A=b=c"], "hosts":\n{TWO}}}'
    found, lines = read_hostfile(text, "h")
    moved = tuple(host._replace(line=host.line + 1) for host in HOSTS)
    assert (found, lines) == (Hostfile("h", moved, "jaccl", (("A", "b=c"),)), [])
    assert read_hostfile('{"backend": "", "envs": [], "hosts": [{"ssh": "a"}]}', "h")[0] == Hostfile(
        "h", (Host(1, "a"),)
    )


def test_all_mistakes_come_with_their_lines() -> None:
    text = """{
 "backend": "gloo",
 "envs": ["A", "MLX_RANK=3"],
 "nodes": 1,
 "hosts": [
  {"ips": ["10.0.0.1"]},
  {"ssh": "-oProxyCommand=x", "ips": "10.0.0.2"},
  {"ssh": "c", "ips": ["10.0.0.1", "mac-c", "10.0.0.3", "10.0.0.3"], "rdma": [1]},
  {"ssh": "d", "ips": ["10.0.0.3"], "user": "me"},
  7
 ]
}"""
    found, lines = read_hostfile(text, "hosts.json")
    assert found is None
    assert lines == [
        'hosts.json:2: backend = "gloo": expected one of auto, ring, nccl, jaccl, mpi.',
        'hosts.json:3: envs = "A": expected a list of texts such as "NAME=value".',
        'hosts.json:3: envs = "MLX_RANK=3": mlxflow sets this variable itself. Remove it.',
        "hosts.json:4: nodes = 1: unknown key. Expected hosts, backend and envs.",
        'hosts.json:6: entry 1: ssh: missing. Add the name for "ssh".',
        'hosts.json:7: entry 2: ssh = "-oProxyCommand=x": expected a name to which ssh connects.',
        'hosts.json:7: entry 2: ips = "10.0.0.2": expected a list of IP addresses.',
        'hosts.json:8: entry 3: ips[0] = "10.0.0.1": is an address of entry 1, too. Each host has its own.',
        'hosts.json:8: entry 3: ips[1] = "mac-c": expected an IP address, such as 10.0.0.2.',
        'hosts.json:8: entry 3: ips = "10.0.0.3": is listed twice. Remove one.',
        "hosts.json:8: entry 3: rdma = [1]: expected a list of device names, and null for its own host.",
        'hosts.json:9: entry 4: user = "me": unknown key. Expected ssh, ips and rdma.',
        'hosts.json:9: entry 4: ips[0] = "10.0.0.3": is an address of c, too. Each host has its own.',
        'hosts.json:10: entry 5 = 7: expected an object such as {"ssh": "mac-b", "ips": ["10.0.0.2"]}.',
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"ssh": "a"},\n {"ssh" "b"}]', "h:2: not valid JSON (Expecting ':' delimiter at column 9). Fix the line."),
        ("[" * 100_000, "h: not valid JSON. Write it as mlx.distributed_config does."),
        ("3", "h: expected a list of hosts. Write it as mlx.distributed_config does."),
        ("{}", "h: hosts: missing. Write it as mlx.distributed_config does."),
        ('{"hosts": {}}', "h:1: hosts = {}: expected a list of hosts."),
        ("[]", "h: 0 entries: expected 1 to 256."),
        (json.dumps([{"ssh": "a"}] * 257), "h: 257 entries: expected 1 to 256."),
    ],
)
def test_a_file_that_is_no_hostfile(text: str, line: str) -> None:
    assert read_hostfile(text, "h") == (None, [line])


def test_ranks_of_one_host_share_its_addresses() -> None:
    found, lines = read_hostfile('[{"ssh": "a", "ips": ["::1"]}, {"ssh": "b"}, {"ssh": "a", "ips": ["::1"]}]', "h")
    assert not lines
    assert found
    assert found.num_hosts == 2
    assert [found.place_on_host(number) for number in range(3)] == [(0, 2), (0, 1), (1, 2)]


def _mistakes(backend: str, *hosts: Host, environment: tuple[tuple[str, str], ...] = ()) -> list[str]:
    return list(backend_mistakes(Hostfile("h", hosts, "", environment), backend))


def test_what_a_backend_needs() -> None:
    assert _mistakes("ring", Host(1, "a", ("::1",)), Host(2, "b")) == [
        'h:2: entry 2: ips: missing, and backend "ring" needs an address of b. Add "ips".'
    ]
    assert _mistakes("ring", *HOSTS) == ["h:3: entry 2: ips: 2 of them: expected as many as entry 1 has, 1."]
    assert _mistakes("nccl", Host(1, "a"), Host(2, "b")) == [
        'h:1: entry 1: ips: missing, and backend "nccl" needs an address of a. Add "ips".'
    ]
    assert _mistakes("nccl", *HOSTS) == []


def test_jaccl_needs_a_device_to_every_other_host() -> None:
    hosts = [
        Host(1, "a", ("::1",), (None, "x", "x", "x")),
        Host(2, "b", (), ("x", None, "x", None)),
        Host(3, "c", (), ("x", "x", "x", "x")),
        Host(4, "d", (), ("x", "x", "x")),
    ]
    lacking = "h:4: entry 4: rdma: 3 of them: expected 4, the device to the host of each entry and null for its own."
    own = "h:3: entry 3: rdma[2]: expected null, for the entry's own host."
    assert _mistakes("jaccl", *hosts) == [
        "h:2: entry 2: rdma[3] = null: expected the RDMA device to d.",
        own,
        lacking,
    ]
    assert _mistakes("jaccl", *hosts, environment=(("MLX_JACCL_RING", "1"),)) == [own, lacking]
    assert _mistakes("mpi", *hosts) == []
    assert _mistakes("mpi", Host(1, "a"), Host(2, "b")) == [
        'h:1: entry 1: ips: missing, and backend "mpi" needs an address of a. Add "ips".'
    ]
    assert _mistakes("jaccl", *[Host(1, "a")] * 33) == ['h: 33 hosts: expected at most 32 for backend "jaccl".']


def test_which_host_is_this_machine() -> None:
    assert Host(1, socket.gethostname()).is_here
    assert Host(1, "localhost").is_here
    assert Host(1, "127.0.0.1").is_here
    assert not Host(1, "mac-b").is_here
    assert not Host(1, "192.0.2.1").is_here
    assert re.match(r"\S", socket.gethostname())
