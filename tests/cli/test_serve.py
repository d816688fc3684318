"""A model behind HTTP, asked by a client."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxflow.data.chatml import CHATML
from tests.conftest import mlxflow
from tests.evaluation.test_chat_session import write_chat_model
from tests.small_models import add_token_without_row


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(folder: Path, model: str) -> Iterator[int]:
    """Start `mlxflow serve` and yield its port when it listens; it has to end by Ctrl-C in a moment."""
    port = free_port()
    command = [sys.executable, "-m", "mlxflow", "serve", model, "--port", str(port)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.parent / "cache"), "HF_HOME": str(folder.parent / "hf")}
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        try:
            while True:
                assert server.poll() is None, server.stdout and server.stdout.read()
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield port
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(timeout=60)
            finally:
                server.kill()


def _post(port: int, path: str, body: dict[str, Any]) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status == 200, data
    return data


def test_a_stage_answers_whole_streamed_and_under_any_name(built: Path) -> None:
    prompt = "note 3 line"
    expected = mlxflow(built, "generate", "artifacts/quantize/q8", "--raw", "--prompt", prompt, "--max-tokens", "8")
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    with serving(built, "quantize:q8") as port:
        whole = json.loads(_post(port, "/v1/completions", body | {"model": "gpt-4"}))
        text = whole["choices"][0]["text"]
        # mlx-lm's detokenizer drops the space before the first word
        assert text.strip() == expected.stdout.removeprefix(prompt).strip()
        lines = _post(port, "/v1/completions", body | {"stream": True}).decode().splitlines()
        parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(part["choices"][0]["text"] for part in parts if part["choices"]) == text
        assert len(parts) > 2
        stopped = json.loads(_post(port, "/v1/completions", body | {"stop": [":"]}))["choices"][0]
        assert stopped["text"] == text.partition(":")[0] != text
        assert stopped["finish_reason"] == "stop"
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/v1/models")
        models = json.loads(connection.getresponse().read())["data"]
        assert [Path(one["id"]).name for one in models] == ["q8"]


def test_what_is_no_model_is_refused(built: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            ("train", "--port", str(port)): f"mlxflow serve: 127.0.0.1:{port}: cannot be listened on (",
            ("train", "--port", "0"): "mlxflow serve: --port = 0: expected 1 to 65535. Use 8080 (the default).",
            ("notes",): "notes: has no config.json. Name a model folder.",
            ("./none",): "./none: missing. Name a stage, a model folder, or a GGUF file.",
            ("benchmark",): "mlxflow serve: benchmark: makes no model. Name a train or quantize stage.",
            ("quantize:q9",): "",
        }
        for arguments, message in cases.items():
            done = mlxflow(built, "serve", *arguments)
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith(message)
            assert len(done.stderr.splitlines()) == 1


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _with_a_bad_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")


def _with_half_of_its_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_tokenizer, "model: its tokenizer cannot be opened ("),
        pytest.param(_with_a_bad_template, "model: its chat template is not valid (", marks=pytest.mark.matrix),
        pytest.param(_with_half_of_its_weights, "model/model.safetensors: damaged (", marks=pytest.mark.matrix),
    ],
)
def test_a_damaged_model_is_refused_before_it_is_served(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    write_chat_model(tmp_path / "model", special=["<|im_start|>", "<|im_end|>"], template=CHATML)
    damage(tmp_path / "model")
    done = mlxflow(tmp_path, "serve", "model", "--port", str(free_port()))
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


def test_a_prompt_with_an_id_without_a_row_is_answered_by_an_error(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "model", special=["<|im_start|>", "<|im_end|>"], template=CHATML)
    number = add_token_without_row(tmp_path / "model", "ZZZZ")
    messages = [{"role": "user", "content": "who ZZZZ"}]
    with serving(tmp_path, "./model") as port:
        for path, body in (
            ("/v1/completions", {"prompt": "who ZZZZ"}),
            ("/v1/chat/completions", {"messages": messages}),
            ("/v1/completions", {"prompt": "who ZZZZ", "seed": 1}),  # not in a batch
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request("POST", path, json.dumps(body | {"max_tokens": 2}), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = json.loads(answer.read())["error"]
            assert answer.status == 404
            assert text.startswith(f"model/tokenizer.json: the prompt has the id {number}, the embedding of the model")
        _post(port, "/v1/completions", {"prompt": "who", "max_tokens": 2})


def test_a_model_that_only_mlx_lm_refuses_ends_the_server(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mlx_lm import server; from mlxflow.evaluation import model_server\n"
        "server.load = lambda *_, **__: 1 / 0\n"
        "model_server.answer_requests("
        f"Path('model'), num_rows=0, host='127.0.0.1', port={free_port()}, trusts_code=False)"
    )
    write_chat_model(tmp_path / "model", special=["<|im_start|>", "<|im_end|>"], template=CHATML)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert "ArtifactError: model: mlx-lm cannot open it (division by zero). Make it again." in done.stderr


def test_a_stage_that_is_not_built_is_named_with_the_command(job: Path) -> None:
    done = mlxflow(job, "serve", "train")
    assert (done.returncode, done.stderr) == (2, "artifacts/train: missing. Run: mlxflow build train\n")


@pytest.mark.parametrize("option", ["--port=x"])
def test_a_port_is_a_number(built: Path, option: str) -> None:
    assert mlxflow(built, "serve", "train", option).returncode == 2


def test_the_openai_client_is_answered_whole_streamed_and_up_to_a_stop(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    write_chat_model(tmp_path / "model", special=["<|im_start|>", "<|im_end|>"], template=CHATML)
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "who are you?"}]
    asked: dict[str, Any] = {"model": "any", "messages": messages, "temperature": 1, "seed": 7, "max_tokens": 12}
    with serving(tmp_path, "model") as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert [Path(one.id).name for one in client.models.list().data] == ["model"]
        whole = client.chat.completions.create(**asked)
        choice = whole.choices[0]
        text = choice.message.content
        assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
        assert whole.usage.completion_tokens == 12
        parts = [part.choices[0] for part in client.chat.completions.create(**asked, stream=True) if part.choices]
        assert "".join(part.delta.content or "" for part in parts) == text
        assert parts[-1].finish_reason == "length"
        assert len(parts) > 2
        middle = text.index(" why")  # of whole tokens; the others begin or end within one, or go over several
        for stop in (" why", "hy", text[middle - 1 : middle + 2], text[1 : middle + 3], text[0]):
            stopped = client.chat.completions.create(**asked, stop=[stop, "not in it"]).choices[0]
            assert (stopped.message.content or "", stopped.finish_reason) == (text.partition(stop)[0], "stop")
            parts = [part.choices[0] for part in client.chat.completions.create(**asked, stop=stop, stream=True)]
            assert "".join(part.delta.content or "" for part in parts) == text.partition(stop)[0]
            assert parts[-1].finish_reason == "stop"
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model="any", messages="no list")
        client.close()


@pytest.mark.parametrize(("stage", "bits"), [("train", None), ("quantize/q4", 4)])
def test_a_model_folder_has_the_files_that_lm_studio_opens(built: Path, stage: str, bits: int | None) -> None:
    """LM Studio's mlx-engine chooses by `config.json`, and mlx-lm reads the weights and the tokenizer."""
    folder = built / "artifacts" / stage
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert [name for name in names if name.endswith(".safetensors")] == ["model.safetensors"]
    assert not [name for name in names if name.endswith((".py", ".npz", ".bin"))]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "vision_config" not in config
    assert config.get("quantization", {}).get("bits") == bits
