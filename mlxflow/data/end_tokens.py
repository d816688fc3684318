"""The tokens with which a model learns to end documents and turns, collected over a corpus."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mlxflow.data.shard import Shard
from mlxflow.data.tokenizer import Vocabulary


class Endings(NamedTuple):
    """The end tokens of a corpus.

    Attributes:
        tokens: ids of tokens that end documents or assistant turns, in order.
        texts: of each token.
        added: conversations with an appended end-of-text token because their template ends no
        turn.
        with_control_tokens: conversations whose messages contain the text of a control token.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    added: int
    with_control_tokens: int

    def warnings(self) -> Iterator[str]:
        """Yield warnings for the user."""
        if self.added:
            yield (
                f"the chat template ends no turn with a control token: an end-of-text token was appended "
                f"to {self.added:,} conversations and is trained on, so that answers end"
            )
        if not self.tokens:
            yield "no token that ends an answer is trained on: answers will run until the token limit"
        if self.with_control_tokens:
            yield (
                f"{self.with_control_tokens:,} conversations contain control tokens inside their messages; "
                "these are encoded as plain text"
            )


def endings_of(shards: Sequence[Shard], vocabulary: Vocabulary) -> Endings:
    """Return the end tokens of the documents of shards.

    A token that also occurs inside an assistant's turn does not count, such as the one between reasoning and answer.
    """
    inner = {token for shard in shards for token in shard.inner_tokens}
    tokens = sorted({token for shard in shards for token in shard.end_tokens} - inner)
    texts = {token: text for text, token in vocabulary.token_ids.items()}
    return Endings(
        tuple(tokens),
        tuple(texts.get(token, str(token)) for token in tokens),
        sum(shard.added_ends for shard in shards),
        sum(shard.literals for shard in shards),
    )
