"""What the project installs and runs that others wrote: pinned by hash, with no more rights than it needs."""

import importlib.util
import re
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.y*ml"))

#: Rights of single jobs: publishing by trusted publishing, and attesting what is published.
_MORE_RIGHTS = {"release.yml": {"publish": {"contents": "read", "id-token": "write", "attestations": "write"}}}

_PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+")


def _load(name: str) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((REPOSITORY / ".github/workflows" / name).read_text())
    return loaded


def _locked(name: str) -> dict[str, list[tuple[str, str, int]]]:
    """Return version, marker and number of hashes of what a lock file pins, by canonical name."""
    pinned: dict[str, list[tuple[str, str, int]]] = {}
    for part in re.split(r"\n(?=\S)", (REPOSITORY / name).read_text().strip()):
        if found := re.match(r"([\w.-]+)(?:\[\w+\])?==(\S+)(?: ; ([^\\\n]+))? \\", part):
            hashes = len(re.findall(r"--hash=sha256:[0-9a-f]{64}", part))
            pinned.setdefault(canonicalize_name(found[1]), []).append((found[2], found[3] or "", hashes))
        else:
            assert re.match(r"\s*#", part), f"{name}: {part!r} is not pinned"
    return pinned


def test_there_is_a_ci_workflow() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]


@pytest.mark.parametrize("name", [path.name for path in WORKFLOWS])
def test_every_action_is_pinned_by_commit_with_its_version_beside_it(name: str) -> None:
    lines = (REPOSITORY / ".github/workflows" / name).read_text().splitlines()
    uses = [line.partition("uses:")[2].strip() for line in lines if "uses:" in line]
    assert uses
    assert [one for one in uses if not _PINNED.fullmatch(one)] == []


@pytest.mark.parametrize("name", [path.name for path in WORKFLOWS])
def test_ci_workflows_have_read_only_permissions(name: str) -> None:
    workflow = _load(name)
    assert workflow["permissions"] == {"contents": "read"}
    more = {job: one["permissions"] for job, one in workflow["jobs"].items() if "permissions" in one}
    assert more == _MORE_RIGHTS.get(name, {})
    events = workflow[True]  # how YAML reads `on`
    assert not set(events) - {"push", "pull_request"}  # not pull_request_target, which has the rights of the project
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    checkouts = [step for step in steps if step.get("uses", "").startswith("actions/checkout@")]
    assert [step["with"]["persist-credentials"] for step in checkouts] == [False] * len(checkouts)
    assert checkouts


def test_a_release_is_built_and_tried_without_the_rights_to_publish_it() -> None:
    release = _load("release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}
    publish = release["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["environment"] == "release"
    used = [step["uses"].partition("@")[0] for step in publish["steps"]]
    assert used == ["actions/download-artifact", "actions/attest-build-provenance", "pypa/gh-action-pypi-publish"]
    assert [step for step in publish["steps"] if "run" in step] == []  # no code of the project beside those rights
    commands = "\n".join(step.get("run", "") for step in release["jobs"]["build"]["steps"])
    assert "--require-hashes -r requirements.lock" in commands
    assert 'test "$GITHUB_REF_NAME" = "v$version"' in commands
    assert "empty/bin/mlxflow build" in commands


def test_hooks_before_a_commit_are_the_checks_of_ci() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ci = (REPOSITORY / ".ci/run").read_text().splitlines()
    entries = [hook["entry"] for hook in hooks]
    assert {line.partition(" >")[0] for line in ci} >= set(entries) - {"python -m tools.docs --check"}
    assert {"ruff check .", "ruff format --check .", "mypy", "lint-imports"} <= set(entries)


@pytest.mark.parametrize("name", [path.name for path in WORKFLOWS])
def test_no_ci_command_interpolates_untrusted_text(name: str) -> None:
    steps = [step for job in _load(name)["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "${{" in step.get("run", "")] == []
    assert "secrets." not in (REPOSITORY / ".github/workflows" / name).read_text()


def test_the_ci_workflow_runs_the_local_ci_script() -> None:
    steps = _load("ci.yml")["jobs"]["build"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert "pip install -q --require-hashes -r requirements.lock" in (REPOSITORY / ".ci/run").read_text()
    assert "python3 .ci/audit.py" in (REPOSITORY / ".ci/run").read_text()


@pytest.mark.parametrize("name", ["requirements.lock", ".ci/audit.lock"])
def test_a_lock_pins_each_package_by_hash(name: str) -> None:
    assert [package for package, pins in _locked(name).items() if not all(hashes for _, _, hashes in pins)] == []


def test_the_requirements_lock_has_every_dependency() -> None:
    pinned = _locked("requirements.lock")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["test"]:
        wanted = Requirement(line)
        versions = [version for version, _, _ in pinned[canonicalize_name(wanted.name)]]
        assert all(wanted.specifier.contains(version) for version in versions), line


def _audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / ".ci/audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_audit_names_vulnerable_packages_and_those_not_looked_up() -> None:
    fine = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}
    unknown = {"name": "c", "skip_reason": "not found"}
    describe = _audit().describe
    assert describe({"dependencies": [fine]}, "lock") == (["lock: 1 packages looked up, 0 known vulnerabilities."], 0)
    assert describe({"dependencies": [unknown]}, "lock") == (["lock: 1 of 1 packages could not be looked up."], 0)
    assert describe({"dependencies": [fine, bad, unknown]}, "lock") == (
        [
            "lock: b 2: PYSEC-1. Fixed in: 2.1.",
            "lock: 1 of 3 packages could not be looked up.",
            "lock: 2 packages looked up, 1 known vulnerabilities.",
        ],
        1,
    )


def test_an_audit_without_a_network_reports_an_unknown_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = _audit()

    def fail(lock: object, folder: object) -> None:
        raise ValueError("no route to host")

    monkeypatch.setattr(audit, "_audit", fail)
    assert audit.main(REPOSITORY / "requirements.lock") == 0
    assert capsys.readouterr().out == "requirements.lock: not audited, nothing is known of it (no route to host).\n"
