import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.distributed import core_sets
from mlxflow.distributed.rank import Rank


@pytest.mark.parametrize(
    ("processors", "ranks", "threads", "expected"),
    [
        ([0, 4, 1, 5], 2, 1, [(0, 4), (1, 5)]),
        ([0, 1, 2, 3, 4], 2, 2, [(0, 1), (2, 3)]),
        ([0, 1, 2], 2, 2, []),
        ([0, 1, 2], 4, 1, []),
        ([0, 1, 2], 1, 1, []),
    ],
)
def test_ranks_get_disjoint_sets_where_their_threads_fit(
    processors: list[int], ranks: int, threads: int, expected: list[tuple[int, ...]]
) -> None:
    assert core_sets.divided(processors, ranks, threads) == expected


def test_processors_of_one_core_are_neighbours(tmp_path: Path) -> None:
    for number, (package, core) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0)]):
        folder = tmp_path / f"cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    assert core_sets.in_order_of_cores(range(6), tmp_path) == [0, 4, 2, 1, 5, 3]
    assert core_sets.in_order_of_cores([3, 1], tmp_path / "missing") == [1, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no sets of processors")
def test_a_rank_runs_on_its_processors_only() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert core_sets.core_sets(2, 0) == [(), ()]
    assert core_sets.core_sets(len(allowed) + 1, 1) == [()] * (len(allowed) + 1)
    if len(allowed) > 1:
        sets = core_sets.core_sets(2, 1)
        assert not set(sets[0]) & set(sets[1])
        assert set(sets[0]) | set(sets[1]) <= set(allowed)
    code = "import os; from mlxflow.distributed import rank; rank.of_this_process(); print(os.sched_getaffinity(0))"
    rank = Rank(1, 2, "ring", "ordered", 0, 2, (allowed[-1],))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | rank.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{{{allowed[-1]}}}\n"
