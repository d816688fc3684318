"""Training that goes on from a model, whole or by adapters, and the mistakes one can make with it."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.evaluation.text_generation import Sampling, Writer
from mlxflow.messages.errors import ArtifactError, MlxflowError, WorkflowError
from mlxflow.storage.report_files import read_report
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import rest_in_matrix

HEAD = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 6
batch_size = 4
warmup_steps = 0
learning_rate = 1e-3
eval_every = 0
max_validation_rows = 8
"""


def _train(project: Path, folder: Path, text: str) -> Path:
    workflow = project / f"{folder.parent.name}.toml"
    workflow.write_text(HEAD + text)
    loaded = load_workflow(workflow)
    return execute_stage(loaded, loaded.find("train"), folder)


def _weights(folder: Path, name: str = "model.safetensors") -> dict[str, mx.array]:
    weights = cast("dict[str, mx.array]", mx.load(str(folder / name)))
    mx.eval(weights)
    return weights


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_is_saved_in_mlx_lms_form_and_fused_into_the_model(
    project: Path, tmp_path: Path, method: str
) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    made = _train(
        project,
        tmp_path / "made",
        f'method = "{method}"\nmodel.from = "artifacts/train"\n[train.lora]\nrank = 4\nkeys = ["self_attn.*"]\n',
    )
    base, fused = _weights(project / "artifacts" / "train"), _weights(made)
    changed = {name for name in base if not mx.array_equal(base[name], fused[name])}
    assert changed == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "qkvo"}
    config = json.loads((made / "adapters" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == method
    assert config["lora_parameters"]["rank"] == 4
    plain, _ = load_model(project / "artifacts" / "train")
    adapted = load_adapters(plain, str(made / "adapters"))
    whole, _ = load_model(made)
    tokens = mx.arange(1, 13)[None]
    adapted.eval()
    assert mx.allclose(adapted(tokens), whole(tokens), atol=1e-4)
    report = read_report(made / "report.toml")
    assert report["last_validation_perplexity"] < report["first_validation_perplexity"]


def test_adapters_fused_into_a_quantized_model_leave_it_quantized(project: Path, tmp_path: Path) -> None:
    text = 'method = "lora"\nmodel.from = "artifacts/quantize/q4"\nfuse = "requantize"\n'
    made = _train(project, tmp_path / "made", text)
    base, fused = _weights(project / "artifacts" / "quantize" / "q4"), _weights(made)
    assert {name: value.shape for name, value in base.items()} == {name: value.shape for name, value in fused.items()}
    assert json.loads((made / "config.json").read_text())["quantization"]["bits"] == 4
    assert any(not mx.array_equal(base[name], fused[name]) for name in base)


def test_full_training_starts_from_the_base_weights(project: Path, tmp_path: Path) -> None:
    made = _train(project, tmp_path / "made", 'model.from = "artifacts/train"\n')
    first = read_report(made / "report.toml")["first_validation_perplexity"]
    assert first == pytest.approx(
        read_report(project / "artifacts/train/report.toml")["last_validation_perplexity"], rel=0.2
    )
    assert not (made / "adapters").exists()


def test_only_the_last_blocks_get_adapters_if_configured(project: Path, tmp_path: Path) -> None:
    made = _train(project, tmp_path / "made", 'method = "lora"\nmodel.from = "artifacts/train"\nlora.num_layers = 1\n')
    assert all(name.startswith("model.layers.1.") for name in _weights(made / "adapters", "adapters.safetensors"))


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
def test_the_trained_model_has_the_dtype_of_training(project: Path, tmp_path: Path, precision: str) -> None:
    made = _train(project, tmp_path / "made", f'precision = "{precision}"\nmodel.from = "artifacts/train"\n')
    assert {value.dtype for value in _weights(made).values()} == {mx.bfloat16}
    assert json.loads((made / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("optimizer", ["sgd", "lion", "muon", "adafactor", "adam"])
def test_every_optimizer_can_finetune(project: Path, tmp_path: Path, optimizer: str) -> None:
    made = _train(project, tmp_path / "made", f'optimizer = "{optimizer}"\nschedule = "wsd"\ndecay_steps = 2\n')
    assert all(np.isfinite(np.array(value)).all() for value in _weights(made).values())


# --- mistakes


def _copy(project: Path, name: str) -> Path:
    return Path(shutil.copytree(project / "artifacts" / "train", project / name, dirs_exist_ok=True))


def _said(project: Path, folder: Path, text: str, kind: type[MlxflowError] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        _train(project, folder / "made", text)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_missing_tensor_of_the_model_is_named(project: Path, tmp_path: Path) -> None:
    folder = _copy(project, "lacking")
    weights = _weights(folder)
    weights.pop("model.norm.weight")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    assert "model.norm.weight" in _said(project, tmp_path, 'model.from = "lacking"\n')


def test_a_tensor_of_another_shape_is_named(project: Path, tmp_path: Path) -> None:
    folder = _copy(project, "wrong")
    weights = _weights(folder)
    weights["model.norm.weight"] = mx.zeros((3,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    assert "model.norm.weight" in _said(project, tmp_path, 'model.from = "wrong"\n')


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_context_longer_than_the_models_positions_is_an_error(project: Path, tmp_path: Path) -> None:
    folder = _copy(project, "short")
    _edit(folder, max_position_embeddings=8)
    said = _said(project, tmp_path, 'model.from = "short"\n')
    assert said == (
        f"train.model.from: {folder} is made for 8 positions, the rows have 16. Lower pretokenize.context_length."
    )


def test_tokens_of_another_tokenizer_are_an_error(project: Path, tmp_path: Path) -> None:
    folder = _copy(project, "foreign")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["!!"] = tokenizer["model"]["vocab"].pop("!")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert _said(project, tmp_path, 'model.from = "foreign"\n') == (
        f"train.model.from: the tokens were not made with the tokenizer of {folder}. "
        "Set pretokenize.tokenizer.from to the same folder."
    )


def test_all_weights_of_a_quantized_model_cannot_be_trained(project: Path, tmp_path: Path) -> None:
    said = _said(project, tmp_path, 'model.from = "artifacts/quantize/q4"\n')
    assert said.endswith('q4 is quantized. Set train.method = "lora", or name a dense model.')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('model.from = "nowhere/at/all"', 'train.model.from = "nowhere/at/all": no such folder. Name a folder with'),
        ('model.from = "notes"', 'train.model.from = "notes": has no config.json. Name a model folder.'),
        ('method = "lora"', 'train.method = "lora": adapters need a base model. Set model.from'),
        ("grow_below = 0.9", "train.grow_below = 0.9: expected less than shrink_above = 0.8. Change one of the two."),
        ('optimizer = "adam"\nweight_decay = 0.1', "train.weight_decay = 0.1: the optimizer 'adam' knows none. Set"),
        ("final_learning_rate = 1.0", "train.final_learning_rate = 1.0: expected at most learning_rate = 0.001."),
        (
            'checkpointing = "some"',
            'train.checkpointing = "some": expected one of "auto", "none", "layers", "pairs" or a whole',
        ),
        ('replay = "none.jsonl"', 'train.replay = "none.jsonl": names no file.'),
    ],
)
def test_contradicting_train_settings_are_an_error(project: Path, tmp_path: Path, text: str, expected: str) -> None:
    assert expected in _said(project, tmp_path, text + "\n", WorkflowError)


def test_a_layer_pattern_without_a_match_is_an_error(project: Path, tmp_path: Path) -> None:
    text = 'method = "lora"\nmodel.from = "artifacts/train"\nlora.keys = ["attn.*"]\n'
    said = _said(project, tmp_path, text, WorkflowError)
    assert said.startswith('train.lora.keys: "attn.*" names no layer. Known: mlp.down_proj, mlp.gate_proj, ')


def test_an_unknown_optimizer_option_is_an_error(project: Path, tmp_path: Path) -> None:
    assert _said(project, tmp_path, "optimizer_options = { momentum = 0.9 }\n") == (
        "train.optimizer_options.momentum: unknown to adamw. Known: bias_correction, eps."
    )


CHATML = """
[workflow]
seed = 0
[pretokenize]
sources = ["talks.jsonl"]
holdout = 0.2
chat_template = "chatml"
tokenizer = { from = "base", add_tokens = ["<|note|>"] }
[train]
num_steps = 3
model = { from = "base" }
"""


@pytest.fixture
def base_without_template(project: Path, tmp_path: Path) -> Path:
    """A folder with a base model, whose tokenizer has no template, and conversations beside it."""
    shutil.copytree(project / "artifacts" / "train", tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}))
    turns = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(40)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return tmp_path


def _run(folder: Path, text: str) -> Path:
    (folder / "workflow.toml").write_text(text)
    loaded = load_workflow(folder / "workflow.toml")
    execute_stage(loaded, loaded.find("pretokenize"))
    return execute_stage(loaded, loaded.find("train"))


def test_a_base_model_gets_a_template_by_name_and_its_tokens(base_without_template: Path) -> None:
    import mlx_lm
    from transformers import AutoTokenizer

    made = _run(base_without_template, CHATML)
    model, tokenizer = mlx_lm.load(str(made))
    size = json.loads((made / "config.json").read_text())["vocab_size"]
    assert size == json.loads((base_without_template / "base/config.json").read_text())["vocab_size"] + 3
    assert model.model.embed_tokens.weight.shape[0] == size
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in tokenizer.eos_token_ids
    assert end in json.loads((made / "generation_config.json").read_text())["eos_token_id"]
    prompt = [{"role": "user", "content": "say 3"}]
    opened = AutoTokenizer.from_pretrained(made)
    text = opened.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nsay 3<|im_end|>\n<|im_start|>assistant\n"
    ids = opened(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == opened.convert_tokens_to_ids("<|im_start|>") >= size - 3
    embedding = _weights(made)["model.embed_tokens.weight"]
    assert not mx.array_equal(embedding[end], embedding[opened.convert_tokens_to_ids("<|note|>")])  # it was trained


@pytest.mark.parametrize(
    ("name", "end"),
    rest_in_matrix([("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")], ("llama3", "<|eot_id|>")),
)
def test_a_model_that_gained_control_tokens_ends_its_answers_with_one(
    base_without_template: Path, name: str, end: str
) -> None:
    import mlx_lm

    answers = ("yes", "no it is not")
    turns = [
        [{"role": "user", "content": f"{'ab'[i % 2]} {i}"}, {"role": "assistant", "content": answers[i % 2]}]
        for i in range(60)
    ]
    lines = (json.dumps({"messages": turn}) + "\n" for turn in turns)
    (base_without_template / "talks.jsonl").write_text("".join(lines))
    config = base_without_template / "base/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 64}))
    text = CHATML.replace('"chatml"', f'"{name}"\ncontext_length = 64')
    steps = "num_steps = 90\nbatch_size = 8\nlearning_rate = 1e-2"
    made = _run(base_without_template, text.replace("num_steps = 3", steps))
    assert json.loads((made / "tokenizer_config.json").read_text())["eos_token"] == end
    writer = Writer(made)
    for letter, answer in zip("ab", answers, strict=True):
        ids = writer.chat_ids([{"role": "user", "content": f"{letter} 8"}])
        assert "".join(writer.write(ids, Sampling(30, 0.0, 0))) == answer
    model, tokenizer = mlx_lm.load(str(made))[:2]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a 8"}], add_generation_prompt=True)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=30) == "yes"


def test_adapters_beside_a_model_that_lacks_the_tokens_are_refused(base_without_template: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        _run(base_without_template, CHATML.replace("[train]", '[train]\nmethod = "lora"'))
    base = base_without_template / "base"
    assert str(caught.value) == (
        f'train.method = "lora": the tokens "<|im_start|>", "<|im_end|>", "<|note|>" are new to {base}, and adapters '
        'do not train their embeddings. Set train.method = "full", or use a template whose tokens the model has.'
    )
