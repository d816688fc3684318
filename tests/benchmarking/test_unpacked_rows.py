import numpy as np

from mlxflow.benchmarking.unpacked_rows import InlineLoader, apart, holds_several
from mlxflow.data.token_file import Rows
from tests.benchmarking.small_steps import open_runner, packed_rows, workflow_recipe


def test_inline_loader_trims_rows_to_the_longest_of_the_batch() -> None:
    rows = apart(packed_rows(), count=48, seed=0)
    batch = next(InlineLoader(rows, batch_size=4, seed=0, trims=True))
    longest = int(max((mark > 0).sum() for mark in np.array(batch.marks)))
    assert batch.tokens.shape == (4, longest)
    assert longest <= 5 < rows.tokens.shape[1]
    with open_runner(workflow_recipe().baseline()) as runner:
        assert isinstance(runner._loader, InlineLoader)
    with open_runner(workflow_recipe()) as runner:
        assert not isinstance(runner._loader, InlineLoader)


def test_unpacking_keeps_every_target_token() -> None:
    packed = packed_rows()
    rows = apart(packed, count=10**6, seed=3)
    assert rows.num_rows == 48
    assert holds_several(packed)
    assert not holds_several(rows)
    assert (rows.marks & 1).sum() == (packed.marks & 1).sum()
    ends = sorted(tuple(row[row > 0]) for row in rows.tokens.astype(int))
    assert ends == sorted([tuple(r[:5]) for r in packed.tokens.astype(int)] + [tuple(r[5:8]) for r in packed.tokens])


def test_packed_rows_after_full_ones_are_found() -> None:
    packed = packed_rows()
    alone = np.full((9000, 9), 3, np.uint8)
    marks = np.concatenate([alone, np.tile(packed.marks, (40, 1))])
    assert holds_several(Rows(np.zeros_like(marks), marks))
    assert not holds_several(Rows(np.zeros_like(alone), alone))
