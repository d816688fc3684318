"""Define which files belong to a model folder; all code that reads, copies, records or opens one uses this module.

A model folder contains a configuration, weights and a tokenizer in Hugging Face's format. Other files, such as a
README or weights of other formats, are ignored. Imported by every `doit`: nothing heavy here.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from mlxflow.storage import remote_code
from mlxflow.storage.temporary_files import scratch_folder

#: A model's name on the hub, optionally with a revision.
HUB_MODEL = r"[\w.-]+/[\w.-]+(@[\w.-]+)?"

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

#: The files that mlx-lm reads as weights of a folder, regardless of an index.
WEIGHT_PATTERNS = ("model*.safetensors",)

#: Adapters beside a model in mlx-lm's format: their weights and their configuration.
ADAPTERS = ("adapters.safetensors", "adapter_config.json")

#: The folder with a copy of adapters that were fused into the model's weights.
ADDED_ADAPTERS = "adapters"

#: Defaults of generation, including its end tokens, which override those of the configuration.
GENERATION = "generation_config.json"

#: The files that mlx-lm reads besides `CONFIG` to build a model.
_CONFIGS = (CONFIG, GENERATION, "hf_quant_config.json", *ADAPTERS)

#: The files of a tokenizer and its chat templates, in every format that transformers opens.
TOKENIZER_PATTERNS = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)

#: The files that are copied, besides configuration and weights, when a model is saved again.
COMPANION_PATTERNS = (*TOKENIZER_PATTERNS, GENERATION)

#: The files that are downloaded of a model on the hub.
HUB_PATTERNS = (*_CONFIGS, INDEX, *WEIGHT_PATTERNS, *TOKENIZER_PATTERNS, "*.py")

#: Advice about a link that leads out of a folder.
ADVICE_LEADING_OUT = "Put the file itself there."

_FOLDERS = ("additional_chat_templates",)
_SHARD = re.compile(r"(model|model\.safetensors)-(\d{5})-of-(\d{5})\.safetensors")


class ModelFolderFiles(NamedTuple):
    """The files of a model folder, by names relative to it.

    Attributes:
        weights: sorted; an index comes first.
        others: every other file that defines the model, sorted.
        code: the Python file that defines the model's architecture; empty if mlx-lm supports it.
        problem: why this is no model folder; empty if it is one.
        advice: what to do about the problem.
    """

    weights: list[str]
    others: list[str]
    code: str
    problem: str
    advice: str

    @property
    def read(self) -> list[str]:
        """Every file that defines the model, the configuration first."""
        return [CONFIG, *(name for name in self.others if name != CONFIG), *self.weights]


def adapters_folder(fuse: str) -> Path:
    """Return the folder of trained adapters in an artifact, relative to it.

    Args:
        fuse: "never" for adapters beside the model; else they are fused into its weights and a copy is kept.
    """
    return Path() if fuse == "never" else Path(ADDED_ADAPTERS)


def is_companion(name: str) -> bool:
    """Return whether a file, by its name relative to a model folder, is copied when the model is saved again."""
    return _matches(name, (*COMPANION_PATTERNS, "*.py"))


def decides(name: str) -> bool:
    """Return whether a file, by its name relative to a model folder, defines the model or its tokenizer.

    A copy of fused adapters counts, because it documents the weights.
    """
    added = (f"{ADDED_ADAPTERS}/{file}" for file in ADAPTERS)
    return is_companion(name) or _matches(name, (*_CONFIGS, INDEX, *WEIGHT_PATTERNS, *added))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def names_in(folder: Path) -> list[str]:
    """Return the names of the visible files in a model folder, sorted, then those in its folder of templates.

    Raises:
        OSError: the folder is missing or cannot be read.
    """
    names = list(_files(folder, ""))
    for below in _FOLDERS:
        if (folder / below).is_dir():
            names += _files(folder, f"{below}/")
    return sorted(names, key=lambda name: (name.count("/"), name))


def _files(folder: Path, below: str) -> Iterator[str]:
    with os.scandir(folder / below) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.is_file():
                yield f"{below}{entry.name}"


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the tokenizer's files in a folder, sorted.

    Raises:
        OSError: the folder is missing or cannot be read.
    """
    return [name for name in names_in(folder) if _matches(name, TOKENIZER_PATTERNS)]


