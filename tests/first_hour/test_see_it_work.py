"""The first hour of a user who wants to see it work."""

import pytest

from tests.first_hour.conftest import Newcomer

pytestmark = pytest.mark.first_hour


def test_two_commands_make_a_model_its_quantized_form_and_the_page(newcomer: Newcomer) -> None:
    said = newcomer.types("mlxflow init hello && cd hello && mlxflow build")
    assert "mlxflow build" in said
    newcomer.assert_improved("hello")
    assert (newcomer.folder / "hello/artifacts/index.html").stat().st_size > 50_000
    text = newcomer.types("cd hello && mlxflow generate artifacts/quantize/q4 --prompt 'def ' --max-tokens 20")
    assert len(text) > 20
    assert newcomer.is_fresh("hello")
