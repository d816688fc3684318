"""A shared store between two machines, which are two folders: artifacts are taken whole, or their stages are built."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.chain import Chain
from tests.conftest import doit, write_workflow
from tests.storage import s3_server
from tests.storage.s3_server import BUCKET, KEY, SECRET, CuttingProxy, S3Server

_WITH_STORE = """
from dataclasses import replace
from mlxflow.workflow.handover import Basis
table = Path("store.toml")
nodes = [replace(node, basis=Basis(table.read_text(), [])) for node in nodes] if table.exists() else nodes
DOIT_CONFIG"""


class Machine(Chain):
    """A chain in a folder of its own, with a store."""

    def __init__(self, folder: Path, url: str, rest: str = "") -> None:
        super().__init__(folder)
        dodo = folder / "dodo.py"
        dodo.write_text(dodo.read_text().replace("DOIT_CONFIG", _WITH_STORE, 1))
        self.use(url, rest)
        self.variables: dict[str, str] = {"HOME": str(folder)}

    def use(self, url: str, rest: str = "") -> None:
        (self.folder / "store.toml").write_text(f'[store]\nurl = "{url}"\n{rest}')

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        before = dict(os.environ)
        for name in [name for name in before if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(self.variables)
        try:
            return super().start(*arguments)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def taken_and_built(self, *arguments: str) -> tuple[list[int], list[int]]:
        """Run doit; return the numbers of the stages that were taken, and of those that were built."""
        code, out, err = self.doit(*arguments)
        assert code == 0, out + err
        taken = [int(number) for number in re.findall(r"^ok s(\d): from the store$", out, re.MULTILINE)]
        return taken, [int(number) for number in re.findall(r"^at work on s(\d)$", err, re.MULTILINE)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture(scope="module")
def prototype(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a machine that has built and uploaded every stage, and its store; tests copy both."""
    folder = tmp_path_factory.mktemp("prototype")
    (folder / "store").mkdir()
    machine = Machine(folder / "one", f"file://{folder}/store")
    assert machine.taken_and_built() == ([], [1, 2, 3, 4, 5, 6])
    code, out, err = machine.doit("push")
    assert (code, err) == (0, "")
    assert out == "".join(f"s{number}: uploaded, 1 file, 1,000 bytes\n" for number in range(1, 7))
    return folder


@pytest.fixture
def pushed(tmp_path: Path, store: Path, prototype: Path) -> Machine:
    """A machine that has built and uploaded every stage."""
    shutil.copytree(prototype, tmp_path, dirs_exist_ok=True)
    return Machine(tmp_path / "one", f"file://{store}")


def _other(pushed: Machine, rest: str = "") -> Machine:
    url = re.findall('"(.*)"', (pushed.folder / "store.toml").read_text())[0]
    return Machine(pushed.folder.with_name("two"), url, rest)


def test_another_machine_takes_every_artifact_and_is_up_to_date(pushed: Machine) -> None:
    other = _other(pushed)
    code, out, _ = other.doit("plan")
    assert code == 0
    assert out.splitlines()[0] == "s1: never built  (from the store)"
    assert out.splitlines()[-1] == "6 of 6 stages will run, 6 of them from the store"
    assert [line[0] for line in other.doit("list", "--status")[1].splitlines()] == ["S"] * 6
    assert other.taken_and_built() == ([1, 2, 3, 4, 5, 6], [])
    other.assert_correct()
    assert other.numbers_that_run() == []
    assert (other.folder / "mlxflow.lock").read_bytes() == (pushed.folder / "mlxflow.lock").read_bytes()
    assert pushed.doit("push")[1] == "".join(f"s{number}: is in the store already\n" for number in range(1, 7))


@pytest.mark.matrix
def test_only_stages_of_the_same_settings_and_inputs_are_taken(pushed: Machine) -> None:
    other = _other(pushed)
    (other.folder / "salt-s3").write_text("other")
    code, out, _ = other.doit("plan")
    assert code == 0
    assert [line[:2] for line in out.splitlines() if "(from the store)" in line] == ["s1", "s2"]
    assert other.taken_and_built() == ([1, 2], [3, 4, 5, 6])
    other.assert_correct()


