"""Text generation with a model folder: continue a text, or answer a message through the chat template.

Works without transformers, which takes more than a second to import. Generates the same tokens as `mlx_lm.generate`;
a 16-bit model on a CPU those that mlx-lm generates with its weights in fp32, see `models.fp32_on_cpu`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxflow.data.chat_compiler import TemplateProblem
from mlxflow.data.chatml import CHATML, TURN_END
from mlxflow.data.guarded_template import GuardedTemplate
from mlxflow.data.guarded_tokenizer import GuardedTokenizer
from mlxflow.messages.errors import ArtifactError, CallError
from mlxflow.models import fp32_on_cpu, gguf_reading, model_folder, trial_calls
from mlxflow.storage import config_json

# Prompt tokens in a forward pass of prefill; the memory of attention grows with it
_PREFILL_TOKENS = 512
Message = Mapping[str, Any]


class Sampling(NamedTuple):
    """How the next token is chosen.

    Attributes:
        max_tokens: upper bound; the model may end earlier.
        temperature: of sampling; 0 is greedy.
        seed: of sampling.
    """

    max_tokens: int
    temperature: float
    seed: int


class TokenCache:
    """A key-value cache of processed ids: a longer prompt with the same prefix processes only the rest.

    Args:
        model: a model of mlx-lm.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.clear()

    def clear(self) -> None:
        """Clear the cache."""
        from mlx_lm.models.cache import make_prompt_cache

        self.layers: list[Any] = make_prompt_cache(self._model)
        self._ids: list[int] = []

    def read(self, ids: Sequence[int]) -> mx.array:
        """Return the logits, (1, V), after the last of some ids, which continue the cached ids."""
        logits: mx.array = self._model(mx.array([list(ids)]), cache=self.layers)[:, -1]
        self._ids += ids
        return logits

    def read_array(self, token: mx.array) -> mx.array:
        """Return the logits, (1, V), after one id, (1,), which may be lazy; pass its value to `note` later."""
        logits: mx.array = self._model(token[None], cache=self.layers)[:, -1]
        return logits

    def note(self, token: int) -> None:
        """Record the value of the id passed to `read_array`."""
        self._ids.append(token)

    def rest_of(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the uncached ids of a prompt, at least the last; drop cached ids beyond the common prefix."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        most = min(len(self._ids), len(ids) - 1)
        common = next((place for place in range(most) if self._ids[place] != ids[place]), most)
        surplus = len(self._ids) - common
        if surplus and not can_trim_prompt_cache(self.layers):
            self.clear()
            return ids
        if surplus:
            trim_prompt_cache(self.layers, surplus)
            del self._ids[common:]
        return ids[common:]


class Writer:
    """A model with its tokenizer and, if its folder has one, its chat template.

    Args:
        folder: a model folder, dense or quantized, or a GGUF file.

    Attributes:
        num_rows: of the model's embedding; 0 if unknown.

    Raises:
        ArtifactError: the folder is no model folder, its tokenizer or template cannot be opened, or its model cannot
            be called.
        SourceError: the tokenizer or the template takes too much time or memory; so do the methods.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder = gguf_reading.opened(folder)
        self.tokenizer = GuardedTokenizer(folder)  # its process starts while the model is read
        self._model, config = model_folder.load(folder, lazy=True)
        self.num_rows = trial_calls.require_generation(self._model, config, str(folder / "config.json"))
        fp32_on_cpu.widen(self._model)
        mx.eval(self._model.parameters())
        if random := self.tokenizer.open():
            raise ArtifactError(f"{folder}: its tokenizer.json has {random}")
        self._template = open_template(folder, self.tokenizer.call)
        end = self.tokenizer.token_to_id(_tokenizer_settings(folder).get("eos_token") or "")
        self._ends = set(config_json.end_of_text(config)) | ({end} if end is not None else set())

    @property
    def model(self) -> Any:
        """The model, in eval mode."""
        return self._model

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def use_chatml(self) -> bool:
        """Take ChatML for the chat template; return whether the vocabulary has the token that ends a turn."""
        self._template = GuardedTemplate(CHATML, {}, "ChatML", self.tokenizer.call)
        end = self.tokenizer.token_to_id(TURN_END)
        self._ends |= {end} if end is not None else set()
        return end is not None

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text to continue, with the special tokens that the tokenizer adds.

        Raises:
            CallError: the embedding has no row for one of them.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        return self._checked(ids or sorted(self._ends)[:1])  # an empty prompt: continue after the end of a document

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation with the generation prompt for an assistant's turn.

        Raises:
            CallError: the folder has no template, its template refuses the conversation, or the embedding has no row
                for an id.
        """
        if self._template is None:
            raise CallError(f"{self._folder}: has no chat template. Name the model of one that has.")
        try:
            text = self._template.render(messages, prompt=True)
        except TemplateProblem as error:
            raise CallError(
                f"{self._folder}: its chat template refuses the conversation ({error}). Continue the text as it is "
                "(--raw), or fix the template."
            ) from error
        return self._checked(self.tokenizer.encode(text, add_special_tokens=False))

    def _checked(self, ids: list[int]) -> list[int]:
        trial_calls.require_rows(ids, self.num_rows, str(self._folder / "tokenizer.json"))
        return ids

    def new_cache(self) -> TokenCache:
        """Return an empty cache for `tokens`."""
        return TokenCache(self._model)

    def tokens(self, ids: Sequence[int], sampling: Sampling, cache: TokenCache | None = None) -> Iterator[int]:
        """Yield the ids that the model generates after a prompt, up to one that ends a text or a turn.

        Args:
            ids: of the prompt.
            sampling: how the next token is chosen.
            cache: of what the model has read before; what it has in common with the prompt is not read again.

        Raises:
            CallError: the embedding has no row for an id.
        """
        trial_calls.require_rows(ids, self.num_rows, str(self._folder / "tokenizer.json"))
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(sampling.seed)
        sampler = make_sampler(temp=sampling.temperature)
        cache = cache or self.new_cache()
        rest = cache.rest_of(ids)

        def choose(logits: mx.array) -> mx.array:
            chosen: mx.array = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            return chosen

        for begin in range(0, len(rest) - 1, _PREFILL_TOKENS):  # the last prompt token yields the first new one
            cache.read(rest[begin : min(begin + _PREFILL_TOKENS, len(rest) - 1)])
            mx.eval([layer.state for layer in cache.layers])
        token = choose(cache.read(rest[-1:]))
        for _ in range(sampling.max_tokens):
            mx.async_eval(token)
            after = choose(cache.read_array(token))  # the host builds the next step while the device computes
            chosen: int = token.item()  # type: ignore[assignment]
            cache.note(chosen)
            if chosen in self._ends:
                return
            yield chosen
            token = after

    def write(self, ids: Sequence[int], sampling: Sampling, cache: TokenCache | None = None) -> Iterator[str]:
        """Yield the text that the model generates after a prompt, piece by piece; see `tokens`."""
        return self.tokenizer.decode_each(self.tokens(ids, sampling, cache))


def generate(folder: Path, *, prompt: str, sampling: Sampling, raw: bool) -> tuple[bool, Iterator[str]]:
    """Return whether the chat template was used, and the generated text piece by piece.

    Args:
        folder: a model folder, dense or quantized, with its tokenizer.
        prompt: a user's message; without a template the text to continue, which is yielded first.
        sampling: how the next token is chosen.
        raw: do not use the template.

    Raises:
        ArtifactError: the folder is no model folder, or has no tokenizer.
        CallError: the template refuses the message.
        SourceError: the tokenizer or the template takes too much time or memory.
    """
    writer = Writer(folder)
    if writer.has_template and not raw:
        return True, writer.write(writer.chat_ids([{"role": "user", "content": prompt}]), sampling)
    return False, chain([prompt], writer.write(writer.text_ids(prompt), sampling))


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json with special tokens as text, including those of special_tokens_map.json."""
    settings = _read_json(folder / "tokenizer_config.json")
    tokens = _read_json(folder / "special_tokens_map.json") | settings
    named = {key: _content(value) for key, value in tokens.items() if key.endswith("_token")}
    return settings | {key: text for key, text in named.items() if text is not None}


def open_template(folder: Path, call: Callable[..., Any]) -> GuardedTemplate | None:
    """Return the chat template of a folder, or None; chat_template.jinja overrides tokenizer_config.json.

    Args:
        folder: of a model, or of a tokenizer only.
        call: calls a function in a watched process; see `Guard.call`.

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
        return GuardedTemplate(source, names, f"{folder}: its chat template", call)
    except TemplateProblem as error:
        raise ArtifactError(f"{folder}: its chat template is not valid ({error}). Fix it.") from error


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
