"""Which architectures work with which method, tried on small random models.

    python -m benchmarks.architectures [ARCHITECTURE ...] [--cases rtn,lora] [--write docs/architectures.md]

Each case runs a stage on a model folder in bf16 and looks at what it wrote. mlx-lm must open it; what the stage reports
of its quality must be what mlx-lm's model computes; rounded tensors must be those of `mlx_lm.convert`. A case that is
refused must be refused by name, with exit code 2, and leave nothing behind.
"""

import argparse
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

from benchmarks.architecture_configs import DENSE, MIXTURES, VOCAB_SIZE, config_of

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

QUANTIZING = ("gptq", "awq", "dwq", "qat")
TRAINING = ("full", "lora", "dora")
BESIDE_CODES = ("qlora", "qdora")

#: The columns of the table.
CASES = ("rtn", *QUANTIZING, *TRAINING, *BESIDE_CODES)


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

    def case(self, architecture: str, name: str, settings: Sequence[tuple[str, int, int]] = SETTINGS) -> Outcome:
        """Run one case and look at what it wrote.

        Args:
            architecture: one of `architecture_configs`.
            name: one of `CASES`.
            settings: tried where layers are rounded; the learned methods take the first of `SETTINGS`.

        Raises:
            AssertionError: what was written is not right.
        """
        base = self._base(architecture)
        if name == "rtn":
            outcomes = [self._quantize(base, "rtn", setting) for setting in settings]
            return next((one for one in outcomes if not one.works), outcomes[0])
        if name in BESIDE_CODES:
            return self._train(self._quantized_base(base), name.removeprefix("q"))
        if name in TRAINING:
            return self._train(base, name)
        return self._quantize(base, name, SETTINGS[0])

    def _quantized_base(self, base: Path) -> Path:
        """Return a folder with the same model in 4 bits, made once by mlx-lm."""
        import mlx.core as mx

        folder = base.with_name(f"{base.name}-4bit")
        if not folder.exists():
            shutil.copytree(base, folder)
            tensors, config = _converted(base, SETTINGS[0])
            mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _base(self, architecture: str) -> Path:
        """Return a folder with a random model of an architecture in bf16, made once."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from mlxflow.models import model_folder, tokenizer_files

        folder = self.folder / "models" / architecture
        if not folder.exists():
            config = config_of(architecture) | {"vocab_size": 300, "torch_dtype": "bfloat16"}
            weights: dict[str, mx.array] = dict(tree_flatten(model_folder.build(config, seed=0).parameters()))
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config))
            half = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
            mx.save_safetensors(str(folder / "model.safetensors"), half, {"format": "mlx"})
            for name in tokenizer_files.TOKENIZER_FILES:
                shutil.copy(self.folder / "artifacts/pretokenize" / name, folder)
        return folder

    def _run(self, stage: str, text: str) -> Path:
        from mlxflow.workflow.execution import execute_stage
        from mlxflow.workflow.loader import load_workflow

        path = self.folder / "workflow.toml"
        path.write_text(_WORKFLOW + text)
        workflow = load_workflow(path)
        made = self.folder / "artifacts" / stage
        shutil.rmtree(made, ignore_errors=True)
        return execute_stage(workflow, workflow.find(stage))

    def _attempt(self, stage: str, text: str) -> tuple[Path, str]:
        """Return the artifact of a stage, and what it was refused with."""
        from mlxflow.messages.errors import UserError

        made = self.folder / "artifacts" / stage
        try:
            return self._run(stage, text), ""
        except UserError as error:
            assert not made.exists(), "a refused stage left an artifact behind"
            return made, " ".join(str(error).split())

    def _train(self, base: Path, method: str) -> Outcome:
        from mlxflow.storage.report_files import read_report

        name = str(base.relative_to(self.folder))
        made, refusal = self._attempt("train", _TRAIN.format(base=name, method=method))
        if refusal:
            return Outcome(works=False, refusal=refusal)
        before, after = _tensors(base), _tensors(made)
        assert before.keys() == after.keys()
        changed = any(not _equal(before[name], after[name]) for name in before)
        assert changed or (made / "adapters.safetensors").is_file(), "training changed no weight"
        report = read_report(made / "report.toml")
        _assert_near(_perplexity(made, self.folder), report["last_validation_perplexity"])
        return Outcome(works=True)

    def _quantize(self, base: Path, method: str, setting: tuple[str, int, int]) -> Outcome:
        from mlxflow.storage.report_files import read_report

        mode, bits, group_size = setting
        wanted = f'mode = "{mode}"\nbits = {bits}\ngroup_size = {group_size}\n'
        name = str(base.relative_to(self.folder))
        text = _QUANTIZE.format(base=name, data="pretokenize", method=method, setting=wanted)
        made, refusal = self._attempt("quantize", text)
        theirs, _ = _converted(base, setting)
        if refusal:
            is_same = not any(name.endswith(".scales") for name in theirs)  # mlx-lm finds nothing to quantize either
            return Outcome(works=method == "rtn" and is_same, refusal=refusal)
        ours = _tensors(made)
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


def _converted(folder: Path, setting: tuple[str, int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors that `mlx_lm.convert` writes for a folder, and the config."""
    import contextlib
    import io

    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model

    mode, bits, group_size = setting
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = load_model(folder)
        quantized, config = quantize_model(model, config, group_size, bits, mode=mode)
    return dict(tree_flatten(quantized.parameters())), config


