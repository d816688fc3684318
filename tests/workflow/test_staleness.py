from pathlib import Path

import pytest

from mlxflow.storage.digests import DigestCache, digest_json
from mlxflow.storage.report_files import write_report
from mlxflow.workflow import staleness
from mlxflow.workflow.outputs import observe_outputs
from mlxflow.workflow.stage_node import Node


def _node(root: Path, task: str, *inputs: str, **settings: object) -> Node:
    folder = f"artifacts/{task}"
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "out.txt").write_text(task)
    return Node(task, "", root, folder, inputs, (f"{folder}/out.txt",), dict(settings), (), bound_device=None)


@pytest.fixture
def cache(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "digests.json")


def _record(node: Node, cache: DigestCache) -> dict[str, object]:
    """Return the record that doit keeps of a run."""
    return {
        "settings": staleness.observe_settings(node),
        "inputs": staleness.observe_inputs(node, cache),
        "outputs": observe_outputs(node, cache),
        "seconds": 1.5,
    }


def _provenance(node: Node, cache: DigestCache) -> dict[str, object]:
    """Return the record that the report of a run alone gives."""
    settings, inputs = staleness.observe_settings(node), staleness.observe_inputs(node, cache)
    digests = {"settings_digest": digest_json(settings), "inputs_digest": digest_json(inputs)}
    return staleness.record_of_report(digests)


@pytest.mark.parametrize("record_of", [_record, _provenance])
def test_changes_of_settings_and_inputs_are_found_from_the_record_and_from_the_report(
    record_of: object, tmp_path: Path, cache: DigestCache
) -> None:
    (tmp_path / "text").write_text("one")
    node = _node(tmp_path, "train", "text", seed=1)
    record = record_of(node, cache)  # type: ignore[operator]
    assert list(staleness.reasons(node, record, cache)) == []
    by_doit = record_of is _record
    other = _node(tmp_path, "train", "text", seed=2)
    changed = ["workflow.seed: 1 -> 2"] if by_doit else ["its settings, its code or MLX changed"]
    assert list(staleness.reasons(other, record, cache)) == changed
    (tmp_path / "text").write_text("another")
    assert list(staleness.reasons(node, record, cache)) == ["source text changed" if by_doit else "an input changed"]
    (tmp_path / "text").unlink()
    gone = "text is missing or damaged" if by_doit else "an input is missing or damaged"
    assert list(staleness.reasons(node, record, cache)) == [gone]


def test_without_record_and_report_a_stage_was_never_built(tmp_path: Path, cache: DigestCache) -> None:
    node = _node(tmp_path, "train")
    for record in ({}, staleness.record_of_report({})):
        assert list(staleness.reasons(node, record, cache)) == ["never built"]


def test_an_artifact_without_a_record_is_not_said_to_be_never_built(tmp_path: Path, cache: DigestCache) -> None:
    """Its run was interrupted between publication and record, or it is an earlier run's, or made by `mlxflow run`."""
    node = _node(tmp_path, "train", seed=1)
    digests = {"settings_digest": digest_json(staleness.observe_settings(node)), "inputs_digest": digest_json({})}
    report = tmp_path / node.folder / "report.toml"
    write_report(report, {"stage": digests})
    unrecorded = "its artifact has no record: its last run was interrupted, or doit did not start it"
    assert list(staleness.reasons(node, {}, cache)) == [unrecorded]
    other = _node(tmp_path, "train", seed=2)
    assert list(staleness.reasons(other, {}, cache)) == [unrecorded, "its settings, its code or MLX changed"]
    report.write_text("no = toml =")
    assert next(iter(staleness.reasons(node, {}, cache))) == unrecorded


def test_readers_of_a_stale_stage_are_stale(tmp_path: Path, cache: DigestCache) -> None:
    first = _node(tmp_path, "pretokenize", seed=1)
    second = _node(tmp_path, "train", *first.outputs)
    third = _node(tmp_path, "other")
    records = {node.task: _record(node, cache) for node in (first, second, third)}
    changed = _node(tmp_path, "pretokenize", seed=2)
    stale = staleness.find_stale([changed, second, third], lambda task: records[task], cache)
    assert [(one.node.task, one.own_reasons, one.upstream, one.seconds) for one in stale] == [
        ("pretokenize", ["workflow.seed: 1 -> 2"], [], 1.5),
        ("train", [], ["pretokenize"], 1.5),
    ]
    assert stale[1].reasons == ["because pretokenize runs"]
    ignored = staleness.find_stale([changed, second, third], lambda task: records[task], cache, "pretokenize".__eq__)
    assert ignored == []
