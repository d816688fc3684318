"""Which architectures work with which method, tried on small random models.

    python benchmarks/architectures.py [ARCHITECTURE ...] [--write docs/architectures.md]

Each case runs a stage on a model folder in bf16, and looks at what it wrote: mlx-lm must open it, and it must be what
the stage reports. A case that is refused must be refused by name, with exit code 2, and leave nothing behind.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from benchmarks.architecture_configs import DENSE, MIXTURES, config_of

#: Rows that a report's validation was measured on, and a batch of them.
_VALIDATION_ROWS = 4

_WORKFLOW = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
"""

_TRAIN = f"""
[train]
model.from = "{{base}}"
method = "{{method}}"
precision = "bf16"
num_steps = 2
batch_size = 2
warmup_steps = 0
learning_rate = 1e-3
eval_every = 0
max_validation_rows = {_VALIDATION_ROWS}
"""

_QUANTIZE = f"""
[quantize]
model = "{{base}}"
data = "{{data}}"
method = "{{method}}"
{{setting}}
num_steps = 2
batch_size = 2
calibration_rows = 32
max_validation_rows = {_VALIDATION_ROWS}
"""

#: Settings that are compared with mlx-lm's converter: mode, bits and group size.
SETTINGS = (
    ("affine", 4, 32), ("affine", 3, 64), ("affine", 8, 128), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)
)  # fmt: skip

TRAINING = ("full", "lora", "dora")
QUANTIZING = ("gptq", "awq", "dwq", "qat")

#: Of the columns of the table.
CASES = ("rtn", *QUANTIZING, *TRAINING)


class Outcome(NamedTuple):
    """What became of a case.

    Attributes:
        works: it ran, and what it wrote is right.
        refusal: what it was refused with; empty where it was not.
    """

    works: bool
    refusal: str = ""


class Jobs:
    """A folder with tokens, in which every case is run.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "notes").mkdir()
        for number in range(8):
            lines = [f"note {number} line {line}: the {line * number % 17}th thing" for line in range(40)]
            (folder / f"notes/{number}.txt").write_text("\n".join(lines))
        self._run("pretokenize", "")

    def case(self, architecture: str, name: str) -> Outcome:
        """Run one case and look at what it wrote.

        Args:
            architecture: one of `architecture_configs`.
            name: one of `CASES`.

        Raises:
            AssertionError: what was written is not right.
        """
        base = self._base(architecture)
        if name == "rtn":
            return self._each(lambda setting: self._quantize(base, "rtn", setting), SETTINGS)
        if name in TRAINING:
            return self._train(base, name)
        return self._quantize(base, name, SETTINGS[0])

    def _each(self, run: Callable[[Any], Outcome], settings: Any) -> Outcome:
        outcomes = [run(setting) for setting in settings]
        return next((one for one in outcomes if not one.works), outcomes[0])

    def _base(self, architecture: str) -> Path:
        """Return a folder with a random model of an architecture in bf16, made once."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from mlxflow import models

        folder = self.folder / "models" / architecture
        if not folder.exists():
            config = config_of(architecture) | {"vocab_size": 300, "torch_dtype": "bfloat16"}
            weights: dict[str, mx.array] = dict(tree_flatten(models.build(config, seed=0).parameters()))
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config))
            half = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
            mx.save_safetensors(str(folder / "model.safetensors"), half, {"format": "mlx"})
            for name in models.TOKENIZER_FILES:
                shutil.copy(self.folder / "artifacts/pretokenize" / name, folder)
        return folder

    def _run(self, stage: str, text: str) -> Path:
        from mlxflow.run import run_stage
        from mlxflow.workflow import load_workflow

        path = self.folder / "workflow.toml"
        path.write_text(_WORKFLOW + text)
        workflow = load_workflow(path)
        made = self.folder / "artifacts" / stage
        shutil.rmtree(made, ignore_errors=True)
        return run_stage(workflow, workflow.find(stage))

    def _attempt(self, stage: str, text: str) -> tuple[Path, str]:
        """Return the artifact of a stage, and what it was refused with."""
        from mlxflow.errors import UserError

        made = self.folder / "artifacts" / stage
        try:
            return self._run(stage, text), ""
        except UserError as error:
            assert not made.exists(), "a refused stage left an artifact behind"
            return made, " ".join(str(error).split())

    def _train(self, base: Path, method: str) -> Outcome:
        from mlxflow.artifact import read_report

        name = str(base.relative_to(self.folder))
        made, refusal = self._attempt("train", _TRAIN.format(base=name, method=method))
        if refusal:
            return Outcome(works=False, refusal=refusal)
        before, after = _tensors(base), _tensors(made)
        assert before.keys() == after.keys()
        assert any(not _equal(before[name], after[name]) for name in before), "training changed no weight"
        report = read_report(made / "report.toml")
        _assert_near(_perplexity(made, self.folder), report["last_validation_perplexity"])
        return Outcome(works=True)

    def _quantize(self, base: Path, method: str, setting: tuple[str, int, int]) -> Outcome:
        from mlxflow.artifact import read_report

        mode, bits, group_size = setting
        wanted = f'mode = "{mode}"\nbits = {bits}\ngroup_size = {group_size}\n'
        name = str(base.relative_to(self.folder))
        text = _QUANTIZE.format(base=name, data="pretokenize", method=method, setting=wanted)
        made, refusal = self._attempt("quantize", text)
        if refusal:
            return Outcome(works=False, refusal=refusal)
        ours, theirs = _tensors(made), _converted(base, setting)
        assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
        different = [name for name, value in ours.items() if not _equal(value, theirs[name])]
        if method == "rtn":
            assert not different, f"not as mlx_lm.convert: {different}"
        else:
            assert different, "nothing was learned"
        report = read_report(made / "report.toml")
        _assert_near(_perplexity(made, self.folder), report["quality"]["perplexity"])
        return Outcome(works=True)


