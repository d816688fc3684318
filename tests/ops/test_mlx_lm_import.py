"""mlx-lm without transformers, and the whole of it where it is asked for."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def _run(program: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("soft", "hard", "module"),
    [
        (100, 256, "mlx_lm_import.mlx_lm_utils()"),
        (1024, 4000, "import mlx_lm.tuner.utils"),
        (4096, 8192, "mlx_lm_import.mlx_lm_utils()"),
        (1024, 8192, "mlx_lm_import.mlx_lm_utils()"),
    ],
)
def test_importing_mlx_lm_leaves_the_open_files_limit_alone(soft: int, hard: int, module: str) -> None:
    told = _run(f"""
import resource
from mlxflow.ops import mlx_lm_import
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
mlx_lm_import.prepare()
{module}
print(resource.getrlimit(resource.RLIMIT_NOFILE))
""")
    assert told == str((max(soft, min(2048, hard)), hard))


LOADED = "sorted({'transformers', 'torch', 'httpx', 'huggingface_hub'} & set(sys.modules))"


def test_models_are_built_and_opened_without_transformers() -> None:
    told = _run(f"""
import sys, tempfile
from pathlib import Path
from mlxflow.models import model_folder, quantized_layers
from mlxflow.training import adapters, trainer
from mlxflow.quantization import calibrated, streaming_export
from mlxflow.benchmarking import generation_speed
from tests.small_models import llama
model, config = llama()
folder = Path(tempfile.mkdtemp())
model_folder.save(model=model, config=config, provenance={{}}, config_file=folder / "config.json",
                  model_file=folder / "model.safetensors")
quantized_layers.for_evaluation(model_folder.load(folder)[0])
generation_speed.measure_generation
print({LOADED})
""")
    assert told == "[]"


def test_the_rest_of_mlx_lm_can_be_imported_later() -> None:
    told = _run("""
import sys
from mlxflow.ops import mlx_lm_import
utils = mlx_lm_import.mlx_lm_utils()
from mlx_lm import load, stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper, load as load_tokenizer
from huggingface_hub import snapshot_download
import mlx_lm, mlx_lm.utils, mlx_lm.tokenizer_utils
assert utils is mlx_lm.utils and load is mlx_lm.utils.load
assert mlx_lm.tokenizer_utils.__file__ and TokenizerWrapper.__module__ == "mlx_lm.tokenizer_utils"
print(mlx_lm.__version__ != "", "transformers" in sys.modules)
""")
    assert told == "True True"
