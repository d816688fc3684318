import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import config_fields, model_folder
from mlxflow.storage import config_json
from tests.models.spoilt_folders import ADVICE, LLAMA, problem

VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"hidden_size": [64]}, "hidden_size = [64]: expected a whole number"),
    "text": ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps = "1e-5": expected a number'),
    "null": ({"vocab_size": None}, "vocab_size = null: expected a whole number"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads = 0: expected a number from 1 to 2147483647"),
    "layers": ({"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000: expected a number from 1 to 1000"),
    "half": ({"intermediate_size": 2.5}, "intermediate_size = 2.5: expected a whole number"),
    "large": ({"head_dim": 10**30}, f"head_dim = 1{'0' * 30}: expected a number from -2147483647 to 2147483647"),
    "bool": ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings = "yes": expected true or false'),
    "infinite": ({"rope_theta": math.inf}, "rope_theta = inf: expected a number"),
    "table": ({"rope_scaling": [1]}, "rope_scaling = [1]: expected a table"),
    "names": ({"layer_types": [1]}, "layer_types = [1]: expected a list, each text"),
    "ends": ({"eos_token_id": {"a": 1}}, 'eos_token_id = {"a": 1}: expected an id or a list of ids'),
    "type": ({"model_type": ["llama"]}, 'model_type = ["llama"]: expected text'),
    "inner": ({"text_config": []}, "text_config = []: expected a table"),
    "codes": (
        {"quantization": {"bits": "4"}},
        'quantization = {"bits": "4"}: expected a table with group_size and bits from 1 to 16',
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_the_wrong_type_is_named(llama_folder: Path, name: str) -> None:
    changes, expected = VALUES[name]
    (llama_folder / "config.json").write_text(json.dumps(LLAMA | changes))
    assert problem(llama_folder) == f"model/config.json: {expected}. {ADVICE}"


def test_what_real_configs_have_is_taken_though_mlx_lm_declares_another_type() -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128}
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8, "conv_kernel": 4, "n_groups": 1}
    flags = dict.fromkeys(("attention_bias", "mamba_proj_bias", "mlp_bias", "use_bias", "use_conv_bias"), False)
    own = {"model_type": "nemotron_h", "hybrid_override_pattern": "M*-", "vocab_size": 64, "layer_norm_epsilon": 1e-5}
    config = {**sizes, **mamba, **flags, **own, "max_position_embeddings": 64, "num_hidden_layers": 3}
    assert len(model_folder.build(config, seed=0).layers) == 3
    hints = type("Hints", (), {"__annotations__": {"partial_rotary_factor": int, "names": list[str]}})
    cls: type = dataclasses.dataclass(hints)
    assert config_fields.mistakes(cls, {"partial_rotary_factor": 0.334, "names": "ab"}) == []
    assert config_fields.mistakes(cls, {"partial_rotary_factor": "1", "names": 1}) == [
        'partial_rotary_factor = "1": expected a whole number',
        "names = 1: expected a list",
    ]


def test_every_wrong_value_has_a_line_of_its_own(llama_folder: Path) -> None:
    (llama_folder / "config.json").write_text(json.dumps(LLAMA | {"hidden_size": "a", "rms_norm_eps": []}))
    assert len(problem(llama_folder).splitlines()) == 2


def test_contradicting_values_are_named_with_the_suspects(llama_folder: Path) -> None:
    (llama_folder / "config.json").write_text(json.dumps(LLAMA | {"num_key_value_heads": -1}))
    line = problem(llama_folder)
    assert line.startswith(
        'model/config.json: num_key_value_heads = -1, model_type = "llama": mlx-lm cannot build that ('
    )
    assert line.endswith(f"). {ADVICE}")
    assert "\n" not in line


def test_a_value_within_the_table_of_the_text_model_is_named_with_it() -> None:
    config = {"model_type": "gemma3", "text_config": config_of("gemma3_text") | {"num_hidden_layers": 0}}
    with pytest.raises(ArtifactError) as caught:
        model_folder.skeleton(config)
    expected = "text_config.num_hidden_layers = 0: expected a number from 1 to 1000"
    assert str(caught.value) == f"config.json: {expected}. {ADVICE}"


def test_an_infinite_time_step_limit_is_accepted() -> None:
    assert config_json._constant("Infinity") == math.inf
    from mlx_lm.models.mamba2 import ModelArgs

    assert config_fields.mistakes(ModelArgs, {"time_step_limit": [0.0, math.inf]}) == []
    assert config_fields.mistakes(ModelArgs, {"time_step_limit": [0.0, math.nan]}) != []
