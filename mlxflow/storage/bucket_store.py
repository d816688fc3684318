"""A shared store in a bucket of S3, of a service that speaks its protocol, or of Google Cloud Storage, by `obstore`.

obstore was chosen over fsspec by measuring (docs/guides/store.md): one package without others, which pins nothing, and
S3's own conditional writes. A put is visible when it is complete. Credentials are found by obstore: in the environment,
or from the service of the machine. Those in AWS profile files are found by boto3.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import StoreError
from mlxflow.storage.object_store import Blob, PlainStore, refusal
from mlxflow.storage.store_url import StoreUrl

_PIECE_BYTES = 8 << 20
_MOST_PIECES = 9_000  # S3 has at most 10,000
_NUM_TRANSFERS = 4

# A question is small: a store that does not answer it is down. A piece may take as long as a slow line needs.
_QUESTION_SECONDS, _TRANSFER_SECONDS = 10, 120

_RETRIES = {
    "max_retries": 3,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
}

# What obstore finds itself; without any of them, profile files are read
_OWN_CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
)
_PROFILES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_STATUS = re.compile(r"status code: (\d{3} [A-Za-z ]+)")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_MEANINGS = {
    "NoSuchBucket": "no such bucket",
    "InvalidAccessKeyId": "the access key is unknown",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "AccessDenied": "the credentials do not allow it",
    "ExpiredToken": "the credentials have expired",
    "PermanentRedirect": "the bucket is in another region. Set AWS_REGION",
}


class BucketStore(PlainStore):
    """A store in a bucket.

    Args:
        url: of scheme `s3` or `gs`.
    """

    def __init__(self, url: StoreUrl) -> None:
        with _reported():
            self._questions = _open(url, _QUESTION_SECONDS)
            self._transfers = _open(url, _TRANSFER_SECONDS)

    def names(self, folder: str) -> list[str]:
        """Return the names of objects; unlike a read, it fails without the bucket. See `ObjectStore`."""
        import obstore

        with _reported():
            return sorted(one["path"] for page in obstore.list(self._questions, f"{folder}/") for one in page)

    def read(self, name: str, largest: int) -> bytes | None:
        """Return the bytes of an object; see `ObjectStore`."""
        import obstore

        with _reported():
            try:
                result = obstore.get(self._questions, name)
                if result.meta["size"] <= largest:
                    return bytes(result.bytes())
            except FileNotFoundError:
                return None
        raise refusal(f"{name} has more than {largest:,} bytes")

    def download(self, blob: Blob, path: Path) -> bool:
        """Write an object to a file, several pieces at a time; see `ObjectStore`."""
        import obstore

        def fetch(offset: int) -> None:
            length = min(_PIECE_BYTES, blob.size - offset)
            data = obstore.get_range(self._transfers, blob.name, start=offset, length=length)
            if len(data) != length:
                raise refusal("a transfer was cut off")
            os.pwrite(file.fileno(), data, offset)

        if not self.has(blob):
            return False
        with path.open("wb") as file, _reported(), ThreadPoolExecutor(_NUM_TRANSFERS) as pool:
            try:
                for _ in pool.map(fetch, range(0, blob.size, _PIECE_BYTES)):
                    pass
            except FileNotFoundError:  # removed meanwhile
                return False
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return True

    def has(self, blob: Blob) -> bool:
        """Return whether there is an object; see `ObjectStore`."""
        import obstore

        with _reported():
            try:
                return bool(obstore.head(self._questions, blob.name)["size"] == blob.size)
            except FileNotFoundError:
                return False

    def upload(self, path: Path, blob: Blob) -> None:
        """Put a file, a large one in pieces; it is visible when all of them are there. See `PlainStore`."""
        import obstore

        piece = max(_PIECE_BYTES, -(-blob.size // _MOST_PIECES))
        with _reported():
            obstore.put(self._transfers, blob.name, path, chunk_size=piece, max_concurrency=_NUM_TRANSFERS)

    def write(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Put an object, by a conditional write where the service has them; see `PlainStore`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotSupportedError

        with _reported():
            try:
                obstore.put(self._questions, name, data, mode="overwrite" if replace else "create")
            except AlreadyExistsError:
                return False
            except NotSupportedError:
                if name in self.names(name.rpartition("/")[0]):
                    return False
                obstore.put(self._questions, name, data)
            return True


def _open(url: StoreUrl, seconds: int) -> Any:
    from obstore.store import from_url

    client: dict[str, Any] = {"connect_timeout": "5s", "timeout": f"{seconds}s"}
    options: dict[str, Any] = {}
    if url.scheme == "s3":
        options = _profile_options()
        endpoint = options.get("endpoint") or next((os.environ[name] for name in _ENDPOINTS if name in os.environ), "")
        client["allow_http"] = endpoint.startswith("http://")
    retries = _RETRIES | {"retry_timeout": timedelta(seconds=min(seconds, 30))}
    address = "/".join(filter(None, (f"{url.scheme}://{url.place}", url.path)))
    return from_url(address, client_options=client, retry_config=retries, **options)


def _profile_options() -> dict[str, Any]:
    """Return credentials, region and endpoint of an AWS profile; empty if obstore finds credentials, or there is none.

    Raises:
        StoreError: a profile is named that boto3 cannot use, or boto3 is missing.
    """
    if any(os.environ.get(name) for name in _OWN_CREDENTIALS):
        return {}
    is_named = any(os.environ.get(name) for name in _PROFILES)
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials")
    config = Path(os.environ.get("AWS_CONFIG_FILE") or Path.home() / ".aws" / "config")
    if not is_named and not file.is_file() and not config.is_file():
        return {}
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise refusal("AWS profiles need boto3. Run: pip install 'mlxflow[store]'") from error
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            return {}
        endpoint = str(session.client("s3", region_name=session.region_name or "us-east-1").meta.endpoint_url)
        options: dict[str, Any] = {"credential_provider": Boto3CredentialProvider(session)}
    except (BotoCoreError, ValueError) as error:
        raise refusal(f"the AWS profile cannot be used ({error})") from error
    return options | ({} if endpoint.rstrip("/").endswith("amazonaws.com") else {"endpoint": endpoint})


@contextmanager
def _reported() -> Iterator[None]:
    """Convert every error to a `StoreError`; those that callers understand are caught inside of the block."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # obstore raises its own and Python's
        raise refusal(_reason(str(error))) from error


def _reason(text: str) -> str:
    """Return the reason in an error of obstore, which continues with a dump of its structures."""
    first = text.partition("\n\nDebug source")[0]
    code = found[1] if (found := _CODE.search(first)) else ""
    status = found[1].strip() if (found := _STATUS.search(first)) else ""
    if "169.254.169.254" in first or "metadata.google.internal" in first:
        return "no credentials were found. Set them in the environment, or name a profile"
    if code or status:
        about = ", ".join(filter(None, (status, code)))
        return f"{_MEANINGS[code]} ({about})" if code in _MEANINGS else f"the server answered {about}"
    return f"cannot be reached ({first.rpartition(' - ')[2][:200]})"
