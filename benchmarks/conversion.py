"""`mlxflow run quantize` beside `mlx_lm.convert -q`: seconds, peak memory and bytes of whole processes."""

import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

from benchmarks.processes import run_command
from benchmarks.quantization_job import print_row
from benchmarks.shapes import SMOLLM2_135M

#: The script whose command `write` writes the dense model.
SCRIPT = Path(__file__).with_name("quantize.py")


def convert(layers: str = "30", rounds: str = "3") -> None:
    """Run `mlxflow run quantize` and `mlx_lm.convert -q` in turns on a bf16 model of SmolLM2-135M's width."""
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        # in a process of its own: what this one holds would count as its children's peak
        subprocess.run([sys.executable, str(SCRIPT), "write", str(where / "dense"), layers], check=True)
        (where / "workflow.toml").write_text('[workflow]\ndevice = "cpu"\n[quantize]\nmodel = "dense"\n')
        python = [sys.executable, "-m"]
        ours = [*python, "mlxflow", "run", "quantize"]
        theirs = [*python, "mlx_lm", "convert", "--hf-path", "dense", "--mlx-path", "theirs", "-q"]
        measured: dict[str, list[tuple[float, int]]] = {"mlxflow": [], "mlx_lm.convert": []}
        for _ in range(int(rounds)):
            shutil.rmtree(where / "theirs", ignore_errors=True)
            for name, command in zip(measured, (ours, theirs), strict=True):
                measured[name].append(run_command(command, where))
        _print_conversion(where, measured)


def _print_conversion(where: Path, measured: dict[str, list[tuple[float, int]]]) -> None:
    import mlx.core as mx

    files = [where / "artifacts" / "quantize" / "model.safetensors", where / "theirs" / "model.safetensors"]
    one, other = (cast("dict[str, mx.array]", mx.load(str(file))) for file in files)
    same = one.keys() == other.keys() and all(bool(mx.array_equal(one[name], other[name])) for name in one)
    dense = (where / "dense" / "model.safetensors").stat().st_size
    for name, runs in measured.items():
        seconds, peaks = zip(*runs, strict=True)
        print_row(name, seconds=statistics.median(seconds), peak_rss_bytes=statistics.median(peaks), tensors_equal=same)
    pairs = list(zip(*measured.values(), strict=True))
    print_row(
        "mlxflow over mlx_lm.convert",
        seconds=statistics.median(ours[0] / theirs[0] for ours, theirs in pairs),
        peak_rss=statistics.median(ours[1] / theirs[1] for ours, theirs in pairs),
        dense_file_over_ours=dense / files[0].stat().st_size,
    )


def write(where: str, layers: str) -> None:
    """Write a model folder with random bf16 weights and a tokenizer, such as mlx-lm asks for."""
    import mlx.core as mx
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    from mlxflow.models import model_folder

    folder = Path(where)
    folder.mkdir()
    shape = SMOLLM2_135M | {"num_hidden_layers": int(layers), "torch_dtype": "bfloat16"}
    model = model_folder.build(shape, seed=0)
    model.set_dtype(mx.bfloat16)
    model_folder.save(
        model=model,
        config=shape,
        config_file=folder / "config.json",
        model_file=folder / "model.safetensors",
        provenance={},
    )
    Tokenizer(BPE()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
