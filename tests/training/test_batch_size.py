import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxflow.messages.errors import SourceError, WorkflowError
from mlxflow.training.batch_size import (
    BatchSizes,
    Decision,
    MemoryUse,
    ladder,
    read_decisions,
    shrink_note,
    split,
)
from mlxflow.training.settings import SettingNames, TrainingSettings

NAMES = SettingNames("train", "pretokenize.context_length", "workflow.memory_limit")


def _sizes(*, replay: Sequence[Decision] = (), **changes: Any) -> BatchSizes:
    settings = TrainingSettings(batch_size=32, max_batch_size=64, grad_accum_steps=4).replace(**changes)
    return BatchSizes(settings, replay=replay, names=NAMES)


def _reading(used: float, active: float = 0.1) -> MemoryUse:
    return MemoryUse(int(active * 1e9), int(used * 1e9), 0, 10**9)


def test_candidate_batch_sizes_run_from_half_to_the_maximum() -> None:
    assert ladder(32, 64) == [16, 24, 32, 48, 64]
    assert ladder(1, 1) == [1]
    assert ladder(5, 9) == [2, 3, 4, 5, 6, 8, 9]


@pytest.mark.parametrize(("rows", "size"), [(64, 64), (64, 24), (60, 16), (3, 8)])
def test_every_row_is_in_exactly_one_pass(rows: int, size: int) -> None:
    parts = list(split(rows, size))
    assert [row for begin, end in parts for row in range(begin, end)] == list(range(rows))
    assert all(end - begin == size for begin, end in parts[:-1])


def test_a_batch_grows_while_memory_is_free_and_shrinks_when_it_is_short() -> None:
    sizes = _sizes()
    assert sizes.look(1, _reading(0.3)) == Decision(1, 48, "grow", _reading(0.3)._asdict())
    assert sizes.look(2, _reading(0.6)) is None
    shrunk = sizes.look(3, _reading(0.9))
    assert shrunk is not None
    assert (shrunk.batch_size, shrunk.reason) == (32, "shrink")
    assert sizes.look(4, _reading(0.2)) is None, "48 was too large once"
    assert [one.batch_size for one in sizes.decisions] == [32, 48, 32]


def test_a_batch_size_stays_between_half_and_the_maximum() -> None:
    low, high = _sizes(), _sizes()
    for step in range(10):
        low.look(step, _reading(0.95))
        high.look(step, _reading(0.11))
    assert (low.size, high.size) == (16, 64)


def test_a_batch_grows_only_where_it_is_expected_to_fit() -> None:
    assert _sizes(grow_below=0.7).look(1, _reading(0.65)) is None
    assert _sizes(grow_below=0.7).look(1, _reading(0.65, active=0.4)) is not None


def test_rows_per_update_are_constant_unless_set_to_follow_the_batch_size() -> None:
    constant, following = _sizes(), _sizes(constant_tokens_per_step=False)
    for sizes in (constant, following):
        sizes.look(1, _reading(0.2))
    assert (constant.size, constant.rows_per_update) == (48, 128)
    assert (following.size, following.rows_per_update) == (48, 192)


def test_a_pass_never_takes_more_rows_than_an_update_has() -> None:
    sizes = _sizes(grad_accum_steps=1)
    assert sizes.look(1, _reading(0.1)) is None
    assert sizes.size == 32


def test_out_of_memory_shrinks_to_the_minimum_and_then_reports_the_needed_bytes() -> None:
    sizes = _sizes(batch_size=4, max_batch_size=4, grad_accum_steps=1)
    assert sizes.run_out(7, _reading(0.9), 10).batch_size == 3
    assert sizes.run_out(7, _reading(0.9), 10).batch_size == 2
    with pytest.raises(WorkflowError) as caught:
        sizes.run_out(7, _reading(0.9), 1_500_000_000)
    assert str(caught.value) == (
        "train.batch_size: forward passes of 2 rows, the fewest, need 1.50 GB and may use 1.00 GB. "
        "Lower train.batch_size or pretokenize.context_length, set "
        'train.checkpointing = "layers" and train.fused_loss = true, or raise workflow.memory_limit.'
    )
    sizes = _sizes(batch_size=1, max_batch_size=1, grad_accum_steps=1, checkpoint_every=1, fused_loss=True)
    with pytest.raises(WorkflowError) as caught:
        sizes.run_out(7, _reading(0.9), 1_500_000_000)
    assert str(caught.value).endswith(
        'Lower pretokenize.context_length, set train.checkpointing = "pairs", or raise workflow.memory_limit.'
    )


