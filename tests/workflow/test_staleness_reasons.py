"""Reasons of bounded length: what is named, and what is counted."""

from mlxflow.workflow.staleness_reasons import (
    damage_reasons,
    input_reasons,
    setting_reasons,
    upstream_reasons,
)

MANY = [f"notes/{number:03}.txt" for number in range(300)]


def test_few_changed_files_are_named_in_order() -> None:
    before = {"a": "1", "b": "1", "artifacts/train/model.safetensors": "1", "d": "1"}
    now = {"a": "2", "artifacts/train/model.safetensors": "2", "c": "1", "d": None}
    assert sorted(input_reasons(before, now)) == [
        "artifacts/train/model.safetensors changed",
        "d is missing or damaged",
        "source a changed",
        "source b is gone",
        "source c is new",
    ]
    assert list(input_reasons(before, before)) == []


def test_many_changed_files_are_one_reason_of_each_kind() -> None:
    old, new = dict.fromkeys(MANY, "1"), dict.fromkeys(MANY, "2")
    named = "notes/000.txt, notes/001.txt, notes/002.txt and 297 more"
    assert list(input_reasons(old, new)) == [f"300 files changed: {named}"]
    assert list(input_reasons(old, {})) == [f"300 files are gone: {named}"]
    assert list(input_reasons({}, new)) == [f"300 files are new: {named}"]
    assert list(input_reasons(old, dict.fromkeys(MANY))) == [f"300 files are missing or damaged: {named}"]
    moved = input_reasons(old, {f"{name}.md": "1" for name in MANY[:2]} | dict.fromkeys(MANY[5:], "1"))
    assert list(moved) == [
        "5 files are gone: notes/000.txt, notes/001.txt, notes/002.txt and 2 more",
        "source notes/000.txt.md is new",
        "source notes/001.txt.md is new",
    ]


def test_control_characters_in_names_are_escaped() -> None:
    names = dict.fromkeys(["a\x1b[31m", "b", "c", "d"], "1")
    assert list(input_reasons({}, names)) == [r"4 files are new: a\x1b[31m, b, c and 1 more"]


def test_many_upstream_stages_are_one_reason() -> None:
    assert list(upstream_reasons(["a", "b"])) == ["because a runs", "because b runs"]
    assert list(upstream_reasons([f"q{n}" for n in range(40)])) == ["because 40 stages run: q0, q1, q2 and 37 more"]


def test_many_damaged_outputs_are_counted() -> None:
    lines = [f"{n} is missing" for n in range(9)]
    assert list(damage_reasons(lines[:3])) == lines[:3]
    assert list(damage_reasons(lines)) == [*lines[:3], "6 more of its files differ"]


def test_settings_are_named_by_their_keys() -> None:
    before = {"seed": 1, "version": 3, "config": {"lora": {"rank": 4}, "bits": 4, "old": 1}}
    now = {"seed": 1, "version": 4, "config": {"lora": {"rank": 8}, "bits": 4, "new": "x"}}
    assert list(setting_reasons("quantize:q4", before, now)) == [
        "quantize.lora.rank: 4 -> 8",
        'quantize.new: nothing -> "x"',
        "quantize.old: 1 -> nothing",
        "the stage's code: 3 -> 4",
    ]


def test_long_values_are_cut_to_the_part_around_their_first_difference() -> None:
    changed = [*MANY[:150], "another.txt", *MANY[151:]]
    (line,) = setting_reasons("pretokenize", {"config": {"sources": MANY}}, {"config": {"sources": changed}})
    old, new = line.removeprefix("pretokenize.sources: ").split(" -> ")
    assert old.startswith("...")
    assert '"notes/149.txt", "notes/150.txt"' in old
    assert '"notes/149.txt", "another.txt"' in new
    assert old.endswith("...")
    assert max(len(old), len(new)) == 106
    (line,) = setting_reasons("t", {"config": {"text": "a" * 300}}, {"config": {"text": "a" * 301}})
    old, new = line.removeprefix("t.text: ").split(" -> ")
    assert old != new
