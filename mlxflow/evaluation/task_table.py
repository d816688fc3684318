"""The table of a task of an evaluation: where its items are, how they are asked and scored, and its gates."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mlxflow.storage.toml_tables import MAX_SIZE, Problem

_ITEMS = ".jsonl"
_YAML = (".yaml", ".yml")

# Keys that only tasks of JSONL items have, and only those of lm-eval
_OWN_KEYS = ("length_normalized", "max_tokens", "stop", "answer_pattern", "ignore_case")
_LM_EVAL_KEYS = ("num_fewshot", "metric")

_Gate = Annotated[float, Meta(ge=0, le=1)]


class TaskTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the tasks of an evaluation."""

    source: Annotated[
        str, Meta(min_length=1, description="a JSONL file of items, a YAML file of lm-eval, or a task's name there")
    ]
    name: Annotated[str, Meta(description="in reports; empty: the file's name without its ending, or source")] = ""
    max_items: Annotated[
        int, Meta(ge=0, le=10**9, description="items used, from the first; of an lm-eval group, of each task; 0: all")
    ] = 0
    chat: Annotated[
        Literal["auto", "always", "never"],
        Meta(description="whether the chat template writes the prompts; auto: if the model has one"),
    ] = "auto"
    min_accuracy: Annotated[
        Literal["auto"] | _Gate, Meta(description="under it the stage fails; 0: no gate; auto: evaluate.min_accuracy")
    ] = "auto"
    max_accuracy_drop: Annotated[
        Literal["auto"] | _Gate,
        Meta(description="over it the stage fails; 0: no gate; auto: evaluate.max_accuracy_drop"),
    ] = "auto"
    length_normalized: Annotated[
        bool, Meta(description="of choices: rank them by log-likelihood per character, not by its sum")
    ] = False
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_SIZE, description="of answers: most tokens that are generated")] = 64
    stop: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(
            description="of answers: texts that end one; empty: the end of the line, with a chat template of the turn"
        ),
    ] = ()
    answer_pattern: Annotated[
        str,
        Meta(description="of answers: a regular expression; its last match, or that one's first group, is compared"),
    ] = ""
    ignore_case: Annotated[bool, Meta(description="of answers: compare them without case")] = False
    num_fewshot: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=0, le=1000)],
        Meta(description="of lm-eval: examples before each item; auto: the task's own number"),
    ] = "auto"
    metric: Annotated[
        str, Meta(description="of lm-eval: the metric that counts as accuracy; empty: acc, else exact_match")
    ] = ""

    @property
    def is_own(self) -> bool:
        """Whether its items are in a JSONL file."""
        return self.source.endswith(_ITEMS)

    @property
    def is_file(self) -> bool:
        """Whether it is a file, not the name of a task in lm-eval."""
        return self.source.endswith((_ITEMS, *_YAML))

    def problems(self) -> Iterator[Problem]:
        """Yield a pattern that is no regular expression, and keys that have no effect on this kind of task."""
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            expected = f"is no regular expression ({error})"
            yield Problem("answer_pattern", self.answer_pattern, expected, "Fix it or remove the key.")
        unused = _LM_EVAL_KEYS if self.is_own else _OWN_KEYS
        whose = "JSONL items" if self.is_own else "lm-eval"
        for key in unused:
            if (value := getattr(self, key)) != next(f.default for f in msgspec.structs.fields(self) if f.name == key):
                yield Problem(key, value, f"has no effect on a task of {whose}", "Remove the key.")

    def named(self) -> "TaskTable":
        """Return the task with its name."""
        if self.name:
            return self
        return msgspec.structs.replace(self, name=Path(self.source).stem if self.is_file else self.source)
