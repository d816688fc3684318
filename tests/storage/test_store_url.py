"""Addresses of stores: what is accepted, what is refused without repeating it, and what is never printed."""

import pytest

from mlxflow.storage.store_url import StoreUrl, parse, scrubbed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket", StoreUrl("s3", "bucket", "")),
        ("s3://bucket/a/b/", StoreUrl("s3", "bucket", "a/b")),
        ("gs://bucket/a", StoreUrl("gs", "bucket", "a")),
        ("file:///mnt/a%20b/", StoreUrl("file", "", "/mnt/a b")),
        ("hf://datasets/owner/name", StoreUrl("hf", "owner/name", "")),
        ("hf://datasets/owner/name@dev/a/b", StoreUrl("hf", "owner/name@dev", "a/b")),
    ],
)
def test_an_address_has_parts(text: str, expected: StoreUrl) -> None:
    assert parse(text) == expected


KNOWN = "expected an address that begins with s3://, gs://, hf://datasets/ or file:///"
NO_USER = "expected no user name, password, query or fragment"
PLAIN = "expected a path of plain names, without empty ones, '..', '%' and backslashes"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", KNOWN),
        ("bucket/path", KNOWN),
        ("http://host/path", KNOWN),
        ("s3://[::1", KNOWN),
        ("s3://key:secret@bucket/path", NO_USER),
        ("s3://bucket/path?token=secret", NO_USER),
        ("s3://bucket/path#part", NO_USER),
        ("s3:///path", "expected a bucket, as in s3://bucket/path"),
        ("s3://b", "expected a bucket, as in s3://bucket/path"),
        ("s3://bucket/a/../b", PLAIN),
        ("s3://bucket/a//b", PLAIN),
        ("s3://bucket/a%2Fb", PLAIN),
        ("hf://owner/name", "expected a data set, as in hf://datasets/owner/name"),
        ("hf://datasets/owner", "expected a data set, as in hf://datasets/owner/name"),
        ("file://host/path", "expected an absolute path after file://, as in file:///mnt/shared/store"),
        ("file:///", "expected an absolute path after file://, as in file:///mnt/shared/store"),
    ],
)
def test_other_addresses_are_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        parse(text)
    assert str(caught.value) == expected


def test_texts_are_scrubbed_of_users_queries_and_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_NO_USER_ACCESS_KEY", "abc/def+123")
    monkeypatch.setenv("HF_TOKEN", "hf_longtoken")
    text = "GET http://user:pw@host:80/a?X-Amz-Signature=1f2e with abc/def+123 and hf_longtoken, see a?"
    assert scrubbed(text) == "GET http://***@host:80/a?*** with *** and ***, see a?"
