"""What of a folder makes a model, by the names of its files."""

import json
from pathlib import Path

import pytest

from mlxflow.storage import model_files, remote_code
from mlxflow.storage.model_files import INDEX

TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def _index(folder: Path, *files: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"{n}.weight": file for n, file in enumerate(files)}}))


def test_a_single_weights_file_is_the_model(tmp_path: Path) -> None:
    _write(tmp_path, "config.json", "model.safetensors", "consolidated.safetensors", "README.md", "model.gguf")
    assert model_files.find(tmp_path) == (["model.safetensors"], ["config.json"], "", "", "Name a model folder.")


def test_an_index_selects_the_weight_files(tmp_path: Path) -> None:
    _write(tmp_path, "config.json", *TWO)
    _index(tmp_path, TWO[1], TWO[0], TWO[1])
    assert model_files.find(tmp_path).weights == [INDEX, *TWO]


def test_an_index_of_a_single_file_is_not_a_second_set_of_weights(tmp_path: Path) -> None:
    _write(tmp_path, "config.json", "model.safetensors")
    _index(tmp_path, "model.safetensors")
    assert model_files.find(tmp_path).weights == [INDEX, "model.safetensors"]


@pytest.mark.parametrize("stem", ["model", "model.safetensors"])
def test_a_whole_set_of_shards_needs_no_index(tmp_path: Path, stem: str) -> None:
    shards = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    _write(tmp_path, "config.json", *shards)
    assert model_files.find(tmp_path).weights == shards


@pytest.mark.parametrize(
    ("names", "listed", "problem", "advice"),
    [
        (["model.safetensors"], None, "has no config.json", "Name a model folder."),
        (["config.json"], None, "has no model.safetensors", "Name a model folder."),
        (["config.json", "weights.safetensors"], None, "has no model.safetensors", "Name a model folder."),
        (["config.json", TWO[1]], None, f"lacks {TWO[0]}", "Put it there, or name another folder."),
        (
            ["config.json", TWO[0]],
            TWO,
            f"lacks {TWO[1]}, which its {INDEX} lists",
            "Put it there, or name another folder.",
        ),
        (
            ["config.json", "model.safetensors", *TWO],
            TWO,
            f"holds two sets of weights, model.safetensors and what {INDEX} lists",
            "Remove the set that is not the model.",
        ),
        (
            ["config.json", "model.safetensors", *TWO],
            None,
            f"holds two sets of weights, model.safetensors and {TWO[0]}",
            "Remove the set that is not the model.",
        ),
        (
            ["config.json", *TWO, "model-00001-of-00003.safetensors"],
            None,
            f"holds shards of two sets of weights, {TWO[0]} and {TWO[1]}",
            "Remove the set that is not the model.",
        ),
        (
            ["config.json", *TWO],
            ("../model.safetensors",),
            f'has a {INDEX} that lists "../model.safetensors", no model*.safetensors in the folder',
            "Name a model folder.",
        ),
        (
            ["config.json", *TWO],
            (*TWO, "../../etc/passwd"),
            f'has a {INDEX} that lists "../../etc/passwd", no model*.safetensors in the folder',
            "Name a model folder.",
        ),
        (
            ["config.json", "model.safetensors", "model copy.safetensors"],
            None,
            "holds model copy.safetensors beside its weights, and mlx-lm would read both",
            "Move it out of the folder.",
        ),
        (
            ["config.json", *TWO, "model-00001-of-00002 2.safetensors"],
            None,
            "holds model-00001-of-00002 2.safetensors beside its weights, and mlx-lm would read both",
            "Move it out of the folder.",
        ),
        (
            ["config.json", *TWO, "model_old.safetensors"],
            TWO,
            "holds model_old.safetensors beside its weights, and mlx-lm would read both",
            "Move it out of the folder.",
        ),
    ],
)
def test_a_folder_of_no_or_several_models_is_refused(
    tmp_path: Path, names: list[str], listed: tuple[str, ...] | None, problem: str, advice: str
) -> None:
    _write(tmp_path, *names)
    if listed is not None:
        _index(tmp_path, *listed)
    found = model_files.find(tmp_path)
    assert (found.problem, found.advice) == (problem, advice)
    assert found.weights == []


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    _write(tmp_path, "config.json", "model.safetensors")
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    assert model_files.find(tmp_path).problem == f"has a {INDEX} that lists no model*.safetensors"


#: Every file that decides a model or its tokenizer, beside configuration and weights.
DECIDING = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
    "additional_chat_templates/tool_use.jinja",
)

#: What lies in model folders, too, and decides nothing.
OTHERS = (
    "README.md",
    ".gitattributes",
    "LICENSE.txt",
    "config.json.bak",
    "original/tokenizer.model",
    "onnx/vocab.json",
    "pytorch_model.bin",
    "model.gguf",
    "report.toml",
)


