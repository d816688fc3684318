"""The request for a quantization."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlxflow.quantization import bit_allocation
from mlxflow.quantization import plan as plans
from mlxflow.quantization.aware_training import AwareTraining
from mlxflow.quantization.quality import QualityLimits
from mlxflow.quantization.settings import Setting


class StartRequest(NamedTuple):
    """The request to start from the artifact of a quantize stage.

    Attributes:
        files: its weights and its report.
        name: of the stage.
        setting: the setting that names it and its value, for messages.
    """

    files: Sequence[Path]
    name: str
    setting: str


class QuantizationRequest(NamedTuple):
    """The request for a quantization.

    Attributes:
        method: "rtn", "gptq", "awq", "dwq", "block" or "qat".
        default: the setting of layers that no rule names.
        rules: settings by layer.
        calibration_rows: training rows that learned methods and a budget use.
        budget: under which bits are chosen; None for none.
        training: of "qat"; None for other methods.
        limits: on the cost.
        batch_size: rows in one forward pass, as far as the loss of a budget depends on it.
        token_stage: the stage of the tokens, for the report.
        start: the artifact of a quantize stage whose codes and grids "qat" starts from; None for the dense weights.
        block_steps: updates of each block, of "block".
        scale_steps: updates of all scales and biases afterwards; 0 for none.
        rotations: to try before anything is rounded; 0 for none.
    """

    method: str
    default: Setting
    rules: Sequence[plans.Rule]
    calibration_rows: int
    budget: bit_allocation.BudgetRequest | None
    training: AwareTraining | None
    limits: QualityLimits
    batch_size: int
    token_stage: str
    start: StartRequest | None
    block_steps: int
    scale_steps: int
    rotations: int
