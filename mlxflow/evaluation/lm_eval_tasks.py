"""Tasks of lm-eval, run through mlx-lm's adapter on a model that is opened here.

lm-eval and mlx-lm's adapter are imported when a task is opened: with their own imports they take seconds.
"""

import contextlib
import math
import numbers
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.evaluation.item_results import ItemResult, TaskResult
from mlxflow.messages.errors import CallError, SourceError, StageError, reason_of
from mlxflow.models.trial_calls import missing_row

# The metrics that count as accuracy, the first that a task has
_ACCURACIES = ("acc", "exact_match")


class LmEvalRule(NamedTuple):
    """How a task of lm-eval is run.

    Attributes:
        num_fewshot: examples before each item; None for the task's own number.
        max_items: items used of each of its tasks, from the first; 0 for all.
        metric: that counts as accuracy; empty for `acc`, else `exact_match`.
        chat: whether prompts go through the chat template; None for as the model has one.
        truncates: cut off the first tokens of a prompt that does not fit; else refuse it.
    """

    num_fewshot: int | None
    max_items: int
    metric: str
    chat: bool | None
    truncates: bool


class LmEvalTask(NamedTuple):
    """A task of lm-eval with its data, or a group of them.

    Attributes:
        loaded: its tasks and groups by name, as lm-eval's task manager returns them.
        key: the setting that names it, with its value, for messages.
    """

    loaded: dict[str, Any]
    key: str


def installed_version() -> str:
    """Return the version of lm-eval, on which its tasks depend.

    Raises:
        CallError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm-eval")
    except PackageNotFoundError as error:
        raise CallError("lm-eval is not installed. Run: pip install 'mlxflow[lm-eval]'.") from error


def open_task(source: str, path: Path | None, *, key: str) -> LmEvalTask:
    """Return a task with its data, which is downloaded unless it is local or in the hub's cache.

    Args:
        source: its name in lm-eval, if there is no file.
        path: of its YAML file, or None.
        key: the setting that names it, with its value, for messages.

    Raises:
        CallError: lm-eval has no such task.
        SourceError: its data cannot be read.
    """
    file = path.resolve() if path else None
    with _quiet(), contextlib.chdir(file.parent if file else Path.cwd()):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=file is None)
        name = str(file) if file else source
        if file is None and name not in manager.all_tasks:
            near = _nearest(name, manager.all_tasks)
            advice = f"Did you mean {near}?" if near else "See: lm_eval ls tasks"
            raise CallError(f"{key}: lm-eval has no such task. {advice}")
        try:
            loaded = manager.load([name])
        except Exception as error:  # of any library that reads data sets, or of the task's own code
            raise SourceError(f"{key}: its data cannot be opened ({reason_of(error)}). {_advise_offline()}") from error
    return LmEvalTask(loaded, key)


def _advise_offline() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        return "HF_HUB_OFFLINE is set: put the data into the hub's cache, or name a local file of it."
    return "Check the task's dataset_path and dataset_kwargs."


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), "")


class _RequestChecks:
    """Checks of requests before they are run.

    Args:
        key: of the task, for messages.
        name: of the model, for messages.
        positions: that the model is made for.
        num_rows: of its embedding; 0 if unknown.
        truncates: whether prompts that do not fit are truncated.
    """

    def __init__(self, key: str, name: str, *, positions: int, num_rows: int, truncates: bool) -> None:
        self._key, self._name, self._positions = key, name, positions
        self._num_rows, self._truncates = num_rows, truncates

    def require_room(self, num_truncated: int) -> None:
        """Refuse requests that do not fit, unless they are truncated.

        Raises:
            SourceError: there are some.
        """
        if num_truncated and not self._truncates:
            raise SourceError(
                f"{self._key}: {num_truncated:,} prompts do not fit into the {self._positions:,} positions of "
                f"{self._name}. Lower num_fewshot, or let prompts be truncated."
            )

    def require_rows(self, texts: Iterable[Iterable[int]]) -> None:
        """Refuse ids without a row of the embedding.

        Raises:
            SourceError: there is one.
        """
        for ids in texts:
            if line := missing_row(ids, self._num_rows, f"{self._key}, {self._name}"):
                raise SourceError(line)


def evaluate_lm_eval(
    task: LmEvalTask,
    model: Any,
    folder: Path,
    rule: LmEvalRule,
    *,
    positions: int,
    num_rows: int,
    batch_size: int,
    name: str,
) -> TaskResult:
    """Return the result of every document of a task; random choices are seeded as lm-eval does.

    Args:
        task: see `open_task`.
        model: of mlx-lm, in eval mode.
        folder: of the model, for its tokenizer.
        rule: how the task is run.
        positions: that the model is made for.
        num_rows: of its embedding; 0 if unknown.
        batch_size: prompts that are generated from together.
        name: of the model, for messages.

    Raises:
        CallError: the task needs a chat template that the folder lacks, or has no such metric.
        SourceError: a prompt does not fit, and the rule refuses it; or it has an id without a row of the embedding.
        StageError: the task or its metrics fail, or a score is not finite.
    """
    with _quiet():
        from lm_eval.evaluator import evaluate

        checks = _RequestChecks(task.key, name, positions=positions, num_rows=num_rows, truncates=rule.truncates)
        adapter = _adapter(model, folder, checks, positions=positions, batch_size=batch_size, chat=rule.chat)
        if adapter.use_chat_template and adapter.tokenizer.chat_template is None:
            raise CallError(f"{folder}: has no chat template, and {task.key} needs one. Leave out {name}, or the task.")
        _seed(task, rule.num_fewshot)
        try:
            results = evaluate(
                adapter,
                task.loaded,
                limit=rule.max_items or None,
                bootstrap_iters=0,
                apply_chat_template=adapter.use_chat_template,
                fewshot_as_multiturn=adapter.use_chat_template,
            )
        except SourceError:
            raise
        except Exception as error:  # of the task's own code, or of a metric
            raise StageError(f"{task.key} on {name}: lm-eval failed: {reason_of(error)}") from error
    samples: Mapping[str, list[dict[str, Any]]] = results["samples"]
    metric = _metric(samples, rule.metric, task.key)
    items = [*_items(samples, metric)]
    if not all(math.isfinite(item.score) for item in items):
        raise StageError(f"{task.key} on {name}: {metric} is not finite. Look for weights that are not finite.")
    metrics = _metrics(results["results"])
    return TaskResult("lm-eval", bool(adapter.use_chat_template), items, metrics, adapter.num_truncated)


def _seed(task: LmEvalTask, num_fewshot: int | None) -> None:
    """Seed every random choice and set the number of examples, as lm-eval's `simple_evaluate` does.

    That function also runs git and lists the system's packages, which takes seconds.
    """
    import random

    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for one in task.loaded["tasks"].values():
        own = one.get_config("num_fewshot")
        if own is None or (own and num_fewshot is not None):  # a task that sets 0 means it
            one.set_config(key="num_fewshot", value=num_fewshot or 0)
        one.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _adapter(
    model: Any, folder: Path, checks: _RequestChecks, *, positions: int, batch_size: int, chat: bool | None
) -> Any:
    """Return mlx-lm's adapter around a model; it counts the requests whose prompts do not fit.

    Args:
        model: of mlx-lm.
        folder: of the model, for its tokenizer.
        checks: of the requests before they are run.
        positions: that the model is made for.
        batch_size: prompts that are generated from together.
        chat: whether prompts go through the chat template; None for as the model has one.
    """
    from mlx_lm.evaluate import MLXLM
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    class Adapter(MLXLM):  # type: ignore[misc]
        """Opens nothing, and limits prompts to the model's positions."""

        def __init__(self) -> None:
            super(MLXLM, self).__init__()
            self._model, self.tokenizer = model, load_tokenizer(folder)
            self._max_tokens: int | None = None
            self._batch_size, self._sampler = batch_size, None
            self.use_chat_template = self.tokenizer.chat_template is not None if chat is None else chat
            self.num_truncated = 0

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            self._count([request.args[0] + request.args[1] for request in requests], 1)
            self._max_tokens = positions  # else it would be 8,192, whatever the model
            try:
                found: list[tuple[float, bool]] = super().loglikelihood(requests)
            finally:
                self._max_tokens = None
            return found

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            self._count([request.args[0] for request in requests], 1)
            found: list[float] = super().loglikelihood_rolling(requests)
            return found

        def generate_until(self, requests: list[Any]) -> list[str]:
            self._count([request.args[0] for request in requests], 0)
            found: list[str] = super().generate_until(requests)
            return found

        def _count(self, texts: list[str], unread: int) -> None:
            self.num_truncated += sum(len(ids) - unread > positions for ids in self._tokenize(texts))
            checks.require_room(self.num_truncated)

        def _tokenize(self, texts: list[str]) -> list[tuple[int, ...]]:
            found: list[tuple[int, ...]] = super()._tokenize(texts)
            checks.require_rows(found)
            return found

    return Adapter()


