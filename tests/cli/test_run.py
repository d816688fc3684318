from pathlib import Path

from tests.conftest import STAGES, mlxflow


def test_a_stage_without_its_input_names_the_command_that_makes_it(job: Path) -> None:
    result = mlxflow(job, "run", "train")
    assert result.returncode == 2
    assert result.stderr == "artifacts/pretokenize: missing. Run: mlxflow build pretokenize\n"
    assert not (job / "artifacts/train").exists()


def test_an_unknown_stage_is_an_error_with_the_known_ones(job: Path) -> None:
    result = mlxflow(job, "run", "deploy")
    assert result.returncode == 2
    assert result.stderr == f"deploy: no such stage in workflow.toml. Known: {', '.join(STAGES)}.\n"


def test_a_file_in_place_of_the_artifacts_folder_is_one_line(job: Path) -> None:
    (job / "artifacts").write_text("a file")
    result = mlxflow(job, "run", "pretokenize")
    line = "artifacts/.mlxflow: Not a directory. Move away the file or folder of this name.\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)
    assert (job / "artifacts").read_text() == "a file"
