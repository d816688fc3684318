"""What other programs of mlxflow take for granted in a report, checked before it is read: a report may be foreign.

A report that was unpacked, fetched from a cache or written by another version may hold anything; what is not of the
form is one line that names the key.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mlxflow.errors import ArtifactError
from mlxflow.storage import report_files

_Count = Annotated[int, Meta(ge=0, le=2**62)]
_Speed = Annotated[float, Meta(gt=0, le=1e18)]
_Error = Annotated[float, Meta(ge=0, le=1e18)]


class _Layer(msgspec.Struct):
    path: str
    shape: list[_Count]
    mode: str
    bits: _Count
    group_size: _Count
    bytes: _Count
    bits_per_weight: float
    relative_error: float


class _Quality(msgspec.Struct):
    dense_perplexity: float
    perplexity: float
    perplexity_standard_error: float
    kl: float
    top1_agreement: float


class Quantized(msgspec.Struct):
    """The keys of a quantize stage's report that are printed."""

    layers: list[_Layer]
    parameters: _Count
    model_bytes: _Count
    bits_per_weight: float
    compression_ratio_fp32: float
    compression_ratio_bf16: float
    quality: _Quality | None = None


class _Side(msgspec.Struct):
    documents: _Count
    tokens: _Count
    targets: _Count
    rows: _Count
    real_token_share: float


class _Source(msgspec.Struct):
    path: str
    documents: _Count
    tokens_per_document: dict[str, int | float]
    bytes_per_token: float
    duplicates: _Count
    bad_records: _Count


class Pretokenized(msgspec.Struct):
    """The keys of a pretokenize stage's report that are printed."""

    train: _Side
    validation: _Side
    context_length: _Count
    sources: list[_Source]


class _Device(msgspec.Struct):
    name: str
    kind: str


class _Prefill(msgspec.Struct):
    prompt_tokens: _Count
    tokens_per_second: _Speed
    low_tokens_per_second: _Speed
    high_tokens_per_second: _Speed
    low_relative_tokens_per_second: _Speed | None = None
    high_relative_tokens_per_second: _Speed | None = None


class _Row(msgspec.Struct):
    """A row of `training` or `models`; a speed comes with both ends of its interval, or there is an error instead."""

    error: str | None = None
    machine_seconds: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    peak_memory_bytes: _Speed | None = None
    model_bytes: _Speed | None = None
    perplexity: _Speed | None = None
    perplexity_standard_error: _Error | None = None
    tokens_per_second: _Speed | None = None
    low_tokens_per_second: _Speed | None = None
    high_tokens_per_second: _Speed | None = None
    low_relative_tokens_per_second: _Speed | None = None
    high_relative_tokens_per_second: _Speed | None = None
    decode_tokens_per_second: _Speed | None = None
    low_decode_tokens_per_second: _Speed | None = None
    high_decode_tokens_per_second: _Speed | None = None
    low_relative_decode_tokens_per_second: _Speed | None = None
    high_relative_decode_tokens_per_second: _Speed | None = None
    prefill: list[_Prefill] = []

    def __post_init__(self) -> None:
        """Refuse a figure without what is read with it."""
        for name, further in (("perplexity", ("perplexity_standard_error",)), *_INTERVALS):
            if getattr(self, name) is not None and None in (lacking := [getattr(self, key) for key in further]):
                raise ValueError(f"`{name}` without `{further[lacking.index(None)]}`")


_INTERVALS = tuple(
    (name, (f"low_{name}", f"high_{name}")) for name in ("tokens_per_second", "decode_tokens_per_second")
) + tuple(
    (f"low_relative_{name}", (f"high_relative_{name}",)) for name in ("tokens_per_second", "decode_tokens_per_second")
)


class _Training(_Row, kw_only=True):
    name: str
    batch_size: _Count


class _Model(_Row, kw_only=True):
    model: str


class _Promise(msgspec.Struct):
    promise: str
    holds: bool


class Benchmarked(msgspec.Struct):
    """The keys of a benchmark's report that comparisons and promises read."""

    device: _Device
    training: list[_Training]
    models: list[_Model]
    promises: dict[str, _Promise] = {}


def read(path: Path, form: type[msgspec.Struct], task: str) -> dict[str, Any]:
    """Return a report that has the keys of a form, as it is written.

    Args:
        path: a `report.toml`.
        form: one of this module.
        task: the stage that writes such a report, for the message.

    Raises:
        ArtifactError: it is missing, no valid TOML, or not of the form.
    """
    report = report_files.read_report(path)
    try:
        msgspec.convert(report, form)
    except msgspec.ValidationError as error:
        said = str(error).replace("$.", "")
        raise ArtifactError(
            f"{path}: not a report as this version of mlxflow writes it ({said}). Run: doit {task}"
        ) from error
    return report
