"""Judges a quantized model against the dense one on documents: perplexity, divergence, what it writes."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.evaluation.dense_reference import cached_reference
from mlxflow.evaluation.kl_divergence import compare_positions
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.models import fp32_on_cpu, model_folder, quantized_layers
from mlxflow.storage.digests import digest_json

_FEWEST_TARGETS = 32

#: Plain beginnings that a model continues: one that has kept its language writes a sentence.
PROMPTS = (
    "The capital of France is Paris. It is a city that",
    "Once upon a time there was a farmer who",
    "Water boils when",
)


class Judge:
    """Measures quantized models against a dense one on documents, one in a row, cut to the context.

    Args:
        dense: its folder.
        job: the folder with the artifact of pretokenize.
        cache: for the dense model's hidden states.
        documents: number of documents.
    """

    def __init__(self, dense: Path, job: Path, cache: Path, *, documents: int) -> None:
        file = TokenFile.open(job / "artifacts/pretokenize/validation.safetensors")
        self._rows = document_rows(file, documents)
        self._counts = (self._rows.marks[:, 1:] & 1).sum(axis=1)
        tokens = np.asarray(self._rows.tokens)
        key = {
            "tokens": tokens.tobytes().hex(),
            "model": str(dense),
            "device": str(mx.default_device()),
            "dtype": fp32_on_cpu.computed_dtype(),
        }
        self._reference = cached_reference(
            lambda: quantized_layers.for_evaluation(model_folder.load(dense, lazy=True)[0], reads_blocks=True),
            self._rows,
            folder=cache,
            key=digest_json(key),
            batch_size=32,
            masks_documents=False,
        )

    def figures(self, artifact: Path) -> dict[str, float]:
        """Return perplexities and divergence of a model folder, with standard errors over documents."""
        model = StreamedModel(
            lambda: quantized_layers.for_evaluation(model_folder.load(artifact, lazy=True)[0], reads_blocks=True)
        )
        columns = compare_positions(self._reference, model, self._rows, batch_size=32, masks_documents=False)
        ends = np.cumsum(self._counts)
        sums = np.stack([part.sum(axis=1) for part in np.split(columns, ends[:-1], axis=1)], axis=1)
        means, errors = zip(*(ratio(one, self._counts) for one in sums), strict=True)
        increase, increase_error = ratio(sums[1] - sums[0], self._counts)  # paired: the same documents
        return {
            "documents": len(self._counts),
            "tokens": int(self._counts.sum()),
            "dense_perplexity": math.exp(means[0]),
            "dense_perplexity_standard_error": math.exp(means[0]) * errors[0],
            "perplexity": math.exp(min(means[1], 700.0)),
            "perplexity_standard_error": math.exp(min(means[1], 700.0)) * errors[1],
            "nats_lost": increase,
            "nats_lost_standard_error": increase_error,
            "kl": means[2],
            "kl_standard_error": errors[2],
            "top1_agreement": means[3],
        }


def continuations(artifact: Path, *, num_tokens: int) -> dict[str, str]:
    """Return the greedy continuation of each prompt of `PROMPTS` by the model of a folder.

    Args:
        artifact: the folder, dense or quantized.
        num_tokens: of each continuation.
    """
    from mlx_lm import generate, load

    model, tokenizer = load(str(artifact))[:2]
    model = quantized_layers.for_evaluation(model)
    return {prompt: generate(model, tokenizer, prompt, max_tokens=num_tokens) for prompt in PROMPTS}


def document_rows(file: TokenFile, count: int) -> Rows:
    """Return the first documents that are long enough, each in a row of its own, cut to the context or padded."""
    length = file.context_length + 1
    chosen = [document for document in file.documents() if len(document) > _FEWEST_TARGETS][:count]
    tokens, marks = (np.zeros((len(chosen), length), kind) for kind in (np.uint32, np.uint8))
    for row, document in enumerate(chosen):
        used = min(length, len(document))
        tokens[row, :used] = document[:used]
        marks[row, :used] = 3
    return Rows(tokens, marks)


def ratio(sums: Any, counts: Any) -> tuple[float, float]:
    """Return the mean over all tokens, and its standard error over documents (ratio estimator).

    Args:
        sums: over the tokens of each document, (D,).
        counts: of its tokens, (D,).
    """
    mean = float(sums.sum() / counts.sum())
    number = len(sums)
    spread = np.square(sums - mean * counts).sum() * number / max(1, number - 1)
    return mean, float(math.sqrt(spread) / counts.sum())
