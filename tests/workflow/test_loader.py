import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlxflow.messages.errors import CallError, WorkflowError
from mlxflow.workflow.loader import STAGES, load_workflow, resolved_toml


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mistakes(folder: Path, text: str) -> list[str]:
    (folder / "workflow.toml").write_text(text)
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    return str(caught.value).splitlines()


def test_an_empty_file_is_a_complete_workflow(folder: Path) -> None:
    (folder / "workflow.toml").write_text("")
    workflow = load_workflow(Path("workflow.toml"))
    expected = [name for name in STAGES if name not in ("export", "evaluate")]  # these are asked for
    assert [stage.task for stage in workflow.stages] == expected


def test_every_problem_is_reported_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = """
[train]
num_stepz = 3
batch_size = 0
[workflow]
sed = 1
[quantize]
bits = 7
"""
    assert mistakes(folder, text) == [
        "workflow.toml: train.num_stepz: unknown key. Did you mean train.num_steps?",
        'workflow.toml: train.batch_size = 0: expected "auto" or a whole number from 1 to 1_048_576. '
        'Use train.batch_size = "auto" (the default) or remove the key.',
        "workflow.toml: workflow.sed: unknown key. Did you mean workflow.seed?",
        'workflow.toml: quantize.bits = 7: expected one of "auto", 2, 3, 4, 5, 6, 8. '
        'Use quantize.bits = "auto" (the default) or remove the key.',
    ]


LONG = 300 * "a"

