"""Adapters beside a quantized model: what each value of `train.fuse` leaves in the files, and who opens them how."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from mlxflow.evaluation.text_generation import Sampling, Writer, generate
from mlxflow.messages.errors import MlxflowError
from mlxflow.models import model_folder
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.report_files import read_report
from mlxflow.tasks import archive
from mlxflow.tasks.graph import load_nodes
from mlxflow.workflow import outputs, staleness
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import mlxflow, rest_in_matrix
from tests.independent import LOSS_TOLERANCE, open_with_mlx_lm, validation_loss

MAX_ROWS = 24

HEAD = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
"""

TRAIN = f"""
[train]
num_steps = 8
batch_size = 4
warmup_steps = 0
learning_rate = 5e-4
eval_every = 0
max_validation_rows = {MAX_ROWS}
"""


@pytest.fixture(scope="module")
def project(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens, and with the trained model in 2 and in 4 bits."""
    folder = tmp_path_factory.mktemp("fuse")
    for name in ("notes", "artifacts/pretokenize", "artifacts/train"):
        shutil.copytree(built / name, folder / name)
    shutil.copytree(built / "artifacts/quantize/q4", folder / "q4")
    _run(folder, "quantize", "[quantize]\nbits = 2\n", folder / "q2")
    return folder


def _run(folder: Path, stage: str, text: str, into: Path) -> Path:
    path = folder / "workflow.toml"
    path.write_text(HEAD + text)
    workflow = load_workflow(path)
    return execute_stage(workflow, workflow.find(stage), into)


def _train(folder: Path, into: Path, text: str) -> Path:
    return _run(folder, "train", TRAIN + text, into)


def _problems(folder: Path, into: Path, text: str) -> str:
    with pytest.raises(MlxflowError) as caught:
        _train(folder, into, text)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.fixture(scope="module")
def adapted(project: Path) -> Path:
    """The artifact of LoRA beside the 2-bit model, its adapters left where they are."""
    return _train(project, project / "adapted", 'method = "lora"\nmodel.from = "q2"\n')


def _loss(project: Path, model: Any) -> float:
    return validation_loss(model, project / "artifacts/pretokenize/validation.safetensors", MAX_ROWS)


def _weights(file: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(file)))


@pytest.mark.parametrize(
    ("base", "method"), rest_in_matrix(itertools.product(["q2", "q4"], ["lora", "dora"]), ("q4", "lora"))
)
def test_each_value_of_fuse_is_measured_on_its_files(project: Path, tmp_path: Path, base: str, method: str) -> None:
    losses, reports = {}, {}
    for fuse in ("never", "requantize", "dense"):
        text = f'method = "{method}"\nmodel.from = "{base}"\nfuse = "{fuse}"\n'
        made = _train(project, tmp_path / fuse, text)
        reports[fuse] = read_report(made / "report.toml")
        losses[fuse] = math.log(reports[fuse]["last_validation_perplexity"])
        assert losses[fuse] == pytest.approx(_loss(project, open_with_mlx_lm(made)[0]), abs=LOSS_TOLERANCE["fp32"])
        assert reports[fuse]["fuse"] == fuse
        config = json.loads((made / "config.json").read_text())
        assert ("quantization" in config, (made / "adapters").is_dir()) == (fuse != "dense", fuse != "never")
    trained = math.log(reports["never"]["trained_validation_perplexity"])
    assert losses["never"] == pytest.approx(trained, abs=LOSS_TOLERANCE["fp32"])
    assert losses["dense"] == pytest.approx(losses["never"], abs=LOSS_TOLERANCE["fp32"])
    assert losses["requantize"] > trained + 100 * LOSS_TOLERANCE["fp32"]
    before = math.log(reports["never"]["first_validation_perplexity"])
    kept = (before - losses["requantize"]) / (before - trained)
    assert reports["requantize"]["gain_kept"] == pytest.approx(kept)
    assert kept < (0.2 if base == "q2" else 0.9)


def test_dense_and_unfused_agree_in_bf16(project: Path, tmp_path: Path) -> None:
    losses = []
    for fuse in ("never", "dense"):
        text = f'method = "lora"\nprecision = "bf16"\nmodel.from = "q2"\nfuse = "{fuse}"\n'
        made = _train(project, tmp_path / fuse, text)
        losses.append(math.log(read_report(made / "report.toml")["last_validation_perplexity"]))
        assert losses[-1] == pytest.approx(_loss(project, open_with_mlx_lm(made)[0]), abs=LOSS_TOLERANCE["bf16"])
    assert losses[0] == pytest.approx(losses[1], abs=LOSS_TOLERANCE["bf16"])


def test_requantizing_adapters_is_warned_about(
    project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = _train(project, tmp_path / "made", 'method = "lora"\nmodel.from = "q2"\nfuse = "requantize"\n')
    report = read_report(made / "report.toml")
    first, trained, last = (f"{report[f'{one}_validation_perplexity']:.4g}" for one in ("first", "trained", "last"))
    assert (
        f'train.fuse = "requantize": the artifact keeps {report["gain_kept"]:.0%} of what training gained: perplexity '
        f'{first} before, {trained} trained, {last} in the files. train.fuse = "never" keeps all of it.\n'
    ) in capfd.readouterr().err


# --- the default


@pytest.mark.parametrize(("base", "expected"), [("artifacts/train", "dense"), ("q4", "never")])
def test_the_default_of_fuse_follows_from_the_model(project: Path, base: str, expected: str) -> None:
    path = project / "workflow.toml"
    path.write_text(HEAD + TRAIN + f'method = "lora"\nmodel.from = "{base}"\n')
    result = mlxflow(project, "check")
    assert result.returncode == 0, result.stderr
    assert f'\nfuse = "{expected}"\n' in result.stdout
    names = {path.relative_to("artifacts/train").as_posix() for path in load_workflow(path).find("train").outputs}
    where = "" if expected == "never" else "adapters/"
    assert {f"{where}adapters.safetensors", f"{where}adapter_config.json"} <= names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'fuse = "never"',
            'train.fuse = "never": method = "full" trains no adapters. Remove the key, or set method = "lora".',
        ),
        (
            'fuse = "requantize"\nmethod = "lora"\nmodel.from = "artifacts/train"',
            'train.fuse = "requantize": artifacts/train is dense. Set fuse = "dense".',
        ),
    ],
)
def test_a_value_of_fuse_that_contradicts_the_model_is_refused(
    project: Path, tmp_path: Path, text: str, expected: str
) -> None:
    said = _problems(project, tmp_path / "made", text + "\n")
    assert said.partition("workflow.toml: ")[2] == expected


# --- who opens the artifact


def test_the_unfused_artifact_is_the_base_with_adapters_beside_it(project: Path, adapted: Path) -> None:
    base, kept = (_weights(folder / "model.safetensors") for folder in (project / "q2", adapted))
    assert {name: mx.array_equal(value, kept[name]).item() for name, value in base.items()} == dict.fromkeys(base, True)
    assert kept.keys() == base.keys()
    assert read_report(adapted / "report.toml")["parameters"] == model_folder.num_parameters(
        model_folder.load(project / "artifacts/train")[0]
    )


def test_generate_writes_what_mlx_lm_writes_with_the_adapters(project: Path, adapted: Path) -> None:
    from mlx_lm import load, stream_generate

    def written(adapters: Path | None) -> str:
        model, tokenizer, *_ = load(str(adapted), adapter_path=str(adapters) if adapters else None)
        prompt = tokenizer.encode("note 3 line")
        tokens = [one.token for one in stream_generate(model, tokenizer, prompt, max_tokens=24)]
        return str(tokenizer.decode([*prompt, *tokens]))

    _, texts = generate(adapted, prompt="note 3 line", sampling=Sampling(24, 0.0, 0), raw=True)
    assert "".join(texts) == written(adapted)
    assert written(None) != written(adapted)


def test_mlx_lm_fuses_the_artifact_into_the_same_dense_model(
    project: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm import fuse

    options = {"--model": adapted, "--adapter-path": adapted, "--save-path": tmp_path / "fused"}
    words = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr("sys.argv", ["fuse", *words, "--dequantize"])
    fuse.main()
    ours = _train(project, tmp_path / "ours", 'method = "lora"\nmodel.from = "q2"\nfuse = "dense"\n')
    fused, expected = (_weights(folder / "model.safetensors") for folder in (tmp_path / "fused", ours))
    assert fused.keys() == expected.keys()
    assert all(mx.array_equal(value, expected[name]).item() for name, value in fused.items())


CHAIN = (
    TRAIN
    + """
method = "lora"
model.from = "q2"
[quantize]
bits = 8
requantize = true
max_validation_rows = 24
[profile]
suggestions = false
batch_size = 4
num_steps = 2
[benchmark]
models = ["train", "quantize"]
batch_sizes = [2]
num_steps = 1
convergence_steps = 2
max_validation_rows = 24
prompt_lengths = [4]
[report]
"""
)


@pytest.fixture(scope="module")
def chain(project: Path, adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workflow that trains beside the 2-bit model; its train stage is built."""
    folder = tmp_path_factory.mktemp("chain")
    for name in ("notes", "q2", "artifacts/pretokenize"):
        shutil.copytree(project / name, folder / name)
    shutil.copytree(adapted, folder / "artifacts/train")
    return folder


def _stage(chain: Path, stage: str) -> dict[str, Any]:
    return read_report(_run(chain, stage, CHAIN, chain / "artifacts" / stage) / "report.toml")


def test_every_later_stage_reads_the_trained_model(chain: Path) -> None:
    trained = read_report(chain / "artifacts/train/report.toml")["last_validation_perplexity"]
    base = read_report(chain / "q2/report.toml")["quality"]["perplexity"]
    assert trained < 0.9 * base
    quality = _stage(chain, "quantize")["quality"]
    assert quality["dense_perplexity"] == pytest.approx(trained, rel=LOSS_TOLERANCE["fp32"])
    assert quality["perplexity"] == pytest.approx(trained, rel=0.02)  # 8 bits of the trained model
    profiled = _stage(chain, "profile")
    assert profiled["settings"]["precision"] == "fp32"
    assert profiled["model_bytes"] == sum(
        value.nbytes
        for name in ("model", "adapters")
        for value in _weights(chain / f"artifacts/train/{name}.safetensors").values()
    )
    rows = {row["model"]: row for row in _stage(chain, "benchmark")["models"]}
    assert rows["train"]["perplexity"] == pytest.approx(trained, rel=LOSS_TOLERANCE["fp32"])
    sizes = [(chain / f"artifacts/train/{name}.safetensors").stat().st_size for name in ("model", "adapters")]
    assert rows["train"]["model_bytes"] == sum(sizes)
    samples = {one["model"]: one for one in _stage(chain, "report")["samples"]}
    sample = samples["train"]
    writer = Writer(chain / "artifacts/train")
    assert sample["text"] == "".join(writer.write(writer.text_ids(sample["prompt"]), Sampling(48, 0.8, _sample_seed())))


def _sample_seed() -> int:
    from mlxflow.storage.run_context import derive_seed

    return derive_seed(0, "report.samples")


def test_quantize_refuses_the_unfused_artifact_unless_configured(chain: Path) -> None:
    text = CHAIN.replace("requantize = true", "requantize = false")
    path = chain / "workflow.toml"
    path.write_text(HEAD + text)
    with pytest.raises(MlxflowError) as caught:
        load_workflow(path)
    assert caught.value.exit_code == 2
    assert str(caught.value).partition("workflow.toml: ")[2] == (
        'quantize.input = "train": is quantized already, and what was lost does not come back. Set train.fuse = '
        '"dense", or requantize = true.'
    )
    path.write_text(HEAD + text.replace('"lora"', '"lora"\nfuse = "dense"'))
    load_workflow(path)


def test_with_a_quantized_base_model_the_quantize_stage_is_left_out(chain: Path) -> None:
    path = chain / "workflow.toml"
    stages = 'stages = ["train", "quantize", "profile", "benchmark", "report"]'
    path.write_text(f"[workflow]\n{stages}\n" + HEAD + TRAIN + 'method = "lora"\nmodel.from = "q2"\n')
    assert [one.task for one in load_workflow(path).stages] == [
        "pretokenize",
        "train",
        "profile",
        "benchmark",
        "report",
    ]


# --- trained further


def test_adapters_are_trained_further(project: Path, adapted: Path, tmp_path: Path) -> None:
    made = _train(project, tmp_path / "made", 'method = "lora"\nmodel.from = "adapted"\n')
    before, after = (read_report(folder / "report.toml") for folder in (adapted, made))
    assert after["first_validation_perplexity"] == pytest.approx(
        before["last_validation_perplexity"], rel=LOSS_TOLERANCE["fp32"]
    )
    assert after["last_validation_perplexity"] < before["last_validation_perplexity"]
    assert math.log(after["last_validation_perplexity"]) == pytest.approx(
        _loss(project, open_with_mlx_lm(made)[0]), abs=LOSS_TOLERANCE["fp32"]
    )
    base, kept = (_weights(folder / "model.safetensors") for folder in (project / "q2", made))
    assert all(mx.array_equal(value, kept[name]).item() for name, value in base.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('method = "full"', 'train.model.from: {} is quantized. Set train.method = "lora", or name a dense model.'),
        (
            'method = "dora"',
            'train.method = "dora": {} has adapters with "lora", and these are trained further. Set train.method = '
            '"lora", or name a model without adapters.',
        ),
        (
            'method = "lora"\nlora.rank = 4',
            "train.lora.rank = 4: {} has adapters with 8, and these are trained further. Set train.lora.rank = 8, or "
            "name a model without adapters.",
        ),
        (
            'method = "lora"\nlora.num_layers = 1',
            "train.lora: {} has adapters beside other layers than lora.keys and lora.num_layers name, and these are "
            "trained further. Restore both, or name a model without adapters.",
        ),
    ],
)
def test_adapters_of_another_shape_are_refused(
    project: Path, adapted: Path, tmp_path: Path, text: str, expected: str
) -> None:
    said = _problems(project, tmp_path / "made", f'model.from = "adapted"\n{text}\n')
    assert said == expected.format(adapted)


