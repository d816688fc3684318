"""A store in a bucket of a real S3 server: cut transfers, refusals, and credentials that are not shown."""

import os
import sys
from pathlib import Path

import pytest

from mlxflow.messages.errors import StoreError
from mlxflow.storage.object_store import Blob, open_store
from tests.storage import s3_server
from tests.storage.s3_server import BUCKET, KEY, SECRET, CuttingProxy, S3Server, file_of, nothing, use

pytestmark = pytest.mark.usefixtures("no_credentials")


@pytest.mark.parametrize("side", ["from_client", "from_server"])
def test_a_transfer_that_is_cut_is_an_error_and_leavesnothing_half(
    server: S3Server, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(server.port, monkeypatch)
    url = f"s3://{BUCKET}/{tmp_path.name}"
    data = os.urandom(3_000_000)
    blob, path = Blob("blobs/a", len(data)), file_of(tmp_path, data)
    if side == "from_server":
        open_store(url).publish({blob: path}, "keys/k/x.json", b"x", nothing, replace=False)
    limit = 100_000
    proxy = CuttingProxy(
        server.port,
        from_client=limit if side == "from_client" else None,
        from_server=limit if side == "from_server" else None,
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    store = open_store(url)
    transfers = {
        "from_server": lambda: store.download(blob, tmp_path / "back"),
        "from_client": lambda: store.publish({blob: path}, "keys/k/x.json", b"x", nothing, replace=False),
    }
    with pytest.raises(StoreError, match=r"^cannot be reached \([^\n]+\)$"):
        transfers[side]()
    proxy.close()
    assert proxy.num_cuts > 1  # it was tried again
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    if side == "from_client":
        assert open_store(url).names("blobs") == open_store(url).names("keys/k") == []


def test_a_download_that_is_cut_is_resumed(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(server.port, monkeypatch)
    url, data = f"s3://{BUCKET}/{tmp_path.name}", os.urandom(3_000_000)
    blob = Blob("blobs/a", len(data))
    open_store(url).publish({blob: file_of(tmp_path, data)}, "keys/k/x.json", b"x", nothing, replace=False)
    proxy = CuttingProxy(server.port, from_server=1_200_000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    assert open_store(url).download(blob, tmp_path / "back")
    proxy.close()
    assert (tmp_path / "back").read_bytes() == data
    assert proxy.num_cuts


def test_a_missing_bucket_is_an_error_and_not_an_empty_store(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(server.port, monkeypatch)
    with pytest.raises(StoreError) as caught:
        open_store("s3://no-such-bucket/x").names("keys/k")
    assert str(caught.value) == "no such bucket (404 Not Found, NoSuchBucket)"


def test_wrong_credentials_are_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with s3_server.s3_server(checks_credentials=True) as strict:
        use(strict.port, monkeypatch)
        store = open_store(f"s3://{BUCKET}/x")
        for attempt in (lambda: store.names("keys/k"), lambda: store.read("keys/k", 1), store.check_writable):
            with pytest.raises(StoreError) as caught:
                attempt()
            assert str(caught.value) == "the access key is unknown (403 Forbidden, InvalidAccessKeyId)"


def test_an_endpoint_with_a_password_is_not_shown(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(server.port, monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{KEY}:{SECRET}@127.0.0.1:1?token={SECRET}")
    with pytest.raises(StoreError) as caught:
        open_store(f"s3://{BUCKET}/x").names("keys/k")
    assert KEY not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_credentials_of_a_profile_are_used(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_PROFILE", "shared")
    folder = tmp_path / "home" / ".aws"
    folder.mkdir(parents=True)
    (folder / "credentials").write_text(f"[shared]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    (folder / "config").write_text(
        f"[profile shared]\nregion = us-east-1\nendpoint_url = http://127.0.0.1:{server.port}\n"
    )
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}")
    assert store.publish({}, "keys/k/x.json", b"one", nothing, replace=False)
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(StoreError, match=r"^the AWS profile cannot be used \(.*other.*\)$"):
        open_store(f"s3://{BUCKET}/{tmp_path.name}")


def test_a_missing_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    (tmp_path / "home/.aws").mkdir(parents=True)
    (tmp_path / "home/.aws/credentials").write_text("[default]\n")
    with pytest.raises(StoreError) as caught:
        open_store("s3://bucket")
    assert str(caught.value) == "AWS profiles need boto3. Run: pip install 'mlxflow[store]'"
    monkeypatch.setitem(sys.modules, "obstore", None)
    for url in ("s3://bucket", "gs://bucket"):
        with pytest.raises(StoreError) as caught:
            open_store(url)
        assert str(caught.value) == "needs obstore. Run: pip install 'mlxflow[store]'"
