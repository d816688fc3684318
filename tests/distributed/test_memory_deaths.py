import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxflow.distributed.memory_deaths import MemoryDeaths

Found = Callable[[], MemoryDeaths]


@pytest.fixture
def deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    """Return a function that looks at a kernel's facts in a folder: nothing was killed, and nothing is limited."""
    for name, text in {"self/cgroup": "1:cpu:/a\n0::/b/c\n", "sys/vm/overcommit_memory": "0\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "vmstat").write_text("nr_free 1\noom_kill 4\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return lambda: MemoryDeaths(tmp_path, tmp_path / "groups")


def test_a_kill_is_due_to_memory_where_the_kernel_counted_one_since(deaths: Found, tmp_path: Path) -> None:
    one = deaths()
    assert not one.explains(-signal.SIGKILL)
    (tmp_path / "vmstat").write_text("nr_free 1\noom_kill 5\n")
    assert one.explains(-signal.SIGKILL)
    assert not one.explains(-signal.SIGTERM)
    assert not one.explains(1)
    assert not deaths().explains(-signal.SIGKILL)


def test_a_kill_in_another_control_group_does_not_count(deaths: Found, tmp_path: Path) -> None:
    own = tmp_path / "groups/b/c"
    own.mkdir(parents=True)
    (own / "memory.events").write_text("oom 9\noom_kill 0\noom_group_kill 0\n")
    one = deaths()
    (tmp_path / "vmstat").write_text("oom_kill 5\n")
    assert not one.explains(-signal.SIGKILL)
    (own / "memory.events").write_text("oom 9\noom_kill 1\noom_group_kill 0\n")
    assert one.explains(-signal.SIGKILL)


def test_a_crash_is_due_to_memory_only_where_allocations_may_fail(
    deaths: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = deaths()
    assert not one.explains(-signal.SIGSEGV)
    (tmp_path / "sys/vm/overcommit_memory").write_text("2\n")
    assert one.explains(-signal.SIGSEGV)
    (tmp_path / "sys/vm/overcommit_memory").unlink()
    assert not one.explains(-signal.SIGSEGV)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 40, resource.RLIM_INFINITY))
    assert one.explains(-signal.SIGSEGV)
    assert not one.explains(-signal.SIGKILL)


def test_a_system_without_these_facts_explains_nothing(tmp_path: Path) -> None:
    assert not MemoryDeaths(tmp_path, tmp_path).explains(-signal.SIGKILL)
