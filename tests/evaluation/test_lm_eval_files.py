"""What a task's YAML file reads is found without running its code."""

from pathlib import Path

import pytest

from mlxflow.evaluation.lm_eval_files import read_task_yaml

BASE = """
dataset_path: json
dataset_kwargs:
  data_files: {test: [a.jsonl, b.jsonl], train: "https://host/c.jsonl"}
process_docs: !function shared.utils.process
"""


def test_included_files_data_and_code_are_named_relative_to_the_task(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/base.yaml").write_text(BASE)
    (tmp_path / "more/shared.py").write_text("raise RuntimeError")
    (tmp_path / "own.yaml").write_text("task: own\ninclude: [more/base.yaml, gone.yaml]\n")
    found = read_task_yaml(tmp_path / "own.yaml")
    assert found.problem == ""
    assert found.name == "own"
    assert found.included == ["more/base.yaml", "gone.yaml"]
    assert found.data == ["a.jsonl", "b.jsonl"]
    assert found.code == ["more/shared/utils.py"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a", "is no table"),
        ("dataset_path: x", 'has no "task", the name'),
        ("task: [a, b]", 'has no "task", the name'),
        ("include: own.yaml\ntask: a", "includes itself"),
        ("task: !!python/object/apply:os.getcwd []", "is not valid YAML (could not determine a constructor"),
        (
            "task: a\ndataset_path: here",
            'dataset_path "here" is a local folder; write dataset_path: json, and its files',
        ),
        ("task: a\ndataset_kwargs: {data_dir: here}", 'data_dir "here" is a local folder; write dataset_path: json'),
        ("a: [", "is not valid YAML (while parsing"),
    ],
)
def test_what_is_no_task_is_said(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "here").mkdir()
    assert read_task_yaml(tmp_path / "own.yaml").problem.startswith(problem)