def _metric(samples: Mapping[str, list[dict[str, Any]]], wanted: str, key: str) -> str:
    """Return the name of the metric that counts as accuracy."""
    known = [[*one["metrics"]] for rows in samples.values() for one in rows]
    shared = [
        name for name in dict.fromkeys(each for names in known for each in names) if all(name in n for n in known)
    ]
    chosen = next((name for name in ((wanted,) if wanted else _ACCURACIES) if name in shared), "")
    if not chosen:
        what = f"has no metric {wanted}" if wanted else "has no accuracy"
        raise CallError(f"{key}: {what}. Set its metric to one of: {', '.join(shared) or 'none'}.")
    return chosen


def _items(samples: Mapping[str, list[dict[str, Any]]], metric: str) -> Iterator[ItemResult]:
    """Yield the score of every document by the first filter of its task."""
    for name, rows in samples.items():
        for one in rows:
            if one["filter"] != rows[0]["filter"]:
                continue
            score = one[metric]
            if not isinstance(score, numbers.Real):
                raise CallError(f"{name}: its metric {metric} is no number for each item. Set another metric.")
            nats = tuple(float(each[0]) for each in one["filtered_resps"] if isinstance(each, tuple | list) and each)
            text = next((each for each in one["filtered_resps"] if isinstance(each, str)), None)
            yield ItemResult(f"{name}:{one['doc_id']}", float(score), nats, text)


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return every aggregated number of lm-eval, by `task metric,filter`; the task is left out if there is one."""
    return {
        (f"{task} {name}" if len(results) > 1 else name).removesuffix(",none"): float(value)
        for task, table in results.items()
        for name, value in table.items()
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and name != "sample_len"
        and "_stderr" not in name and math.isfinite(float(value))
    }  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what lm-eval and mlx-lm print to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