def has_vocabulary(names: Iterable[str]) -> bool:
    """Return whether a tokenizer's files include a vocabulary, not only settings and templates."""
    settings = (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "*.jinja",
    )
    return any(not _matches(name, settings) and not name.endswith(".jinja") for name in names)


def companions(folder: Path) -> list[str]:
    """Return the names of the files besides configuration and weights that define the model, sorted.

    Python files count if a configuration names code.

    Raises:
        OSError: the folder is missing or cannot be read.
    """
    names = names_in(folder)
    code = [name for name in names if _matches(name, ("*.py",))]
    left_out = set() if code and remote_code.names_code(folder) else set(code)
    return [name for name in names if _matches(name, (*COMPANION_PATTERNS, "*.py")) and name not in left_out]


def beside(folder: Path) -> list[str]:
    """Return the companions and adapters in an artifact's folder; empty if it is not built yet."""
    try:
        return [*companions(folder), *(name for name in names_in(folder) if name in ADAPTERS)]
    except OSError:
        return []


def defaults_and_code(folder: Path) -> list[str]:
    """Return the companions that belong to the model and not to its tokenizer, sorted."""
    return [name for name in companions(folder) if not _matches(name, TOKENIZER_PATTERNS)]


def find(folder: Path) -> ModelFolderFiles:
    """Return the files of a model folder, or why it is no model folder.

    The weights are the files listed in an index, else `model.safetensors`, else a complete set of shards. Two sets of
    weights and stray weight files are refused: mlx-lm would mix them, and transformers would use one of them. Links
    out of the folder are refused, too, because their targets would be copied into artifacts.

    Raises:
        OSError: the folder is missing or cannot be read.
    """
    names = names_in(folder)
    others = sorted({name for name in _CONFIGS if name in names} | set(companions(folder)))
    code = remote_code.model_code(folder)
    if CONFIG not in names:
        return ModelFolderFiles([], others, code, f"has no {CONFIG}", "Name a model folder.")
    weights, problem = _index_weights(folder, names) if INDEX in names else _weights_without_index(names)
    problem = problem or _stray_weights(weights, names)
    if code and code not in names:
        problem = problem or f"lacks {code}, which its {CONFIG} names"
    if not problem and (out := leading_out(folder, [*others, *weights])):
        problem = leading_out_problem(out)
    return ModelFolderFiles([] if problem else weights, others, code, problem, _advise(problem))


def leading_out_problem(name: str) -> str:
    """Return the message about a file that `leading_out` found."""
    return f"holds {name}, a link to a file outside of the folder"


def _advise(problem: str) -> str:
    if "two sets" in problem:
        return "Remove the set that is not the model."
    if "would read both" in problem:
        return "Move it out of the folder."
    if problem.endswith("outside of the folder"):
        return ADVICE_LEADING_OUT
    return "Put it there, or name another folder." if problem.startswith("lacks") else "Name a model folder."


def _index_weights(folder: Path, names: list[str]) -> tuple[list[str], str]:
    """Return the index and the weights that it lists, and a problem if there is one."""
    table = remote_code.read_table(folder / INDEX).get("weight_map")
    values = list(table.values()) if isinstance(table, dict) else []
    if wrong := [value for value in values if not isinstance(value, str) or not _matches(value, WEIGHT_PATTERNS)]:
        return [], f"has a {INDEX} that lists {json.dumps(wrong[0])[:100]}, no model*.safetensors in the folder"
    if not values:
        return [], f"has a {INDEX} that lists no model*.safetensors"
    listed = sorted(set(values))
    if lacking := [name for name in listed if name not in names]:
        return [], f"lacks {lacking[0]}, which its {INDEX} lists"
    if WEIGHTS in names and WEIGHTS not in listed:
        return [], f"holds two sets of weights, {WEIGHTS} and what {INDEX} lists"
    return [INDEX, *listed], ""


