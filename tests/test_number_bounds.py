"""Every number that a workflow file may hold is finite and bounded; settings that contradict each other are refused."""

import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import mlx.core as mx
import msgspec
import pytest
import tomli_w
from msgspec import Meta

from mlxflow.device.compute_device import SIZE_PATTERN
from mlxflow.messages.errors import WorkflowError
from mlxflow.stages import train
from mlxflow.storage.toml_tables import read_struct, toml_value
from mlxflow.training import length, table_settings
from mlxflow.training.optimizers import make_schedule
from mlxflow.workflow.loader import STAGES, load_workflow, resolved_toml
from mlxflow.workflow.model import Settings

TABLES: dict[str, type[msgspec.Struct]] = {
    "workflow": Settings,
    **{name: importlib.import_module(f"mlxflow.stages.{name}").Config for name in STAGES},
}


def _leaves(key: str, type_: Any, metas: tuple[Meta, ...] = ()) -> Iterator[tuple[str, Any, tuple[Meta, ...]]]:
    """Yield every key with each type that its value, or an item of it, may have, and what bounds it."""
    if get_origin(type_) is Annotated:
        bare, *more = get_args(type_)
        yield from _leaves(key, bare, (*metas, *(one for one in more if isinstance(one, Meta))))
    elif isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        types = get_type_hints(type_, include_extras=True)
        for field in msgspec.structs.fields(type_):
            yield from _leaves(f"{key}.{field.encode_name}", types[field.name])
    elif get_origin(type_) is not Literal and get_args(type_):
        for item in (one for one in get_args(type_) if one is not Ellipsis):
            yield from _leaves(key, item, () if get_origin(type_) in (tuple, dict) else metas)
    elif get_origin(type_) is not Literal:
        yield key, type_, metas


LEAVES = [leaf for name, struct in TABLES.items() for leaf in _leaves(name, struct)]
NUMBERS = [(key, type_, metas) for key, type_, metas in LEAVES if type_ in (int, float)]


def test_the_bounds_tests_cover_every_number() -> None:
    keys = {key for key, *_ in NUMBERS}
    assert {"workflow.seed", "train.num_steps", "train.checkpointing", "train.betas", "train.lora.rank"} <= keys
    assert {"pretokenize.sources.weight", "quantize.learning_rate", "benchmark.batch_sizes"} <= keys
    tables = {"train.optimizer_options", "train.model.args"}
    assert {key for key, type_, _ in LEAVES if type_ not in (int, float, str, bool)} == tables


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 10**22, -(10**22)])
def test_every_number_has_bounds(value: float) -> None:
    taken = []
    for key, type_, metas in NUMBERS:
        annotated: Any = type_
        for meta in metas:
            annotated = Annotated[annotated, meta]
        try:
            msgspec.convert(value, annotated)
            taken.append(key)
        except msgspec.ValidationError:
            pass
    assert taken == []


def mistakes(text: str) -> str:
    """Return what is wrong with the one table of a workflow file."""
    lines: list[str] = []
    ((name, table),) = tomllib.loads(text).items()
    read_struct(table, TABLES[name], file="workflow.toml", key=name, lines=lines)
    return "\n".join(lines)


UNLIMITED_KEYS = {
    f"{table}.{key}": value
    for table, values in {
        "train": {
            "max_grad_norm": 0.0,
            "max_bad_steps": 10**9,
            "eval_every": 0,
            "patience": 0,
            "save_every": 0,
            "lora.num_layers": 0,
        },
        "quantize": {
            "target_bits_per_weight": 0.0,
            "max_perplexity_increase": 0.0,
            "max_kl": 0.0,
            "lora.num_layers": 0,
        },
        "benchmark": {"max_seconds": 0.0, "max_regression": 1e6},
    }.items()
    for key, value in values.items()
}


def test_the_bounds_tests_cover_every_key_that_may_be_infinite() -> None:
    assert {key for key, _, metas in NUMBERS if any(meta.extra for meta in metas)} == UNLIMITED_KEYS.keys()


