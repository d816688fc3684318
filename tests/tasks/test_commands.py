"""plan, verify, reproduce, pack, unpack, cache-key and the lock file, on the cheap chain and on real stages."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from mlxflow.storage import state_files
from mlxflow.workflow.loader import STAGES
from tests.chain import Chain
from tests.conftest import doit


def _without_seconds(line: str) -> str:
    return line.partition("  (")[0]


# --- plan


def test_a_plan_without_stale_stages_says_so(chain: Chain) -> None:
    assert chain.doit("plan", "--exit-code") == (0, "nothing to do: 6 stages are fresh\n", "")


def test_a_plan_follows_the_chain_with_a_fact_for_each_stage(chain: Chain) -> None:
    chain.path(6).write_bytes(chain.path(6).read_bytes()[:-1])
    (chain.folder / "salt-s4").write_text("x")
    code, out, _ = chain.doit("plan")
    lines = out.splitlines()
    assert code == 0
    assert [_without_seconds(line) for line in lines[:-1]] == [
        's4: s4.salt: "" -> "x"',
        "s5: because s4 runs",
        "s6: artifacts/s6/a has 999 bytes instead of 1,000; because s5 runs",
    ]
    assert all(line.endswith(" s last time)") for line in lines[:-1])
    assert lines[-1].startswith("3 of 6 stages will run; 3 of them took ")
    assert chain.doit("plan", "--exit-code")[0] == 1


def test_a_plan_of_one_stage_includes_its_inputs(chain: Chain) -> None:
    (chain.folder / "source").write_bytes(b"another")
    code, out, _ = chain.doit("plan", "s2")
    assert code == 0
    assert [_without_seconds(line) for line in out.splitlines()[:-1]] == [
        "s1: source source changed",
        "s2: because s1 runs",
    ]
    assert chain.doit("plan", "s9")[::2] == (2, "s9: no such stage. Known: s1, s2, s3, s4, s5, s6.\n")


def test_a_plan_changes_nothing_and_matches_the_run(chain: Chain) -> None:
    chain.path(2).unlink()
    assert chain.doit("plan")[1].startswith("s2: artifacts/s2/a is missing; ") is False
    assert not chain.path(2).exists()
    assert chain.doit("plan")[1].startswith("s2: artifacts/s2/a is missing  (")
    assert chain.numbers_that_run() == [2]


def test_reasons_for_staleness_are_in_the_terms_of_the_workflow(job_copy: Path) -> None:
    assert doit(job_copy, "train").returncode == 0
    workflow = job_copy / "workflow.toml"
    text = workflow.read_text().replace("warmup_steps = 2", "warmup_steps = 2\nlearning_rate = 0.001")
    workflow.write_text(text.replace("[workflow]", "[workflow]\nseed = 3"))
    (job_copy / "notes/03.txt").write_text("another note")
    lines = dict(line.split(": ", 1) for line in doit(job_copy, "plan", "train").stdout.splitlines()[:-1])
    assert _without_seconds(lines["pretokenize"]) == "workflow.seed: 0 -> 3; source notes/03.txt changed"
    assert _without_seconds(lines["train"]) == (
        "train.learning_rate: 0.015 -> 0.001; workflow.seed: 0 -> 3; because pretokenize runs"
    )


def test_another_mlx_makes_every_stage_stale(chain: Chain) -> None:
    now = version("mlx")
    journal = chain.folder / "artifacts/.mlxflow/state.jsonl"
    journal.write_text(journal.read_text().replace(f'"mlx":"{now}"', '"mlx":"0.30.1"'))
    lines = [_without_seconds(line) for line in chain.doit("plan")[1].splitlines()[:-1]]
    changed = f'mlx: "0.30.1" -> "{now}"'
    assert lines == [f"s1: {changed}", *(f"s{i}: {changed}; because s{i - 1} runs" for i in range(2, 7))]


# --- verify


def test_verify_finds_damage_that_keeps_size_and_time(chain: Chain) -> None:
    assert chain.doit("verify") == (0, "6 files of 6 stages read, 0 damaged\n", "")
    path = chain.path(3)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    stat = path.stat()
    digests = chain.folder / "artifacts/.mlxflow/digests.json"
    stored = state_files.read(digests)
    key = next(name for name in stored["files"] if name.startswith(str(chain.folder)) and name.endswith("s3/a"))
    stored["files"][key][:4] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    digests.write_bytes(state_files.encode(stored))
    assert chain.numbers_that_run() == []  # as if the disk had lied
    assert chain.doit("verify") == (
        1,
        "artifacts/s3/a was changed after the run\n6 files of 6 stages read, 1 damaged\n",
        "",
    )


# --- the lock file


def test_the_lock_file_records_the_inputs_of_each_stage(chain: Chain) -> None:
    text = (chain.folder / "mlxflow.lock").read_text()
    lock = tomllib.loads(text)
    assert list(lock) == [f"s{i}" for i in range(1, 7)]
    for number in range(2, 7):
        table = lock[f"s{number}"]
        assert table["inputs"] == {
            f"artifacts/s{number - 1}/a": lock[f"s{number - 1}"]["outputs"][f"artifacts/s{number - 1}/a"]
        }
        assert "seconds" not in table
        assert {"mlx", "python", "device", "commit", "seed", "config"} <= table.keys()
    assert text.index("[s1]") < text.index("[s2]")


def test_an_unchanged_run_does_not_rewrite_the_lock_file(chain: Chain) -> None:
    before = (chain.folder / "mlxflow.lock").stat().st_mtime_ns
    assert chain.numbers_that_run() == []
    assert (chain.folder / "mlxflow.lock").stat().st_mtime_ns == before


# --- reproduce


def test_reproduce_confirms_equal_bytes_of_a_real_stage_and_keeps_the_artifact(job_copy: Path) -> None:
    assert doit(job_copy, "train").returncode == 0
    before = (job_copy / "artifacts/train/report.toml").read_bytes()
    result = doit(job_copy, "reproduce", "train")
    assert (result.returncode, result.stdout) == (0, "train: reproduced, every tensor is equal\n")
    assert (job_copy / "artifacts/train/report.toml").read_bytes() == before
    assert list((job_copy / "artifacts/.mlxflow").glob("reproduce-*")) == []


def test_reproduce_names_the_first_tensor_that_differs(job_copy: Path) -> None:
    assert doit(job_copy, "train").returncode == 0
    tokens = job_copy / "artifacts/pretokenize/train.safetensors"
    data = bytearray(tokens.read_bytes())
    for position in range(8192, len(data) // 2, 2):  # other tokens, of which the model knows every one
        data[position] ^= 1
    tokens.write_bytes(data)
    result = doit(job_copy, "reproduce", "train")
    assert (result.returncode, result.stdout) == (
        1,
        "train: artifacts/train/model.safetensors: tensor model.embed_tokens.weight differs\n",
    )


def test_measuring_stages_cannot_be_reproduced(job_copy: Path) -> None:
    result = doit(job_copy, "reproduce", "profile")
    assert (result.returncode, result.stderr) == (
        2,
        "profile: measures the machine; there is nothing to reproduce.\n",
    )


# --- pack and unpack


def test_an_artifact_moves_to_another_machine(chain: Chain, tmp_path: Path) -> None:
    assert chain.doit("pack", "s1", str(tmp_path / "s1.tar")) == (
        0,
        f"s1: 1 files packed into {tmp_path / 's1.tar'}\n",
        "",
    )
    other = Chain(tmp_path / "other")
    assert other.doit("unpack", str(tmp_path / "s1.tar"))[:2] == (0, "s1: 1 files unpacked into artifacts/s1\n")
    assert other.path(1).read_bytes() == chain.path(1).read_bytes()
    assert other.numbers_that_run() == [2, 3, 4, 5, 6]
    other.assert_correct()


def test_an_unpacked_artifact_of_other_settings_is_stale(chain: Chain, tmp_path: Path) -> None:
    assert chain.doit("pack", "s1", str(tmp_path / "s1.tar"))[0] == 0
    other = Chain(tmp_path / "other")
    (other.folder / "source").write_bytes(b"another source")
    assert other.doit("unpack", str(tmp_path / "s1.tar"))[0] == 0
    assert other.numbers_that_run() == [1, 2, 3, 4, 5, 6]
    other.assert_correct()


def test_equal_artifacts_give_equal_archives(chain: Chain, tmp_path: Path) -> None:
    for name in ("1.tar", "2.tar"):
        assert chain.doit("pack", "s2", str(tmp_path / name))[0] == 0
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_a_damaged_artifact_is_not_packed(chain: Chain, tmp_path: Path) -> None:
    chain.path(1).write_bytes(b"x" * 1000)
    assert chain.doit("pack", "s1", str(tmp_path / "s1.tar")) == (
        1,
        "",
        "artifacts/s1/a was changed after the run\ns1: its artifact was changed after its run. Run: mlxflow build s1\n",
    )
    assert not (tmp_path / "s1.tar").exists()


def test_a_hostile_archive_is_one_error_line_and_changes_nothing(chain: Chain, tmp_path: Path) -> None:
    archive = tmp_path / "s1.tar"
    assert chain.doit("pack", "s1", str(archive))[0] == 0
    archive.write_bytes(archive.read_bytes().replace(b'"settings": {', b'"settingz": {'))
    said = f"{archive}: its record is not valid (settings: missing). Pack it again.\n"
    assert chain.doit("unpack", str(archive)) == (2, "", said)
    assert chain.numbers_that_run() == []


def test_a_missing_archive_is_an_error(chain: Chain) -> None:
    assert chain.doit("unpack", "none.tar") == (2, "", "none.tar: missing. Name a file that doit pack wrote.\n")


# --- cache-key


def test_a_cache_key_changes_exactly_with_the_inputs_of_a_stage(job: Path) -> None:
    def keys() -> list[str]:
        return [doit(job, "cache-key", stage).stdout for stage in ("pretokenize", "train", "quantize:q4")]

    first = keys()
    assert first[2].startswith("quantize-q4-")
    assert not (job / "artifacts").exists()
    (job / "workflow.toml").write_text((job / "workflow.toml").read_text() + "# a comment\n")
    (job / "notes/03.txt").touch()
    assert keys() == first
    (job / "workflow.toml").write_text(
        (job / "workflow.toml").read_text().replace("warmup_steps = 2", "warmup_steps = 3")
    )
    second = keys()
    assert (second[0] == first[0], second[1] == first[1], second[2] == first[2]) == (True, False, False)
    (job / "notes/03.txt").write_text("another")
    assert not set(keys()) & set(second)


def test_commands_on_one_stage_refuse_several(job: Path) -> None:
    assert doit(job, "cache-key").stderr == "expected one stage. Use: doit cache-key STAGE\n"
    assert doit(job, "cache-key", "quantize").stderr == (
        "quantize: has variants. Name one of quantize:q4, quantize:q8.\n"
    )


def test_no_stage_has_the_name_of_a_command(monkeypatch: pytest.MonkeyPatch, job: Path) -> None:
    from doit.doit_cmd import DoitMain

    from mlxflow.messages.errors import WorkflowError
    from mlxflow.tasks import graph

    assert not set(STAGES) & set(DoitMain().get_cmds())
    with pytest.raises(WorkflowError) as caught:
        graph._refuse_command_names({"train", "plan", "clean"})
    assert str(caught.value).splitlines() == [
        "clean: is a doit command and cannot be a stage. Rename the stage.",
        "plan: is a doit command and cannot be a stage. Rename the stage.",
    ]


# --- state that is not valid


def test_no_verb_shows_a_traceback_for_an_invalid_record(chain: Chain) -> None:
    journal = chain.folder / "artifacts/.mlxflow/state.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if line["task"] == "s3" and line["record"]:
            line["record"]["_values_:"]["settings"] = None
    (chain.folder / "mlxflow.lock").unlink()
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reason = "the record of s3 is not valid state (settings: expected a table of settings)"
    said = f"artifacts/.mlxflow/state.jsonl: {reason}. It is as if it were not there.\n"
    assert chain.doit("verify") == (0, "5 files of 5 stages read, 0 damaged\n", said)
    code, out, err = chain.doit()
    assert (code, re.findall(r"^\.  (.*)$", out, re.MULTILINE), said in err) == (0, ["s3: never built"], True)
    assert chain.doit() == (0, "".join(f"-- s{i}\n" for i in range(1, 7)), "")


def test_a_forgotten_stage_is_neither_verified_nor_packed(chain: Chain, tmp_path: Path) -> None:
    assert chain.doit("forget", "s2")[0] == 0
    assert chain.doit("verify")[:2] == (0, "5 files of 5 stages read, 0 damaged\n")
    said = "s2: never built here. Run: mlxflow build s2\n"
    assert chain.doit("pack", "s2", str(tmp_path / "s2.tar")) == (1, "", said)
