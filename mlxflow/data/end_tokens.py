"""With which tokens a model learns to end a text, over a whole corpus."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mlxflow.data.shard import Shard
from mlxflow.data.tokenizer import Vocabulary


class Endings(NamedTuple):
    """What ends the documents of a corpus.

    Attributes:
        tokens: ids that end what is trained on, in order: of documents, and of an assistant's turns.
        texts: of each.
        added: conversations behind which an end of text was put because their template ends no turn.
        with_control_tokens: conversations whose messages hold the text of a control token.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    added: int
    with_control_tokens: int

    def warnings(self) -> Iterator[str]:
        """Yield what a user should know of it."""
        if self.added:
            yield (
                f"the chat template ends no turn with a control token: the end of text was put behind {self.added:,} "
                "conversations and is trained on, so that answers end"
            )
        if not self.tokens:
            yield "no token that ends an answer is trained on: answers will go on until they are cut off"
        if self.with_control_tokens:
            yield (
                f"{self.with_control_tokens:,} conversations hold control tokens inside of their messages: "
                "they are plain text there"
            )


def endings_of(shards: Sequence[Shard], vocabulary: Vocabulary) -> Endings:
    """Return what ends the documents of shards.

    A token that also stands inside of an assistant's turn ends nothing, such as the one between thoughts and answer.
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
