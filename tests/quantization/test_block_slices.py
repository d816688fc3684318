from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from benchmarks.architecture_configs import VOCAB_SIZE, config_of
from mlxflow.models import model_folder
from mlxflow.ops.patching import layer_method
from mlxflow.quantization import block_slices
from mlxflow.quantization.block_slices import StoredTree, block_inputs

TOKENS = mx.random.randint(0, VOCAB_SIZE, (5, 8), key=mx.random.key(0))


class _Pair(NamedTuple):
    one: mx.array
    name: str


def test_a_tree_is_read_as_it_was_written(tmp_path: Path) -> None:
    arrays = [mx.arange(3), mx.array([True, False]), mx.ones((2, 2), mx.bfloat16)]
    tree: Any = ((arrays[0], None, "causal"), {"mask": arrays[1], "pair": _Pair(arrays[2], "a"), "none": [], "n": 3})
    read = StoredTree(tree, tmp_path / "tree.safetensors").read()
    assert read[0][1:] == (None, "causal")
    assert (read[1]["pair"].name, read[1]["none"], read[1]["n"]) == ("a", [], 3)
    for one, other in zip(arrays, (read[0][0], read[1]["mask"], read[1]["pair"].one), strict=True):
        assert one.dtype == other.dtype
        assert mx.array_equal(one, other)


def test_a_tree_without_arrays_is_read(tmp_path: Path) -> None:
    assert StoredTree(((), {"mask": None}), tmp_path / "tree.safetensors").read() == ((), {"mask": None})


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_oss", "jamba"])
def test_inputs_are_those_of_a_forward_pass_of_the_unchanged_model(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_slices, "TOKENS_AT_ONCE", 2 * TOKENS.shape[1])
    model = model_folder.build(config_of(architecture), seed=0)
    model.eval()
    taken: list[Any] = []

    def noting(call: Any) -> Any:
        def noted_call(self: Any, *inputs: Any, **named: Any) -> Any:
            taken.append((inputs, named))
            return call(self, *inputs, **named)

        return noted_call

    with layer_method(model.layers[-1], "__call__", noting, by=__name__):
        for begin in (0, 2, 4):
            mx.eval(model(TOKENS[begin : begin + 2]))
    expected = list(taken)
    taken.clear()
    modules, found = dict(model.named_modules()), {}
    for path, slices in block_inputs(model, TOKENS, folder=tmp_path / "inputs"):
        found[path] = [one.read() for one in slices]
        modules[path].update({name: one * 0 for name, one in modules[path].items() if isinstance(one, mx.array)})
        for layer in modules[path].modules():
            if "weight" in layer:
                layer.weight = layer.weight * 0
    assert len(found) == len(model.layers)
    assert not (tmp_path / "inputs").exists()
    last = list(found.values())[-1]
    assert len(last) == len(expected) == 3
    for one, other in zip(last, expected, strict=True):
        pairs = zip(tree_flatten(one), tree_flatten(other), strict=True)
        for (_, value), (_, exact) in pairs:
            assert mx.array_equal(value, exact) if isinstance(exact, mx.array) else value == exact