ONE_MISTAKE = {
    "[tarin]\nnum_steps = 1": "workflow.toml: tarin: unknown key. Did you mean train?",
    "colour = 1": "workflow.toml: colour: unknown key. "
    "Known here: benchmark, evaluate, export, pretokenize, profile, quantize, report, store, tracking, train, "
    "workflow.",
    "[train]\nbatchsize = 1": "workflow.toml: train.batchsize: unknown key. Did you mean train.batch_size?",
    "[quantize.q4]\nbits = 4": "workflow.toml: quantize.q4: unknown key. "
    'A variant is written as [[quantize]] with name = "q4".',
    '[[quantize]]\nname = "a"\n[quantize.q4]\nbits = 4': "workflow.toml: quantize[0].q4: unknown key. "
    'A variant is written as [[quantize]] with name = "q4".',
    "[train.lra]\nrank = 4": "workflow.toml: train.lra: unknown key. Did you mean train.lora?",
    "[train]\nzzz = 1": "workflow.toml: train.zzz: unknown key. Known here: adjust_every, batch_size, betas, "
    "checkpointing, constant_tokens_per_step, decay_steps, deterministic, document_mask, dynamic_batch_size, "
    "eval_every, final_learning_rate, fuse, fused_loss, grad_accum_steps, grow_below, input, keep, "
    "keep_checkpoints, kernels, lazy_eval_every, learning_rate, log_every, lora, max_bad_steps, "
    "max_batch_size, max_grad_norm, max_validation_rows, method, model, num_epochs, num_steps, "
    "optimizer, optimizer_options, patience, precision, prefetch_batches, replay, require_improvement, save_every, "
    "schedule, shrink_above, warmup_steps, weight_decay, workers.",
    "[train.model]\nlayers = 1": "workflow.toml: train.model.layers: unknown key. Did you mean train.model.num_layers?",
    'train = "fast"': 'workflow.toml: train = "fast": expected a table. '
    "Write [train] on a line of its own and its keys below it.",
    '[train]\nnum_steps = "many"': 'workflow.toml: train.num_steps = "many": '
    'expected "auto" or a whole number from 1 to 1_000_000_000. '
    'Use train.num_steps = "auto" (the default) or remove the key.',
    "[train]\nnum_steps = 2.5": "workflow.toml: train.num_steps = 2.5: "
    'expected "auto" or a whole number from 1 to 1_000_000_000. '
    'Use train.num_steps = "auto" (the default) or remove the key.',
    "[train]\nlearning_rate = -0.1": "workflow.toml: train.learning_rate = -0.1: "
    'expected "auto" or a number from 1e-12 to 1e+06. '
    'Use train.learning_rate = "auto" (the default) or remove the key.',
    "[train]\nlearning_rate = nan": "workflow.toml: train.learning_rate = nan: "
    'expected "auto" or a number from 1e-12 to 1e+06. '
    'Use train.learning_rate = "auto" (the default) or remove the key.',
    "[train.model]\nnum_heads = 3": "workflow.toml: train.model.hidden_size = 128: "
    "expected a multiple of twice num_heads = 3. Change one of the two.\n"
    "workflow.toml: train.model.num_kv_heads = 2: expected a divisor of num_heads = 3. Change one of the two.",
    "[pretokenize]\nholdout = 1.0": "workflow.toml: pretokenize.holdout = 1.0: expected a number over 0 and under 1. "
    "Use pretokenize.holdout = 0.02 (the default) or remove the key.",
    "[pretokenize]\nworkers = 0": "workflow.toml: pretokenize.workers = 0: expected a whole number from 1 to 256. "
    "Use pretokenize.workers = 8 (the default) or remove the key.",
    "[pretokenize]\nsources = []": "workflow.toml: pretokenize.sources = []: "
    "expected a list of at least 1, each text or a table. "
    'Use pretokenize.sources = ["builtin:python-stdlib"] (the default) or remove the key.',
    '[pretokenize]\nsources = ["no/such.txt"]': 'workflow.toml: pretokenize.sources = "no/such.txt": names no file. '
    "Name a file, a folder or a glob with text in it.",
    '[pretokenize]\nsources = ["*.md"]': 'workflow.toml: pretokenize.sources = "*.md": names no file. '
    "Name a file, a folder or a glob with text in it.",
    '[pretokenize]\nsources = ["builtin:novels"]': 'workflow.toml: pretokenize.sources = "builtin:novels": '
    "no such built-in corpus. Known: builtin:python-stdlib.",
    '[quantize]\nmode = "mxfp4"\ngroup_size = 64': ""
    'workflow.toml: quantize.group_size = 64: mode "mxfp4" needs group_size 32. '
    'Set group_size = 32 or mode = "affine".',
    '[quantize]\nmode = "mxfp8"\nbits = 4': 'workflow.toml: quantize.bits = 4: mode "mxfp8" needs bits 8. '
    'Set bits = 8 or mode = "affine".',
    "[quantize]\ngroup_size = 16": 'workflow.toml: quantize.group_size = 16: mode "affine" needs one of 32, 64, 128. '
    "Set group_size = 64.",
    '[quantize]\ninput = "tarin"': 'workflow.toml: quantize.input = "tarin": no stage before this one makes it. '
    "Known: train.",
    '[quantize]\ninput = "pretokenize"': 'workflow.toml: quantize.input = "pretokenize": makes no config.json. '
    "Known: train.",
    '[profile]\ninput = "pretokenize"': 'workflow.toml: profile.input = "pretokenize": makes no config.json. '
    "Known: train, quantize.",
    '[train]\ninput = "train"': 'workflow.toml: train.input = "train": reads from itself (train -> train). '
    "Name a stage that does not.",
    '[benchmark]\nmodels = ["quantize:q9"]': 'workflow.toml: benchmark.models = "quantize:q9": '
    "no stage before this one makes it. Known: train, quantize.",
    '[benchmark]\nmodels = ["quantise:*"]': 'workflow.toml: benchmark.models = "quantise:*": '
    "no stage before this one makes it. Known: pretokenize, train, quantize, export, evaluate, profile.",
    "[benchmark]\nbatch_sizes = [16, 0]": "workflow.toml: benchmark.batch_sizes = [16, 0]: "
    "expected a list of at least 1, each a whole number from 1 to 1_048_576. "
    "Use benchmark.batch_sizes = [16, 32, 64] (the default) or remove the key.",
    '[[quantize]]\nname = "a"\n[[quantize]]\nname = "a"': 'workflow.toml: quantize[1].name = "a": '
    "named twice in [[quantize]]. Give each variant a name of its own.",
    "[[quantize]]\nbits = 4": "workflow.toml: quantize[0].name: missing. "
    'Each [[quantize]] needs one, such as name = "q4".',
    '[[quantize]]\nname = "../q4"': 'workflow.toml: quantize[0].name = "../q4": '
    "expected letters, digits, '.', '_' and '-', at most 64. Write one such as \"q4\".",
    '[[quantize]]\nname = "x.partial"': 'workflow.toml: quantize[0].name = "x.partial": '
    "is a reserved name of mlxflow. Write another one.",
    '[[quantize]]\nname = "Report.toml"': 'workflow.toml: quantize[0].name = "Report.toml": '
    "is a reserved name of mlxflow. Write another one.",
    '[[quantize]]\nname = "x.partial.old"': 'workflow.toml: quantize[0].name = "x.partial.old": '
    "is a reserved name of mlxflow. Write another one.",
    "quantize = []": "workflow.toml: quantize = []: expected a table. Write [quantize] or remove the key.",
    "quantize = [4]": "workflow.toml: quantize[0] = 4: expected a table. "
    "Write [[quantize]] on a line of its own and its keys below it.",
    '[[quantize]]\nname = "Q4"\n[[quantize]]\nname = "q4"': 'workflow.toml: quantize[1].name = "q4": '
    'differs only by case from "Q4". Give each variant a name of its own.',
    '[quantize]\nname = "q4\\n"': 'workflow.toml: quantize.name = "q4\\n": '
    "expected letters, digits, '.', '_' and '-', at most 64. Write one such as \"q4\".",
    "[train]\nbetas = [0.9]": "workflow.toml: train.betas = [0.9]: "
    "expected a list of 2, each a number of at least 0 and under 1. "
    "Use train.betas = [0.9, 0.95] (the default) or remove the key.",
    "[[workflow]]\nseed = 1": "workflow.toml: workflow = [{ seed = 1 }]: expected a table. "
    "Write [workflow] on a line of its own and its keys below it.",
    '[pretokenize]\nsources = ["café/中\\t"]': 'workflow.toml: pretokenize.sources = "café/中\\t": names no file. '
    "Name a file, a folder or a glob with text in it.",
    '[pretokenize]\nsources = [""]': 'workflow.toml: pretokenize.sources = "": names no file. '
    "Name a file, a folder or a glob with text in it.",
    f'[pretokenize]\nsources = ["{LONG}"]': f'workflow.toml: pretokenize.sources = "{LONG}": '
    "cannot be looked up (File name too long). Name a file, a folder or a glob with text in it.",
    '[workflow]\nmemory_limit = "much"': 'workflow.toml: workflow.memory_limit = "much": expected text such as '
    "'12 GB'. Use workflow.memory_limit = \"80%\" (the default) or remove the key.",
    '[workflow]\nmemory_limit = "0%"': 'workflow.toml: workflow.memory_limit = "0%": expected more than 0 bytes. '
    'Use "80%" (the default).',
    '[workflow]\ndevice = "tpu"': 'workflow.toml: workflow.device = "tpu": expected one of "auto", "gpu", "cpu". '
    'Use workflow.device = "auto" (the default) or remove the key.',
    "[workflow]\nseed = true": "workflow.toml: workflow.seed = true: "
    "expected a whole number from 0 to 9_223_372_036_854_775_807. "
    "Use workflow.seed = 0 (the default) or remove the key.",
    "[train\nnum_steps = 3": "workflow.toml:1:7: not valid TOML (Expected ']' at the end of a table declaration). "
    "Fix the line.",
    "[train]\nnum_steps = 3\nnum_steps = 4\n": "workflow.toml:3:14: not valid TOML "
    "(Cannot overwrite a value). Fix the line.",
    "[train]\nnum_steps = 3\nnum_steps = 4": "workflow.toml:3: not valid TOML (Cannot overwrite a value). "
    "Fix the line or one before it.",
    "a = " + 5000 * "[": "workflow.toml: not valid TOML (nested too deeply). Fix the file.",
}


