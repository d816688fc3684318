"""The peak of a training step, predicted from shapes, against MLX's counter in a step that is taken."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.device import memory_limit, phase_peaks
from mlxflow.kernels import codegen, model_kernels
from mlxflow.ops import blockwise_attention
from mlxflow.training import build, memory_forecast
from mlxflow.training.checkpoints import CheckpointStore
from mlxflow.training.device_lag import Ahead
from mlxflow.training.memory_forecast import MemoryForecast, forecast_memory
from mlxflow.training.settings import AdapterShape, TrainingSettings
from mlxflow.training.step import Step
from mlxflow.training.trainer import Session
from tests.small_models import llama
from tests.training.step_peaks import peak_of_steps

VOCAB, LENGTH, ROWS = 2048, 128, 4
NONE = model_kernels.no_kernels()


def _subject(method: str, *, bits: int = 0, num_layers: int = 3, **settings: Any) -> build.Subject:
    gc.collect()  # models of other tests
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_heads": 6, "num_kv_heads": 2, "num_layers": num_layers}
    model, _ = llama(vocab_size=VOCAB, context_length=LENGTH, **shape, seed=0)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    if method != "full":
        settings["adapters"] = AdapterShape(
            method=method,  # type: ignore[arg-type]
            rank=8,
            scale=20.0,
            dropout=0.0,
            num_layers=0,
            keys=("self_attn.*", "mlp.*"),
        )
    chosen = TrainingSettings(batch_size=ROWS, warmup_steps=0, fused_loss=True, **settings)
    build.prepare_model(model, chosen, adapter_seed=0)
    return build.Subject(model, chosen, VOCAB, LENGTH)


def _rows() -> Rows:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    return Rows(tokens, np.full(tokens.shape, 3, np.uint8))


def _measured(subject: build.Subject, kernels: model_kernels.ModelKernels = NONE) -> int:
    peak = peak_of_steps(subject, kernels, _rows(), count=3)
    mx.clear_cache()
    return peak


@pytest.mark.parametrize("method", ["full", "lora"])
def test_of_recomputed_layers_the_activations_of_one_are_held(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer more costs its weights, their state and its input; its activations take fifteen times the input."""
    monkeypatch.setattr(memory_forecast, "_lags", lambda: (Ahead(1), Ahead(1)))
    settings = {"bits": 4 if method == "lora" else 0, "checkpoint_every": 1}

    def peak_and_held(num_layers: int) -> tuple[int, int]:
        subject = _subject(method, num_layers=num_layers, **settings)
        trained = sum(value.nbytes for _, value in tree_flatten(subject.model.trainable_parameters()))
        held = sum(value.nbytes for _, value in tree_flatten(subject.model.parameters())) + 3 * trained
        return forecast_memory(subject, NONE, _rows()).peak_bytes, held  # 3: gradients and two moments

    (fewer, held_fewer), (more, held_more) = peak_and_held(4), peak_and_held(8)
    layer_input = ROWS * LENGTH * 192 * 4
    assert (more - fewer) - (held_more - held_fewer) <= 4 * 1.5 * layer_input


@pytest.mark.matrix
def test_of_layers_recomputed_in_pairs_every_second_input_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LENGTH", 512), ("ROWS", 8)):
        monkeypatch.setattr(f"{__name__}.{name}", value)
    peaks = {
        (segment, num_layers): _measured(
            _subject("full", num_layers=num_layers, checkpoint_every=1, checkpoint_segment=segment)
        )
        for segment in (1, 2)
        for num_layers in (4, 12)
    }
    grows = {segment: peaks[segment, 12] - peaks[segment, 4] for segment in (1, 2)}
    kept = 8 * ROWS * LENGTH * 192 * 4
    assert grows[1] - grows[2] == pytest.approx(kept / 2, rel=0.25)
    for method, bits in (("full", 0), ("lora", 4)):
        paired = _subject(method, bits=bits, num_layers=4, checkpoint_every=1, checkpoint_segment=2)
        expected = forecast_memory(paired, NONE, _rows())
        assert expected.peak_bytes == pytest.approx(_measured(paired), rel=0.05), method