def test_adapters_beside_a_dense_model_become_weights_that_are_trained_further(project: Path, tmp_path: Path) -> None:
    first = _train(project, project / "beside", 'method = "lora"\nmodel.from = "artifacts/train"\nfuse = "never"\n')
    assert (first / "adapters.safetensors").is_file()
    made = _train(project, tmp_path / "made", 'model.from = "beside"\n')
    before, after = (read_report(folder / "report.toml") for folder in (first, made))
    assert after["first_validation_perplexity"] == pytest.approx(
        before["last_validation_perplexity"], rel=LOSS_TOLERANCE["fp32"]
    )
    assert not (made / "adapters.safetensors").exists()


def test_a_deleted_adapter_makes_the_stage_stale(chain: Path) -> None:
    (chain / "workflow.toml").write_text(HEAD + CHAIN)
    node = next(node for node in load_nodes(chain / "workflow.toml", chain / "none") if node.task == "train")
    cache = DigestCache(chain / "digests.json")
    record = {"outputs": outputs.observe_outputs(node, cache)}
    assert list(outputs.damaged_outputs(node, record, cache)) == []
    for name in ("adapters.safetensors", "adapter_config.json"):
        file = chain / "artifacts/train" / name
        kept = file.read_bytes()
        file.unlink()
        assert list(outputs.damaged_outputs(node, record, cache)) == [f"artifacts/train/{name} is missing"]
        file.write_bytes(kept)


