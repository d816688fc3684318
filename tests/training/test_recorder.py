from tests.training.small_training import (
    records_of,
    train_small,
)


def test_a_training_record_has_every_figure() -> None:
    _, records, _ = train_small(learning_rate=0.25)
    record = records_of(records, "train")[0]
    assert record["learning_rate"] == 0.25
    assert record["batch_size"] == 16
    assert record["skipped_steps"] == 0
    seconds = {"seconds", "data_wait_seconds", "device_wait_seconds", "compile_seconds"}
    memory = {"active_memory_bytes", "cache_memory_bytes", "peak_memory_bytes"}
    others = {"kind", "step", "loss", "gradient_norm", "tokens", "tokens_per_second"}
    assert record.keys() == seconds | memory | others | {"learning_rate", "batch_size", "skipped_steps"}
    assert record["seconds"] >= record["compile_seconds"] > 0