def _tensors(folder: Path) -> dict[str, Any]:
    import mlx.core as mx

    return cast("dict[str, Any]", mx.load(str(folder / "model.safetensors")))


def _equal(one: Any, other: Any) -> bool:
    import mlx.core as mx

    return one.dtype == other.dtype and one.shape == other.shape and bool(mx.array_equal(one, other))


def _converted(folder: Path, setting: tuple[str, int, int]) -> dict[str, Any]:
    """Return the tensors that `mlx_lm.convert` writes for a folder."""
    import contextlib
    import io

    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model

    mode, bits, group_size = setting
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = load_model(folder)
        quantized, _ = quantize_model(model, config, group_size, bits, mode=mode)
    return dict(tree_flatten(quantized.parameters()))


def _perplexity(folder: Path, jobs: Path) -> float:
    """Return the perplexity of a written model on the validation rows, through mlx-lm alone."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx_lm.utils import load_model

    from mlxflow.data.token_file import TokenFile

    model, _ = load_model(folder, strict=True)
    rows = TokenFile.open(jobs / "artifacts/pretokenize/validation.safetensors").rows.head(_VALIDATION_ROWS)
    tokens = mx.array(rows.tokens.astype(np.int32))
    counted = mx.array((rows.marks[:, 1:] & 1).astype(np.float32))
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])
    return math.exp(float((losses * counted).sum() / counted.sum()))


def _assert_near(found: float, reported: float) -> None:
    # two ways of summing in bf16: the logits differ in their last of 8 bits, and the loss by less
    assert math.isclose(math.log(found), math.log(reported), rel_tol=2e-2), f"{found} measured, {reported} reported"


def main() -> None:
    """Run the cases and print, or write, the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=[*DENSE, *MIXTURES])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder))
        for architecture in options.architectures:
            for name in options.cases.split(","):
                try:
                    outcome = jobs.case(architecture, name)
                    print(architecture, name, "works" if outcome.works else f"refused: {outcome.refusal}", flush=True)
                except Exception as error:
                    print(
                        architecture,
                        name,
                        "FAILS",
                        type(error).__name__,
                        " ".join(str(error).split())[:300],
                        flush=True,
                    )


if __name__ == "__main__":
    main()
