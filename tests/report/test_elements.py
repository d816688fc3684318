from typing import get_args

import pytest
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlxflow.report.elements import Block, Code, Exchange, Figure, Note, Sample, Section, Sides, Table, Text

_TABLE = Table("a caption", ("a head", "another"), [("a cell", "1 < 2")])
_BLOCKS: list[tuple[Block, tuple[str, ...]]] = [
    (Note("a note"), ("a note",)),
    (Text("a text"), ("a text",)),
    (_TABLE, ("a caption", "a head", "another", "a cell", "1 &lt; 2")),
    (
        Figure("a title", Markup("<svg></svg>"), _TABLE, (("c0 box", "a series"),), hint="a hint"),
        ("a title", "<svg></svg>", "a cell", "a series", "a hint"),
    ),
    (Sample("a model", "a prompt", "and on"), ("a model", "a prompt", "and on")),
    (Exchange("a model", "a question", "its answer", "the answer"), ("a question", "its answer", "the answer")),
    (Code("a caption", "x = 1"), ("a caption", "x = 1")),
    (Sides(("A", "B"), ([Note("left")], [Text("right")])), ("A", "B", "left", "right")),
]


def test_every_element_has_a_kind_of_its_own() -> None:
    assert {type(block) for block, _ in _BLOCKS} == set(get_args(Block))
    assert len({block.kind for block, _ in _BLOCKS}) == len(_BLOCKS)


@pytest.mark.parametrize(("block", "shown"), [pytest.param(*one, id=one[0].kind) for one in _BLOCKS])
def test_the_template_shows_every_text_of_an_element(block: Block, shown: tuple[str, ...]) -> None:
    jinja = Environment(
        loader=PackageLoader("mlxflow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = jinja.get_template("page.html").render(
        title="a run",
        policy="",
        style="",
        scripts=[],
        labels=[],
        columns=1,
        facts=[],
        warnings=[],
        answers=[],
        sections=[Section("an-id", "A section", [block])],
    )
    begin = page.index("A section")
    for text in shown:
        assert text in page[begin:]
