import ctypes

import pytest

from mlxflow.device import heap


class _Library:
    """A C library that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def mallopt(self, *arguments: int) -> None:
        self.calls.append(("mallopt", *arguments))

    def malloc_trim(self, *arguments: int) -> None:
        self.calls.append(("malloc_trim", *arguments))


def test_glibc_is_asked_for_one_heap_and_for_a_trim(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    heap.share_one()
    heap.trim()
    assert library.calls == [("mallopt", -8, 1), ("malloc_trim", 0)]


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[None] = []

    def open_library(_: None) -> object:
        opened.append(None)
        return object()

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    heap.share_one()
    heap.trim()
    assert len(opened) == 2