@pytest.mark.matrix
def test_what_read_from_another_result_of_the_same_settings_is_not_taken(pushed: Machine) -> None:
    other = _other(pushed, "pull = false\n")
    stage = other.folder / "stage.py"
    stage.write_text(stage.read_text().replace("name + salt", 'name + salt + "unlike" * (name == "s2")'))
    assert other.taken_and_built() == ([], [1, 2, 3, 4, 5, 6])
    code, out, _ = other.doit("push")
    kept = "the store keeps another result of the same settings and inputs. To replace it: doit push --replace"
    assert code == 0
    assert out.splitlines()[:3] == [
        "s1: is in the store already",
        f"s2: {kept}",
        "s3: uploaded, 1 file, 1,000 bytes",  # of what this machine read
    ]
    third = Machine(pushed.folder.with_name("three"), f"file://{pushed.folder.with_name('store')}")
    assert third.taken_and_built() == ([1, 2, 3, 4, 5, 6], [])
    third.assert_correct()  # of the first machine, throughout


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed", "record"])
def test_a_damaged_artifact_is_refused_and_built(pushed: Machine, store: Path, damage: str) -> None:
    keys = next(path for path in (store / "v1/keys").iterdir() if path.name.startswith("s2-"))
    (record,) = keys.iterdir()
    digest = re.findall(r'"artifacts/s2/a": \[1000, "(\w+)"\]', record.read_text())[0]
    blob = store / f"v1/blobs/{digest[:2]}/{digest}-1000"
    if damage == "removed":
        blob.unlink()
    elif damage == "record":
        record.write_bytes(record.read_bytes().replace(b"seed", b"sead"))
    else:
        data = blob.read_bytes()
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "flipped" else data[:-1])
    other = _other(pushed)
    code, out, err = other.doit()
    assert code == 0
    says = {
        "flipped": "artifacts/s2/a is not what its record says",
        "cut": "artifacts/s2/a of s2 is missing there",
        "removed": "artifacts/s2/a of s2 is missing there",
        "record": f"v1/keys/{keys.name}/{record.name}: is damaged",
    }
    assert f"file://{store}: {says[damage]}. s2 is built instead.\n" in err
    assert re.findall(r"^ok (s\d): from the store$", out, re.MULTILINE) == ["s1", "s3", "s4", "s5", "s6"]
    other.assert_correct()
    code, out, err = other.doit("pull")
    assert (code, out) == (0, "every stage that is shared is fresh\n")
    assert other.doit("push", "--replace", "s2")[:2] == (0, "s2: uploaded, 1 file, 1,000 bytes\n")
    third = Machine(pushed.folder.with_name("three"), f"file://{store}")
    assert third.taken_and_built("s2") == ([1, 2], [])


@pytest.mark.matrix
def test_push_and_pull_by_name(pushed: Machine, store: Path) -> None:
    other = _other(pushed)
    code, out, _ = other.doit("push", "s2")
    assert code == 1
    assert out == "s2: not uploaded, it is stale (never built; because s1 runs). Run: mlxflow build s2\n"
    assert other.doit("pull", "s2") == (
        0,
        "s1: taken, 1 file, 1,000 bytes\ns2: taken, 1 file, 1,000 bytes\nevery stage that is shared is fresh\n",
        "s1: is in the store, 1 file, 1,000 bytes\ns2: is in the store, 1 file, 1,000 bytes\n",
    )
    (other.folder / "source").write_bytes(b"another")
    assert other.doit("pull", "s1")[:2] == (1, "s1: is not in the store. Run: mlxflow build s1\n")
    (other.folder / "store.toml").unlink()
    assert other.doit("pull")[0] == 2


@pytest.mark.matrix
def test_a_build_that_was_asked_for_is_no_download(pushed: Machine) -> None:
    other = _other(pushed)
    assert other.taken_and_built("-a", "s1") == ([], [1])
    assert other.doit("forget", "s1")[0] == 0
    assert "from the store" not in other.doit("plan", "s1")[1]
    assert other.taken_and_built("s1") == ([], [1])


