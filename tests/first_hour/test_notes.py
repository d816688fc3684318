"""The first hour of a user with a folder of notes."""

import shutil

import pytest

from tests.first_hour.conftest import EXAMPLES, Newcomer

pytestmark = pytest.mark.first_hour


def test_a_folder_of_notes_becomes_a_model_that_is_better_than_at_the_start(newcomer: Newcomer) -> None:
    newcomer.types("mlxflow init mine --template notes")
    shutil.copytree(EXAMPLES / "notes/notes", newcomer.folder / "mine/notes")
    newcomer.types("cd mine && mlxflow build train report")
    newcomer.assert_improved("mine")
    figures = newcomer.report("mine/artifacts/train")
    assert any("validation" in line for line in figures["warnings"])  # twelve notes hold out too little to measure on
    text = newcomer.types("cd mine && mlxflow generate artifacts/train --prompt 'The ' --max-tokens 20")
    assert len(text) > 10
