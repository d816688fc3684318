"""What a model folder's model writes: a text continued, or a question answered through the folder's chat template.

Opened without transformers, which takes a second and more to import; token by token what `mlx_lm.generate` writes.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import mlx.core as mx

from mlxflow.data import guard
from mlxflow.data.chat_compiler import TemplateProblem
from mlxflow.data.guarded_template import GuardedTemplate
from mlxflow.data.tokenizer import randomness
from mlxflow.errors import ArtifactError, CallError
from mlxflow.models import config_json, model_folder

# Of a prompt, read at a time: the memory of attention goes with it
_PREFILL_TOKENS = 512
Message = Mapping[str, Any]


class Sampling(NamedTuple):
    """How the next token is chosen.

    Attributes:
        max_tokens: tokens at most; the model may end before.
        temperature: 0 takes the likeliest token.
        seed: of the choice of tokens.
    """

    max_tokens: int
    temperature: float
    seed: int


class Writer:
    """A model with its tokenizer and, where its folder has one, its chat template.

    Args:
        folder: a model folder, dense or quantized.

    Raises:
        ArtifactError: the folder is no model folder, or its tokenizer or template cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model, config = model_folder.load(folder)
        self.tokenizer = model_folder.open_tokenizer(folder)
        if random := randomness(self.tokenizer):
            raise ArtifactError(f"{folder}: its tokenizer.json has {random}")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._template = open_template(folder)
        end = self.tokenizer.token_to_id(_tokenizer_settings(folder).get("eos_token") or "")
        self._ends = set(config_json.end_of_text(config)) | ({end} if end is not None else set())

    @property
    def has_template(self) -> bool:
        """Whether the folder has a chat template."""
        return self._template is not None

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text to continue, with what the tokenizer puts before one."""
        ids = self._encode(text, add_special_tokens=True)
        return ids or sorted(self._ends)[:1]  # nothing to read: as after a document's end

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation that asks for an assistant's turn.

        Raises:
            CallError: the folder has no template, or its template refuses the conversation.
        """
        if self._template is None:
            raise CallError(f"{self._folder}: has no chat template. Name the model of one that has.")
        try:
            text = self._template.render(messages, prompt=True)
        except TemplateProblem as error:
            raise CallError(
                f"{self._folder}: its chat template refuses the conversation ({error}). Continue the text as it is "
                "(--raw), or mend the template."
            ) from error
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text; what a tokenizer of others takes too long for, or panics at, is one line.

        Raises:
            ArtifactError: the tokenizer fails, or is not done in time.
        """
        results: SimpleQueue[list[int] | BaseException] = SimpleQueue()

        def encode() -> None:
            try:
                # a batch, since a single text is encoded without releasing the interpreter
                results.put(self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)
            except BaseException as error:  # a panic of the library is no Exception
                results.put(error)

        threading.Thread(target=encode, daemon=True).start()
        limit = guard.LIMITS.seconds + guard.LIMITS.seconds_per_byte * len(text.encode(errors="replace"))
        try:
            ids = results.get(timeout=limit)
        except Empty:
            raise self._failed(f"took over {limit:,.0f} s for a text of {len(text):,} characters") from None
        if isinstance(ids, BaseException):
            raise self._failed(" ".join(str(ids).split())[:200] or type(ids).__name__) from None
        return ids

    def _failed(self, reason: str) -> ArtifactError:
        return ArtifactError(f"{self._folder}: its tokenizer.json failed ({reason}). Mend it or name another model.")

    def tokens(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Yield the ids that the model writes after others, up to one that ends a text or a turn."""
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(sampling.seed)
        sampler, cache = make_sampler(temp=sampling.temperature), make_prompt_cache(self._model)

        def following(tokens: mx.array) -> mx.array:
            logits = self._model(tokens, cache=cache)[:, -1]
            chosen: mx.array = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            return chosen

        for begin in range(0, len(ids) - 1, _PREFILL_TOKENS):  # the last one gives the first new token
            self._model(mx.array([ids[begin : min(begin + _PREFILL_TOKENS, len(ids) - 1)]]), cache=cache)
            mx.eval([layer.state for layer in cache])
        token = following(mx.array([ids[-1:]]))
        for _ in range(sampling.max_tokens):
            mx.async_eval(token)
            after = following(token[None])  # the host builds the next step meanwhile
            chosen: int = token.item()  # type: ignore[assignment]
            if chosen in self._ends:
                return
            yield chosen
            token = after

    def write(self, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """Yield the text that the model writes after some ids, piece by piece."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        for token in self.tokens(ids, sampling):
            if text := stream.step(self.tokenizer, token):
                yield text


def generate(folder: Path, *, prompt: str, sampling: Sampling, raw: bool) -> tuple[bool, Iterator[str]]:
    """Return whether a model was asked through its chat template, and what it writes, piece by piece.

    Args:
        folder: a model folder, dense or quantized, with its tokenizer.
        prompt: a user's message; or, without a template, the text to continue, which then comes first.
        sampling: how the next token is chosen.
        raw: leave the template aside.

    Raises:
        ArtifactError: the folder is no model folder, or has no tokenizer.
        CallError: the template refuses the message.
    """
    writer = Writer(folder)
    if writer.has_template and not raw:
        return True, writer.write(writer.chat_ids([{"role": "user", "content": prompt}]), sampling)
    return False, _continued(writer, prompt, sampling)


def _continued(writer: Writer, prompt: str, sampling: Sampling) -> Iterator[str]:
    yield prompt
    yield from writer.write(writer.text_ids(prompt), sampling)


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json says, with special tokens as text, also those of special_tokens_map.json."""
    settings = _read_json(folder / "tokenizer_config.json")
    tokens = _read_json(folder / "special_tokens_map.json") | settings
    named = {key: _content(value) for key, value in tokens.items() if key.endswith("_token")}
    return settings | {key: text for key, text in named.items() if text is not None}


def open_template(folder: Path) -> GuardedTemplate | None:
    """Return the chat template of a folder, None where it has none; a file of its own overrides the settings.

    Args:
        folder: of a model, or of a tokenizer alone.

    Raises:
        ArtifactError: it is no valid template.
        SourceError: compiling it takes too much time or memory.
    """
    settings = _tokenizer_settings(folder)
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if not isinstance(source, str):
        source = _read_json(folder / "chat_template.json").get("chat_template")
    if not isinstance(source, str):
        return None
    names = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}
    try:
        return GuardedTemplate(source, names, f"{folder}: its chat template")
    except TemplateProblem as error:
        raise ArtifactError(f"{folder}: its chat template is not valid ({error}). Mend it.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: is not valid JSON ({error}). Build it again.") from error
    return value if isinstance(value, dict) else {}


def _content(token: object) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
