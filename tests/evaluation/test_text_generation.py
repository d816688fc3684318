"""What a model folder's model writes is what mlx-lm writes, by the same template, up to the same end tokens."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.generate import stream_generate
from tokenizers import Tokenizer

from mlxflow.__main__ import main
from mlxflow.data import guard, watched_tokenizer
from mlxflow.data.guarded_tokenizer import GuardedTokenizer
from mlxflow.evaluation.chat_session import ChatSession
from mlxflow.evaluation.text_generation import Sampling, Writer
from mlxflow.messages.errors import ArtifactError, CallError, SourceError
from mlxflow.models import trial_calls
from tests.small_models import add_token_without_row, llama, write_llama

TEXTS = ["who are you? i am a small model.", "what is a note? a line of text.", "why? because it is so, they say."]
QUESTION = [{"role": "user", "content": "what is a small note?"}]
GREEDY = Sampling(12, 0.0, 0)


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without a template; its tokenizer has ChatML's control tokens."""
    folder = tmp_path_factory.mktemp("model")
    special = ["<|im_start|>", "<|im_end|>", "<|begin|>"]
    write_llama(folder, TEXTS, special=special, template=None, context_length=64)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _change(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values))


def _theirs(folder: Path, messages: list[dict[str, str]] | None, text: str = "") -> tuple[list[int], list[int]]:
    """Return the prompt and the tokens of mlx-lm, as its command `generate` makes them."""
    model, tokenizer = load(str(folder))
    if messages is None:
        ids = tokenizer.encode(text)
    else:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
    written = [one.token for one in stream_generate(model, tokenizer, ids, max_tokens=GREEDY.max_tokens)]
    return ids, [token for token in written if token not in tokenizer.eos_token_ids]


def _in_settings(folder: Path) -> None:
    _change(folder / "tokenizer_config.json", chat_template=TEMPLATE)


def _in_a_file(folder: Path) -> None:
    _change(folder / "tokenizer_config.json", chat_template="{{ 'not this one' }}")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _by_name(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "{{ 'tools' }}"}, {"name": "default", "template": TEMPLATE}]
    _change(folder / "tokenizer_config.json", chat_template=named)


def _with_a_begin(folder: Path) -> None:
    token = {
        "__type": "AddedToken",
        "content": "<|begin|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "special": True,
    }
    _change(folder / "tokenizer_config.json", chat_template="{{ bos_token }}" + TEMPLATE, bos_token=token)


@pytest.mark.parametrize("put", [_in_settings, _in_a_file, _by_name, _with_a_begin])
def test_a_prompt_goes_through_the_template_and_is_answered_as_by_mlx_lm(folder: Path, put: Any) -> None:
    put(folder)
    ids, written = _theirs(folder, QUESTION)
    writer = Writer(folder)
    assert writer.has_template
    assert writer.chat_ids(QUESTION) == ids
    assert list(writer.tokens(ids, GREEDY)) == written
    assert len(written) == GREEDY.max_tokens


def test_a_raw_text_is_continued_as_by_mlx_lm(folder: Path) -> None:
    ids, written = _theirs(folder, None, "what is a")
    writer = Writer(folder)
    assert not writer.has_template
    assert writer.text_ids("what is a") == ids
    assert list(writer.tokens(ids, GREEDY)) == written


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU computes in the stored dtype")
def test_a_16_bit_model_writes_on_a_cpu_as_by_mlx_lm_with_its_weights_in_fp32(folder: Path) -> None:
    weights: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    narrow = {name: value.astype(mx.float16) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), narrow, {"format": "mlx"})
    writer = Writer(folder)
    assert {value.dtype for _, value in tree_flatten(writer.model.parameters())} == {mx.float32}
    wide = {name: value.astype(mx.float32) for name, value in narrow.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), wide, {"format": "mlx"})
    ids, written = _theirs(folder, None, "what is a")
    assert list(writer.tokens(ids, GREEDY)) == written


def _ends_of_config(folder: Path, ends: list[int]) -> None:
    _change(folder / "config.json", eos_token_id=ends)


def _ends_of_generation(folder: Path, ends: list[int]) -> None:
    _change(folder / "generation_config.json", eos_token_id=ends)


def _end_of_tokenizer(folder: Path, ends: list[int]) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    text = next(text for text, number in definition["model"]["vocab"].items() if number == ends[-1])
    _change(folder / "tokenizer_config.json", eos_token=text)


@pytest.mark.parametrize("put", [_ends_of_config, _ends_of_generation, _end_of_tokenizer])
def test_every_end_token_of_the_folder_stops_generation(folder: Path, put: Any) -> None:
    ids, written = _theirs(folder, None, "what is a")
    last = written.index(written[5])
    put(folder, [299, written[last]])
    assert list(Writer(folder).tokens(ids, GREEDY)) == written[:last] == _theirs(folder, None, "what is a")[1]