@pytest.mark.matrix
def test_stages_are_uploaded_as_they_are_built_if_the_workflow_says_so(tmp_path: Path, store: Path) -> None:
    machine = Machine(tmp_path / "one", f"file://{store}", 'push = "auto"\n')
    process, _ = machine.pause_in(4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    other = Machine(tmp_path / "two", f"file://{store}")
    assert other.taken_and_built() == ([1, 2, 3], [4, 5, 6])
    code, _, err = machine.doit()
    assert code == 0
    assert re.findall(r"^s(\d): uploaded, 1 file, 1,000 bytes$", err, re.MULTILINE) == ["4", "5", "6"]


# --- a bucket on a real server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with s3_server.s3_server() as running:
        yield running


@pytest.mark.matrix
def test_two_machines_that_push_at_once_and_one_that_pulls_meanwhile(server: S3Server, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    machines = [Machine(tmp_path / name, url) for name in ("one", "two", "three")]
    for machine in machines:
        machine.variables |= server.environment
    for machine in machines[:2]:
        machine.use(url, "pull = false\n")
        assert machine.taken_and_built() == ([], [1, 2, 3, 4, 5, 6])
    processes = [machine.start("push") for machine in machines[:2]] + [machines[2].start("pull")]
    ended = [(process, *process.communicate()) for process in processes]
    for process, out, err in ended:
        assert process.returncode == 0, out + err
    for number in range(1, 7):
        lines = [f"s{number}: uploaded, 1 file, 1,000 bytes", f"s{number}: is in the store already"]
        assert any(f"{lines[0]}\n" in out for _, out, _ in ended[:2])
        assert all(any(f"{line}\n" in out for line in lines) for _, out, _ in ended[:2])
    machines[2].taken_and_built()  # what it had not taken before
    machines[2].assert_correct()
    assert machines[2].numbers_that_run() == []


def test_a_store_that_refuses_is_one_line_before_the_build(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    url = f"s3://{BUCKET}/x"
    machine = Machine(tmp_path / "one", url, 'push = "auto"\n')
    with s3_server.s3_server(checks_credentials=True) as strict:
        machine.variables |= strict.environment
        code, out, err = machine.doit()
        lines = [line for line in err.splitlines() if not line.startswith("at work on")]
        reason = f"{url}: the access key is unknown (403 Forbidden, InvalidAccessKeyId)"
        assert code == 0
        assert lines == [
            f"{reason}. Stages that are built are not uploaded.",
            f"{reason}. Stages are built here instead.",
        ]
        assert err.index(lines[1]) < err.index("at work on s1")
        machine.assert_correct()
        assert machine.doit("push") == (2, "", f"{reason}\n")
        machine.path(1).unlink()
        assert machine.doit("pull") == (2, "", f"{reason}\n")
        shown = out + err
    assert KEY not in shown
    assert SECRET not in shown


@pytest.mark.matrix
def test_a_missing_bucket_is_one_line_and_the_stages_are_built(server: S3Server, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "one", "s3://no-such-bucket/x")
    machine.variables |= server.environment
    code, _, err = machine.doit()
    reason = "s3://no-such-bucket/x: no such bucket (404 Not Found, NoSuchBucket)"
    assert code == 0
    assert err.startswith(f"{reason}. Stages are built here instead.\nat work on s1\n")
    assert err.count(reason) == 1
    machine.assert_correct()
    assert machine.doit("push") == (2, "", f"{reason}\n")


def test_nothing_to_do_asks_the_store_nothing_and_imports_nothing_for_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        machine = Machine(tmp_path / "one", f"s3://{BUCKET}/x", "pull = false\n")
        machine.variables |= s3_server.environment(listener.getsockname()[1])
        assert machine.taken_and_built() == ([], [1, 2, 3, 4, 5, 6])
        machine.use(f"s3://{BUCKET}/x", 'push = "auto"\n')  # which makes nothing stale
        script = (
            "import sys; from doit.doit_cmd import DoitMain; code = DoitMain().run([])\n"
            "print([m for m in ('obstore', 'boto3', 'msgspec', 'fsspec', 'mlx', 'numpy') if m in sys.modules], code)"
        )
        variables = {**os.environ, **machine.variables, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=machine.folder, env=variables, capture_output=True, text=True, check=True)
        assert done.stdout == "".join(f"-- s{number}\n" for number in range(1, 7)) + "[] 0\n"
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.matrix
def test_a_connection_that_is_cut_is_one_line_and_the_stage_is_built(server: S3Server, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    one, two = (Machine(tmp_path / name, url) for name in ("one", "two"))
    one.variables |= server.environment
    assert one.taken_and_built("s1") == ([], [1])
    assert one.doit("push", "s1")[0] == 0
    proxy = CuttingProxy(server.port, from_server=600)  # a listing fits, the artifact does not
    two.variables |= s3_server.environment(proxy.port)
    code, out, err = two.doit("s1")
    proxy.close()
    assert code == 0
    assert "from the store" not in out
    assert re.search(rf"^{url}: cannot be reached \([^\n]+\)\. Stages are built here instead\.$", err, re.MULTILINE)
    assert two.path(1).read_bytes() == two.expected()[1]
    assert [path.name for path in (two.folder / "artifacts").iterdir() if "partial" in path.name] == []


_PUSHER = """
import sys
from pathlib import Path
from mlxflow.storage.object_store import Blob, open_store
path = Path(sys.argv[2])
blobs = {Blob("blobs/a", path.stat().st_size): path}
open_store(sys.argv[1]).publish(blobs, "keys/k/x.record", b"about it", lambda: None, replace=False)
"""


@pytest.mark.matrix
def test_a_pusher_that_is_killed_leaves_nothing_and_the_next_one_succeeds(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxflow.storage.object_store import Blob, open_store

    path, url = tmp_path / "large", f"s3://{BUCKET}/{tmp_path.name}"
    path.write_bytes(os.urandom(20_000_000))  # three parts
    blob = Blob("blobs/a", 20_000_000)
    is_stalled = threading.Event()
    proxy = CuttingProxy(server.port, from_client=12_000_000 // 4, stalls=is_stalled)
    command = [sys.executable, "-c", _PUSHER, url, str(path)]
    process = subprocess.Popen(command, env={**os.environ, **s3_server.environment(proxy.port)})
    assert is_stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    proxy.close()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(url)
    assert not store.has(blob)
    assert store.names("keys/k") == []
    subprocess.run(command, env={**os.environ, **server.environment}, check=True)
    assert store.download(blob, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    with suppress(OSError):
        proxy.close()


# --- a real workflow


@pytest.mark.matrix
def test_a_real_model_is_taken_with_every_file_and_what_measures_a_machine_is_not(tmp_path: Path, store: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, push in ((one, "auto"), (two, "never")):
        folder.mkdir()
        path = write_workflow(folder)
        path.write_text(f'{path.read_text()}\n[store]\nurl = "file://{store}"\npush = "{push}"\n')
    built = doit(one, "train", "profile")
    assert built.returncode == 0, built.stderr
    uploaded = re.findall(r"^(\w+): uploaded, \d+ files, [\d,]+ bytes$", built.stderr, re.MULTILINE)
    assert uploaded == ["pretokenize", "train"]
    taken = doit(two, "train")
    assert taken.returncode == 0, taken.stderr
    assert "ok pretokenize: from the store\n" in taken.stdout
    assert "ok train: from the store\n" in taken.stdout
    assert doit(two, "train").stdout == "-- pretokenize\n-- train\n"
    for name in ("pretokenize", "train"):
        there, here = (_files(folder / "artifacts" / name) for folder in (one, two))
        assert here == there  # the model card, too
    assert doit(two, "pull", "profile").stdout == (
        "profile: measures the machine, and is not shared.\nevery stage that is shared is fresh\n"
    )
    assert doit(two, "push", "profile").stdout == "profile: measures the machine, and is not shared.\n"
    assert doit(two, "plan", "profile").stdout.startswith("profile: never built\n")


def _files(folder: Path) -> dict[str, bytes]:
    """Return the content of the files in a folder by their names, without those of folders in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.matrix
def test_a_machine_that_is_killed_while_it_takes_an_artifact_takes_it_again(server: S3Server, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    one, two = (Machine(tmp_path / name, url) for name in ("one", "two"))
    one.variables |= server.environment
    assert one.taken_and_built("s1") == ([], [1])
    assert one.doit("push", "s1")[0] == 0
    is_stalled = threading.Event()
    proxy = CuttingProxy(server.port, from_server=1_200, stalls=is_stalled)  # in the file of 1,000 bytes
    two.variables |= s3_server.environment(proxy.port)
    process = two.start("s1")
    assert is_stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    proxy.close()
    assert not two.path(1).exists()
    two.variables |= server.environment
    assert two.taken_and_built("s1") == ([1], [])
    assert two.path(1).read_bytes() == two.expected()[1]
