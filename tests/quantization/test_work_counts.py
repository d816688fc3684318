from typing import Any

import mlx.core as mx
import pytest

from mlxflow.quantization import work_counts
from mlxflow.quantization.bit_allocation import BudgetRequest
from mlxflow.quantization.done_work import DoneWork
from mlxflow.quantization.model_shape import ModelShape
from mlxflow.quantization.quality import QualityLimits
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.work_counts import held_models, work_of
from tests.small_models import llama


def _shape() -> ModelShape:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=128)
    return ModelShape.of(model, 60)


def request_of(method: str, **changes: Any) -> QuantizationRequest:
    return QuantizationRequest(
        method=method,
        default=Setting("affine", 4, 64),
        rules=[],
        calibration_rows=changes.pop("rows", 16),
        budget=None,
        training=None,
        limits=QualityLimits(8, 0.0, 0.0),
        batch_size=4,
        token_stage="pretokenize",
        start=None,
        block_steps=10,
        scale_steps=0,
        rotations=0,
    )._replace(**changes)


def _work(method: str, *, is_unusual: bool = False, **changes: Any) -> Any:
    done = changes.pop("done", DoneWork())
    request = request_of(method, **changes)
    return work_of(request, _shape(), row_tokens=32, num_rows=64, validation_rows=8, is_unusual=is_unusual, done=done)


def test_a_cpu_counts_16_bit_models_as_it_computes_them_in_fp32() -> None:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=128)
    model.set_dtype(mx.bfloat16)
    narrow = ModelShape.of(model, 60)
    assert 2 * narrow.num_bytes == _shape().num_bytes
    on_cpu = mx.default_device() == mx.cpu

    def held(shape: ModelShape, method: str, rows: int = 64) -> float:
        request = request_of(method, rows=rows)
        return work_of(request, shape, row_tokens=32, num_rows=2048, validation_rows=8).held_bytes

    assert (held(narrow, "rtn") == held(_shape(), "rtn")) == on_cpu  # the measurement of the result
    hidden = held(narrow, "gptq", rows=2048) - held(narrow, "gptq", rows=1024)
    assert hidden == pytest.approx(2 * 1024 * 32 * 64 * (4 if on_cpu else 2))


def test_what_an_interrupted_run_has_done_is_not_counted() -> None:
    whole, half, all_of_it = (
        _work("block", scale_steps=10, done=DoneWork(*done)) for done in [(0.0, 0), (0.5, 0), (1.0, 10)]
    )
    assert whole.operations > half.operations > all_of_it.operations
    # what a learned model takes beside rounding: its comparison with that, three models on eight rows
    check = 6 * _shape().parameters * 8 * 32 + 10_000 * 60 * 2 * 8 * 32
    assert all_of_it.operations == _work("rtn").operations + check
    assert whole.held_bytes == half.held_bytes == all_of_it.held_bytes  # a run that is resumed holds the same arrays
    blocks = _work("block", scale_steps=10).operations - _work("block", scale_steps=10, done=DoneWork(1.0)).operations
    assert whole.operations - half.operations == pytest.approx(blocks / 2)
    few, many = (_work("block", scale_steps=20, done=DoneWork(1.0, steps)).operations for steps in (15, 5))
    assert many - few == pytest.approx(
        _work("block", scale_steps=20).operations - _work("block", scale_steps=10).operations
    )


def test_plans_of_a_budget_that_are_learned_are_not_counted() -> None:
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")
    none, one, all_four = (
        _work("gptq", budget=budget, done=DoneWork(trials=trials)).operations for trials in (0.0, 1.0, 4.0)
    )
    assert none - all_four == pytest.approx(4 * (none - one))
    assert all_four > _work("gptq").operations  # gradients and the comparison of plans are still to be computed


def test_plans_of_corrected_costs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")

    def operations(corrections: int, rows: int, method: str = "rtn") -> float:
        monkeypatch.setattr(work_counts, "CORRECTIONS", {"rtn": corrections} if corrections else {})
        monkeypatch.setattr(work_counts, "SLOPE_ROWS", rows)
        return float(_work(method, budget=budget).operations)

    few, many = (operations(2, rows) - operations(1, rows) for rows in (4, 8))
    assert operations(1, 4) - operations(0, 4) - few > 0  # slopes at two plans are needed before the first
    assert many - few == 12 * _shape().parameters * 4 * 32 + 5_000 * 60 * 4 * 32  # of 4 more rows at one more plan
    assert operations(2, 8, "gptq") == operations(0, 8, "gptq")


def test_each_plan_that_a_budget_measures_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")

    def operations(uniform: int) -> float:
        monkeypatch.setattr(work_counts, "UNIFORM", {"rtn": uniform})
        return float(_work("rtn", budget=budget).operations)

    per_token = 2 * _shape().parameters + 10_000 * 60
    assert operations(3) - operations(2) == per_token * 16 * 32


