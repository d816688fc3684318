"""Workflow files, model configurations and headers of weights made by grammar: a result, or lines about what is wrong.

`HYPOTHESIS_PROFILE=long` makes many more of them, other ones in each run.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.architecture_configs import DENSE, MIXTURES, config_of
from mlxflow.messages.errors import ArtifactError, WorkflowError
from mlxflow.models import model_folder
from mlxflow.storage.tensor_header import read_safetensors_header
from mlxflow.storage.tensor_types import UNREAD_TYPES
from mlxflow.workflow.loader import load_workflow, resolved_toml
from tests.test_number_bounds import LEAVES, TABLES

T = TypeVar("T")


def outcome(function: Callable[[], T], kind: type[Exception]) -> tuple[T | None, list[str]]:
    """Return what a function returns, or the lines of the one kind of error that it may raise."""
    try:
        return function(), []
    except kind as error:
        return None, list(getattr(error, "problems", [str(error)]))


def are_lines(lines: list[str]) -> bool:
    """Return whether there are lines, none of which breaks into two on a terminal."""
    return bool(lines) and all(line and line.splitlines() == [line] for line in lines)


NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, -(10**30), 1e308, 5e-324, float("inf"), float("nan")]),
)
LEAF = st.one_of(NUMBERS, st.booleans(), st.text(max_size=8), st.sampled_from(["auto", "80%", "9 TB", "train", "*"]))
VALUE = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.text(max_size=5), st.sampled_from(["name", "match", "bits", "path"])), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
KEYS = sorted({key for key, _, _ in LEAVES})
NAMES = sorted({"name", "matrix", "exclude", *(key.rpartition(".")[2] for key in KEYS)})


@st.composite
def workflows(draw: st.DrawFn) -> str:
    """Draw the text of a workflow file: known keys with any values, unknown ones, matrices, or TOML cut somewhere."""
    document: dict[str, Any] = {}
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=6)):
        *tables, name = key.split(".")
        inner = document
        for table in tables:
            inner = inner.setdefault(table, {}) if isinstance(inner.get(table, {}), dict) else {}
        inner[name] = draw(VALUE)
    stage = draw(st.sampled_from([*TABLES, "other"]))
    if draw(st.booleans()):
        names = st.sampled_from(NAMES)
        document[stage] = draw(
            st.one_of(
                st.lists(st.dictionaries(names, VALUE, max_size=3), max_size=3),
                st.fixed_dictionaries({"matrix": st.dictionaries(names, st.lists(LEAF, max_size=4), max_size=3)}),
                VALUE,
            )
        )
    text = tomli_w.dumps(document)
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


@given(workflows())
def test_a_fuzzed_workflow_is_read_or_its_errors_are_lines(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "workflow.toml")
        path.write_text(text, encoding="utf-8")
        workflow, lines = outcome(lambda: load_workflow(path), WorkflowError)
        if workflow is None:
            assert are_lines(lines)
            return
        resolved = resolved_toml(workflow)
        tomli_w.dumps({one.task: one.settings() for one in workflow.stages})
        path.write_text(resolved, encoding="utf-8")
        again = load_workflow(path)
        assert [one.task for one in again.stages] == [one.task for one in workflow.stages]


JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, st.booleans(), st.text(max_size=8), st.sampled_from([10**7, "full_attention"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["type", "factor", "bits"]), inner, max_size=3)
    ),
    max_leaves=5,
)
MORE_KEYS = ("rope_scaling", "layer_types", "head_dim", "sliding_window", "quantization", "text_config")


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a `config.json` of some architecture with some values changed, added or left out."""
    config = config_of(draw(st.sampled_from(sorted({**DENSE, **MIXTURES}))))
    for key in draw(st.lists(st.sampled_from([*config, *MORE_KEYS]), min_size=1, max_size=3, unique=True)):
        if draw(st.integers(0, 4)):
            config[key] = draw(JSON)
        else:
            config.pop(key, None)
    return config


@given(configs())
def test_a_fuzzed_config_builds_a_model_or_is_refused_in_lines(config: dict[str, Any]) -> None:
    model, lines = outcome(lambda: model_folder.skeleton(config), ArtifactError)
    assert model is not None or (are_lines(lines) and all(line.startswith("config.json: ") for line in lines))


ENTRY = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "F4", "", None, 7]),
            "shape": st.one_of(st.lists(st.one_of(st.integers(0, 3), NUMBERS), max_size=3), JSON),
            "data_offsets": st.one_of(st.lists(st.integers(0, 12), min_size=2, max_size=2), JSON),
        }
    ),
    JSON,
)
SOUND = st.fixed_dictionaries(
    {"dtype": st.just("F32"), "shape": st.sampled_from([[2], [1, 2], [2, 1]]), "data_offsets": st.just([0, 8])}
)


@st.composite
def tensor_files(draw: st.DrawFn) -> bytes:
    """Draw a safetensors file: sound, or with a header that lies, stands twice or is cut."""
    entries = draw(
        st.lists(st.tuples(st.sampled_from(["a", "b", "__metadata__"]), st.one_of(SOUND, ENTRY)), max_size=3)
    )
    text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries) + "}"
    header = text.encode()[: draw(st.sampled_from([len(text.encode()), len(text.encode()) // 2, 1]))]
    length = draw(st.sampled_from([len(header), 0, 2**63, len(header) + 1]))
    return length.to_bytes(8, "little") + header + bytes(draw(st.sampled_from([8, 0, 12])))


@given(tensor_files())
def test_a_fuzzed_header_is_refused_or_also_accepted_by_mlx(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(data)
        found, lines = outcome(lambda: read_safetensors_header(path), ValueError)
        if found is None:
            assert are_lines(lines)
            return
        header, begin = found
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        assert begin + sum(one["data_offsets"][1] - one["data_offsets"][0] for one in entries.values()) == len(data)
        if not any(entry["dtype"] in UNREAD_TYPES for entry in entries.values()):
            read: Any = mx.load(str(path))
            mx.eval(read)
            assert {name: list(value.shape) for name, value in read.items()} == {
                name: entry["shape"] for name, entry in entries.items()
            }
