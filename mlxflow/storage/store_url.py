"""The address of a shared store: its parts, what can be wrong with it, and texts without what is secret in one."""

import os
import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

#: The beginnings of addresses, for messages.
KNOWN = "s3://, gs://, hf://datasets/ or file:///"

# Names that every service accepts: no query, no empty part, no parent folder
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}")
_PART = re.compile(r"[^/\\?#%\x00-\x1f\x7f]{1,255}")

# What precedes the host of an address, and what follows its path
_USER = re.compile(r"(?<=//)[^/\s\"'<>@]+@")
_QUERY = re.compile(r"(?<=[\w/])\?[^\s\"'<>),]+")

# Variables whose values are never printed; the values of those that end so
_SECRET_ENDINGS = ("KEY", "KEY_ID", "TOKEN", "PASSWORD", "SECRET", "CREDENTIALS")
_SHORTEST_SECRET = 6


class StoreUrl(NamedTuple):
    """The parts of an address.

    Attributes:
        scheme: `s3`, `gs`, `hf` or `file`.
        place: the bucket, or `owner/name` with an optional `@revision`; empty for a folder.
        path: in the bucket or repository, without slashes at its ends; of a folder, the absolute path.
    """

    scheme: str
    place: str
    path: str


def parse(text: str) -> StoreUrl:
    """Return the parts of an address.

    Raises:
        ValueError: it is none; the message is what was expected, and repeats nothing of it.
    """
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise ValueError(f"expected an address that begins with {KNOWN}") from error
    if "@" in parts.netloc or "?" in text or "#" in text:
        raise ValueError("expected no user name, password, query or fragment")
    if parts.scheme in ("s3", "gs"):
        if not _BUCKET.fullmatch(parts.netloc):
            raise ValueError(f"expected a bucket, as in {parts.scheme}://bucket/path")
        return StoreUrl(parts.scheme, parts.netloc, _inside(parts.path))
    if parts.scheme == "hf":
        owner, _, rest = _inside(parts.path).partition("/")
        name, _, path = rest.partition("/")
        if parts.netloc != "datasets" or not owner or not name:
            raise ValueError("expected a data set, as in hf://datasets/owner/name")
        return StoreUrl("hf", f"{owner}/{name}", path)
    if parts.scheme == "file":
        folder = unquote(parts.path).rstrip("/")
        if parts.netloc not in ("", "localhost") or not folder.startswith("/") or "\0" in folder:
            raise ValueError("expected an absolute path after file://, as in file:///mnt/shared/store")
        return StoreUrl("file", "", folder)
    raise ValueError(f"expected an address that begins with {KNOWN}")


def _inside(path: str) -> str:
    names = path.strip("/").split("/") if path.strip("/") else []
    if any(name in (".", "..") or not _PART.fullmatch(name) for name in names):
        raise ValueError("expected a path of plain names, without empty ones, '..', '%' and backslashes")
    return "/".join(names)


def scrubbed(text: str) -> str:
    """Return a text with user names, passwords and queries of addresses, and values of secret variables, as `***`."""
    for name, value in os.environ.items():
        if name.upper().endswith(_SECRET_ENDINGS) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return _QUERY.sub("?***", _USER.sub("***@", text))