def test_work_on_the_cpu_is_counted_once_for_layers_that_share_their_inputs() -> None:
    shape = _shape()
    once, for_each = 64**3 * 3 + 128**3, 64**3 * 6 + 128**3  # attention, output, feed-forward: by inputs; by layers
    assert shape.distinct_cubes == 2 * once + 64**3  # two blocks, and the head
    assert shape.cubic_widths == 2 * for_each + 64**3
    sizes = 64 * (shape.parameters - 2 * 64 * 128)
    assert shape.compensations == sizes + 2 * 64 * 128 * 128
    assert _work("block").host == (shape.distinct_cubes / 3, shape.compensations, shape.parameters)
    assert _work("gptq").host == (pytest.approx(4 / 3 * shape.cubic_widths), 0, 0)
    assert not any(_work("rtn").host + _work("awq").host + _work("dwq").host)
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")
    assert _work("block", budget=budget).host == tuple(5 * one for one in _work("block").host)
    assert not any(_work("block", done=DoneWork(1.0)).host)


def test_a_cpu_takes_longer_to_pack_floats_of_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [Setting("affine", 4, 64), Setting("mxfp8", 8, 32), Setting("mxfp4", 4, 32), Setting("nvfp4", 4, 16)]

    def operations(device: mx.DeviceType) -> list[float]:
        monkeypatch.setattr(mx, "default_device", lambda: device)
        return [_work("rtn", default=setting).operations for setting in settings]

    affine, bytes_, mx4, nv4 = operations(mx.cpu)
    assert affine == bytes_
    assert mx4 == nv4 == affine + _shape().parameters * (8_000 - 100)
    assert len(set(operations(mx.gpu))) == 1


def test_more_work_takes_longer() -> None:
    plain = {method: _work(method).operations for method in ("rtn", "gptq", "awq", "dwq", "block")}
    assert all(plain["rtn"] < value for method, value in plain.items() if method != "rtn")
    assert _work("block", block_steps=100).operations > 2 * plain["block"]
    assert _work("block", scale_steps=10).operations > plain["block"]
    assert _work("gptq", rows=64).operations > plain["gptq"]
    assert _work("rtn", rotations=4).operations > plain["rtn"]
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")
    assert _work("gptq", budget=budget).operations > 4 * plain["gptq"]
    assert _work("block", scale_steps=10).held_bytes >= _work("block").held_bytes


def test_logits_that_are_compared_or_trained_on_take_time() -> None:
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")

    def added(**changes: Any) -> float:
        """Return the operations that a vocabulary of 1,000 more takes, with the layers of the same shape."""
        request = request_of(changes.pop("method", "rtn"), **changes)
        few, many = (
            work_of(request, _shape()._replace(vocab_size=size), row_tokens=32, num_rows=64, validation_rows=8)
            for size in (60, 1060)
        )
        return many.operations - few.operations

    compared = 10_000 * 1000 * 8 * 32  # the quality loss
    assert added() == compared
    learned = 3 * compared  # and again, with the rounded model
    assert added(method="gptq") == learned
    assert added(rotations=2) == compared * (1 + 3 * 2)  # twice as many calibration rows, three models
    assert all(added(**one) > compared for one in ({"method": "dwq"}, {"budget": budget}))
    assert added(method="block", scale_steps=4) > added(method="block") == learned


def test_held_memory_follows_one_block_and_not_their_number() -> None:
    few, many = (
        ModelShape.of(llama(vocab_size=60, hidden_size=64, num_layers=count, intermediate_size=128)[0], 60)
        for count in (2, 8)
    )
    for method in ("rtn", "gptq", "awq", "block"):
        held = [
            work_of(request_of(method), shape, row_tokens=32, num_rows=64, validation_rows=8).held_bytes
            for shape in (few, many)
        ]
        assert held[1] == pytest.approx(held[0], rel=0.01), method


def test_parts_that_hold_a_whole_model_are_counted_with_all_its_layers() -> None:
    def held(method: str, *, is_unusual: bool = False, **changes: Any) -> dict[str, float]:
        sizes = {"row_tokens": 32, "tokens": 512}
        return held_models(request_of(method, **changes), _shape(), is_unusual=is_unusual, **sizes)

    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")
    assert held("rtn", is_unusual=True) == held("gptq", budget=budget) == held("block") == {}
    assert held("gptq", is_unusual=True)["gptq"] > _shape().num_bytes + 4 * _shape().square_widths
    assert held("rtn", is_unusual=True, budget=budget)["budget"] > 3 * _shape().num_bytes
    assert list(held("gptq", is_unusual=True, budget=budget)) == ["gptq", "budget"]
    assert list(held("dwq")) == ["dwq"]
    assert list(held("block", scale_steps=3)) == ["scale_steps"]
    for method, changes in (("gptq", {}), ("rtn", {"budget": budget})):
        usual, whole = (_work(method, is_unusual=one, **changes).held_bytes for one in (False, True))
        assert whole >= usual
        assert whole >= max(held(method, is_unusual=True, **changes).values())


def test_awq_grows_with_the_rows_by_hidden_states_alone() -> None:
    few, many = (
        work_of(request_of("awq", rows=rows), _shape(), row_tokens=2048, num_rows=rows, validation_rows=0).held_bytes
        for rows in (64, 128)
    )
    assert many - few == pytest.approx(64 * 2048 * _shape().hidden_size * 4, rel=0.02)