def test_a_changed_adapter_makes_every_reader_stale(chain: Path) -> None:
    (chain / "workflow.toml").write_text(HEAD + CHAIN)
    adapters = {"artifacts/train/adapters.safetensors", "artifacts/train/adapter_config.json"}
    nodes = load_nodes(chain / "workflow.toml", chain / "none")
    readers = {node.task for node in nodes if adapters <= set(staleness.files_read(node))}
    assert readers == {"quantize", "profile", "benchmark", "report"}


@pytest.mark.parametrize(("base", "expected"), [("artifacts/train", "dense"), ("q4", "never")])
def test_a_model_of_the_hub_decides_when_it_is_there(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, expected: str
) -> None:
    monkeypatch.setattr(model_folder, "fetch", lambda *_, **__: project / base)
    made = _train(project, tmp_path / "made", 'method = "lora"\nmodel.from = "owner/name"\n')
    report = read_report(made / "report.toml")
    assert report["fuse"] == expected
    assert math.log(report["last_validation_perplexity"]) == pytest.approx(
        _loss(project, open_with_mlx_lm(made)[0]), abs=LOSS_TOLERANCE["fp32"]
    )
    node = next(node for node in load_nodes(project / "workflow.toml", project / "none") if node.task == "train")
    (tmp_path / "artifacts").mkdir()
    made.rename(tmp_path / "artifacts/train")
    where = "artifacts/train/adapters" if expected == "dense" else "artifacts/train"
    recorded = outputs.observe_outputs(replace(node, root=tmp_path), DigestCache(tmp_path / "digests.json"))
    assert {f"{where}/adapters.safetensors", f"{where}/adapter_config.json"} <= recorded.keys()


