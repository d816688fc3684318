import re

import pytest

from mlxflow.data import guard
from mlxflow.data.guard import guarded
from mlxflow.evaluation.text_generation import open_template
from mlxflow.messages.errors import SourceError
from tests.data.test_guard import (
    _MEMORY,
    _SMALL,
    _TEMPLATE,
    _Job,
    job,  # noqa: F401
)

_FIRST = f"{_TEMPLATE}, reading a.jsonl:1"

_SECONDS = "took over 1 s of processor time. Fix it or name another."


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", f"{_FIRST}, {_SECONDS}"),
        ("{{ 9**(9**9) }}", f"{_TEMPLATE} {_SECONDS}"),
        ("{{ 9**(9**9 * messages|length) }}", f"{_FIRST}, {_SECONDS}"),
        ("{{ 'x' * 10**10 }}", f"{_TEMPLATE} {_MEMORY}"),
        ("{{ 'x' * 10**18 }}", f"{_TEMPLATE} failed (out of memory). Fix it or name another."),
        ("{{ messages[0].content.center(10**9) }}", f"{_FIRST}, {_MEMORY}"),
        ("{{ ('%' ~ 10**9 ~ 'd') % messages|length }}", f"{_FIRST}, {_MEMORY}"),
        ("{% set a = messages[0].content * 10**5 %}{{ range(1000)|join(a) }}", f"{_FIRST}, {_MEMORY}"),
        (
            "{% macro f(x) %}{% if x < 99 %}{{ f(x + 1) }}{{ f(x + 1) }}{% endif %}{% endmacro %}{{ f(1) }}",
            f"{_FIRST}, {_SECONDS}",
        ),
        (
            "{% set n = namespace(a=messages) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
            f"{_FIRST}, {_MEMORY}",
        ),
        (
            "{{ " + "(" * 5000 + ")" * 5000 + " }}",
            f"{_TEMPLATE} is not valid (maximum recursion depth exceeded). Fix it.",
        ),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, None),
    ],
    ids=["loops", "constant", "power", "text", "huge", "center", "width", "join", "macro", "list", "depth", "blocks"],
)
def test_a_template_over_its_limits_is_one_error_line(
    job: _Job,  # noqa: F811
    source: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if said and said.endswith(_MEMORY):
        monkeypatch.setattr(guard, "LIMITS", _SMALL)
    line = job.fails(job.template(source))
    if said is None:
        assert line.startswith(f"{_TEMPLATE} is not valid (too many levels of indentation")
    else:
        assert re.sub(r" \([\d,]+ bytes\)|(?<=exceeded) in comparison", "", line) == said


def test_the_template_of_a_model_folder_is_limited(job: _Job) -> None:  # noqa: F811
    job.tokenizer()
    (job.folder / "mine/chat_template.jinja").write_text("{{ 9**(9**9 * messages|length) }}")
    template = open_template(job.folder / "mine", guarded)
    assert template is not None
    with pytest.raises(SourceError) as caught:
        template.render([{"role": "user", "content": "x"}], prompt=True)
    assert str(caught.value) == f"{job.folder}/mine: its chat template {_SECONDS}"
