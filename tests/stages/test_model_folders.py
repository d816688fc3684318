"""Model folders that others made: where they may lie, what is read of them, what goes along, and whose code is run."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from tokenizers import Tokenizer

from mlxflow.__main__ import main
from mlxflow.evaluation.text_generation import Sampling, Writer
from mlxflow.messages.errors import ArtifactError, WorkflowError
from mlxflow.models import model_folder, tokenizer_files
from mlxflow.storage import remote_code
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.cache_key import cache_key
from mlxflow.tasks.graph import load_nodes
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Workflow
from mlxflow.workflow.staleness import observe_inputs

HEAD = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 2
batch_size = 2
warmup_steps = 0
learning_rate = 1e-3
eval_every = 0
max_validation_rows = 4
"""
#: What can be looked at without building anything but the tokens.
BUILT = ("pretokenize", "train", "quantize")
QUANTIZE = '\n[quantize]\ndata = ""\ngroup_size = 32\n'

#: A llama whose class lies beside its weights; it counts how often it is imported.
MODELING = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from mlx_lm.models.llama import Model, ModelArgs as Args
with Path(__file__).with_name("imported").open("a") as log:
    log.write("x")
@dataclass
class ModelArgs(Args):
    own: int | None = None
"""


@pytest.fixture
def job(built: Path, tmp_path: Path) -> Path:
    """A folder with tokens, and a model folder `base` in it."""
    root = tmp_path / "job"
    for name in ("notes", "artifacts/pretokenize"):
        shutil.copytree(built / name, root / name)
    (root / "base").mkdir()
    for name in ("config.json", "model.safetensors", *tokenizer_files.TOKENIZER_FILES):
        shutil.copy(built / "artifacts/train" / name, root / "base")
    return root


def _load(job: Path, text: str) -> Workflow:
    (job / "workflow.toml").write_text(HEAD + text)
    return load_workflow(job / "workflow.toml")


def _run(job: Path, stage: str, text: str) -> Path:
    workflow = _load(job, text)
    return execute_stage(workflow, workflow.find(stage))


def _weights(folder: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))


def _change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def _split(folder: Path) -> None:
    """Make two shards and an index of the weights of a folder."""
    weights = _weights(folder)
    mx.eval(weights)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-0000{1 + (number > 3)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in names if files[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_two_sets_of_weights_are_refused_and_an_index_is_followed(job: Path) -> None:
    plain = _weights(_run(job, "quantize", QUANTIZE + 'model = "base"\n'))
    mx.eval(plain)
    shutil.copy(job / "base/model.safetensors", job / "whole")
    _split(job / "base")
    assert all(
        mx.array_equal(value, plain[name])
        for name, value in _weights(_run(job, "quantize", QUANTIZE + 'model = "base"\n')).items()
    )
    stray = {
        name: mx.zeros_like(value)
        for name, value in cast("dict[str, mx.array]", mx.load(str(job / "whole"), format="safetensors")).items()
    }
    for copy in ("model copy.safetensors", "model_old.safetensors"):
        mx.save_safetensors(str(job / "base" / copy), stray)
        with pytest.raises(ArtifactError) as held:
            model_folder.load(job / "base")
        assert str(held.value) == (
            f"{job}/base: holds {copy} beside its weights, and mlx-lm would read both. Move it out of the folder."
        )
        (job / "base" / copy).unlink()
    mx.save_safetensors(str(job / "base/model.safetensors"), stray)
    for table, key in (("[train]", "train.model.from"), ("[quantize]", "quantize.model")):
        with pytest.raises(WorkflowError) as caught:
            _load(job, QUANTIZE + 'model = "base"\n' if table == "[quantize]" else 'model.from = "base"\n')
        assert str(caught.value) == (
            f'{job}/workflow.toml: {key} = "base": holds two sets of weights, model.safetensors and what '
            "model.safetensors.index.json lists. Remove the set that is not the model."
        )
    with pytest.raises(ArtifactError) as refused:
        model_folder.load(job / "base")
    assert str(refused.value) == (
        f"{job}/base: holds two sets of weights, model.safetensors and what model.safetensors.index.json lists. "
        "Remove the set that is not the model."
    )


def test_lazily_loaded_weights_outlive_the_folder_of_links(job: Path) -> None:
    lazy, _ = model_folder.load(job / "base", lazy=True)
    whole, _ = model_folder.load(job / "base")
    assert mx.array_equal(lazy.model.embed_tokens.weight, whole.model.embed_tokens.weight)


#: Where a model folder lies, and how the workflow, in the folder `job`, names it.
PLACES = {
    "absolute": ("base", "{tmp}/job/base"),
    "outside": ("../models/base", "../models/base"),
    "absolute outside": ("../models/base", "{tmp}/models/base"),
    "spelled from outside": ("base", "../job/./base/"),
    "a variable": ("../models/base", "$MODELS/base"),
    "the home folder": ("../models/base", "~/base"),
    "glob characters": ("base [v2]/*?", "base [v2]/*?"),
    "glob characters outside": ("../a[b]/base", "{tmp}/a[b]/base"),
    "spaces and quotes": ('../it\'s a "model" ', '../it\'s a "model" '),
    "letters": ("modèle 模型 ä", "modèle 模型 ä"),
    "a newline": ("base\nnew", "base\nnew"),
    "a dash": ("-base", "-base"),
    "two dots": ("a..b", "a..b"),
    "bytes that are no UTF-8": ("../odd\udcff/base", "$ODD/base"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_model_folder_may_lie_anywhere_under_any_name(job: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(job.parent / "models"))
    monkeypatch.setenv("HOME", str(job.parent / "models"))
    monkeypatch.setenv("ODD", f"{job.parent}/odd\udcff")
    there, name = PLACES[place]
    try:
        (job / there).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        pytest.skip(f"this file system has no such names: {error}")
    (job / "base").rename(job / there)
    written = json.dumps(name.format(tmp=job.parent), ensure_ascii=False)
    made = _run(job, "quantize", f"{QUANTIZE}model = {written}\n")
    assert (made / "tokenizer.json").read_bytes() == (job / there / "tokenizer.json").read_bytes()
    if place in ("absolute outside", "glob characters", "a newline", "bytes that are no UTF-8"):
        trained = _run(job, "train", f"model.from = {written}\n")
        model_folder.load(trained)
        assert main(["check", f"--workflow={job}/workflow.toml"]) == 0


@pytest.mark.parametrize("name", ["project [v2]", "-x", "a\nb", "模型 ä", "*"])
def test_a_project_may_have_any_name(job: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = job.rename(job.with_name(name))
    monkeypatch.chdir(root.parent)
    workflow = Path(name, "workflow.toml")
    workflow.write_text(HEAD + 'model.from = "base"\n' + QUANTIZE)
    for stage in ("train", "quantize"):
        assert main(["run", stage, f"--workflow={workflow}"]) == 0
    model_folder.load(root / "artifacts/quantize")


def test_records_do_not_depend_on_the_value_of_a_path_variable(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So artifacts and the lock hold on a machine with other folders."""
    shutil.copytree(job / "notes", job.parent / "one/texts")
    (job / "base").rename(job.parent / "one/base")
    text = f'model.from = "$MODELS/base"\n{QUANTIZE}model = "~/base"\n'
    (job / "workflow.toml").write_text(HEAD.replace('["notes"]', '["$MODELS/texts/*.txt"]') + text)
    told = []
    for place in ("one", "another"):
        if place == "another":
            (job.parent / "one").rename(job.parent / place)
        monkeypatch.setenv("MODELS", str(job.parent / place))
        monkeypatch.setenv("HOME", str(job.parent / place))
        nodes = load_nodes(job / "workflow.toml", job / "artifacts/.mlxflow")
        cache = DigestCache(job / "none")
        keys = {node.task: cache_key(node, nodes, cache) for node in nodes}
        told.append((keys, {node.task: observe_inputs(node, cache) for node in nodes if node.task in BUILT}))
    assert told[0] == told[1]
    assert "$MODELS/texts/03.txt" in told[0][1]["pretokenize"]
    assert "$MODELS/base/config.json" in told[0][1]["train"]
    assert "~/base/model.safetensors" in told[0][1]["quantize"]
    assert load_workflow(job / "workflow.toml").find("train").files_read(job).keys() == told[0][1]["train"].keys()


