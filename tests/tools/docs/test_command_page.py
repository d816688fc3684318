from mlxflow.cli.command import VERBS
from tests.conftest import REPOSITORY
from tools.docs.command_page import command_page


def test_every_verb_has_a_section_with_its_arguments() -> None:
    text = command_page(REPOSITORY)
    assert [f"### `mlxflow {verb}`" in text for verb in VERBS] == [True] * len(VERBS)
    assert "| `-n, --processes N` | independent stages at a time |" in text
    assert "### `doit plan`" in text
    assert "| `--exit-code` | exit with 1 when something would run |" in text


def test_commands_that_stages_refuse_are_left_out() -> None:
    assert "strace" not in command_page(REPOSITORY)