def test_a_size_that_ran_out_of_memory_in_an_earlier_start_is_avoided_from_then_on() -> None:
    sizes = _sizes()
    sizes.look(1, _reading(0.2))
    assert sizes.avoid(4, 48, _reading(0.9)) == Decision(4, 32, "out of memory", _reading(0.9)._asdict())
    assert sizes.look(5, _reading(0.2)) is None
    assert sizes.avoid(6, 48, _reading(0.9)) is None
    assert sizes.avoid(6, 17, _reading(0.9)) == Decision(6, 16, "out of memory", _reading(0.9)._asdict())
    with pytest.raises(WorkflowError) as caught:
        sizes.avoid(6, 16, _reading(0.9))
    assert str(caught.value) == (
        "train.batch_size: forward passes of 16 rows, the fewest, ran out of memory. Lower train.batch_size or "
        'pretokenize.context_length, set train.checkpointing = "layers" and train.fused_loss = true, or raise '
        "workflow.memory_limit."
    )


def test_recorded_decisions_are_replayed_regardless_of_memory(tmp_path: Path) -> None:
    first = _sizes()
    first.look(1, _reading(0.2))
    first.run_out(5, _reading(0.9), 1)
    path = tmp_path / "metrics.jsonl"
    records: list[dict[str, Any]] = [{"kind": "train", "step": 1}, *(one.record() for one in first.decisions)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    again = _sizes(replay=read_decisions(path, "train.replay"))
    sizes = []
    for step in range(8):
        if again.must_shrink(step):
            again.follow_shrink(step)
        sizes.append(again.size)
        again.look(step + 1, _reading(0.99))
    assert sizes == [32, 48, 48, 48, 48, 32, 32, 32]
    assert [one[:3] for one in again.decisions] == [one[:3] for one in first.decisions]


def test_a_checkpoint_without_decisions_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(SourceError, match=r"^train\.replay: .* holds no batch size\. Name the metrics\.jsonl of a run"):
        read_decisions(path, "train.replay")
    with pytest.raises(SourceError, match=r"cannot be read as a run's metrics\.jsonl"):
        read_decisions(tmp_path / "none", "train.replay")


def test_a_checkpoint_keeps_the_batch_size_decisions() -> None:
    first, second = _sizes(), _sizes()
    first.look(1, _reading(0.2))
    first.look(2, _reading(0.9))
    second.restore(json.loads(json.dumps(first.state())))
    assert second.decisions == first.decisions
    assert second.look(3, _reading(0.2)) is None


def test_a_fixed_batch_size_reads_no_memory() -> None:
    sizes = _sizes(dynamic_batch_size=False)
    assert sizes.look(1, _reading(0.1)) is None
    assert sizes.look(2, _reading(0.95)) is None
    assert sizes.size == 32


def test_a_note_says_when_a_training_that_fits_gets_fewer_rows() -> None:
    settings = TrainingSettings(batch_size=4, warmup_steps=0)
    names = SettingNames("train")

    def note(peak_bytes: int, **changes: Any) -> str:
        return shrink_note(settings.replace(**changes), names, peak_bytes=peak_bytes, limit_bytes=10**10)

    assert note(8_100_000_000) == (
        "A pass of more than 8.00 GB (train.shrink_above = 0.8) gets fewer rows, and a step more passes. "
        "Set train.dynamic_batch_size = false to keep 4."
    )
    assert note(8_000_000_000) == ""
    assert note(9_900_000_000, shrink_above=1.0) == ""
    assert note(9_900_000_000, dynamic_batch_size=False) == ""
    assert note(9_900_000_000, batch_size=1, max_batch_size=1) == ""
    sizes = BatchSizes(settings)
    assert sizes.look(1, MemoryUse(0, 8_000_000_000, 0, 10**10)) is None
    decision = sizes.look(2, MemoryUse(0, 8_100_000_000, 0, 10**10))
    assert decision is not None
    assert (decision.reason, decision.batch_size < 4) == ("shrink", True)