def test_a_variable_that_is_not_set_is_named(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(WorkflowError) as caught:
        _load(job, 'model.from = "$NO_SUCH/base"\n')
    assert str(caught.value) == (
        f'{job}/workflow.toml: train.model.from = "$NO_SUCH/base": no such folder ($NO_SUCH is not set). '
        "Name a folder with a config.json, or a hub id."
    )


def test_files_beside_a_model_are_copied(job: Path) -> None:
    base = job / "base"
    (base / "additional_chat_templates").mkdir()
    written = {
        "generation_config.json": '{"eos_token_id": [0, 3], "temperature": 0.6}',
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages[0].content }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "vocab.json": "{}",
        "merges.txt": "",
    }
    for name, text in written.items():
        (base / name).write_text(text)
    (base / "train.py").write_text("raise SystemExit('a file of the user')")
    quantized = _run(job, "quantize", QUANTIZE + 'model = "base"\n')
    assert {name: (quantized / name).read_text() for name in written} == written
    assert not (quantized / "train.py").exists()
    trained = _run(job, "train", 'model.from = "base"\n')
    assert json.loads((trained / "generation_config.json").read_text())["temperature"] == 0.6
    assert not (trained / "vocab.json").exists()  # the tokenizer is that of the tokens


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_every_end_token_that_a_folder_names_stops_generation(job: Path, file: str) -> None:
    sampling = Sampling(max_tokens=6, temperature=0.0, seed=0)
    written = Writer(job / "base")
    prompt = written.text_ids("note 3")
    first = next(written.tokens(prompt, sampling))
    if file == "tokenizer_config.json":
        tokenizer = Tokenizer.from_file(str(job / "base/tokenizer.json"))
        _change_json(job / "base" / file, eos_token=tokenizer.id_to_token(first))
    else:
        _change_json(job / "base" / file, eos_token_id=[7, first])
    assert list(Writer(job / "base").tokens(prompt, sampling)) == []