def _lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["generate", *arguments, "--max-tokens", "12"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_prints_how_the_prompt_was_built(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = QUESTION[0]["content"]
    code, out, err = _lines(capsys, str(folder), "--prompt", question)
    assert (code, out.startswith(question)) == (0, True)
    assert err == f"generate: {folder}: the text is continued as it is; it has no chat template\n"
    _in_settings(folder)
    code, answer, err = _lines(capsys, str(folder), "--prompt", question)
    assert err == f"generate: {folder}: asked through its chat template; --raw continues the text as it is\n"
    writer = Writer(folder)
    assert (code, answer) == (0, "".join(writer.write(writer.chat_ids(QUESTION), GREEDY)) + "\n")
    for option in ("--raw", "--no-chat-template"):
        code, again, err = _lines(capsys, str(folder), "--prompt", question, option)
        assert (code, again) == (0, out)
        assert err == f"generate: {folder}: the text is continued as it is (--raw)\n"


def test_a_template_that_refuses_or_is_invalid_is_one_error_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(folder / "tokenizer_config.json", chat_template="{{ raise_exception('Begin with the system.') }}")
    code, out, err = _lines(capsys, str(folder), "--prompt", "x")
    assert (code, out) == (2, "")
    assert err == (
        f"{folder}: its chat template refuses the conversation (Begin with the system.). "
        "Continue the text as it is (--raw), or fix the template.\n"
    )
    _change(folder / "tokenizer_config.json", chat_template="{% if %}")
    with pytest.raises(ArtifactError) as caught:
        Writer(folder)
    assert str(caught.value).startswith(f"{folder}: its chat template is not valid (")


def test_a_tokenizer_that_fails_or_times_out_is_one_error_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"(?:a|a)*[^a\n]"}, "behavior": "Isolated", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    _change(folder / "tokenizer.json", pre_tokenizer=both)
    monkeypatch.setattr(guard, "LIMITS", guard.ProcessLimits(seconds=1))
    with pytest.raises(SourceError) as caught:
        Writer(folder).text_ids("a" * 300)
    said = str(caught.value)
    assert said.startswith((f"{folder}: its tokenizer.json failed (", f"{folder}: its tokenizer.json took over 1 s "))
    assert said.endswith(". Fix it or name another.")


def _multiply_text(folder: Path) -> None:
    steps = [{"type": "Replace", "pattern": {"String": a}, "content": b * 2000} for a, b in ("ab", "bc", "cd")]
    _change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})


def test_a_normalizer_that_multiplies_text_is_one_error_line_of_generate(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _multiply_text(folder)
    monkeypatch.setattr(guard, "LIMITS", guard.ProcessLimits(60, 0, 600_000_000, 0))
    code, out, err = _lines(capsys, str(folder), "--prompt", "a small note")
    assert (code, out) == (2, "")
    assert err == (f"{folder}: its tokenizer.json took over 0.6 GB of memory. Fix it or name another.\n")


def test_the_number_of_tokens_of_a_text_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_tokenizer, "_MOST_IDS", 100)
    _change(
        folder / "tokenizer.json", normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b c" * 300}
    )
    key = (folder, "the tokenizer", False)
    count = len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a"))
    with pytest.raises(SourceError) as caught:
        watched_tokenizer.encode(key, "a", True)
    said = f"the tokenizer makes {count:,} tokens of a text of 1 bytes. Fix it or name another."
    assert str(caught.value) == said
    assert len(watched_tokenizer.encode(key, "a" + "b" * count, True)) >= count


def test_a_decoder_that_returns_long_texts_is_one_error_line(folder: Path) -> None:
    decoder = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 2_000_000}
    _change(folder / "tokenizer.json", decoder=decoder)
    tokenizer = GuardedTokenizer(folder)
    number = tokenizer.token_to_id("a")
    assert number is not None
    said = f"{folder}: its tokenizer.json makes a text of 2,000,000 characters of 1 tokens. Fix it or name another."
    for decode in (lambda: tokenizer.decode([number]), lambda: list(tokenizer.decode_each([number]))):
        with pytest.raises(SourceError) as caught:
            decode()
        assert str(caught.value) == said


def test_deleting_a_writer_ends_its_process(folder: Path) -> None:
    writer = Writer(folder)
    process = psutil.Process(writer.tokenizer.call("os:getpid"))
    del writer
    assert not process.is_running()


def test_a_tokenizer_with_dropout_is_refused_for_generation(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    _change(folder / "tokenizer.json", model=tokenizer["model"] | {"dropout": 0.1})
    with pytest.raises(ArtifactError) as caught:
        Writer(folder)
    assert str(caught.value) == (
        f"{folder}: its tokenizer.json has model.dropout = 0.1: two runs would give different ids. Set it to null."
    )


def _lacks(folder: Path, number: int) -> str:
    return (
        f"{folder}/tokenizer.json: the prompt has the id {number}, the embedding of the model has {number} rows. "
        "Use the tokenizer of the model, or another prompt."
    )


def test_a_prompt_with_an_id_without_a_row_of_the_embedding_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLX reads any memory for it, and the exit code would be 0."""
    number = add_token_without_row(folder, "ZZZZ")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for way in ("--raw", "--chat"):
        assert main(["generate", str(folder), way, "--prompt", "what ZZZZ", "--max-tokens", "2"]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"{_lacks(folder, number)}\n")
    writer = Writer(folder)
    with pytest.raises(CallError) as caught:
        next(writer.tokens([0, number], GREEDY))  # ids of elsewhere, such as those of held-out conversations
    assert str(caught.value) == _lacks(folder, number)
    session = ChatSession(writer)
    with pytest.raises(CallError):
        next(session.answer("ZZZZ", GREEDY))
    assert session.messages == []  # it can be continued
    assert main(["generate", str(folder), "--raw", "--prompt", "what", "--max-tokens", "2"]) == 0
    writer.tokenizer.close()


def test_a_model_that_may_generate_an_id_without_a_row_is_refused() -> None:
    model, config = llama(vocab_size=300, hidden_size=32)
    model.args.tie_word_embeddings, model.lm_head = False, nn.Linear(32, 320, bias=False)
    assert trial_calls.require_call(model, config, "m") == 300
    with pytest.raises(ArtifactError) as caught:
        trial_calls.require_generation(model, config, "m")
    assert str(caught.value) == "m: the head of the model has 320 ids, its embedding 300 rows. Name another model."
