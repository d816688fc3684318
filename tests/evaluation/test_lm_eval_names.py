"""Names of lm-eval's tasks are listed once, kept for the installation, and checked before anything is trained."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxflow.evaluation import lm_eval_names
from mlxflow.messages.errors import WorkflowError
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.loader import load_workflow

NAMES = frozenset({"arc_easy", "arc_challenge", "mmlu"})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, and nothing remembered in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lm_eval_names.known_names.cache_clear()
    yield
    lm_eval_names.known_names.cache_clear()


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put a package of the name on the search path; return what grows with each listing."""
    listed: list[int] = []

    def list_names() -> frozenset[str]:
        listed.append(1)
        return NAMES

    (folder / "lm_eval").mkdir(exist_ok=True)
    (folder / "lm_eval/__init__.py").write_text("")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(lm_eval_names, "version", lambda name: "0.4.9")
    monkeypatch.setattr(lm_eval_names, "_listed", list_names)
    return listed


def test_names_are_listed_once_for_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = _install(tmp_path, monkeypatch)
    assert lm_eval_names.mistake("mmlu") is None
    assert lm_eval_names.mistake("arc_eazy") == ("is no task of lm-eval", "Did you mean arc_easy?")
    lm_eval_names.known_names.cache_clear()  # as another process
    assert lm_eval_names.mistake("arc_easy") is None
    assert len(listed) == 1
    lm_eval_names.known_names.cache_clear()
    monkeypatch.setattr(lm_eval_names, "version", lambda name: "0.5")
    assert lm_eval_names.mistake("arc_easy") is None
    assert len(listed) == 2


def test_a_damaged_list_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = _install(tmp_path, monkeypatch)
    assert lm_eval_names.mistake("mmlu") is None
    (file,) = (tmp_path / "cache/mlxflow").glob("lm-eval*")
    file.write_bytes(file.read_bytes()[:-9])
    lm_eval_names.known_names.cache_clear()
    assert lm_eval_names.mistake("mmlu") is None
    assert len(listed) == 2


def test_an_unknown_task_is_reported_when_the_workflow_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch)
    monkeypatch.setattr(Disk, "has_package", lambda *_: True)
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("a note")
    text = '[pretokenize]\nsources = ["notes.txt"]\n[train]\n[evaluate]\ntasks = ["mmlu", "zzz"]\n'
    Path("workflow.toml").write_text(text)
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert str(caught.value) == (
        'workflow.toml: evaluate.tasks[1].source = "zzz": is no task of lm-eval. '
        "List them: lm_eval ls tasks. A file's name ends in .jsonl or .yaml."
    )


def test_without_lm_eval_no_name_is_known_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_names, "find_spec", lambda name: None)
    assert lm_eval_names.mistake("zzz") is None