def _with_code(base: Path) -> None:
    (base / "modeling.py").write_text(MODELING)
    _change_json(base / "config.json", model_file="modeling.py", model_type="not mlx-lm's")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('model.from = "base"\n', "train.model"),
        (QUANTIZE + 'model = "base"\n', "quantize"),
    ],
)
def test_code_of_a_model_folder_runs_only_if_the_workflow_trusts_it(job: Path, text: str, key: str) -> None:
    _with_code(job / "base")
    with pytest.raises(WorkflowError) as caught:
        _load(job, text)
    name = {"train.model": "train.model.from", "quantize": "quantize.model"}[key]
    assert str(caught.value) == (
        f'{job}/workflow.toml: {name} = "base": its config.json names Python code of its own, modeling.py. '
        f"Read it, then set {key}.trust_remote_code = true to run it."
    )
    with pytest.raises(ArtifactError) as refused:
        model_folder.load(job / "base")
    assert str(refused.value) == (
        f"{job}/base: its config.json names Python code of its own, modeling.py. Read it, then set "
        "trust_remote_code = true where the workflow names the folder, or pass --trust-remote-code."
    )
    with pytest.raises(ArtifactError):
        model_folder.skeleton(json.loads((job / "base/config.json").read_text()), code=job / "base")
    assert not (job / "base/imported").exists()


