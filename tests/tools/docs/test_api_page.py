from pathlib import Path

import mlxflow
from tests.conftest import REPOSITORY
from tools.docs.api_page import api_page


def test_every_public_name_has_a_section_and_nothing_else_has() -> None:
    lines = api_page(REPOSITORY).splitlines()
    assert [line[3:] for line in lines if line.startswith("## ")] == [
        name for name in mlxflow.__all__ if name != "__version__"
    ]


def test_signatures_and_sections_of_docstrings_are_shown(tmp_path: Path) -> None:
    text = api_page(REPOSITORY)
    assert "quantize_model_for_inference(" in text
    assert "- `batch_size`: rows per batch, B." in text
    assert "TokenFile.open(path: Path) -> Self" in text or "TokenFile.open(" in text
    assert "def __" not in text
