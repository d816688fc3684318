"""The tokenizer follows the model that training goes on from; another one beside it is found by `check`."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxflow.cli.check import check_plans
from mlxflow.messages.errors import ArtifactError, WorkflowError
from mlxflow.models import vocabularies
from mlxflow.models.tokenizer_files import require_tokenizer
from mlxflow.models.vocabularies import have_equal_ids
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Workflow
from tests.conftest import mlxflow
from tests.small_models import llama

WORDS = {"a": 0, "b": 1, "c": 2}


def _definition(vocabulary: Any, **added: int) -> dict[str, Any]:
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "added_tokens": [{"content": text, "id": number} for text, number in added.items()],
    }


def _model(folder: Path, vocabulary: dict[str, int] | None = None, **added: int) -> None:
    """Make a model folder, with a tokenizer where a vocabulary is given."""
    folder.mkdir()
    _, config = llama(hidden_size=64, intermediate_size=64)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer_config.json").write_text("{}")
    if vocabulary is not None:
        (folder / "tokenizer.json").write_text(json.dumps(_definition(vocabulary, **added)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    _model(tmp_path / "base", WORDS, **{"<end>": 3})
    _model(tmp_path / "other", {"a": 0, "c": 1, "b": 2}, **{"<end>": 3})
    _model(tmp_path / "more", WORDS, **{"<end>": 3, "<tool>": 4})
    _model(tmp_path / "bare")
    return tmp_path


def _load(folder: Path, text: str) -> Workflow:
    (folder / "workflow.toml").write_text(text)
    return load_workflow(Path("workflow.toml"))


def _tokenizer(workflow: Workflow, task: str = "pretokenize") -> str:
    config: Any = workflow.find(task).config
    return str(config.tokenizer.from_)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ('[train]\nmodel.from = "base"', "base"),
        ('[train]\nmodel.from = "owner/name@main"', "owner/name@main"),
        ('[train]\nmodel.from = "bare"', ""),
        ('[[train]]\nname = "new"\n[[train]]\nname = "on"\nmodel.from = "base"', "base"),
        ('[pretokenize]\ntokenizer.from = "more"\n[train]\nmodel.from = "base"', "more"),
        ("[pretokenize]\ntokenizer.vocab_size = 300\n[train]\nmodel.from = 'base'", ""),
        ('[pretokenize]\n[quantize]\nmodel = "base"\ndata = "pretokenize"', ""),
    ],
)
def test_the_tokenizer_follows_the_base_model(folder: Path, text: str, expected: str) -> None:
    workflow = _load(folder, text)
    assert _tokenizer(workflow) == expected
    inputs: Any = workflow.find("pretokenize").inputs
    assert [path.as_posix() for path in inputs.tokenizer if path.name == "tokenizer.json"] == (
        [f"{expected}/tokenizer.json"] if expected in ("base", "more") else []
    )


def test_each_pretokenize_stage_follows_the_base_model_of_its_readers(folder: Path) -> None:
    stages = [
        f'[[pretokenize]]\nname = "{name}"\n[[train]]\nname = "{name}"\ninput = "pretokenize:{name}"\n'
        f'model.from = "{base}"\n'
        for name, base in (("one", "base"), ("two", "other"))
    ]
    workflow = _load(folder, "".join(stages))
    assert _tokenizer(workflow, "pretokenize:one") == "base"
    assert _tokenizer(workflow, "pretokenize:two") == "other"
    check_plans(workflow)


def test_a_base_among_the_workflows_own_artifacts_is_not_followed(folder: Path) -> None:
    (folder / "artifacts").mkdir()
    _model(folder / "artifacts/earlier", WORDS)
    assert _tokenizer(_load(folder, '[train]\nmodel.from = "artifacts/earlier"')) == ""


def test_a_base_with_a_tokenizer_of_another_form_is_not_trained_on_other_ids(folder: Path) -> None:
    (folder / "bare/tokenizer.model").write_bytes(b"x")
    assert _tokenizer(_load(folder, '[train]\nmodel.from = "bare"')) == ""
    with pytest.raises(ArtifactError) as caught:
        require_tokenizer(
            Path("bare"), Path("base/tokenizer.json"), "train.model.from", tokens_key="pretokenize.tokenizer.from"
        )
    assert str(caught.value) == (
        "train.model.from: the tokenizer of bare has no tokenizer.json, to which that of the tokens could be compared. "
        "Save it once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


SAID = (
    "workflow.toml: {table}.{key}: has another tokenizer than its tokens, which are made with "
    'pretokenize.tokenizer.from = "{made}". Set pretokenize.tokenizer.from = "{own}", or read tokens of another stage.'
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '[pretokenize]\ntokenizer.from = "other"\n[train]\nmodel.from = "base"',
            SAID.format(table="train", key='model.from = "base"', made="other", own="base"),
        ),
        (
            '[[train]]\nname = "a"\nmodel.from = "base"\n[[train]]\nname = "b"\nmodel.from = "other"',
            SAID.format(table="train[1]", key='model.from = "other"', made="base", own="other"),
        ),
        (
            '[pretokenize]\ntokenizer.from = "base"\n[quantize]\nmodel = "other"\ndata = "pretokenize"',
            SAID.format(table="quantize", key='model = "other"', made="base", own="other"),
        ),
    ],
)
def test_another_tokenizer_beside_a_model_is_found_by_check(folder: Path, text: str, line: str) -> None:
    workflow = _load(folder, text)
    with pytest.raises(WorkflowError) as caught:
        check_plans(workflow)
    assert str(caught.value).splitlines() == [line]


def test_check_ends_with_the_line_and_exit_code_2(folder: Path) -> None:
    (folder / "workflow.toml").write_text('[pretokenize]\ntokenizer.from = "other"\n[train]\nmodel.from = "base"\n')
    result = mlxflow(folder, "check")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith('workflow.toml: train.model.from = "base": has another tokenizer than its tokens, ')


def test_each_tokenizer_is_parsed_once_where_two_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def counted(text: str) -> Any:
        parsed.append(text)
        return json.loads(text)

    monkeypatch.setattr(vocabularies, "json", SimpleNamespace(loads=counted))
    assert require_tokenizer(Path("base"), Path("more/tokenizer.json"), "train.model.from", tokens_key="t") == [
        "<tool>"
    ]
    assert len(parsed) == 2


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (lambda one: one, True),
        (lambda one: one | {"version": "2"}, True),
        (lambda one: one | {"added_tokens": [*one["added_tokens"], {"content": "<new>", "id": 9}]}, True),
        (lambda one: one | {"added_tokens": []}, True),
        (lambda one: one | {"added_tokens": [{"content": "<end>", "id": 5}]}, False),
        (lambda one: one | {"added_tokens": [{"content": "<stop>", "id": 3}]}, False),
        (lambda one: _definition(WORDS | {"d": 4}, **{"<end>": 3}), False),
        (lambda one: _definition({"a": 0, "c": 1, "b": 2}, **{"<end>": 3}), False),
        (lambda one: _definition(WORDS | {"<end>": 3}), True),
        (lambda one: _definition([["a", 0.0], ["b", -1.0], ["c", -2.0]], **{"<end>": 3}), True),
        (lambda one: _definition([["a", 0.0], ["c", -1.0], ["b", -2.0]], **{"<end>": 3}), False),
    ],
)
def test_vocabularies_are_equal_if_they_give_equal_ids(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], is_same: bool
) -> None:
    definition = _definition(WORDS, **{"<end>": 3})
    files = [tmp_path / name for name in ("one.json", "other.json")]
    for file, one in zip(files, (definition, change(definition)), strict=True):
        file.write_text(json.dumps(one))
    assert have_equal_ids(*files) is is_same
    assert have_equal_ids(*reversed(files)) is is_same