def test_trusted_code_runs_in_every_later_stage(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _with_code(job / "base")
    text = 'model = { from = "base", trust_remote_code = true }\n' + QUANTIZE
    trained = _run(job, "train", text)
    quantized = _run(job, "quantize", text)
    for made in (trained, quantized):
        assert (made / "modeling.py").read_text() == MODELING
        assert json.loads((made / "config.json").read_text())["model_file"] == "modeling.py"
        assert not (made / "__pycache__").exists()
    assert main(["generate", str(quantized), "--prompt", "note", "--max-tokens", "2"]) == 2
    assert "Python code of its own" in capsys.readouterr().err
    assert main(["generate", str(quantized), "--prompt", "note", "--max-tokens", "2", "--trust-remote-code"]) == 0
    assert main(["check", "--workflow", str(job / "workflow.toml")]) == 0
    assert not remote_code.trusts_code()


def test_code_that_fails_is_one_error_line(job: Path) -> None:
    _with_code(job / "base")
    (job / "base/modeling.py").write_text("import no_such_module")
    with pytest.raises(ArtifactError) as caught:
        _run(job, "train", 'model = { from = "base", trust_remote_code = true }\n')
    assert str(caught.value) == (
        f"{job}/base/modeling.py: cannot be run (ModuleNotFoundError: No module named 'no_such_module'). Fix it."
    )


#: A tokenizer whose class lies beside a vocabulary of its own form.
TOKENIZATION = """
import json
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    vocab_files_names = {"vocab_file": "vocab.own.json"}
    def __init__(self, vocab_file=None, **kwargs):
        tokenizer = Tokenizer(models.WordLevel(json.loads(Path(vocab_file).read_text()), unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        super().__init__(tokenizer_object=tokenizer, **kwargs)
"""


def _own_tokenizer(folder: Path) -> None:
    folder.mkdir()
    words = ["<end>", "?", "note", "line", "thing", "to", "remember"]
    (folder / "vocab.own.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "tokenization.py").write_text(TOKENIZATION)
    _change_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization.Own", "tokenization.Own"]},
        tokenizer_class="Own",
        eos_token="<end>",
        unk_token="?",
    )


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_models_tokenizer_is_refused_before_any_work(job: Path, file: str) -> None:
    base = job / "base"
    for name in tokenizer_files.TOKENIZER_FILES:
        (base / name).unlink()
    _own_tokenizer(job / "words")
    if file == "config.json":
        _change_json(job / "words/tokenizer_config.json", auto_map=None)
        _change_json(base / file, auto_map={"AutoConfig": "tokenization.Own"})
    for name in ("vocab.own.json", "tokenization.py", "tokenizer_config.json"):
        shutil.copy(job / "words" / name, base)
    text = QUANTIZE + 'model = "base"\n'
    with pytest.raises(WorkflowError) as caught:
        _load(job, text)
    assert str(caught.value) == (
        f'{job}/workflow.toml: quantize.model = "base": its {file} names Python code of its own, tokenization.Own. '
        "Read it, then set quantize.trust_remote_code = true to run it."
    )
    with pytest.raises(ArtifactError) as refused:
        tokenizer_files.convert_tokenizer(base)
    assert str(refused.value) == (
        f"{base}: its {file} names Python code of its own, tokenization.Own. Read it, then set "
        "trust_remote_code = true where the workflow names the folder, or pass --trust-remote-code."
    )


def test_code_that_no_stage_needs_is_not_copied(job: Path) -> None:
    base = job / "base"
    (base / "modeling.py").write_text("raise SystemExit('nothing may import this')")
    for name in ("config.json", "tokenizer_config.json"):
        _change_json(base / name, auto_map={"AutoConfig": "modeling.Own", "AutoTokenizer": ["modeling.Own", None]})
    for made in (_run(job, "train", 'model.from = "base"\n'), _run(job, "quantize", QUANTIZE + 'model = "base"\n')):
        assert not (made / "modeling.py").exists()
        assert "auto_map" not in (made / "config.json").read_text() + (made / "tokenizer_config.json").read_text()


def test_a_folders_files_are_opened_by_transformers_without_the_code_that_they_name(job: Path) -> None:
    (job / "base/tokenizer_config.json").unlink()
    (job / "base/tokenization.py").write_text("raise SystemExit('nothing may import this')")
    _change_json(job / "base/config.json", auto_map={"AutoTokenizer": ["tokenization.Own", None]})
    quantized = _run(job, "quantize", QUANTIZE + 'model = "base"\n')
    assert "auto_map" not in (quantized / "tokenizer_config.json").read_text()


def test_code_of_a_tokenizer_is_run_only_where_it_is_trusted(
    job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import transformers.dynamic_module_utils as modules
    from transformers import AutoTokenizer

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    _own_tokenizer(job / "words")
    text = HEAD.replace("vocab_size = 300", 'from = "words"')
    (job / "workflow.toml").write_text(text)
    with pytest.raises(WorkflowError) as caught:
        load_workflow(job / "workflow.toml")
    assert str(caught.value) == (
        f'{job}/workflow.toml: pretokenize.tokenizer.from = "words": its tokenizer_config.json names Python code of '
        "its own, tokenization.Own. Read it, then set pretokenize.tokenizer.trust_remote_code = true to run it."
    )
    (job / "workflow.toml").write_text(text.replace('from = "words"', 'from = "words", trust_remote_code = true'))
    workflow = load_workflow(job / "workflow.toml")
    made = execute_stage(workflow, workflow.find("pretokenize"))
    kept: dict[str, Any] = json.loads((made / "tokenizer.json").read_text())
    assert kept["model"]["vocab"]["remember"] == 6
    assert "auto_map" not in json.loads((made / "tokenizer_config.json").read_text())
    opened = AutoTokenizer.from_pretrained(made, trust_remote_code=False)
    assert opened.encode("remember") == [6]