def test_recomputed_layers_with_dora_do_not_keep_their_dense_weights() -> None:
    least = [
        forecast_memory(_subject("dora", bits=4, num_layers=count, checkpoint_every=1), NONE, _rows()).least_bytes
        for count in (2, 6)
    ]
    dense_layer = 4 * (2 * 192 * 192 + 2 * 64 * 192 + 3 * 512 * 192)
    assert least[1] - least[0] < 4 * dense_layer


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("full", {}),
        pytest.param("full", {"precision": "bf16"}, marks=pytest.mark.matrix),
        ("full", {"checkpoint_every": 1}),
        ("full", {"checkpoint_every": 1, "checkpoint_segment": 2, "num_layers": 4}),
        pytest.param("lora", {}, marks=pytest.mark.matrix),
        ("lora", {"bits": 4}),
        ("lora", {"bits": 4, "checkpoint_every": 1}),
        ("lora", {"bits": 4, "precision": "bf16"}),
        ("dora", {}),
        ("dora", {"bits": 4}),
        ("dora", {"bits": 4, "checkpoint_every": 1}),
    ],
    ids=lambda value: str(value),
)
def test_the_peak_of_steps_is_predicted_within_5_percent_and_is_more_than_that_of_a_host_that_waits(
    method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long buffers wait to be freed depends on how far the host is ahead: on the CPU up to 110 dispatches."""
    subject = _subject(method, **settings)
    expected = forecast_memory(subject, NONE, _rows())
    assert expected.tokens == ROWS * LENGTH
    with monkeypatch.context() as patch:
        patch.setattr(memory_forecast, "_lags", lambda: (Ahead(0), Ahead(0)))
        least = forecast_memory(subject, NONE, _rows()).peak_bytes
    measured = max(_measured(subject) for _ in range(2))  # where other work delays the host, it is less far ahead
    assert least * 0.98 <= measured
    assert expected.peak_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("length", "method", "settings"),
    [
        (8, "lora", {"bits": 4, "precision": "bf16"}),
        pytest.param(LENGTH, "lora", {"bits": 4, "precision": "bf16", "checkpoint_every": 1}, marks=pytest.mark.matrix),
        pytest.param(LENGTH, "full", {"precision": "bf16"}, marks=pytest.mark.matrix),
    ],
    ids=lambda value: str(value),
)
def test_the_peak_of_a_whole_run_with_its_validations_is_predicted_within_10_percent(
    length: int, method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    subject = _subject(method, **settings)
    changes = {"num_steps": 4, "dynamic_batch_size": False, "eval_every": 0, "adjust_every": 0}
    subject = subject._replace(settings=subject.settings.replace(**changes))
    rows = _rows() if length == LENGTH else Rows(_rows().tokens[:1, : length + 1], _rows().marks[:1, : length + 1])
    expected = forecast_memory(subject, NONE, rows)
    others = mx.get_active_memory() - sum(value.nbytes for _, value in tree_flatten(subject.model.parameters()))
    session = Session(CheckpointStore(tmp_path, keep=1, settings={}, say=print), 1 << 40, lambda _: None)
    data = build.make_data(rows, rows, subject.settings, seed=0)
    with build.ready_trainer(subject, NONE, data, session) as trainer:
        measured = trainer.run().peak_memory_bytes - others
    assert 0.9 * measured <= expected.peak_bytes <= 1.1 * measured, (expected, measured)
    assert (expected.validation_bytes == expected.peak_bytes) == (length < LENGTH)


def test_the_trainer_holds_no_gradient_that_an_update_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = _subject("full")
    settings = subject.settings.replace(num_steps=4, dynamic_batch_size=False, eval_every=0, adjust_every=0)
    data = build.make_data(_rows(), _rows().head(1), settings, seed=0)
    session = Session(CheckpointStore(tmp_path, keep=1, settings={}, say=print), 1 << 40, lambda _: None)
    gradients: list[weakref.ref[mx.array]] = []
    held: list[int] = []
    update = Step.update
    send: Any = mx.async_eval

    def noting(self: Step, summed: Any) -> Any:
        gradients[:] = [weakref.ref(value) for _, value in tree_flatten(summed) if isinstance(value, mx.array)]
        return update(self, summed)

    def looking(*arrays: Any) -> None:
        if gradients:
            held.append(sum(one() is not None for one in gradients))
            gradients.clear()
        send(*arrays)

    monkeypatch.setattr(Step, "update", noting)
    monkeypatch.setattr(mx, "async_eval", looking)
    with build.ready_trainer(subject._replace(settings=settings), NONE, data, session) as trainer:
        trainer.run()
    assert held == [0, 0, 0, 0]


def test_kernels_are_traced_without_their_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[bool] = []
    usual = codegen.traceable

    @contextmanager
    def traceable() -> Iterator[None]:
        with usual():
            traced.append(True)
            yield
            traced.append(False)

    def passed(*arguments: Any) -> Any:
        assert traced == [True]
        return usual_trace(*arguments)

    usual_trace = memory_forecast._trace_pass
    monkeypatch.setattr(codegen, "traceable", traceable)
    monkeypatch.setattr(memory_forecast, "_trace_pass", passed)
    forecast_memory(_subject("full"), NONE._replace(selected=["one"]), _rows())
    assert traced == [True, False]


@pytest.mark.parametrize(
    ("precision", "every"), [("fp32", 0), pytest.param("bf16", 1, marks=pytest.mark.matrix)], ids=str
)
def test_the_peak_of_long_rows_is_predicted(precision: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their attention computes exponentials again, block by block."""
    for name, value in (("LENGTH", 768), ("ROWS", 2)):
        monkeypatch.setattr(f"{__name__}.{name}", value)
    kept = _measured(_subject("full", precision=precision, checkpoint_every=every))
    monkeypatch.setattr(blockwise_attention, "_MOST_KEPT", 0)
    monkeypatch.setattr(blockwise_attention, "_MOST_HELD", 2 << 20)
    subject = _subject("full", precision=precision, checkpoint_every=every)
    measured = _measured(subject)
    assert measured < kept
    assert forecast_memory(subject, NONE, _rows()).peak_bytes == pytest.approx(measured, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": 1}], ids=str)
def test_the_peak_of_a_step_with_kernels_is_predicted_on_a_gpu(settings: dict[str, Any]) -> None:
    subject = _subject("full", precision="bf16-pure", **settings)
    traits = model_kernels.TrainingTraits("bf16-pure", LENGTH, False)
    refused = model_kernels.choose_for(subject.model, traits, recorded=[]).refused
    kernels = model_kernels.choose_for(subject.model, traits, recorded=list(refused))
    assert kernels.selected
    expected = forecast_memory(subject, kernels, _rows())
    measured = _measured(subject, kernels)
    print(expected, measured)
    assert expected.least_bytes * 0.9 <= measured <= expected.peak_bytes * 1.1


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": 1}], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_peak_of_a_step_beside_quantized_layers_is_predicted_on_a_gpu(
    method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LENGTH", 512), ("ROWS", 8)):
        monkeypatch.setattr(f"{__name__}.{name}", value)
    subject = _subject(method, bits=4, precision="bf16", **settings)
    traits = model_kernels.TrainingTraits("bf16", LENGTH, False)
    refused = model_kernels.choose_for(subject.model, traits, recorded=[]).refused
    kernels = model_kernels.choose_for(subject.model, traits, recorded=list(refused))
    assert any(name.startswith("quantized_product/") for name in kernels.selected)
    expected = forecast_memory(subject, kernels, _rows())
    measured = _measured(subject, kernels)
    print(expected, measured)
    assert expected.least_bytes * 0.9 <= measured <= expected.peak_bytes * 1.1


def test_nothing_is_computed_and_the_model_is_as_before() -> None:
    subject = _subject("lora")
    before = {name: np.array(value) for name, value in tree_flatten(subject.model.parameters())}
    active = mx.get_active_memory()
    with phase_peaks.followed() as peak:
        forecast_memory(subject, NONE, _rows())
    assert peak.bytes < active + (1 << 20)
    for name, value in tree_flatten(subject.model.parameters()):
        assert np.array_equal(before[name], np.array(value)), name


def test_garbage_is_not_collected_while_graphs_are_made() -> None:
    """They are hundreds of thousands of objects without a cycle for a model of 32 layers."""
    subject = _subject("lora", num_layers=1)
    phases: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        phases.append(phase)

    gc.callbacks.append(note)
    try:
        forecast_memory(subject, NONE, _rows())
        assert phases.count("start") <= 2  # before and after
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(note)


def test_recomputation_longer_rows_and_sums_change_what_is_predicted() -> None:
    def peak(**settings: Any) -> int:
        return forecast_memory(_subject("full", **settings), NONE, _rows()).peak_bytes

    plain = peak()
    assert peak(checkpoint_every=1) < plain < peak(grad_accum_steps=2)
    assert plain < peak(precision="bf16-pure") * 2
    rows = _rows()
    fewer = forecast_memory(_subject("full"), NONE, rows.head(1))
    assert fewer.peak_bytes < plain


def test_the_line_says_whether_it_fits() -> None:
    expected = MemoryForecast(3_210_000_000, 8192)
    assert expected.line(12 * 10**9, advice="Lower it.") == (
        "about 3.21 GB in a step with passes of 8,192 tokens: fits into the 12.0 GB allowed"
    )
    assert expected._replace(validation_bytes=3_210_000_000).line(12 * 10**9, advice="Lower it.") == (
        "about 3.21 GB in a validation, which takes more than a step with passes of 8,192 tokens: "
        "fits into the 12.0 GB allowed"
    )
    assert expected.line(2 * 10**9, advice="Lower it.") == (
        "about 3.21 GB in a step with passes of 8,192 tokens: does not fit into the 2.00 GB allowed. Lower it."
    )
    waiting = expected._replace(waiting_bytes=1_900_000_000)
    assert waiting.line(2 * 10**9, advice="Lower it.") == (
        "about 3.21 GB in a step with passes of 8,192 tokens, 1.90 GB if the host waits for the device: fits into the "
        "2.00 GB allowed, more slowly"
    )
    assert waiting.line(18 * 10**8, advice="Lower it.").endswith("does not fit into the 1.80 GB allowed. Lower it.")


def test_a_training_keeps_within_what_it_takes_if_the_host_waits() -> None:
    """MLX's limit is lowered as a training does it; far ahead, the host holds twice as much."""
    subject = _subject("lora", bits=4, num_layers=4, checkpoint_every=1)
    expected = forecast_memory(subject, NONE, _rows())
    assert expected.waiting_bytes < 0.6 * expected.peak_bytes
    with memory_limit.lowered() as lower:
        lower(mx.get_active_memory())  # the host waits after each operation that it can wait for
        measured = _measured(subject)
    assert measured <= 1.05 * expected.waiting_bytes