def _weights_without_index(names: list[str]) -> tuple[list[str], str]:
    """Return `model.safetensors` or a complete set of shards, and a problem if there is one."""
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if not shards:
        return ([WEIGHTS], "") if WEIGHTS in names else ([], f"has no {WEIGHTS}")
    if WEIGHTS in names:
        return [], f"holds two sets of weights, {WEIGHTS} and {shards[0][0]}"
    if len({(match[1], match[3]) for match in shards}) > 1:
        return [], f"holds shards of two sets of weights, {shards[0][0]} and {shards[-1][0]}"
    stem, _, count = shards[0].groups()
    whole = [f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    if lacking := [name for name in whole if name not in names]:
        return [], f"lacks {lacking[0]}"
    return whole, ""


def _stray_weights(weights: list[str], names: list[str]) -> str:
    """Return the problem if a folder has other files that mlx-lm would read as weights of the same model."""
    stray = [name for name in names if name not in weights and _matches(name, WEIGHT_PATTERNS)]
    return f"holds {stray[0]} beside its weights, and mlx-lm would read both" if weights and stray else ""


def leading_out(folder: Path, names: Iterable[str]) -> str:
    """Return the first of a folder's files that is a link to a file outside of it; empty if there is none.

    The hub's cache counts as one folder: its folders of revisions contain links to a shared folder of files.

    Args:
        folder: a model folder, which may be a link itself.
        names: of its files.
    """
    for name in names:
        path = os.path.join(folder, name)  # noqa: PTH118 - asked at every no-op
        if os.path.islink(path) or "/" in name:  # noqa: PTH114
            inside = os.path.realpath(folder)
            revisions, blobs = os.path.split(os.path.dirname(inside))[1], f"{inside}/../../blobs"  # noqa: PTH120
            roots = [inside, *([os.path.realpath(blobs)] if revisions == "snapshots" else [])]
            if not any(os.path.realpath(path).startswith(f"{root.rstrip('/')}/") for root in roots):
                return name
    return ""


def copy(folder: Path, names: Iterable[str], to: Path) -> None:
    """Copy files of a model folder into another one.

    If code of the folder is not trusted, Python files are not copied and the configurations name none: otherwise
    every program that opens the copy later would run the untrusted code.

    Args:
        folder: a model folder.
        names: of its files.
        to: the other folder.
    """
    import shutil

    for name in names:
        if name.endswith(".py") and not remote_code.trusts_code():
            continue
        (to / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, to / name)
        table = remote_code.read_table(to / name) if name in (CONFIG, TOKENIZER_CONFIG) else {}
        if table != (copied_table := remote_code.copied(table)):
            (to / name).write_text(json.dumps(copied_table, indent=2) + "\n", encoding="utf-8")


@contextmanager
def opened(folder: Path, files: Iterable[str]) -> Iterator[Path]:
    """Yield a folder that contains only links to some of a folder's files.

    mlx-lm opens every `model*.safetensors` of a folder and interprets `[` in the folder's name as a pattern.

    Args:
        folder: a model folder.
        files: names of its files.
    """
    with scratch_folder() as scratch:
        for file in files:
            link = scratch / file
            link.parent.mkdir(exist_ok=True)
            link.symlink_to((folder / file).absolute())
        yield scratch


def stored_bytes(weights: Path) -> int:
    """Return the size of a model's weights on the disk in bytes, including adapters beside them.

    Args:
        weights: the file `model.safetensors`, or where it would be if the weights were in one file.

    Raises:
        OSError: it cannot be looked up.
    """
    shards = [] if weights.is_file() else sorted(weights.parent.glob(f"{weights.stem}-*{weights.suffix}"))
    beside = weights.with_name(ADAPTERS[0])
    files = [*(shards or [weights]), *([beside] if beside.is_file() else [])]
    return sum(file.stat().st_size for file in files)
