import tomllib

import pytest

from mlxflow.storage import toml_text

TEXTS = ['a.b.c = 1\n"d.e" = [1.5, 2.5]\n', "[x.y]\nz = '''a.b.c.d.e'''\n# a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_loads_returns_the_table_of_tomllib(text: str) -> None:
    assert toml_text.loads(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\n  " + ".".join("a" * 17) + " = 1", "a key of more than 16 parts (at line 2, column 3)"),
        ("a = " + "[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "1" * 5000, "a whole number of too many digits"),
    ],
)
def test_long_keys_deep_nesting_and_huge_numbers_are_refused(text: str, reason: str) -> None:
    with pytest.raises(tomllib.TOMLDecodeError) as caught:
        toml_text.loads(text)
    assert str(caught.value) == reason


def test_the_longest_key_and_the_deepest_list_are_read() -> None:
    assert toml_text.loads(".".join("a" * 16) + " = 1")["a"]
    assert toml_text.loads("a = " + "[" * 31 + "]" * 31)["a"] is not None
