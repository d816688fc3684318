"""The JSON schema accepts what the loader accepts, and names the place of a mistake."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlxflow.workflow.json_schema import schema_text, workflow_schema
from tests.conftest import REPOSITORY

jsonschema: Any = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

SHIPPED = REPOSITORY / "mlxflow/cli/workflow.schema.json"
WORKFLOWS = [
    REPOSITORY / "workflow.toml",
    *sorted((REPOSITORY / "mlxflow/cli/templates").glob("*.toml")),
    *sorted((REPOSITORY / "examples").rglob("*.toml")),
    REPOSITORY / "tests/tiny.toml",
]


def mistakes(text: str) -> list[tuple[str, str]]:
    """Return the dotted place and the message of every mistake."""
    validator = jsonschema.Draft7Validator(workflow_schema())
    found = validator.iter_errors(tomllib.loads(text))
    return [(".".join(map(str, error.absolute_path)), error.message) for error in found]


def test_the_shipped_file_is_up_to_date() -> None:
    command = "mlxflow schema > mlxflow/cli/workflow.schema.json"
    assert SHIPPED.read_text() == schema_text(), f"{SHIPPED}: out of date. Run: {command}"


def test_it_is_a_schema_of_draft_7() -> None:
    jsonschema.Draft7Validator.check_schema(workflow_schema())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_workflow_of_the_repository_is_valid(path: Path) -> None:
    assert mistakes(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "train = {}",
        '[[quantize]]\nname = "a"\n[[quantize]]\nmatrix = { bits = [4, 8], "lora.rank" = [2] }',
        "[quantize]\nmatrix = { bits = [4, 8] }\nexclude = [{ bits = 8 }]",
        '[train]\nmatrix = { "model.num_layers" = [1, 2] }\nname = "n"',
        '[pretokenize]\nsources = ["a", { path = "b", weight = 2 }]',
        "[quantize]\nmax_kl = 0.5",
    ],
)
def test_variants_nested_keys_and_unions_are_valid(text: str) -> None:
    assert mistakes(text) == []


def test_a_number_without_limit_may_be_null_which_taplo_reads_infinity_as() -> None:
    keys = workflow_schema()["definitions"]["quantize"]["properties"]
    assert keys["max_kl"]["type"] == ["number", "null"]
    assert keys["calibration_rows"]["type"] == "integer"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[trian]", [("", "Additional properties are not allowed ('trian' was unexpected)")]),
        ("[train]\nnum_stesp = 3", [("train", "Additional properties are not allowed ('num_stesp' was unexpected)")]),
        ('[train]\nlog_every = "3"', [("train.log_every", "'3' is not of type 'integer'")]),
        ("[train]\nlora.rank = 0", [("train.lora.rank", "0 is less than the minimum of 1")]),
        ("train = 3", [("train", "3 is not of type 'object', 'array'")]),
        ("[[quantize]]", [("quantize.0", "'name' is a required property")]),
        (
            "[quantize]\nmatrix = { bits = [4, 9] }",
            [("quantize.matrix.bits.1", "9 is not one of [2, 3, 4, 5, 6, 8, 'auto']")],
        ),
        ('[workflow]\nmemory_limit = "much"', [("workflow.memory_limit", None)]),
    ],
)
def test_a_mistake_is_reported_at_its_key(text: str, found: list[tuple[str, str | None]]) -> None:
    seen = mistakes(text)
    assert [place for place, _ in seen] == [place for place, _ in found]
    assert all(message in (None, said) for (_, said), (_, message) in zip(seen, found, strict=True))


def test_every_key_is_described_and_has_its_default() -> None:
    definitions = workflow_schema()["definitions"]
    keys = {(name, key): schema for name, table in definitions.items() for key, schema in table["properties"].items()}
    assert not [place for place, schema in keys.items() if not schema.get("description")]
    assert keys["train", "log_every"]["default"] > 0
    assert definitions["train"]["description"].startswith("Train")
