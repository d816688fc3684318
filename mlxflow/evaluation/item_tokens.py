"""Token ids of task items: what the model reads, what is scored, and what is cut off a prompt that is too long.

A prompt and its completion are encoded as one text, as a model reads them. The context is what this encoding has in
common with that of the prompt alone, so a token across the border is scored with the completion.
"""

from collections.abc import Sequence
from pathlib import Path

from mlxflow.data.chat_compiler import TemplateProblem
from mlxflow.data.guarded_tokenizer import GuardedTokenizer
from mlxflow.evaluation.log_likelihood import TokenSequence
from mlxflow.evaluation.task_file import TaskItem
from mlxflow.evaluation.text_generation import open_template
from mlxflow.messages.errors import ArtifactError, SourceError
from mlxflow.storage import config_json

# Encoded with and without special tokens to find those before a text
_PROBE = "a"


class ItemEncoder:
    """The tokenizer and the chat template of a model folder, without its weights.

    Args:
        folder: a model folder.

    Raises:
        ArtifactError: its tokenizer or template cannot be opened.
        SourceError: they take too much time or memory; so do the methods.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = GuardedTokenizer(folder)
        if random := self._tokenizer.open():
            raise ArtifactError(f"{folder}: its tokenizer.json has {random}")
        self._template = open_template(folder, self._tokenizer.call)
        bare = self._tokenizer.encode(_PROBE, add_special_tokens=False)
        full = self._tokenizer.encode(_PROBE, add_special_tokens=True)
        first = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
        self._begin = full[:first]
        self._ends = sorted(config_json.end_of_text(config_json.read(folder)))[:1]

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def close(self) -> None:
        """End the tokenizer's process."""
        self._tokenizer.close()

    def prompt_ids(self, item: TaskItem, *, uses_chat: bool, shown: str) -> list[int]:
        """Return the ids of a prompt; see `sequences`."""
        text = self._text(item, uses_chat=uses_chat, shown=shown)
        return self._encode(text, uses_chat=uses_chat) or self._start(item, shown)

    def sequences(self, item: TaskItem, *, uses_chat: bool, shown: str) -> list[TokenSequence]:
        """Return context and completion for each text of an item.

        Args:
            item: a completion, or several choices.
            uses_chat: whether the chat template writes the prompt.
            shown: the name of the item's file, for messages.

        Raises:
            SourceError: the template refuses the conversation, or nothing precedes a completion.
        """
        prompt = self._text(item, uses_chat=uses_chat, shown=shown)
        before = self._encode(prompt, uses_chat=uses_chat)
        found = []
        for text in item.texts:
            whole = self._encode(prompt + text, uses_chat=uses_chat)
            most = min(len(before), len(whole) - 1)
            common = next((at for at in range(most) if before[at] != whole[at]), most)
            context = whole[:common] or self._start(item, shown)
            found.append(TokenSequence(context, whole[common:]))
        return found

    def _start(self, item: TaskItem, shown: str) -> list[int]:
        """Return the context of a text without one: the end of the document before it."""
        if not self._ends:
            raise SourceError(
                f"{shown}:{item.line}: has an empty prompt, and the model no token that ends a text. Write a prompt."
            )
        return self._ends

    def _encode(self, text: str, *, uses_chat: bool) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids if uses_chat else [*self._begin, *ids]

    def _text(self, item: TaskItem, *, uses_chat: bool, shown: str) -> str:
        if self._template is None or not uses_chat:
            return item.prompt
        messages = list(item.messages) or [{"role": "user", "content": item.prompt}]
        try:
            return self._template.render(messages, prompt=True)
        except TemplateProblem as error:
            raise SourceError(f"{shown}:{item.line}: the chat template refuses it ({error}). Fix the line.") from error


def fit_sequences(sequences: Sequence[TokenSequence], positions: int) -> tuple[list[TokenSequence], int] | None:
    """Return the sequences of an item with as many first ids of all contexts cut off as do not fit, and their number.

    Args:
        sequences: of an item; they begin with the same ids.
        positions: that the model is made for.

    Returns:
        None if a completion does not fit with one id before it.
    """
    surplus = max(0, *(len(one.context) + len(one.completion) - 1 - positions for one in sequences))
    if surplus and surplus >= min(len(one.context) for one in sequences):
        return None
    return [TokenSequence(one.context[surplus:], one.completion) for one in sequences], surplus


def fit_prompt(ids: Sequence[int], positions: int, max_tokens: int) -> tuple[Sequence[int], int] | None:
    """Return the last ids of a prompt that leave room for generated tokens, and the number of those cut off.

    Returns:
        None if there is no room for one id.
    """
    surplus = max(0, len(ids) + max_tokens - positions)
    return None if surplus and surplus >= len(ids) else (ids[surplus:], surplus)