@pytest.mark.parametrize("text", ONE_MISTAKE)
def test_error_messages_of_a_workflow(folder: Path, text: str) -> None:
    assert "\n".join(mistakes(folder, text)) == ONE_MISTAKE[text]


def test_errors_of_every_kind_are_reported_in_the_order_of_the_file(folder: Path) -> None:
    text = """
[benchmark]
models = ["quantize:q9"]
[[quantize]]
name = "q4"
input = "tarin"
[tarin]
[pretokenize]
sources = ["gone"]
"""
    assert [line.partition(":")[2].partition(" =")[0].strip() for line in mistakes(folder, text)] == [
        "benchmark.models",
        "quantize[0].input",
        "tarin: unknown key. Did you mean train?",
        "pretokenize.sources",
    ]


@pytest.mark.parametrize(
    "variant", ['name = "q4"\nbits = 7', 'name = "q 4"', 'name = "q"\nmatrix = {}', 'name = "q4"\ninput = 3']
)
def test_a_reference_to_an_invalid_variant_is_no_second_error(folder: Path, variant: str) -> None:
    text = f'[[quantize]]\n{variant}\n[benchmark]\nmodels = ["quantize:q4", "quantize:q 4"]\n'
    assert len(mistakes(folder, text)) == 1


def test_an_invalid_table_causes_no_further_errors(folder: Path) -> None:
    text = '[[train]]\nname = "a"\n[quantize]\nbits = 7\n[profile]\ninput = "train:a"\n'
    text += '[benchmark]\ninput = "train:a"\nmodels = ["train:a"]'
    assert [line.partition(" =")[0] for line in mistakes(folder, text)] == ["workflow.toml: quantize.bits"]


