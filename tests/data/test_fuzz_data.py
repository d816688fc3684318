"""Source files made by a grammar and then damaged: each gives documents, or a line that says what is wrong."""

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxflow.data import decompression
from mlxflow.data.chat import ChatTemplate
from mlxflow.data.chatml import CHATML
from mlxflow.data.conversations import ALPACA_KEYS, CHAT_KEYS, COMPANION_KEYS, COMPLETION_KEYS
from mlxflow.data.decompression import FileProblem
from mlxflow.data.documents import Document, Formatter, NoTemplateError
from mlxflow.data.records import Bad, Shape, read_file
from mlxflow.storage.digests import digest_file

KEYS = ("text", *CHAT_KEYS, *COMPLETION_KEYS, *ALPACA_KEYS, *COMPANION_KEYS)
ROLES = ("user", "assistant", "system", "tool", "gpt", "human", "function_call", "observation", "", "a b", "\ud800")
NUMBERS = ("1e999", "-1e-999", "NaN", "-Infinity", "9" * 5000, "0." + "1" * 400, "-0", "1E400")

texts = st.text(max_size=20) | st.sampled_from(
    ["<|im_end|>", "\ufdd0", "\ufeff", "a\0", "\u2028", "x" * 3000, "[" * 2000]
)
surrogates = st.sampled_from(["\ud800", "\udfff a", "\udc00\ud800"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | surrogates
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | surrogates, inner, max_size=4),
    max_leaves=8,
)
calls = st.fixed_dictionaries(
    {}, optional={"function": values, "name": texts, "arguments": values | values.map(json.dumps), "id": values}
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | values, "content": texts | values},
    optional={
        "tool_calls": st.lists(calls | values, max_size=2) | values,
        "function_call": calls | values,
        "weight": st.sampled_from([0, 1]) | values,
        "train": st.booleans() | values,
        "name": values,
    },
)
turns = st.fixed_dictionaries(
    {"from": st.sampled_from(ROLES) | values, "value": texts | values | calls.map(json.dumps)}
)
talks = st.lists(messages | turns, min_size=1, max_size=4)
tools = st.lists(calls | calls.map(json.dumps) | values, max_size=2)
fields = talks | talks.map(json.dumps) | tools | tools.map(json.dumps) | texts | values
records = st.dictionaries(st.sampled_from(KEYS) | texts, fields, max_size=5) | values
dumped = st.builds(json.dumps, records, ensure_ascii=st.booleans()).map(lambda one: one.encode(errors="surrogatepass"))
odd_lines = st.sampled_from(NUMBERS).map(lambda one: f'{{"text": "a", "n": {one}}}'.encode())
lines = dumped | odd_lines | st.binary(max_size=20) | st.sampled_from([b"", b" ", b"\r", b"[" * 3000, b'{"text": "a"}'])
files = st.lists(lines, max_size=6).map(b"\n".join)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Return bytes of which a few are changed, or the end is missing, or twice there."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 3)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.none() | st.integers(0, len(data)))
    return bytes(data[:cut]) + bytes(data[draw(st.integers(0, len(data))) :]) * draw(st.integers(0, 1))


def _read(path: Path, *, has_template: bool, train_on: Literal["completion", "last", "all"] | None) -> None:
    """Read a file; fail on anything but documents that can be tokenized, and short lines of what is wrong."""
    template = ChatTemplate(CHATML, {}) if has_template else None
    formatter = Formatter(format_="auto", text_key="text", template=template, train_on=train_on)
    reasons = []
    try:
        for batch in read_file(
            path,
            Shape.of(path),
            expected_digest=digest_file(path).content,
            form=formatter.record_form,
            strict=False,
            on_read=lambda _: None,
        ):
            for one in formatter.documents(batch):
                if isinstance(one, Bad):
                    reasons.append(one.reason)
                else:
                    _check(one)
    except FileProblem as problem:
        reasons.append(str(problem))
    except NoTemplateError:
        assert not has_template
    for reason in reasons:
        assert reason.isprintable()
        assert len(reason) < 500


def _check(document: Document) -> None:
    assert len(document.text.encode()) == document.num_bytes
    for begin, end in document.spans or ():
        assert 0 <= begin <= end <= len(document.text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


quick = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@quick
@given(
    data=damaged(files),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt"]),
    has_template=st.booleans(),
    train_on=st.sampled_from(["completion", "last", "all", None]),
)
def test_a_fuzzed_file_gives_documents_or_an_error_line(
    folder: Path, data: bytes, name: str, has_template: bool, train_on: Any
) -> None:
    path = folder / name
    path.write_bytes(data)
    _read(path, has_template=has_template, train_on=train_on)


@quick
@given(records=st.lists(records, max_size=4), train_on=st.sampled_from(["completion", "last", "all", None]))
def test_a_fuzzed_record_gives_a_document_or_an_error_line(folder: Path, records: list[Any], train_on: Any) -> None:
    path = folder / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    _read(path, has_template=True, train_on=train_on)


def _parquet_files() -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    table = pyarrow.table({"text": ["hello", None, "you"] * 20, "messages": [talk] * 60})
    found = []
    for options in ({}, {"store_schema": False}, {"use_dictionary": False, "data_page_version": "2.0"}):
        out = io.BytesIO()
        parquet.write_table(table, out, **options)
        found.append(out.getvalue())
    return found


@quick
@given(data=damaged(st.sampled_from(_parquet_files())))
def test_a_fuzzed_parquet_file_gives_documents_or_an_error_line(folder: Path, data: bytes) -> None:
    path = folder / "a.parquet"
    path.write_bytes(data)
    _read(path, has_template=True, train_on="all")


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress}
units = st.sampled_from([b"\0", b"\n", b"a ", b'{"text": "a"}\n', b"[", b'"', b"text,a\n", b"\xff", b"{"])
repeated = st.builds(lambda unit, size: unit * (size // len(unit)), units, st.integers(0, 2_000_000))


@settings(quick, max_examples=settings().max_examples // 8)
@given(
    parts=st.lists(files | repeated, max_size=3),
    kind=st.sampled_from(["txt", "jsonl", "json", "csv"]),
    compression=st.sampled_from(sorted(COMPRESS)),
    data=st.data(),
)
def test_a_fuzzed_compressed_file_is_read_in_bounded_memory(
    folder: Path, parts: list[bytes], kind: str, compression: str, data: st.DataObject
) -> None:
    stream = b"".join(map(COMPRESS[compression], parts))
    path = folder / f"a.{kind}.{compression}"
    path.write_bytes(data.draw(damaged(st.just(stream))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompression, "PIECE_BYTES", 1 << 16)
        patch.setattr(decompression, "_FREE_INFLATION_BYTES", 1 << 19)
        tracemalloc.start()
        try:
            _read(path, has_template=True, train_on="all")
            assert tracemalloc.get_traced_memory()[1] < 30_000_000
        finally:
            tracemalloc.stop()