def test_an_unfused_artifact_moves_between_machines(chain: Path, tmp_path: Path) -> None:
    (chain / "workflow.toml").write_text(HEAD + CHAIN)
    node = next(node for node in load_nodes(chain / "workflow.toml", chain / "none") if node.task == "train")
    cache = DigestCache(chain / "digests.json")
    values = {"settings": {}, "inputs": {}, "seconds": 0.0, "outputs": outputs.observe_outputs(node, cache)}
    archive.pack(node, values, tmp_path / "train.tar")
    moved = replace(node, root=tmp_path / "moved")
    (moved.root / "artifacts").mkdir(parents=True)
    archive.unpack(tmp_path / "train.tar", {"train": moved})
    one, other = (model_folder.load(root / "artifacts/train")[0] for root in (chain, moved.root))
    tokens = mx.arange(1, 9)[None]
    assert mx.array_equal(one(tokens), other(tokens)).item()


def test_a_fused_artifact_moves_between_machines(project: Path, tmp_path: Path) -> None:
    text = TRAIN + 'method = "lora"\nmodel.from = "q2"\nfuse = "dense"\n'
    made = _run(project, "train", text, tmp_path / "artifacts/train")
    node = next(node for node in load_nodes(project / "workflow.toml", project / "none") if node.task == "train")
    here, moved = replace(node, root=tmp_path), replace(node, root=tmp_path / "moved")
    recorded = outputs.observe_outputs(here, DigestCache(tmp_path / "digests.json"))
    values = {"settings": {}, "inputs": {}, "seconds": 0.0, "outputs": recorded}
    archive.pack(here, values, tmp_path / "train.tar")
    (moved.root / "artifacts").mkdir(parents=True)
    archive.unpack(tmp_path / "train.tar", {"train": moved})
    name = "adapters/adapters.safetensors"
    assert (moved.root / "artifacts/train" / name).read_bytes() == (made / name).read_bytes()
