"""Render runs to one HTML file; it makes no requests, and its content security policy forbids them."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlxflow.report.elements import Answer
from mlxflow.report.facts import facts
from mlxflow.report.formatting import clean
from mlxflow.report.load_run import Run
from mlxflow.report.sections import (
    benchmark,
    comparison,
    corpus,
    environment,
    evaluation,
    learning,
    memory,
    models,
    quantization,
    samples,
    stages,
)
from mlxflow.report.summary import answers

_SECTIONS = (
    *(comparison, models, stages, corpus, learning, quantization, evaluation),
    *(memory, benchmark, samples, environment),
)

# More answers side by side than these would be too narrow to read: they stand below each other
_MOST_COLUMNS = 4


def render(runs: Sequence[Run], *, is_live: bool = False) -> bytes:
    """Return the page of one run, or of several side by side; equal runs give equal bytes.

    Args:
        runs: one or more; several have labels.
        is_live: whether the page asks its server for changes, and shows them.
    """
    loader = PackageLoader("mlxflow.report")
    jinja = Environment(
        loader=loader,
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = _asset(jinja, loader, "page.css")
    scripts = [_asset(jinja, loader, name) for name in ("page.js", *(("live.js",) if is_live else ()))]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src 'sha256-{_hash(style)}'",
            "script-src " + " ".join(f"'sha256-{_hash(script)}'" for script in scripts),
            *(("connect-src 'self'",) if is_live else ()),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    page = jinja.get_template("page.html").render(
        title=" and ".join(dict.fromkeys(run.name for run in runs)),
        policy=policy,
        style=Markup(style),  # noqa: S704 - our own files
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        labels=[run.label for run in runs if run.label],
        columns=min(len(runs), _MOST_COLUMNS),
        facts=facts(runs[0]) if len(runs) == 1 else [],
        warnings=[warning for run in runs for warning in _warnings(run)],
        answers=_lines([answers(run) for run in runs]),
        sections=[section for module in _SECTIONS if (section := module.section(runs)).blocks],
    )
    return page.encode()


def _warnings(run: Run) -> Iterator[str]:
    """Yield what the stages warn of, each with its stage and run."""
    for one in run.stages:
        for line in getattr(one.report.figures, "warnings", ()) if one.report else ():
            yield ": ".join(word for word in (run.label, one.task, clean(str(line))) if word)


def _lines(runs: Sequence[Sequence[Answer]]) -> list[tuple[Answer, list[Answer | None]]]:
    """Return a line for each question, with the answers of all runs that have one."""
    asked = {one.question: one for found in runs for one in found}
    by_run = [{one.question: one for one in found} for found in runs]
    return [(one, [known.get(question) for known in by_run]) for question, one in asked.items()]


def _shown(value: Any) -> Any:
    """Return text for the template, without characters that HTML cannot contain."""
    return clean(value) if type(value) is str else value


def _asset(jinja: Environment, loader: BaseLoader, name: str) -> str:
    """Return the content of one of the page's assets."""
    return loader.get_source(jinja, name)[0]


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
