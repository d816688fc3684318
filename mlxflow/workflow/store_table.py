"""The `[store]` table: where artifacts are shared between machines. It makes nothing stale. Imports no MLX."""

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mlxflow.storage import store_url, toml_text
from mlxflow.storage.toml_tables import Problem


class StoreTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[store]` table.

    It determines where an artifact comes from, not which one: no key makes an artifact stale.
    """

    url: Annotated[
        str,
        Meta(
            examples=["s3://bucket/path"],
            description="the store: s3://bucket/path, gs://bucket/path, hf://datasets/owner/name/path or "
            "file:///folder; credentials come from the environment or the profile files of the service",
        ),
    ] = ""
    pull: Annotated[
        bool,
        Meta(
            description="take an artifact from the store instead of building it, if it has one that was made by the "
            "same settings from the same inputs"
        ),
    ] = True
    push: Annotated[
        Literal["never", "auto"],
        Meta(description="auto: upload each stage after it was built; never: only by `doit push`"),
    ] = "never"

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the address; nothing that may be secret is shown."""
        if not self.url:
            yield Problem("url", msgspec.UNSET, "missing", "Add url to [store].")
            return
        try:
            store_url.parse(self.url)
        except ValueError as error:
            advice = 'Write one such as "s3://bucket/path"; credentials do not belong here.'
            yield Problem("url", store_url.scrubbed(self.url), str(error), advice)


def of_text(text: str) -> StoreTable | None:
    """Return the table of the text of a checked workflow file; None if it has none."""
    table = toml_text.loads(text.removeprefix("\ufeff")).get("store")
    return None if table is None else msgspec.convert(table, StoreTable)
