"""Settings of architectures, read from mlx-lm's source."""

import dataclasses

import pytest

from mlxflow.models import architecture_args


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "olmo2", "qwen3_moe", "mamba2", "phi3", "falcon_h1"])
def test_the_fields_are_those_of_mlx_lms_class(name: str) -> None:
    import importlib

    from mlxflow.ops import mlx_lm_import

    mlx_lm_import.prepare()
    own = importlib.import_module(f"mlx_lm.models.{name}").ModelArgs
    found = architecture_args.args_class(name)
    assert {one.name for one in dataclasses.fields(found)} == {one.name for one in dataclasses.fields(own)}
    without = dataclasses.MISSING
    required = {
        one.name for one in dataclasses.fields(own) if one.default is without and one.default_factory is without
    }
    assert {one.name for one in dataclasses.fields(found) if one.default is without} == required


def test_a_shape_gets_the_names_of_the_architecture() -> None:
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "context_length": 16, "eps": 1e-5}
    assert architecture_args.given("gpt2", shape) == {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 16,
        "n_ctx": 16,
        "layer_norm_epsilon": 1e-5,
    }


def test_no_module_of_models_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from mlxflow.models import architecture_args as a; list(a.problems('qwen3', {'head_dim': 8})); "
        "print([name for name in ('mlx.core', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