def test_a_byte_order_mark_is_accepted(folder: Path) -> None:
    (folder / "workflow.toml").write_bytes(b"\xef\xbb\xbf[train]\nnum_steps = 7\n")
    assert "num_steps = 7" in resolved_toml(load_workflow(Path("workflow.toml")))


def test_a_file_that_cannot_be_read_is_an_error(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("file/workflow.toml"))
    assert str(caught.value) == "file/workflow.toml: cannot be read (Not a directory). Fix it, or name another."


@pytest.mark.parametrize("size", ["1 TiB", "12GB", "512 MiB", "80 %", "0.5gb"])
def test_a_memory_limit_is_a_share_or_a_size(folder: Path, size: str) -> None:
    (folder / "workflow.toml").write_text(f'[workflow]\nmemory_limit = "{size}"')
    assert load_workflow(Path("workflow.toml")).settings.memory_limit == size


def test_a_missing_file_is_an_error(folder: Path) -> None:
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("other.toml"))
    assert str(caught.value) == "other.toml: missing. Write one (an empty file works), or name another."


def test_a_file_that_is_not_utf_8_is_an_error(folder: Path) -> None:
    (folder / "workflow.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert str(caught.value) == "workflow.toml: byte 5 is not UTF-8. Save the file as UTF-8."


@pytest.mark.parametrize(("name", "expected"), [("empty", "is an empty folder"), ("blank", "all its files are empty")])
def test_a_source_without_text_is_an_error(folder: Path, name: str, expected: str) -> None:
    (folder / "empty").mkdir()
    (folder / "blank").mkdir()
    (folder / "blank" / "a.txt").touch()
    assert mistakes(folder, f'[pretokenize]\nsources = ["{name}"]') == [
        f'workflow.toml: pretokenize.sources = "{name}": {expected}. Name a file, a folder or a glob with text in it.'
    ]


def test_an_unknown_stage_is_an_error_with_the_known_stages(folder: Path) -> None:
    (folder / "workflow.toml").write_text('[[quantize]]\nname = "q4"\n[[quantize]]\nname = "q8"\nbits = 8')
    with pytest.raises(CallError) as caught:
        load_workflow(Path("workflow.toml")).find("quantize")
    assert str(caught.value) == (
        "quantize: no such stage in workflow.toml. Known: pretokenize, train, quantize:q4, quantize:q8."
    )


def test_each_variant_has_its_own_task_folder_and_settings(folder: Path) -> None:
    (folder / "workflow.toml").write_text('[[quantize]]\nname = "a"\n[[quantize]]\nname = "b"\nbits = 8\n[benchmark]')
    workflow = load_workflow(Path("workflow.toml"))
    first, second = workflow.find("quantize:a"), workflow.find("quantize:b")
    assert (first.folder.as_posix(), second.folder.as_posix()) == ("artifacts/quantize/a", "artifacts/quantize/b")
    assert first.settings() != second.settings()
    assert {"quantize:a", "quantize:b"} < workflow.find("benchmark").inputs.models.keys()  # type: ignore[attr-defined]


TWO = '[[train]]\nname = "a"\n[[train]]\nname = "b"\nnum_steps = 9\n'


def test_a_stage_with_one_variant_is_found_by_its_name_alone(folder: Path) -> None:
    later = "[quantize]\n[profile]\n[benchmark]\n[report]\n"
    (folder / "workflow.toml").write_text(f'[[pretokenize]]\nname = "p"\n[[train]]\nname = "a"\n{later}')
    workflow = load_workflow(Path("workflow.toml"))
    tasks = ["pretokenize:p", "train:a", "quantize", "profile", "benchmark", "report"]
    assert [one.task for one in workflow.stages] == tasks
    reads = {one.task: one.reads for one in workflow.members()}
    assert reads["train:a"] == ("pretokenize:p",)
    assert set(reads["quantize"]) == set(reads["profile"]) == {"pretokenize:p", "train:a"}
    assert set(workflow.find("benchmark").inputs.models) == {"train:a", "quantize"}  # type: ignore[attr-defined]
    assert workflow.find("train").task == "train:a"


def test_a_default_stage_with_an_ambiguous_input_is_left_out_with_the_variants(folder: Path) -> None:
    (folder / "workflow.toml").write_text(f'[workflow]\nstages = ["train", "quantize", "report"]\n{TWO}')
    workflow = load_workflow(Path("workflow.toml"))
    assert [one.task for one in workflow.stages] == ["pretokenize", "train:a", "train:b", "report"]
    line = 'workflow.toml: quantize.input = "train": expected one of its variants. Write "train:a" or "train:b".'
    assert workflow.left_out["quantize"] == [line]
    with pytest.raises(CallError) as caught:
        workflow.find("quantize")
    assert str(caught.value) == line


def test_profile_and_benchmark_take_the_first_of_several_train_variants_and_its_tokens(folder: Path) -> None:
    tokens = '[[pretokenize]]\nname = "x"\n[[pretokenize]]\nname = "y"\ncontext_length = 32\n'
    train = '[[train]]\nname = "a"\ninput = "pretokenize:y"\n[[train]]\nname = "b"\ninput = "pretokenize:x"\n'
    (folder / "workflow.toml").write_text(f"{tokens}{train}[profile]\nnum_steps = 9\n[benchmark]\n")
    workflow = load_workflow(Path("workflow.toml"))
    for name in ("profile", "benchmark"):
        config: Any = workflow.find(name).config
        assert (config.input, config.data) == ("train:a", "pretokenize:y")
    assert set(workflow.find("benchmark").inputs.models) == {"train:a", "train:b"}  # type: ignore[attr-defined]
    (folder / "resolved.toml").write_text(resolved_toml(workflow))
    assert resolved_toml(load_workflow(Path("resolved.toml"))) == resolved_toml(workflow)


def test_a_configured_stage_with_an_ambiguous_input_is_an_error_with_the_variants(folder: Path) -> None:
    assert mistakes(folder, f'{TWO}[quantize]\nbits = 4\n[benchmark]\ninput = "train:b"\nmodels = ["train"]\n') == [
        'workflow.toml: quantize.input = "train": expected one of its variants. Write "train:a" or "train:b".',
        'workflow.toml: benchmark.models = "train": expected one of its variants. '
        'Write "train:a" or "train:b" or "train:*".',
    ]


TABLES = {
    "": ["pretokenize", "train", "quantize", "profile", "benchmark", "report"],
    "[workflow]\nseed = 1": ["pretokenize", "train", "quantize", "profile", "benchmark", "report"],
    "[train]\nnum_steps = 9": ["pretokenize", "train"],
    "[report]": ["report"],
    "[quantize]\n[report]": ["pretokenize", "train", "quantize", "report"],
    '[[quantize]]\nname = "a"\nmodel = "owner/name"': ["quantize:a"],
    "[benchmark]": ["pretokenize", "train", "benchmark"],
    '[workflow]\nstages = ["train"]\n[profile]\n[quantize]': ["pretokenize", "train"],
    '[workflow]\nstages = ["quantize:b"]\n[[quantize]]\nname = "a"\n[[quantize]]\nname = "b"': [
        "pretokenize",
        "train",
        "quantize:b",
    ],
}


@pytest.mark.parametrize("text", TABLES)
def test_stages_with_a_table_are_built_and_those_they_read_from(folder: Path, text: str) -> None:
    (folder / "workflow.toml").write_text(text)
    assert [one.task for one in load_workflow(Path("workflow.toml")).stages] == TABLES[text]


def test_a_stage_that_is_not_built_is_an_error_that_says_how_to_build_it(folder: Path) -> None:
    (folder / "workflow.toml").write_text("[train]\nnum_steps = 9")
    with pytest.raises(CallError) as caught:
        load_workflow(Path("workflow.toml")).find("profile")
    assert str(caught.value) == (
        "profile: workflow.toml has no [profile] table, and no stage reads from it. Add it: its keys have defaults."
    )
    (folder / "workflow.toml").write_text('[workflow]\nstages = ["train"]\n[profile]')
    with pytest.raises(CallError) as caught:
        load_workflow(Path("workflow.toml")).find("profile")
    assert str(caught.value) == 'profile: workflow.toml does not build it. Add "profile" to workflow.stages.'


def test_a_mistyped_name_of_a_stage_to_build_is_an_error(folder: Path) -> None:
    assert mistakes(folder, '[workflow]\nstages = ["train", "profil"]') == [
        'workflow.toml: workflow.stages[1] = "profil": no such stage. '
        "Known: pretokenize, train, quantize, export, evaluate, profile, benchmark, report."
    ]


CHAIN = """
[[pretokenize]]
name = "base"
[[pretokenize]]
name = "chat"
context_length = 32
[[train]]
name = "qlora"
input = "pretokenize:chat"
method = "lora"
model = { from = "quantize:q4" }
[[train]]
name = "base"
input = "pretokenize:base"
[[train]]
name = "chat"
input = "pretokenize:chat"
model = { from = "train:base" }
[[quantize]]
name = "q4"
model = "train:chat"
[[quantize]]
name = "again"
model = "train:qlora"
requantize = true
"""


def test_a_model_may_come_from_another_stage_and_is_built_before(folder: Path) -> None:
    (folder / "workflow.toml").write_text(CHAIN)
    workflow = load_workflow(Path("workflow.toml"))
    assert [one.task for one in workflow.stages] == [
        "pretokenize:base",
        "pretokenize:chat",
        "train:base",
        "train:chat",
        "quantize:q4",
        "train:qlora",
        "quantize:again",
    ]
    reads = {one.task: set(one.reads) for one in workflow.members()}
    assert reads["pretokenize:chat"] == {"pretokenize:base"}  # the tokenizer follows the model
    assert reads["train:chat"] == {"pretokenize:chat", "train:base"}
    assert reads["quantize:q4"] == {"pretokenize:chat", "train:chat"}  # its tokens follow the model, too
    assert reads["train:qlora"] == {"pretokenize:chat", "quantize:q4"}
    assert (workflow.find("train:qlora").config.fuse, workflow.find("train:chat").config.fuse) == ("never", "auto")  # type: ignore[attr-defined]
    (folder / "resolved.toml").write_text(resolved_toml(workflow))
    assert resolved_toml(load_workflow(Path("resolved.toml"))) == resolved_toml(workflow)


def test_a_model_that_is_quantized_by_another_stage_is_not_quantized_again_unless_asked(folder: Path) -> None:
    assert mistakes(folder, CHAIN.replace("requantize = true", "")) == [
        'workflow.toml: quantize[1].model = "train:qlora": is quantized already, and what was lost does not come back. '
        "Name a dense model, or set requantize = true."
    ]


def test_stages_that_read_from_one_another_in_a_circle_are_an_error(folder: Path) -> None:
    text = '[[train]]\nname = "a"\nmodel = { from = "quantize" }\n[quantize]\ninput = "train:a"'
    assert mistakes(folder, text) == [
        'workflow.toml: train[0].model.from = "quantize": reads from itself (train:a -> quantize -> train:a). '
        "Name a stage that does not."
    ]


def test_a_model_of_another_stage_whose_tokenizer_is_another_one_is_an_error(folder: Path) -> None:
    text = CHAIN.replace("context_length = 32", "tokenizer = { vocab_size = 300 }")
    assert mistakes(folder, text)[0] == (
        'workflow.toml: train[2].model.from = "train:base": has the tokenizer of pretokenize:base, and its tokens are '
        'made with that of pretokenize:chat. Set pretokenize:chat.tokenizer.from = "pretokenize:base", '
        "or read tokens of another stage."
    )


def test_a_model_of_another_stage_with_fewer_positions_than_a_row_is_an_error(folder: Path) -> None:
    said = "is made for 64 positions, and the rows of pretokenize:chat have 100. Lower pretokenize:chat.context_length."
    assert mistakes(folder, CHAIN.replace("context_length = 32", "context_length = 100")) == [
        f'workflow.toml: train[2].model.from = "train:base": {said}',
        f'workflow.toml: train[0].model.from = "quantize:q4": {said}',
    ]


def test_a_mistyped_stage_of_a_model_is_one_mistake(folder: Path) -> None:
    assert mistakes(folder, '[[train]]\nname = "base"\n[[train]]\nname = "b"\nmodel = { from = "train:bsae" }\n') == [
        'workflow.toml: train[1].model.from = "train:bsae": no stage before this one makes it. Known: train:base.'
    ]


def test_a_folder_with_the_name_of_a_stage_is_an_error_where_either_may_be_meant(folder: Path) -> None:
    (folder / "train").mkdir()
    text = '[pretokenize]\nsources = ["builtin:python-stdlib"]\ntokenizer = { from = "train" }\n'
    assert mistakes(folder, text + "[train]\ninput = 'pretokenize'")[-1:] == [
        'workflow.toml: pretokenize.tokenizer.from = "train": reads from itself (pretokenize -> train -> pretokenize). '
        "Name a stage that does not."
    ]
    text = '[[quantize]]\nname = "a"\nmodel = "train"\n'
    assert mistakes(folder, text) == [
        'workflow.toml: quantize[0].model = "train": names a stage and a folder beside the workflow file. '
        'Write "./train" for the folder, or rename it to read from the stage.'
    ]


@pytest.mark.parametrize(
    ("table", "expected", "rules"),
    [
        ("", ("affine", 4, 64), []),
        ('mode = "symmetric"', ("symmetric", 4, 64), []),
        ('mode = "mxfp4"', ("mxfp4", 4, 32), []),
        ('mode = "mxfp8"', ("mxfp8", 8, 32), []),
        ('mode = "nvfp4"', ("nvfp4", 4, 16), []),
        ('bits = 3\nlayers = [{ match = "*", mode = "mxfp8" }]', ("affine", 3, 64), [("mxfp8", 8, 32)]),
        ('group_size = 32\nlayers = [{ match = "*", mode = "nvfp4" }]', ("affine", 4, 32), [("nvfp4", 4, 16)]),
        # what neither wrote: of the table where the modes have the same choices, else of the own mode
        (
            'bits = 3\nlayers = [{ match = "*", mode = "symmetric" }]',
            ("affine", 3, 64),
            [("symmetric", "same", "same")],
        ),
        ('mode = "mxfp8"\nlayers = [{ match = "*", mode = "affine" }]', ("mxfp8", 8, 32), [("affine", 4, 64)]),
        (
            'mode = "mxfp4"\ngroup_size = 32\nlayers = [{ match = "*", mode = "affine", bits = 6 }]',
            ("mxfp4", 4, 32),
            [("affine", 6, 32)],
        ),
        ('layers = [{ match = "*", bits = 8 }]', ("affine", 4, 64), [("same", 8, "same")]),
    ],
)
def test_a_mode_has_its_own_default_bits_and_group_size(
    folder: Path, table: str, expected: tuple[str, int, int], rules: list[tuple[object, ...]]
) -> None:
    (folder / "workflow.toml").write_text(f"[quantize]\n{table}\n")
    text = resolved_toml(load_workflow(Path("workflow.toml")))
    shown = tomllib.loads(text)["quantize"]
    assert tuple(shown[key] for key in ("mode", "bits", "group_size")) == expected
    assert [tuple(rule[key] for key in ("mode", "bits", "group_size")) for rule in shown["layers"]] == rules
    (folder / "resolved.toml").write_text(text)
    assert resolved_toml(load_workflow(Path("resolved.toml"))) == text


def test_a_modes_default_bits_give_the_same_artifact_as_explicit_ones(folder: Path) -> None:
    settings = []
    for table in ('mode = "mxfp4"', 'mode = "mxfp4"\nbits = 4\ngroup_size = 32'):
        (folder / "workflow.toml").write_text(f"[quantize]\n{table}\n")
        settings.append(load_workflow(Path("workflow.toml")).find("quantize").settings())
    assert settings[0] == settings[1]


def test_modes_of_a_matrix_have_their_own_group_sizes(folder: Path) -> None:
    (folder / "workflow.toml").write_text('[quantize]\nmatrix = { mode = ["affine", "mxfp4", "nvfp4"] }\n')
    tables = tomllib.loads(resolved_toml(load_workflow(Path("workflow.toml"))))["quantize"]
    assert [(one["name"], one["bits"], one["group_size"]) for one in tables] == [
        ("mode-affine", 4, 64),
        ("mode-mxfp4", 4, 32),
        ("mode-nvfp4", 4, 16),
    ]


def test_the_resolved_workflow_is_a_workflow_file_that_resolves_to_itself(folder: Path) -> None:
    (folder / "workflow.toml").write_text('[train]\nnum_steps = 50\n[[quantize]]\nname = "q8"\nbits = 8')
    resolved = resolved_toml(load_workflow(Path("workflow.toml")))
    (folder / "resolved.toml").write_text(resolved)
    assert resolved_toml(load_workflow(Path("resolved.toml"))) == resolved
    assert "num_steps = 50" in resolved
    assert "context_length = 64" in resolved


@pytest.mark.parametrize("prefix", ["~", "{home}", "../home"])
def test_every_path_of_a_workflow_may_be_absolute_of_the_home_folder_or_outside_of_the_project(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, project = tmp_path / "home", tmp_path / "project"
    for folder in (home / "texts", home / "model", project):
        folder.mkdir(parents=True)
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in (*(f"model/{name}" for name in names), "texts/a.txt", "t.jinja", "metrics.jsonl", "report.toml"):
        (home / name).write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    at = prefix.format(home=home)
    (project / "workflow.toml").write_text(
        f"""[pretokenize]
sources = ["{at}/texts"]
chat_template = "{at}/t.jinja"
tokenizer.from = "{at}/model"
[train]
model.from = "{at}/model"
replay = "{at}/metrics.jsonl"
[quantize]
model = "{at}/model"
[benchmark]
baseline = "{at}/report.toml"
"""
    )
    read = {
        one.name: {(project / path).resolve() for path in one.input_files if path.parts[0] != "artifacts"}
        for one in load_workflow(project / "workflow.toml").stages
    }
    model = {home / "model" / name for name in names}
    assert read["pretokenize"] == {home / "texts/a.txt", home / "t.jinja", *sorted(model)[2:]}
    assert read["train"] == {home / "metrics.jsonl", *model}
    assert read["quantize"] == model
    assert read["benchmark"] == {home / "report.toml"}
