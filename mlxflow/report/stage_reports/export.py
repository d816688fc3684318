"""The figures of an export stage in report.toml."""

from mlxflow.storage.report_structs import Count, ReportTable, StageReport


class TensorFigures(ReportTable, frozen=True, kw_only=True):
    """A tensor of the exported file.

    Attributes:
        name: in the file.
        path: of the parameter in the model; empty if it is computed from its configuration.
        shape: of the dense tensor.
        type: in the file, such as "q4_1".
        keeps_codes: whether the model's codes were written as they are, with their scales in fp16.
        relative_error: Frobenius norm of the difference between the tensor read back from the file and the model's,
            divided by that of the model's.
    """

    name: str
    path: str
    shape: tuple[Count, ...]
    type: str
    keeps_codes: bool
    relative_error: float


class ExportReport(StageReport, frozen=True, kw_only=True):
    """The figures of an export stage.

    Attributes:
        format: "gguf", "mlx", "peft" or "adapter-gguf".
        architecture: in the words of the format, such as "llama".
        type: that of most weights; empty for formats without.
        files: that were written, without this report.
        bytes: of all of them.
        parameters: numbers in all tensors.
        bits_per_weight: stored bits of all files by parameters.
        requantized: tensors whose codes no type holds, or that the table sets another type for; they were dequantized
            and encoded again.
        largest_relative_error: of all tensors.
        tensors: every tensor, in the order of the file; empty for formats that copy them.
    """

    format: str
    architecture: str
    type: str
    files: tuple[str, ...]
    bytes: Count
    parameters: Count
    bits_per_weight: float
    requantized: tuple[str, ...] = ()
    largest_relative_error: float
    tensors: tuple[TensorFigures, ...] = ()
