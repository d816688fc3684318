"""A conversation with a model; each answer prefills only the tokens that are new since the last one."""

from collections.abc import Iterable, Iterator

from mlxflow.data.chatml import TURN_END
from mlxflow.evaluation.text_generation import Message, Sampling, Writer


class ChatSession:
    """The messages of one conversation. Without a chat template ChatML is used; see `ends_turns`.

    Args:
        writer: the model.
        system: a system message; empty for none.

    Attributes:
        messages: all so far, the system message first.
        ends_turns: whether the model has a token that ends an answer; if not, an answer ends at the text of ChatML's
            end token.
    """

    def __init__(self, writer: Writer, system: str = "") -> None:
        self._writer = writer
        self._cache = writer.new_cache()
        self.ends_turns = writer.has_template or writer.use_chatml()
        self.messages: list[Message] = []
        self.reset(system)

    def reset(self, system: str = "") -> None:
        """Begin a new conversation.

        Args:
            system: a system message; empty for none.
        """
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Yield the answer to a message piece by piece; both are part of the conversation afterwards.

        An answer that is not consumed to its end is kept up to that point.

        Args:
            text: the user's message.
            sampling: how the next token is chosen.

        Raises:
            CallError: the template refuses the conversation; the message is not kept then.
            SourceError: the tokenizer or the template takes too much time or memory.
        """
        ids = self._writer.chat_ids([*self.messages, {"role": "user", "content": text}])
        self.messages.append({"role": "user", "content": text})
        written: list[str] = []
        is_whole = False
        try:
            pieces = self._writer.write(ids, sampling, self._cache)
            for piece in pieces if self.ends_turns else until(pieces, TURN_END):
                written.append(piece)
                yield piece
            is_whole = True
        finally:
            if not is_whole:  # it was interrupted, perhaps within a step
                self._cache.clear()
            self.messages.append({"role": "assistant", "content": "".join(written)})


def until(pieces: Iterable[str], end: str) -> Iterator[str]:
    """Yield the pieces of a text up to a stop string, which may be split over several pieces."""
    held = ""
    for piece in pieces:
        held += piece
        if end in held:
            held = held[: held.index(end)]
            break
        held_back = next(
            (size for size in range(min(len(end) - 1, len(held)), 0, -1) if end.startswith(held[-size:])), 0
        )
        ready, held = held[: len(held) - held_back], held[len(held) - held_back :]
        if ready:
            yield ready
    if held:
        yield held
