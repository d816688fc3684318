"""A metrics file that is read while it is written."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxflow.tracking.metrics_tail import MetricsTail
from tests.tracking.runs import lines

Opens = Callable[..., MetricsTail]


@pytest.fixture
def tail_of() -> Iterator[Opens]:
    """A function that makes a tail, which is closed at the end."""
    made: list[MetricsTail] = []

    def make(*paths: Path, known: dict[str, int] | None = None, known_of_all: int = -1) -> MetricsTail:
        made.append(MetricsTail(tuple(map(str, paths)), known or {}, known_of_all))
        return made[-1]

    yield make
    for one in made:
        one.close()


def _steps(tail: MetricsTail, name: str = "train/loss", only: int | None = None) -> list[int]:
    steps: list[int] = []
    while (points := tail.read(only)) is not None:
        steps += [point.step for point in points if point.name == name]
    return steps


def test_lines_are_read_as_they_are_appended_and_a_torn_one_when_it_is_whole(tmp_path: Path, tail_of: Opens) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = tail_of(path)
    assert _steps(tail) == []
    text = lines([10, 20])
    path.write_text(text[:-10])
    assert _steps(tail) == [10, 20]
    assert _steps(tail, "validation/loss") == []
    with path.open("a") as file:
        file.write(text[-10:])
    assert _steps(tail, "validation/loss") == [20]


def test_steps_that_are_written_again_count_once(tmp_path: Path, tail_of: Opens) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines([10, 20, 30]))
    tail = tail_of(path)
    assert _steps(tail) == [10, 20, 30]
    path.write_text(lines([10]))  # shorter: a run that resumes has opened it again
    assert _steps(tail) == []
    path.write_text(lines([10, 20, 30, 40]))
    assert _steps(tail) == [40]


def test_a_file_that_takes_the_place_of_another_is_read_after_the_end_of_that(tmp_path: Path, tail_of: Opens) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines([10]))
    tail = tail_of(path)
    assert _steps(tail) == [10]
    with path.open("a") as file:
        file.write(lines([20]))
    path.rename(tmp_path / "old")
    path.write_text(lines([10, 20, 30]))
    assert _steps(tail) == [20, 30]


def test_a_file_that_is_moved_is_read_to_its_end(tmp_path: Path, tail_of: Opens) -> None:
    (tmp_path / "private").mkdir()
    path = tmp_path / "private" / "metrics.jsonl"
    path.write_text(lines([10]))
    tail = tail_of(path, tmp_path / "artifact" / "metrics.jsonl")
    assert _steps(tail, only=0) == [10]
    with path.open("a") as file:
        file.write(lines([20]))
    (tmp_path / "private").rename(tmp_path / "artifact")
    assert _steps(tail) == [20]


def test_the_file_of_the_artifact_that_is_replaced_is_not_read_before_the_end(tmp_path: Path, tail_of: Opens) -> None:
    old = tmp_path / "artifact.jsonl"
    old.write_text(lines([10]))
    tail = tail_of(tmp_path / "private.jsonl", old)
    assert _steps(tail, only=0) == []
    assert _steps(tail) == [10]


def test_points_that_the_tracker_has_are_left_out(tmp_path: Path, tail_of: Opens) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines([10, 20, 30]))
    known = {"train/loss": 20}
    assert _steps(tail_of(path, known=known)) == [30]
    assert _steps(tail_of(path, known=known), "validation/loss") == [10, 20, 30]
    assert _steps(tail_of(path, known=known, known_of_all=10), "validation/loss") == [20, 30]
