"""Render runs to one HTML file; it makes no requests, and its content security policy forbids them."""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlxflow.report.elements import Answer
from mlxflow.report.formatting import clean
from mlxflow.report.load_run import Run
from mlxflow.report.sections import benchmark, corpus, environment, learning, memory, quantization, samples, stages
from mlxflow.report.summary import answers

_SECTIONS = (stages, corpus, learning, quantization, memory, benchmark, samples, environment)


def render(runs: Sequence[Run]) -> bytes:
    """Return the page of one run, or of two side by side; equal runs give equal bytes.

    Args:
        runs: one or two of them; two have labels.
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
    style, script = (_asset(jinja, loader, name) for name in ("page.css", "page.js"))
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src 'sha256-{_hash(style)}'",
            f"script-src 'sha256-{_hash(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    page = jinja.get_template("page.html").render(
        title=" and ".join(dict.fromkeys(run.name for run in runs)),
        policy=policy,
        style=Markup(style),  # noqa: S704 - our own files
        script=Markup(script),  # noqa: S704
        labels=[run.label for run in runs if run.label],
        answers=_lines([answers(run) for run in runs]),
        sections=[module.section(runs) for module in _SECTIONS],
    )
    return page.encode()


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
