"""Model folders of others: whatever `config.json` and headers say, one line names the file and the cause."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from benchmarks.architecture_configs import config_of
from mlxflow.errors import ArtifactError
from mlxflow.models import config_fields, config_json, model_folder
from mlxflow.storage.tensor_reading import read_metadata

TEXT = config_of("llama") | {"model_type": "llama", "tie_word_embeddings": False}
ADVICE = "Mend the file, or name another model."


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder; tests copy it."""
    folder = tmp_path_factory.mktemp("good")
    weights: dict[str, mx.array] = dict(tree_flatten(model_folder.build(TEXT, seed=0).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(TEXT))
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the model folder, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def problem(folder: Path) -> str:
    """Return why a folder cannot be opened, without the folder's name."""
    with pytest.raises(ArtifactError) as caught:
        model_folder.load(folder, lazy=True)
    return str(caught.value).replace(str(folder), "model")


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
def test_a_value_of_the_wrong_type_is_named(folder: Path, name: str) -> None:
    changes, expected = VALUES[name]
    (folder / "config.json").write_text(json.dumps(TEXT | changes))
    assert problem(folder) == f"model/config.json: {expected}. {ADVICE}"


def test_every_wrong_value_has_a_line_of_its_own(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(TEXT | {"hidden_size": "a", "rms_norm_eps": []}))
    assert len(problem(folder).splitlines()) == 2


def test_values_that_do_not_fit_together_are_told_with_those_that_may_be_to_blame(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(TEXT | {"num_key_value_heads": -1}))
    line = problem(folder)
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


TEXTS = {
    "NaN": ('{"rms_norm_eps": NaN}', "NaN is no number for a setting"),
    "deep": ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"),
    "list": ("[]", "it is no table"),
    "long": ("{" + " " * 2**24 + "}", "it has more than 16,777,216 bytes"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_that_is_no_table_of_numbers_is_refused(folder: Path, name: str) -> None:
    text, cause = TEXTS[name]
    (folder / "config.json").write_text(text)
    assert problem(folder) == f"model: no model folder (its config.json: {cause}). Build it again."


def test_the_ends_in_the_defaults_of_generation_are_checked(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "two"}')
    expected = 'model/generation_config.json: eos_token_id = "two": expected an id or a list of ids'
    assert problem(folder) == f"{expected}. {ADVICE}"


def test_an_infinite_limit_of_a_time_step_is_taken() -> None:
    assert config_json._constant("Infinity") == math.inf
    from mlx_lm.models.mamba2 import ModelArgs

    assert config_fields.mistakes(ModelArgs, {"time_step_limit": [0.0, math.inf]}) == []
    assert config_fields.mistakes(ModelArgs, {"time_step_limit": [0.0, math.nan]}) != []


def write_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a folder's weights; it stays as long as it is, or the file's length follows."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed.encode() if isinstance(changed, str) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.norm.weight"
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "dtype": (lambda header: header[NORM].update(dtype="F99"), f"tensor '{NORM}' is of the unknown type 'F99'"),
    "wide": (
        lambda header: header[NORM].update(dtype="F64"),
        f"tensor '{NORM}' of type F64 and shape [64] has 256 bytes",
    ),
    "shape": (
        lambda header: header[NORM].update(shape=[2**40, 2**40]),
        f"tensor '{NORM}' of type F32 and shape [1099511627776, 1099511627776] has 256 bytes",
    ),
    "negative": (lambda header: header[NORM].update(shape=[-64]), f"tensor '{NORM}' has no valid shape ([-64])"),
    "text": (lambda header: header[NORM].update(shape="64"), f"tensor '{NORM}' has no valid shape ('64')"),
    "overlap": (
        lambda header: header[NORM].update(data_offsets=[0, 256]),
        "does not begin where the one before it ends",
    ),
    "beyond": (lambda header: header[NORM].update(data_offsets=[2**60, 2**60 + 256]), "does not begin where the one"),
    "offsets": (lambda header: header[NORM].update(data_offsets=None), f"tensor '{NORM}' has no valid data_offsets"),
    "entry": (lambda header: header.update({NORM: []}), f"tensor '{NORM}' has no valid data_offsets"),
    "metadata": (lambda header: header.update(__metadata__=[1]), "its __metadata__ is no table of texts"),
    "twice": (
        lambda header: json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}',
        f"its header lists '{NORM}' twice",
    ),
    "deep": (lambda header: "[" * 100_000 + "]" * 100_000, "its header is not valid JSON"),
    "long": (lambda header: json.dumps(header) + " " * 2**24, "bytes, more than 16,777,216"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_weights_that_lies_is_named_with_its_tensor(folder: Path, name: str) -> None:
    change, cause = HEADERS[name]
    write_header(folder, change)
    line = problem(folder)
    assert line.startswith("model/model.safetensors: damaged (")
    assert cause in line
    assert "\n" not in line
    with pytest.raises(ArtifactError, match="damaged"):
        read_metadata(folder / "model.safetensors")


def spoil(folder: Path, name: str, value: mx.array) -> str:
    """Put another tensor into a model and return why the folder cannot be opened."""
    path = folder / "model.safetensors"
    weights = cast("dict[str, mx.array]", mx.load(str(path)))
    mx.eval(weights)
    weights[name] = value
    mx.save_safetensors(str(path), weights, {"format": "mlx"})
    return problem(folder)


def test_weights_of_whole_numbers_are_refused(folder: Path) -> None:
    expected = f"model: {NORM} is of type int32: expected floating numbers. Name another model."
    assert spoil(folder, NORM, mx.ones((64,), mx.int32)) == expected


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    line = spoil(folder, NORM, mx.ones((63,)))
    assert line.startswith("model: cannot be opened as a model (")
    assert NORM in line
    assert "\n" not in line


def test_weights_of_a_type_that_mlx_does_not_read_are_named(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[NORM].update(dtype="F64", shape=[32])

    write_header(folder, change)
    assert problem(folder) == (
        f"model/model.safetensors: {NORM} is of type F64, which MLX does not read. Convert the model to bf16 first."
    )


def test_a_hostile_config_ends_in_little_time_and_memory(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": [' + "[], " * (2**21 - 8) + "[]]}")
    write_header(folder, lambda _: '{"a": [' + "[], " * (2**21 - 8) + "[]]}")
    script = (
        "import resource, sys, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from mlxflow import errors\nfrom mlxflow.models import config_json\nfrom mlxflow.storage import digests\n"
        "try: config_json.read(pathlib.Path(sys.argv[1]))\n"
        "except errors.ArtifactError: pass\n"
        "try: digests.digest_file(pathlib.Path(sys.argv[1], 'model.safetensors'))\n"
        "except ValueError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "tensor 'a' has no valid data_offsets\n"
