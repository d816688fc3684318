import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxflow.storage import config_json
from tests.models.spoilt_folders import ADVICE, problem, write_header
from tests.models.test_model_folder import VISION

TEXTS = {
    "NaN": ('{"rms_norm_eps": NaN}', "NaN is no number for a setting"),
    "deep": ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"),
    "list": ("[]", "it is no table"),
    "long": ("{" + " " * 2**24 + "}", "it has more than 16,777,216 bytes"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_that_is_no_table_of_numbers_is_refused(llama_folder: Path, name: str) -> None:
    text, cause = TEXTS[name]
    (llama_folder / "config.json").write_text(text)
    assert problem(llama_folder) == f"model: no model folder (its config.json: {cause}). Build it again."


def test_ids_in_the_generation_defaults_are_checked(llama_folder: Path) -> None:
    (llama_folder / "generation_config.json").write_text('{"eos_token_id": "two"}')
    expected = 'model/generation_config.json: eos_token_id = "two": expected an id or a list of ids'
    assert problem(llama_folder) == f"{expected}. {ADVICE}"


def test_a_config_keeps_the_parts_whose_weights_are_there() -> None:
    config = {"model_type": "muse_spark", "vision_config": VISION, "audio_config": VISION}
    kept = config_json.describing(config, weights=["model.vision_tower.blocks.0.attn.weight"], is_quantized=False)
    assert kept == {"model_type": "muse_spark", "vision_config": VISION}


def test_infinities_are_written_as_mlx_lm_reads_them(tmp_path: Path) -> None:
    from mlx_lm.utils import load_config

    config = {"a": float("inf"), "b": [float("-inf"), 1.5], "c": {"d": float("inf")}, "n": 1}
    config_json.write(tmp_path / "config.json", config)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert load_config(tmp_path) == config


@pytest.mark.parametrize(
    ("config", "vocabulary", "positions", "ends"),
    [
        ({"vocab_size": 5, "max_position_embeddings": 6, "eos_token_id": [1, 2]}, 5, 6, {1, 2}),
        ({"text_config": {"vocab_size": 5, "max_position_embeddings": 6, "eos_token_id": 1}}, 5, 6, {1}),
        ({"vocab_size": 7, "text_config": {"vocab_size": 5}, "n_positions": 8}, 7, 8, set()),
        ({}, 2**62, 2**62, set()),
    ],
)
def test_settings_are_found_at_the_top_or_in_the_text_model(
    config: dict[str, Any], vocabulary: int, positions: int, ends: set[int]
) -> None:
    assert config_json.vocab_size(config) == vocabulary
    assert config_json.num_positions(config) == positions
    assert config_json.end_of_text(config) == ends


def test_with_dtype_replaces_every_given_dtype() -> None:
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "n": 1}, "n": 2}
    assert config_json.with_dtype(config, "float32") == {
        "torch_dtype": "float32", "text_config": {"dtype": "float32", "n": 1}, "n": 2,
    }  # fmt: skip
    assert config_json.with_dtype({"n": 1}, "float32") == {"n": 1}


def test_a_config_of_very_many_lists_is_read_in_bounded_time_and_memory(llama_folder: Path) -> None:
    (llama_folder / "config.json").write_text('{"a": [' + "[], " * (2**21 - 8) + "[]]}")
    write_header(llama_folder, lambda _: '{"a": [' + "[], " * (2**21 - 8) + "[]]}")
    script = (
        "import resource, sys, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from mlxflow.messages import errors\nfrom mlxflow.storage import config_json, digests\n"
        "try: config_json.read(pathlib.Path(sys.argv[1]))\n"
        "except errors.ArtifactError: pass\n"
        "try: digests.digest_file(pathlib.Path(sys.argv[1], 'model.safetensors'))\n"
        "except ValueError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(llama_folder)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "tensor 'a' has no valid data_offsets\n"
