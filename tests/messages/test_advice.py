import re

from mlxflow.messages.advice import advise_build
from tests.conftest import REPOSITORY


def test_the_advised_command_needs_no_dodo_py() -> None:
    assert advise_build("quantize:q4") == "Run: mlxflow build quantize:q4"


def test_no_message_advises_to_build_by_doit() -> None:
    files = [*(REPOSITORY / "mlxflow").rglob("*.py"), *(REPOSITORY / "tasks").glob("*.py")]
    advice = re.compile(r"Run: doit [a-z{]")
    assert [path.name for path in files if advice.search(path.read_text())] == []
