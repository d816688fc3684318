import tomllib
from pathlib import Path

import tomli_w

from mlxflow.report.elements import Code, Note, Table
from mlxflow.report.formatting import UNKNOWN
from mlxflow.report.sections import environment
from tests.report.runs import edit, read


def _tables(root: Path) -> dict[str, Table]:
    blocks = environment.section([read(root)]).blocks
    return {block.caption: block for block in blocks if isinstance(block, Table)}


def test_equal_machine_facts_of_stages_are_shown_once(root: Path) -> None:
    edit(root, "profile", lambda report: report["run"].update(device_name="another", peak_rss_bytes=3 * 10**9))
    cells = {row[0]: row[1] for row in _tables(root)["Machine and versions"].rows}
    assert cells["Device"] == "stage; another"
    assert cells["Kind of device"] == "cpu"
    assert cells["seed"] == "0"
    assert cells["Most memory of a process"] == "3 GB (profile)"
    assert "BLAS" not in cells, "no stage reported one"


def test_the_lock_has_a_row_for_each_stage_with_a_short_commit(root: Path) -> None:
    path = root / "mlxflow.lock"
    lock = tomllib.loads(path.read_text())
    lock["train"] |= {
        "commit": "0123456789abcdef+changes",
        "outputs": {"artifacts/train/report.toml": "fedcba9876543210"},
    }
    del lock["profile"]
    path.write_text(tomli_w.dumps(lock))
    rows = {row[0]: row for row in _tables(root)["mlxflow.lock: what each stage was made of"].rows}
    assert rows["train"] == ("train", "0123456789ab+changes", "0", "stage", UNKNOWN, "stage", "fedcba987654")
    assert rows["profile"][1:] == (UNKNOWN,) * 6


def test_settings_are_shown_as_toml(root: Path) -> None:
    codes = [block for block in environment.section([read(root)]).blocks if isinstance(block, Code)]
    assert ("Settings of train", 'key = "stage"\n') in [(code.caption, code.text) for code in codes]


def test_a_missing_lock_is_noted(root: Path) -> None:
    (root / "mlxflow.lock").unlink()
    notes = [block.text for block in environment.section([read(root)]).blocks if isinstance(block, Note)]
    assert notes == ["mlxflow.lock is missing: it is written when a stage is built."]
