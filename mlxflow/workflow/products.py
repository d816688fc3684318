"""Bounds on products of a workflow's numbers, such as tokens, weights and adapter ranks.

Each number alone may be large. Numbers that are only upper limits are no factors, because the token files or the
memory bound them: `max_batch_size`, `max_validation_rows`, `calibration_rows`, and `num_steps` of a benchmark with
`max_seconds`.
"""

import math
from collections.abc import Mapping
from typing import Any

from mlxflow.storage.toml_tables import MAX_WEIGHTS, Problem, toml_value
from mlxflow.workflow.stage import Artifacts

#: Tokens of one forward pass: at the smallest `hidden_size`, 8, the embeddings alone take 512 GiB in fp32.
MAX_PASS_TOKENS = 2**34

#: Prefetched tokens: their ids take 512 GiB.
MAX_TOKENS_AHEAD = 2**37

#: Tokens of one update: more than a day at ten million tokens a second.
MAX_UPDATE_TOKENS = 2**40

#: Tokens of a whole training: thirty years at that speed.
MAX_TRAINING_TOKENS = 10**16

#: Ranks of all adapted blocks: one layer of 8 inputs and outputs in each, with gradients and moments, takes 512 GiB.
MAX_RANKS = 2**31

#: Tokens that the models process for the page: at 10,000 tokens a second more than a day.
MAX_SAMPLE_TOKENS = 10**9


def excess(factors: Mapping[str, int | tuple[int, ...]], most: int, noun: str) -> Problem | None:
    """Return the problem if a product of numbers is too large, else None.

    Args:
        factors: numbers by key; of a list, the largest counts. The first key is in the checked table.
        most: upper bound of the product.
        noun: what the product counts.
    """
    number = math.prod(max(factor) if isinstance(factor, tuple) else factor for factor in factors.values())
    if number <= most:
        return None
    (key, value), *others = factors.items()
    listed = [f"{name} = {toml_value(other)}" for name, other in others]
    given = ", ".join(listed[:-1]) + " and " * (len(listed) > 1) + listed[-1]
    return Problem(key, value, f"expected, with {given}, at most {most:,} {noun}, not {number:,}", "Lower one of them.")


def note_excess(artifacts: Artifacts, *bounds: tuple[Mapping[str, int | tuple[int, ...]], int, str]) -> None:
    """Report the first product that is too large; the others share factors with it.

    Args:
        artifacts: where it is reported.
        bounds: arguments of `excess`.
    """
    problem = next((problem_found for bound in bounds if (problem_found := excess(*bound))), None)
    if problem is not None:
        artifacts.note(problem)


def rows_of(artifacts: Artifacts, reference: str) -> dict[str, int]:
    """Return the tokens of a row as a factor; empty if a reference is no pretokenize stage.

    Args:
        artifacts: the tables of the workflow.
        reference: the pretokenize stage.
    """
    length = getattr(artifacts.table(reference), "context_length", None)
    return {} if length is None else {f"{reference}.context_length": length}


def note_training(config: Any, artifacts: Artifacts, tokens: str, *, prefetch: Mapping[str, int]) -> None:
    """Report too many tokens in a forward pass, an update or a whole training.

    Args:
        config: has `batch_size`, `grad_accum_steps` and `num_steps`.
        artifacts: the tables of the workflow.
        tokens: the pretokenize stage.
        prefetch: number of prefetched batches by its key; empty without such a key.
    """
    if not (row := rows_of(artifacts, tokens)):
        return
    one_pass = {"batch_size": config.batch_size, **row}
    update = {**one_pass, "grad_accum_steps": config.grad_accum_steps}
    steps = {} if config.num_steps == "auto" else {"num_steps": config.num_steps}  # epochs: the rows bound them
    note_excess(
        artifacts,
        (one_pass, MAX_PASS_TOKENS, "tokens in a forward pass"),
        (update, MAX_UPDATE_TOKENS, "tokens in an update"),
        ({**update, **steps}, MAX_TRAINING_TOKENS, "tokens in all"),
        ({**one_pass, **prefetch}, MAX_TOKENS_AHEAD, "tokens gathered ahead"),
    )


def note_weights(model: Any, artifacts: Artifacts, tokens: str) -> None:
    """Report a new model with too many weights, including embeddings of the configured vocabulary size.

    Args:
        model: has `num_layers`, `hidden_size` and `num_weights`.
        artifacts: the tables of the workflow.
        tokens: the pretokenize stage.
    """
    tokenizer = getattr(artifacts.table(tokens), "tokenizer", None)
    if tokenizer is None or tokenizer.from_:
        return
    key = f"{tokens}.tokenizer.vocab_size"
    num_weights = model.num_weights(tokenizer.vocab_size)
    if num_weights > MAX_WEIGHTS:
        expected = f"expected, with num_layers = {model.num_layers} and {key} = {tokenizer.vocab_size}, "
        expected += f"at most {MAX_WEIGHTS:,} weights, not {num_weights:,}"
        artifacts.note(Problem("model.hidden_size", model.hidden_size, expected, "Lower one of the three."))


def note_adapters(lora: Any, artifacts: Artifacts) -> None:
    """Report adapters whose ranks in all blocks exceed the memory of any machine.

    Args:
        lora: has `rank` and `num_layers`.
        artifacts: where it is reported.
    """
    note_excess(
        artifacts, ({"lora.rank": lora.rank, "lora.num_layers": max(1, lora.num_layers)}, MAX_RANKS, "ranks in all")
    )
