from mlxflow.cli.key_reference import reference
from tests.conftest import REPOSITORY


def test_the_readme_holds_every_key() -> None:
    table = reference()
    assert "| `train.model.num_layers` | `2` | a whole number from 1 to 1000 | transformer blocks |" in table
    assert (
        f"<!-- python -m mlxflow.cli.key_reference -->\n{table}<!-- end -->" in (REPOSITORY / "README.md").read_text()
    )