def _perplexity(folder: Path, jobs: Path) -> float:
    """Return the perplexity of a written model on the validation rows, through mlx-lm alone."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    from mlxflow.data.token_file import TokenFile

    model, _ = load_model(folder, strict=True)
    if (folder / "adapters.safetensors").is_file():
        model = load_adapters(model, str(folder))
        model.eval()
    rows = TokenFile.open(jobs / "artifacts/pretokenize/validation.safetensors").rows.head(_VALIDATION_ROWS)
    tokens = mx.array(rows.tokens.astype(np.int32))
    counted = mx.array((rows.marks[:, 1:] & 1).astype(np.float32))
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])
    return math.exp(float((losses * counted).sum() / counted.sum()))


def _assert_near(found: float, reported: float) -> None:
    # two ways of summing in bf16: the logits differ in their last of 8 bits, and the loss by less
    assert math.isclose(math.log(found), math.log(reported), rel_tol=2e-2), f"{found} measured, {reported} reported"


def facts(architecture: str) -> tuple[bool, bool]:
    """Return whether documents in one row are kept apart, and whether head and loss are fused, for an architecture."""
    from mlxflow.models import model_folder
    from mlxflow.ops import document_mask
    from mlxflow.training.output_head import find_head

    model = model_folder.build(config_of(architecture), seed=0)
    return document_mask.can_mask_documents(model, VOCAB_SIZE), find_head(model, VOCAB_SIZE) is not None


_HEAD = """# Architectures

Which architectures of mlx-lm {mlx_lm} were tried with which method, on small random models in bf16 on a CPU
(MLX {mlx}). Written by `python -m benchmarks.architectures --write docs/architectures.md`. The same cases are tests:
`pytest` runs some of them, `pytest -m matrix` the others.

- `rtn`: quantized by rounding in {settings}.
  Every tensor is equal to the bit to that of `mlx_lm.convert`.
- `gptq`, `awq`, `dwq`, `qat`: learned codes of 4 bits. `full`, `lora`, `dora`: training. `qlora`, `qdora`: adapters
  beside the model in 4 bits.
- "yes": the stage ran, mlx-lm opens what it wrote, and computes the perplexity that the report states.
- "documents apart": whether documents packed into one row can be masked from each other. "fused head": whether head and
  loss are one, which needs no memory for all logits.
"""


def table(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Return the page: a row for each architecture, and the reasons of what is refused."""
    settings = ", ".join(f"{mode} {bits} bits group {size}" for mode, bits, size in SETTINGS)
    columns = ["architecture", *CASES, "documents apart", "fused head"]
    lines = [_HEAD.format(settings=settings, mlx=version("mlx"), mlx_lm=version("mlx-lm"))]
    lines += [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    reasons: dict[str, int] = {}
    for architecture, cases in outcomes.items():
        cells = [architecture]
        for name in CASES:
            one = cases[name]
            note = "" if one.works else f" [{reasons.setdefault(one.refusal, len(reasons) + 1)}]"
            cells.append(f"{'yes' if one.works else 'no'}{note}")
        cells += ["yes" if fact else "no" for fact in facts(architecture)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    works = sum(one.works for cases in outcomes.values() for one in cases.values())
    total = sum(len(cases) for cases in outcomes.values())
    lines += [f"{works} of {total} cases work; the others are refused by name before any work."]
    lines += ["", "DoRA has no form for experts: in mixtures its adapters lie beside all other layers."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cases; print them, and write the table where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=[*DENSE, *MIXTURES])
    parser.add_argument("--cases", default=",".join(CASES), help="some of the columns, separated by commas")
    parser.add_argument("--write", type=Path, help="the page to write; needs all cases")
    options = parser.parse_args()
    outcomes: dict[str, dict[str, Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder))
        for architecture, name in itertools.product(options.architectures, options.cases.split(",")):
            one = outcomes.setdefault(architecture, {})[name] = jobs.case(architecture, name)
            print(architecture, name, "works" if one.works else f"is refused: {one.refusal}", flush=True)
    if options.write:
        options.write.write_text(table(outcomes))


if __name__ == "__main__":
    main()
