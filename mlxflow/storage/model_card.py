"""The README.md of a model folder: what the model is, how it was made, its figures, its licence, and how to load it.

The head is the one that model hubs read. Equal runs write equal cards: nothing that differs between them is in one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.storage import layout, model_files
from mlxflow.storage.toml_tables import toml_value

CARD = layout.CARD

_MOST_BYTES = 1 << 23
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_LICENCE_LINE = re.compile(r"^license(?:_name)?:[ \t]*[\"']?([^\s\"'#][^\n\"'#]*)", re.MULTILINE)
_BASE_LINE = re.compile(r"^base_model:[ \t]*[\"']?([^\s\"'#][^\n\"'#]*)", re.MULTILINE)


class CardFacts(NamedTuple):
    """What a card says besides what the files of the folder show.

    Attributes:
        name: of the workflow.
        stage: the task, such as "quantize:q4".
        summary: what the stage does, in a line.
        version: of mlxflow.
        settings: keys of the stage's table that differ from the default, as JSON values.
        figures: of the report, as JSON values.
        base: folder of the model that this one was made from; None for a new one.
        base_name: how the workflow names it.
    """

    name: str
    stage: str
    summary: str
    version: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]
    base: Path | None
    base_name: str


def licence_of(folder: Path) -> str:
    """Return the licence that a model's folder names in the head of its README, or else begins a licence file with."""
    if named := _LICENCE_LINE.search(_head(folder)):
        return named[1].strip()
    for name in _LICENCE_FILES:
        if line := next((line.strip() for line in _text(folder / name).splitlines() if line.strip()), ""):
            return f"{line[:80]} ({name})"
    return ""


def _head(folder: Path) -> str:
    """Return the head of a folder's README; empty if it has none."""
    text = _text(folder / CARD)
    return text.removeprefix("---").partition("\n---")[0] if text.startswith("---") else ""


def _text(path: Path) -> str:
    """Return a small text file; empty if it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def write(folder: Path, facts: CardFacts) -> None:
    """Write the card of a folder whose other files are there."""
    (folder / CARD).write_text("\n".join(_lines(folder, facts)) + "\n", encoding="utf-8")


def _lines(folder: Path, facts: CardFacts) -> Iterator[str]:
    licence = licence_of(facts.base) if facts.base else ""
    base = _base_id(facts)
    yield from ("---", *([f"license: {_licence_id(licence)}"] if licence else []))
    yield from ([f"base_model: {base}"] if base else [])
    library = {"model.gguf": "gguf", "adapter.gguf": "gguf", "adapter_model.safetensors": "peft"}
    name = next((library[name] for name in library if (folder / name).is_file()), "mlx")
    yield from (f"library_name: {name}", "pipeline_tag: text-generation", "tags:", "- mlxflow", "---", "")
    yield from (f"# {facts.name or facts.stage}", "")
    origin = f" from {facts.base_name}" if facts.base_name else ""
    yield from (f"{facts.summary}: made by the stage `{facts.stage}` of mlxflow {facts.version}{origin}.", "")
    yield from ("## Use", "", *_usage(folder, facts.base_name or "BASE"), "")
    if facts.settings:
        yield from ("## Settings", "", "Keys that differ from the defaults:", "")
        yield from (f"    {line}" for line in _settings(facts.settings))
        yield ""
    yield from ("## Figures", "", "| figure | value |", "|---|---|")
    yield from (f"| {key} | {value} |" for key, value in _figures(facts.figures))
    yield from ("", "All figures and the origin of every file are in `report.toml`.", "", "## Licence", "")
    yield licence or (
        "The folder of the base model names no licence." if facts.base else "Trained from scratch; choose one."
    )


def _licence_id(licence: str) -> str:
    """Return a licence for the head: hubs know names without spaces, and call the others "other"."""
    return licence.lower() if re.fullmatch(r"[\w.-]+", licence) else "other"


def _base_id(facts: CardFacts) -> str:
    """Return the name of the base on the hub, or of the base's base; empty for folders."""
    if facts.base is not None and (named := _BASE_LINE.search(_head(facts.base))):
        return named[1].strip()
    is_id = re.fullmatch(model_files.HUB_MODEL, facts.base_name) and not (facts.base and facts.base.is_dir())
    return facts.base_name.partition("@")[0] if is_id else ""


def _usage(folder: Path, base: str) -> Iterator[str]:
    """Yield the commands that load the files of a folder, as an indented block."""
    if (folder / "model.gguf").is_file():
        yield from ("    llama-cli -m model.gguf", "    ollama create NAME -f Modelfile")
    elif (folder / "adapter.gguf").is_file():
        yield f"    llama-cli -m {base}.gguf --lora adapter.gguf"
    elif (folder / "adapter_model.safetensors").is_file():
        yield "    from peft import PeftModel"
        yield "    from transformers import AutoModelForCausalLM"
        yield f'    model = AutoModelForCausalLM.from_pretrained("{base}")'
        yield '    model = PeftModel.from_pretrained(model, "FOLDER")'
    else:
        adapters = " --adapter-path FOLDER" if (folder / model_files.ADAPTERS[0]).is_file() else ""
        settings = _table(folder / model_files.TOKENIZER_CONFIG)
        chats = bool(settings.get("chat_template")) or (folder / "chat_template.jinja").is_file()
        yield f"    mlx_lm.{'chat' if chats else 'generate --prompt Once'} --model FOLDER{adapters}"
        if not adapters and "quantization" not in _table(folder / model_files.CONFIG):
            yield from ("", "or with transformers, in Python:", "")
            yield "    from transformers import AutoModelForCausalLM, AutoTokenizer"
            yield '    tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
            yield '    model = AutoModelForCausalLM.from_pretrained("FOLDER")'


def _table(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {toml_value(value)}"


def _figures(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the figures that are single values, those of inner tables with their dotted key."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{prefix}{key}.") if key != "run" and not prefix else ()
        elif isinstance(value, bool | str):
            yield f"{prefix}{key}", str(value).replace("|", "\\|").replace("\n", " ")
        elif isinstance(value, int):
            yield f"{prefix}{key}", f"{value:,}"
        elif isinstance(value, float):
            yield f"{prefix}{key}", f"{value:.6g}"


def changed_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a table that differ from the default, also within inner tables."""
    changed: dict[str, Any] = {}
    for key, value in settings.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            if inner := changed_settings(value, default):
                changed[key] = inner
        elif value != default:
            changed[key] = value
    return changed
