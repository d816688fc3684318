"""The `[store]` table: what is refused, that a mistake shows no secret, and that it makes nothing stale."""

from pathlib import Path

import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.workflow.loader import load_workflow, resolved_toml
from mlxflow.workflow.store_table import of_text
from tests.conftest import write_workflow


def _mistakes(folder: Path, table: str) -> str:
    path = folder / "workflow.toml"
    path.write_text(f"[store]\n{table}\n")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path)
    return str(caught.value).replace(f"{path}: ", "")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("", "store.url: missing. Add url to [store]."),
        (
            'url = "ftp://host"',
            'store.url = "ftp://host": expected an address that begins with s3://, gs://, hf://datasets/ or file:///. '
            'Write one such as "s3://bucket/path"; credentials do not belong here.',
        ),
        (
            'url = "s3://AKIA123:very+secret@bucket/path?token=very"',
            'store.url = "s3://***@bucket/path?***": expected no user name, password, query or fragment. '
            'Write one such as "s3://bucket/path"; credentials do not belong here.',
        ),
        (
            'url = ["s3://AKIA123:very+secret@bucket/path"]',
            'store.url = ["s3://***@bucket/path"]: expected text. Use store.url = "" (the default) or remove the key.',
        ),
        (
            'url = "s3://bucket"\npush = "always"',
            'store.push = "always": expected one of "never", "auto". '
            'Use store.push = "never" (the default) or remove the key.',
        ),
        (
            'url = "s3://bucket"\nsecret_key = "very+secret"',
            "store.secret_key: unknown key. Known here: pull, push, url.",
        ),
    ],
)
def test_a_mistake_is_one_line_without_secrets(tmp_path: Path, table: str, expected: str) -> None:
    assert _mistakes(tmp_path, table) == expected


def test_a_store_makes_nothing_stale_and_is_shown_resolved(tmp_path: Path) -> None:
    write_workflow(tmp_path)
    path = tmp_path / "workflow.toml"
    before = [stage.node() for stage in load_workflow(path).stages]
    path.write_text(path.read_text() + '\n[store]\nurl = "s3://bucket/path"\n')
    workflow = load_workflow(path)
    assert [stage.node() for stage in workflow.stages] == before
    assert 'url = "s3://bucket/path"\npull = true\npush = "never"\n' in resolved_toml(workflow)


def test_the_table_of_a_text() -> None:
    assert of_text("[train]\n") is None
    table = of_text('\ufeff[store]\nurl = "s3://bucket"\n')
    assert table is not None
    assert table.url == "s3://bucket"
