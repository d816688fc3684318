import mlx.core as mx
import numpy as np

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.positions import count_positions, hidden_states, parts
from tests.small_models import llama

# Bit 0 of a mark: the token is a target; the first column is never one
MARKS = np.array([[2, 3, 2, 3], [2, 2, 2, 2], [3, 3, 3, 3]], np.uint8)
TOKENS = np.arange(12, dtype=np.uint16).reshape(3, 4)
ROWS = Rows(TOKENS, MARKS)


def test_batches_without_a_target_are_skipped() -> None:
    found = list(parts(ROWS, at_once=1, masks_documents=False))
    assert [part.tokens.tolist() for part in found] == [[[0, 1, 2]], [[8, 9, 10]]]
    assert [part.targets.tolist() for part in found] == [[1, 3], [9, 10, 11]]
    assert found[0].chosen is not None
    assert found[0].chosen.tolist() == [0, 2]
    assert found[1].chosen is None  # every position has a target
    assert found[0].pieces is None


def test_positions_count_through_the_rows_of_a_batch() -> None:
    (part,) = parts(ROWS, at_once=8, masks_documents=True)
    assert part.chosen is not None
    assert part.chosen.tolist() == [0, 2, 6, 7, 8]
    assert part.targets.tolist() == [1, 3, 9, 10, 11]
    assert part.pieces is not None
    assert part.pieces.tolist() == MARKS[:, :-1].tolist()
    assert count_positions(ROWS) == 5


def test_hidden_states_are_those_of_the_target_positions() -> None:
    model, _ = llama()
    model.eval()
    body = Body.of(model)
    (part,) = parts(ROWS, at_once=8, masks_documents=False)
    whole = body.hidden(part.tokens, None).reshape(9, -1)
    assert mx.array_equal(hidden_states(body, part), whole[mx.array([0, 2, 6, 7, 8])])
