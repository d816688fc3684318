"""Evaluate a model on the items of a task file: likely completions, the likeliest choice, or generated answers."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.nn as nn

from mlxflow.evaluation.item_results import ItemResult, TaskResult
from mlxflow.evaluation.item_tokens import ItemEncoder, fit_prompt, fit_sequences
from mlxflow.evaluation.log_likelihood import LogLikelihood, TokenSequence, log_likelihoods
from mlxflow.evaluation.perplexity import perplexity_of
from mlxflow.evaluation.task_file import TaskFile, TaskItem
from mlxflow.evaluation.text_generation import Sampling, Writer
from mlxflow.messages.errors import CallError, SourceError, StageError
from mlxflow.models.trial_calls import missing_row

# The most lines of items that do not fit
_MAX_LINES = 10


class ScoringRule(NamedTuple):
    """How the items of a task are asked and scored.

    Attributes:
        chat: whether prompts go through the chat template; auto: if the model has one.
        max_items: items used, from the first; 0 for all.
        length_normalized: rank choices by log-likelihood per character.
        max_tokens: most tokens of a generated answer.
        stop: texts that end a generated answer; empty: the end of its line, through a chat template none.
        answer_pattern: a regular expression; its last match, or the first group of that, is the answer.
        ignore_case: compare answers without case.
        truncates: cut off the first tokens of a prompt that does not fit; else refuse it.
    """

    chat: Literal["auto", "always", "never"]
    max_items: int
    length_normalized: bool
    max_tokens: int
    stop: tuple[str, ...]
    answer_pattern: str
    ignore_case: bool
    truncates: bool


class EncodedItem(NamedTuple):
    """An item as the ids of one model's tokenizer.

    Attributes:
        item: of the file.
        sequences: of a completion or of choices; empty for an exact match.
        prompt: of an exact match; empty for the others.
        cut_tokens: number of the prompt's first tokens that are left out.
    """

    item: TaskItem
    sequences: list[TokenSequence]
    prompt: Sequence[int]
    cut_tokens: int


class EncodedTask(NamedTuple):
    """The items of a task as the ids of one model's tokenizer.

    Attributes:
        kind: of the items.
        items: in the order of the file.
        uses_chat: whether the chat template wrote the prompts.
    """

    kind: str
    items: list[EncodedItem]
    uses_chat: bool

    @property
    def num_truncated(self) -> int:
        """The number of items whose prompt is cut."""
        return sum(one.cut_tokens > 0 for one in self.items)


class TaskNames(NamedTuple):
    """What messages call a task and a model.

    Attributes:
        file: of the items.
        model: as written.
        key: the setting of the task.
    """

    file: str
    model: str
    key: str


def encode_task(
    file: TaskFile, folder: Path, rule: ScoringRule, *, positions: int, names: TaskNames, encoder: ItemEncoder
) -> EncodedTask:
    """Return a task as ids; nothing of the model's weights is read.

    Args:
        file: the items.
        folder: of the model.
        rule: how they are asked.
        positions: that the model is made for.
        names: for messages.
        encoder: of the folder.

    Raises:
        CallError: the task needs a chat template, and the folder has none.
        SourceError: an item does not fit into the model's context, or its template refuses it; a line for each.
    """
    uses_chat = rule.chat == "always" or (rule.chat == "auto" and (encoder.has_template or file.needs_chat))
    if uses_chat and not encoder.has_template:
        because = f"{names.file} has messages" if file.needs_chat else f'{names.key}.chat = "always"'
        raise CallError(f"{folder}: has no chat template, and {because}. Leave out {names.model}, or the task.")
    encoded: list[EncodedItem] = []
    lines: list[str] = []
    for item in file.items[: rule.max_items or None]:
        one = _encode(item, file.kind, encoder, rule, positions=positions, shown=names.file, uses_chat=uses_chat)
        if one is None:
            lines.append(f"{names.file}:{item.line}: its answer does not fit into the {positions:,} positions of "
                         f"{names.model}. Remove the line, or shorten it.")  # fmt: skip
        elif one.cut_tokens and not rule.truncates:
            lines.append(f"{names.file}:{item.line}: is {one.cut_tokens:,} tokens too long for the {positions:,} "
                         f"positions of {names.model}. Shorten it, or let prompts be truncated.")  # fmt: skip
        else:
            encoded.append(one)
    if lines:
        raise SourceError(*lines[:_MAX_LINES])
    return EncodedTask(file.kind, encoded, uses_chat)


def _encode(
    item: TaskItem, kind: str, encoder: ItemEncoder, rule: ScoringRule, *, positions: int, shown: str, uses_chat: bool
) -> EncodedItem | None:
    if kind == "exact match":
        prompt = fit_prompt(encoder.prompt_ids(item, uses_chat=uses_chat, shown=shown), positions, rule.max_tokens)
        return None if prompt is None else EncodedItem(item, [], *prompt)
    sequences = fit_sequences(encoder.sequences(item, uses_chat=uses_chat, shown=shown), positions)
    return None if sequences is None else EncodedItem(item, sequences[0], [], sequences[1])


def evaluate_task(
    task: EncodedTask, writer: Writer, scored: nn.Module, rule: ScoringRule, *, batch_size: int, names: TaskNames
) -> TaskResult:
    """Return the result of every item.

    Args:
        task: the items.
        writer: the model, which generates answers.
        scored: the model, which computes log-likelihoods; see `quantized_layers.for_evaluation`.
        rule: how they are scored.
        batch_size: largest number of rows in a forward pass.
        names: for messages.

    Raises:
        SourceError: an item has an id without a row of the embedding; a line for each.
        StageError: a log-likelihood is not finite.
    """
    _require_rows(task, writer.num_rows, names)
    if task.kind == "exact match":
        items = [_generated(one, writer, rule, uses_chat=task.uses_chat) for one in task.items]
        return TaskResult(task.kind, task.uses_chat, items, {}, task.num_truncated)
    found = iter(log_likelihoods(scored, [each for one in task.items for each in one.sequences], batch_size=batch_size))
    results = [[next(found) for _ in one.sequences] for one in task.items]
    for one, own in zip(task.items, results, strict=True):
        if not all(math.isfinite(each.nats) for each in own):
            raise StageError(
                f"{names.model}: returns numbers that are not finite at {names.file}:{one.item.line}. "
                "Look for weights that are not finite."
            )
    if task.kind == "choice":
        return _choices(task, results, rule)
    return _completions(task, results)


def _require_rows(task: EncodedTask, rows: int, names: TaskNames) -> None:
    lines = []
    for one in task.items:
        read = [*one.prompt, *(each for sequence in one.sequences for part in sequence for each in part)]
        if line := missing_row(read, rows, f"{names.file}:{one.item.line}, {names.model}"):
            lines.append(line)
    if lines:
        raise SourceError(*lines[:_MAX_LINES])


def _completions(task: EncodedTask, results: Sequence[Sequence[LogLikelihood]]) -> TaskResult:
    """Return the results of completions: right if greedy decoding writes the completion."""
    items = [
        ItemResult(str(one.item.line), float(own.is_greedy), (own.nats,), None, one.cut_tokens)
        for one, (own,) in zip(task.items, results, strict=True)
    ]
    nats, tokens = math.fsum(own.nats for (own,) in results), sum(own.tokens for (own,) in results)
    metrics = {"nats_per_token": -nats / tokens, "perplexity": perplexity_of(-nats / tokens)}
    return TaskResult(task.kind, task.uses_chat, items, metrics, task.num_truncated)


def _choices(task: EncodedTask, results: Sequence[Sequence[LogLikelihood]], rule: ScoringRule) -> TaskResult:
    """Return the results of multiple choice by both rankings; the rule says which one counts.

    As in lm-eval's `acc_norm`, the space before a choice is not one of its characters.
    """
    rankings: dict[bool, list[float]] = {False: [], True: []}
    for one, own in zip(task.items, results, strict=True):
        nats = [each.nats for each in own]
        per_character = [each / len(text.strip()) for each, text in zip(nats, one.item.texts, strict=True)]
        for is_normalized, values in ((False, nats), (True, per_character)):
            rankings[is_normalized].append(float(values.index(max(values)) == one.item.right))
    items = [
        ItemResult(str(one.item.line), score, tuple(each.nats for each in own), None, one.cut_tokens)
        for one, own, score in zip(task.items, results, rankings[rule.length_normalized], strict=True)
    ]
    count = len(items)
    names = {False: "accuracy_by_sum", True: "accuracy_per_character"}
    metrics = {names[is_normalized]: math.fsum(scores) / count for is_normalized, scores in rankings.items()}
    return TaskResult(task.kind, task.uses_chat, items, metrics, task.num_truncated)


def _generated(one: EncodedItem, writer: Writer, rule: ScoringRule, *, uses_chat: bool) -> ItemResult:
    """Return the result of a generated answer."""
    stop = rule.stop or (() if uses_chat else ("\n",))
    pieces = writer.write(one.prompt, Sampling(rule.max_tokens, 0.0, 0))
    text = answer_text(pieces, stop)
    answer = comparable(extracted(text, rule.answer_pattern), ignore_case=rule.ignore_case)
    accepted = {comparable(each, ignore_case=rule.ignore_case) for each in one.item.texts}
    return ItemResult(str(one.item.line), float(answer in accepted), (), text, one.cut_tokens)


def answer_text(pieces: Iterator[str], stop: Sequence[str]) -> str:
    """Return a generated text up to the first stop text after its leading white space; generation ends there."""
    text = ""
    for piece in pieces:
        text += piece
        answer = text.lstrip()
        if places := [at for one in stop if (at := answer.find(one)) >= 0]:
            return answer[: min(places)].rstrip()
    return text.strip()


def extracted(text: str, pattern: str) -> str:
    """Return the last match of a regular expression, or the first group of it; the text for an empty expression."""
    if not pattern:
        return text
    matches = list(re.finditer(pattern, text))
    if not matches:
        return ""
    return (matches[-1][1] if matches[-1].re.groups else matches[-1][0]) or ""


def comparable(text: str, *, ignore_case: bool) -> str:
    """Return a text as answers are compared: white space at its ends and runs of it do not count."""
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text
