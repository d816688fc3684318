"""An artifact as a shared store has it: the document with its record, and the names of its files there."""

from typing import TYPE_CHECKING, Any, NamedTuple

from mlxflow.messages.errors import StoreError
from mlxflow.storage import layout
from mlxflow.storage.digests import digest_text
from mlxflow.workflow.stage_node import Node

if TYPE_CHECKING:
    from mlxflow.storage.object_store import Blob

#: The most bytes of a document: a record, and a line with its checksum.
LARGEST_BYTES = 32_000_100

_BLOBS = "v1/blobs"


class UnusableArtifactError(StoreError):
    """An artifact in the store is damaged, or is not what its name says."""


class StoredArtifact(NamedTuple):
    """What a document describes.

    Attributes:
        node: the stage.
        values: its record.
        card: size and content digest of the model card; None without one.
    """

    node: Node
    values: dict[str, Any]
    card: list[Any] | None

    @property
    def files(self) -> dict[str, list[Any]]:
        """Size and content digest of every file by its name in the workflow."""
        outputs: dict[str, list[Any]] = self.values["outputs"]
        return outputs | ({card_name(self.node): self.card} if self.card else {})

    def document(self) -> bytes:
        """Return the bytes of the document.

        Raises:
            ArtifactError: the record is too large.
        """
        from mlxflow.tasks import packed_record

        record = packed_record.encode(self.node, self.values, self.card)
        return digest_text(record.decode()).encode() + b"\n" + record

    @classmethod
    def parse(cls, node: Node, name: str, data: bytes) -> "StoredArtifact":
        """Return the artifact of a document.

        Args:
            node: the stage.
            name: of the document, for messages.
            data: its bytes.

        Raises:
            UnusableArtifactError: it is damaged or hostile, or of another stage or version.
        """
        from mlxflow.tasks import packed_record

        checksum, _, record = data.partition(b"\n")
        if checksum.decode(errors="replace") != digest_text(record.decode(errors="replace")):
            raise UnusableArtifactError(f"{name}: is damaged")
        try:
            values = packed_record.decode(record, {node.task: node})[1]
        except packed_record.InvalidRecordError as error:
            raise UnusableArtifactError(f"{name}: {str(error).partition('. ')[0]}") from error
        return cls(node, values, packed_record.card_in(record))


def card_name(node: Node) -> str:
    """Return the name of an artifact's model card, which is no output: no stage reads it."""
    return f"{node.folder}/{layout.CARD}"


def blob_of(size: int, content: str) -> "Blob":
    """Return a file in the store, by its size and content digest."""
    from mlxflow.storage.object_store import Blob

    return Blob(f"{_BLOBS}/{content[:2]}/{content}-{size}", size)