def _resolved(folder: Path, value: str) -> dict[str, dict[str, Any]]:
    """Return the settings of all stages, every key that may be infinite set to a value, as the lock has them."""
    tables: dict[str, str] = {}
    for key in UNLIMITED_KEYS:
        table, _, name = key.partition(".")
        tables[table] = tables.get(table, f"[{table}]\n") + f"{name} = {value}\n"
    (folder / "notes.txt").write_text("some text")
    path = folder / "workflow.toml"
    path.write_text('[pretokenize]\nsources = ["notes.txt"]\n' + "".join(tables.values()))
    workflow = load_workflow(path)
    assert "inf" not in resolved_toml(workflow).split()
    tomli_w.dumps({one.task: one.settings() for one in workflow.stages})  # which knows no None
    return tomllib.loads(resolved_toml(workflow))


def test_infinity_becomes_none_for_keys_without_a_limit(tmp_path: Path) -> None:
    settings = _resolved(tmp_path, "inf")
    for dotted, value in UNLIMITED_KEYS.items():
        table, *keys = dotted.split(".")
        found: Any = settings[table]
        for key in keys:
            found = found[key]
        assert found == value, dotted


@pytest.mark.parametrize("value", ["-inf", "nan"])
def test_non_finite_numbers_are_refused_for_all_other_keys(tmp_path: Path, value: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        _resolved(tmp_path, value)
    assert len(caught.value.problems) == len(UNLIMITED_KEYS)


SIZES = [key for key, _, metas in LEAVES if any(SIZE_PATTERN in (meta.pattern or "") for meta in metas)]


def test_the_bounds_tests_cover_every_size() -> None:
    assert {"workflow.memory_limit", "quantize.target_size", "profile.max_leak_per_step"} < set(SIZES)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", ["900%", "100.5%", "9999999 TB", f"{400 * '9'} GB"])
def test_sizes_above_the_maximum_are_refused(key: str, value: str) -> None:
    table, _, name = key.partition(".")
    shares = "a size in bytes" if name in ("target_size", "max_shard_size") else "at most 100%"
    expected = f"expected {shares if '%' in value else 'at most 1024 TiB'}. "
    line = mistakes(f"[{table}]\n{name} = {toml_value(value)}")
    assert line.startswith(f"workflow.toml: {key} = {toml_value(value)}: {expected}")
    assert "\n" not in line


CONTRADICTIONS = {
    "[train]\nlearning_rate = inf": "workflow.toml: train.learning_rate = inf: "
    'expected "auto" or a number from 1e-12 to 1e+06. Use train.learning_rate = "auto" (the default) or remove the '
    "key.",
    "[train]\nnum_steps = 10000000000000000000000": "workflow.toml: train.num_steps = 10000000000000000000000: "
    'expected "auto" or a whole number from 1 to 1_000_000_000. Use train.num_steps = "auto" (the default) or remove '
    "the key.",
    "[train]\nnum_steps = 10\nnum_epochs = 2": "workflow.toml: train.num_epochs = 2.0: "
    "expected without num_steps = 10, which says the same in updates. Remove one of the two.",
    "[train]\nnum_epochs = 2\nconstant_tokens_per_step = false": "workflow.toml: train.num_epochs = 2.0: an epoch has "
    "no fixed number of updates while constant_tokens_per_step = false lets them grow. Set num_steps instead, or "
    "remove the other key.",
    "[train]\nbatch_size = 16\nmax_batch_size = 8": "workflow.toml: train.max_batch_size = 8: "
    "expected at least batch_size = 16. Set it to 16 or remove it.",
    '[workflow]\nmemory_limit = "900%"': 'workflow.toml: workflow.memory_limit = "900%": expected at most 100%. '
    'Use "80%" (the default).',
    "[train]\nnum_steps = 10\nwarmup_steps = 10": "workflow.toml: train.warmup_steps = 10: "
    "expected less than num_steps = 10. Lower it or remove the key.",
    '[train]\nnum_steps = 10\nschedule = "wsd"\nwarmup_steps = 4\ndecay_steps = 7': "workflow.toml: "
    "train.decay_steps = 7: expected at most num_steps - warmup_steps = 6. Lower it or remove the key.",
    "[train]\nlearning_rate = 1e-3\nfinal_learning_rate = 1e-2": "workflow.toml: train.final_learning_rate = 0.01: "
    "expected at most learning_rate = 0.001. Change one of the two.",
    "[train]\neval_every = 0\npatience = 2": "workflow.toml: train.patience = 2: "
    "needs validations on the way, and eval_every = 0 makes none. Set eval_every, or remove patience.",
    '[train]\noptimizer = "sgd"\nbetas = [0.5, 0.9]': "workflow.toml: train.betas = [0.5, 0.9]: "
    "the optimizer 'sgd' has none. Remove the key, or set optimizer = \"adamw\".",
    "[train.model]\nhidden_size = 1048576\nintermediate_size = 1048576\nnum_layers = 1000": "workflow.toml: "
    "train.model.hidden_size = 1048576: expected, with intermediate_size = 1048576 and num_layers = 1000, "
    "at most 1,000,000,000,000 weights, not 7,696,581,394,432,000. Lower one of the three.",
    "[train]\noptimizer_options = { eps = inf, bias_correction = true }": "workflow.toml: "
    "train.optimizer_options.eps = inf: "
    "expected true, false, a number from -1000000 to 1000000, or a list of such. Change it or remove the key.",
    '[train.model]\nfrom = "base"\nhidden_size = 64': "workflow.toml: train.model.hidden_size = 64: "
    "is for a new model, and model.from names one that exists. Remove one of the two.",
    '[pretokenize]\nholdout = 0.1\nvalidation_sources = ["v.txt"]': "workflow.toml: pretokenize.holdout = 0.1: "
    "is for a corpus without documents for validation, and validation_sources names some. Remove one of the two.",
    "[quantize]\ntarget_bits_per_weight = 3\ncandidate_bits = [4, 8]": "workflow.toml: "
    "quantize.target_bits_per_weight = 3.0: "
    "expected at least the lowest of candidate_bits = 4. Change one of the two.",
    '[quantize]\ntarget_size = "0 GB"': 'workflow.toml: quantize.target_size = "0 GB": expected more than 0 bytes. '
    'Write such as "200 MB".',
    '[export]\nmax_shard_size = "0 GB"': 'workflow.toml: export.max_shard_size = "0 GB": expected more than 0 bytes. '
    'Use export.max_shard_size = "5 GB" (the default).',
}


@pytest.mark.parametrize("text", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(text: str) -> None:
    assert mistakes(text) == CONTRADICTIONS[text]


@pytest.mark.parametrize(
    "text",
    [
        "[train]\nbatch_size = 500",
        "[train]\nnum_epochs = 0.5",
        "[train]\nnum_epochs = 2\nwarmup_steps = 1000",
        "[train]\nnum_epochs = 2\nconstant_tokens_per_step = false\ndynamic_batch_size = false",
        "[train]\nnum_steps = 1",
        "[train]\nnum_steps = 1\nwarmup_steps = 0",
        '[train]\nnum_steps = 10\nschedule = "wsd"\nwarmup_steps = 4\ndecay_steps = 6',
        '[train]\nnum_steps = 3\nschedule = "wsd"',
        "[train]\noptimizer_options = { eps = [1e-30, 1e-3], scale_parameter = true }",
    ],
)
def test_defaults_adapt_to_the_keys_that_are_set(text: str) -> None:
    assert mistakes(text) == ""


def test_derived_defaults_are_computed_from_num_steps_and_batch_size() -> None:
    resolved = [train.Config(num_steps=n, batch_size=b) for n, b in ((240, 32), (1, 500), (30, 1))]
    assert [table_settings.warmup_steps(one, length.planned_steps(one, 1)) for one in resolved] == [20, 0, 15]
    assert [table_settings.decay_steps(one, length.planned_steps(one, 1)) for one in resolved] == [48, 1, 6]
    assert [table_settings.max_batch_size(one) for one in resolved] == [64, 500, 64]


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("num_steps", [1, 2, 30, 240])
def test_the_final_learning_rate_is_reached_right_after_the_last_step(name: str, num_steps: int) -> None:
    config = train.Config(num_steps=num_steps)
    schedule = make_schedule(
        name=name,
        learning_rate=2.0,
        final_learning_rate=0.5,
        num_steps=num_steps,
        warmup_steps=table_settings.warmup_steps(config, num_steps),
        decay_steps=table_settings.decay_steps(config, num_steps),
    )
    last, after = (float(schedule(mx.array(step, mx.uint64))) for step in (num_steps - 1, num_steps))
    assert after == pytest.approx(0.5, abs=1e-6)
    assert last > after
