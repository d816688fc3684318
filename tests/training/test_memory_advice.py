"""The advice to a training that does not fit into the memory names what helps, given its settings."""

import pytest

from mlxflow.stages import train
from mlxflow.training.memory_advice import memory_advice
from mlxflow.training.settings import AdapterShape, Recomputation, SettingNames, TrainingSettings

NAMES = SettingNames.of_stage("train", "pretokenize", "workflow.memory_limit")
ADAPTERS = AdapterShape("lora", 8, 20.0, 0.0, 0, ("*",))
FUSED = TrainingSettings(fused_loss=True)
PAIRS = Recomputation.of("pairs").applied_to(FUSED)


def _changes(settings: TrainingSettings, names: SettingNames = NAMES, *, in_validation: bool = False) -> str:
    """Return the settings that are advised beside fewer and shorter rows and a higher limit."""
    line = memory_advice(settings, names, rows=8, in_validation=in_validation)
    begin, end = "Lower train.batch_size or pretokenize.context_length, ", "or raise workflow.memory_limit."
    assert line.startswith(begin)
    assert line.endswith(end)
    return line.removeprefix(begin).removesuffix(end).removesuffix(", ").removeprefix("set ")


@pytest.mark.parametrize(
    ("now", "advised"),
    [("none", '"layers"'), (4, '"layers"'), (2, '"layers"'), (1, '"pairs"'), ("layers", '"pairs"')],
)
def test_the_next_step_of_recomputation_is_advised(now: str | int, advised: str) -> None:
    assert _changes(Recomputation.of(now).applied_to(FUSED)) == f"train.checkpointing = {advised}"


def test_what_costs_more_than_time_is_advised_once_all_layers_are_recomputed_in_pairs() -> None:
    assert _changes(PAIRS) == 'train.precision = "bf16"'
    lion = 'train.optimizer = "lion", which holds one moment of each weight instead of two'
    assert _changes(PAIRS.replace(precision="bf16")) == lion
    assert _changes(PAIRS.replace(precision="bf16", optimizer="lion")) == ""
    assert _changes(PAIRS.replace(precision="bf16", adapters=ADAPTERS)) == "", "moments of adapters are small"


def test_no_recomputation_is_advised_where_trials_have_chosen_it() -> None:
    chosen = train.setting_names(train.Config(checkpointing="auto"), "train")
    for layers in (Recomputation(0), Recomputation(1), Recomputation(1, 2)):
        assert _changes(layers.applied_to(FUSED), chosen) == 'train.precision = "bf16"'
    written = train.setting_names(train.Config(checkpointing="layers"), "train")
    assert _changes(Recomputation(1).applied_to(FUSED), written) == 'train.checkpointing = "pairs"'


def test_the_fused_loss_is_advised_where_it_is_not_used_and_the_model_can() -> None:
    plain = Recomputation.of("layers").applied_to(TrainingSettings(fused_loss=False))
    assert _changes(plain) == 'train.checkpointing = "pairs" and train.fused_loss = true'
    assert _changes(plain, NAMES.without("fused_loss")) == 'train.checkpointing = "pairs"'


def test_a_validation_keeps_nothing_for_a_backward_pass() -> None:
    assert _changes(TrainingSettings(), in_validation=True) == 'train.precision = "bf16"'


def test_a_single_row_can_only_be_shorter() -> None:
    assert memory_advice(PAIRS.replace(precision="bf16", adapters=ADAPTERS), NAMES, rows=1) == (
        "Lower pretokenize.context_length, or raise workflow.memory_limit."
    )
