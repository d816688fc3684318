import math
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from mlxflow.storage.toml_tables import Problem, describe, problem_message, read_struct, toml_value, unknown_key


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    size: Annotated[int, Meta(ge=1, le=9)] = 3


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    rate: Annotated[float, Meta(gt=0)] = 0.5
    several: tuple[Inner, ...] = ()
    inner: Inner = Inner()
    limit: int | None = None

    def problems(self) -> Iterator[Problem]:
        if self.rate > self.inner.size:
            yield Problem("rate", self.rate, f"expected at most inner.size = {self.inner.size}", "Lower it.")


def read(text: str) -> tuple[Outer | None, list[str]]:
    lines: list[str] = []
    return read_struct(tomllib.loads(text), Outer, file="f.toml", key="t", lines=lines), lines


def test_a_table_is_read_into_a_struct_with_every_default() -> None:
    made, lines = read('name = "a"\nseveral = [{ size = 1 }, {}]')
    assert lines == []
    assert made == Outer(name="a", several=(Inner(size=1), Inner()))


def test_an_integer_is_accepted_as_a_float() -> None:
    made, _ = read('name = "a"\nrate = 2')
    assert made
    assert isinstance(made.rate, float)


def test_every_error_is_reported_with_its_key() -> None:
    made, lines = read('rte = 1\nseveral = [{ size = 1 }, { size = 0 }, 4]\ninner = { sise = 1 }\nlimit = "x"')
    assert made is None
    assert lines == [
        "f.toml: t.rte: unknown key. Did you mean t.rate?",
        "f.toml: t.several[1].size = 0: expected a whole number from 1 to 9. "
        "Use t.several[1].size = 3 (the default) or remove the key.",
        "f.toml: t.several[2] = 4: expected a table. Write [t.several[2]] on a line of its own and its keys below it.",
        "f.toml: t.inner.sise: unknown key. Did you mean t.inner.size?",
        'f.toml: t.limit = "x": expected a whole number. Change it or remove t.limit.',
        "f.toml: t.name: missing. Add name to [t].",
    ]


def test_cross_checks_run_only_on_valid_values() -> None:
    assert read('name = "a"\nrate = 4') == (None, ["f.toml: t.rate = 4.0: expected at most inner.size = 3. Lower it."])
    assert read('name = "a"\nrate = 4\nlimit = "x"')[1] == [
        'f.toml: t.limit = "x": expected a whole number. Change it or remove t.limit.'
    ]


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        3,
        -2.5,
        "plain",
        'quoted "\\" back',
        "café 中 🙂",
        "a\nb\tc\r",
        "\x00\x1b\u202e\U000e0001",
        [1, ["x"]],
    ],
)
def test_values_are_shown_as_toml(value: object) -> None:
    assert "\n" not in toml_value(value)
    assert tomllib.loads(f"a = {toml_value(value)}") == {"a": value}


def test_tables_and_structs_are_shown_inline() -> None:
    assert toml_value({"a": 1, "b": ["c"]}) == '{ a = 1, b = ["c"] }'
    assert toml_value({}) == "{}"
    assert toml_value(Inner()) == "{ size = 3 }"
    assert (toml_value(math.inf), toml_value(math.nan)) == ("inf", "nan")


@pytest.mark.parametrize(
    ("type_", "words"),
    [
        (int, "a whole number"),
        (bool, "true or false"),
        (Annotated[str, Meta(min_length=1)], "text that is not empty"),
        (Annotated[int, Meta(ge=2, le=5)], "a whole number from 2 to 5"),
        (Annotated[float, Meta(gt=0, lt=1)], "a number over 0 and under 1"),
        (Annotated[int, Meta(le=5)], "a whole number of at most 5"),
        (Literal["a", 3], 'one of "a", 3'),
        (tuple[str, ...], "a list, each text"),
        (Annotated[tuple[str, ...], Meta(min_length=2)], "a list of at least 2, each text"),
        (tuple[float, float], "a list of 2, each a number"),
        (int | None, "a whole number"),
        (int | str, "a whole number or text"),
        (Annotated[str, Meta(pattern="^x$", examples=["x"])], "text such as 'x'"),
        (Annotated[str, Meta(pattern="^x$")], "text of the form ^x$"),
    ],
)
def test_types_are_described_in_words(type_: Any, words: str) -> None:
    assert describe(type_) == words


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("t.batchsize", "f.toml: t.batchsize: unknown key. Did you mean t.batch_size?"),
        ("t.Batch_Sizes", "f.toml: t.Batch_Sizes: unknown key. Did you mean t.batch_size?"),
        ("seeds", "f.toml: seeds: unknown key. Did you mean seed?"),
        ("t.colour", "f.toml: t.colour: unknown key. Known here: batch_size, seed."),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest_or_all_keys(key: str, line: str) -> None:
    assert unknown_key(key, ["seed", "batch_size"], file="f.toml") == line


def test_a_problem_without_a_value_shows_none() -> None:
    assert (
        problem_message(Problem("a", msgspec.UNSET, "missing", "Add it."), "f.toml", "t")
        == "f.toml: t.a: missing. Add it."
    )
    assert problem_message(Problem("", 3, "no table", "Fix it."), "f.toml", "t") == "f.toml: t = 3: no table. Fix it."