def test_exactly_the_files_that_define_a_model_are_found(tmp_path: Path) -> None:
    _write(tmp_path, "config.json", "hf_quant_config.json", "model.safetensors", *DECIDING, *OTHERS)
    found = model_files.find(tmp_path)
    assert sorted(found.read) == sorted(["config.json", "hf_quant_config.json", "model.safetensors", *DECIDING])
    assert found.read[0] == "config.json"
    assert model_files.companions(tmp_path) == list(DECIDING)
    tokenizer = [name for name in DECIDING if name != "generation_config.json"]
    assert model_files.tokenizer_files(tmp_path) == tokenizer
    assert model_files.defaults_and_code(tmp_path) == ["generation_config.json"]
    assert all(model_files.decides(name) for name in found.read)
    assert not any(model_files.decides(name) for name in OTHERS if name[0] != ".")


@pytest.mark.parametrize(
    ("file", "table", "is_code"),
    [
        ("config.json", {"model_file": "modeling.py"}, True),
        ("config.json", {"auto_map": {"AutoConfig": "configuration.Config"}}, True),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}}, True),
        ("tokenizer_config.json", {"tokenizer_class": "Own"}, False),
    ],
)
def test_code_named_by_a_configuration_is_copied(
    tmp_path: Path, file: str, table: dict[str, object], is_code: bool
) -> None:
    _write(tmp_path, "config.json", "model.safetensors", "tokenizer_config.json", "modeling.py", "train.py")
    (tmp_path / file).write_text(json.dumps(table))
    expected = ["modeling.py", "tokenizer_config.json", "train.py"] if is_code else ["tokenizer_config.json"]
    assert model_files.companions(tmp_path) == expected


def test_without_trust_a_copy_has_no_code_and_names_none(tmp_path: Path) -> None:
    folder, names = tmp_path / "model", ["config.json", "tokenizer_config.json", "modeling.py", "merges.txt"]
    _write(folder, *names)
    table = {
        "auto_map": {"AutoTokenizer": ["tokenization.Own", None]},
        "model_file": "modeling.py",
        "custom_pipelines": {"own": {"impl": "pipeline.Own"}},
        "text_config": {"auto_map": {"AutoConfig": "configuration.Own"}, "layers": 2},
    }
    for name in names[:2]:
        (folder / name).write_text(json.dumps(table))
    for trusts in (False, True):
        to = tmp_path / f"copy-{trusts}"
        to.mkdir()
        with remote_code.trusting_code(trusts):
            model_files.copy(folder, names, to)
        assert model_files.names_in(to) == sorted(set(names) - (set() if trusts else {"modeling.py"}))
        expected = table if trusts else {"text_config": {"layers": 2}}
        assert [json.loads((to / name).read_text()) for name in names[:2]] == [expected, expected]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = _write(tmp_path / "model", "config.json", "model.safetensors")
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret")
    problem = f"holds {name}, a link to a file outside of the folder"
    found = model_files.find(folder)
    assert (found.problem, found.advice, found.weights) == (problem, "Put the file itself there.", [])


def test_a_folder_of_templates_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "model", "config.json", "model.safetensors")
    _write(tmp_path / "elsewhere", "tool_use.jinja")
    (folder / "additional_chat_templates").symlink_to("../elsewhere")
    assert model_files.find(folder).problem == (
        "holds additional_chat_templates/tool_use.jinja, a link to a file outside of the folder"
    )


def test_links_within_a_folder_and_within_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs = _write(tmp_path / "models--a--b/blobs", "1f", "2e")
    folder = tmp_path / "models--a--b/snapshots/0123"
    folder.mkdir(parents=True)
    for name, blob in (("config.json", "1f"), ("model.safetensors", "2e")):
        (folder / name).symlink_to(blobs / blob)
    (folder / "tokenizer.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to(folder)
    assert [model_files.find(place).problem for place in (folder, tmp_path / "link")] == ["", ""]
    (folder / "merges.txt").symlink_to("../../../other")
    (tmp_path / "other").write_text("")
    assert model_files.find(folder).problem == "holds merges.txt, a link to a file outside of the folder"


def test_missing_code_named_by_a_configuration_is_a_problem(tmp_path: Path) -> None:
    _write(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_file": "../modeling.py"}')
    assert model_files.find(tmp_path).problem == "lacks ../modeling.py, which its config.json names"


def test_the_folder_of_links_holds_the_chosen_files_only(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a [v2]\n", "config.json", "model.safetensors", "additional_chat_templates/x.jinja")
    with model_files.opened(folder, ["config.json", "additional_chat_templates/x.jinja"]) as links:
        assert model_files.names_in(links) == ["config.json", "additional_chat_templates/x.jinja"]
        assert (links / "config.json").read_text() == "{}"
    assert not links.exists()
    assert model_files.find(folder).problem == ""
