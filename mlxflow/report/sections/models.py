"""The models: folder, size and licence of the base of each, and the commands that load it and chat with it."""

from collections.abc import Sequence

from mlxflow.report.elements import Block, Code, Note, Section, Table
from mlxflow.report.formatting import UNKNOWN, clean, show, show_bytes, show_large
from mlxflow.report.load_run import LoadedStage, Run
from mlxflow.report.model_folder import ModelFolderFacts
from mlxflow.report.sections import beside
from mlxflow.report.stage_reports.quantize import QuantizeReport
from mlxflow.report.stage_reports.train import TrainReport


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("models", "Use the models", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    rows: list[tuple[str, ...]] = []
    loads: list[Block] = []
    for one in run.stages:
        folder = run.models.get(one.task)
        if folder is None or one.report is None:
            continue
        rows.append((one.task, one.member.folder.as_posix(), *_sizes(one), *_base(run, one, folder)))
        loads.append(Code(f"Load and use {one.task}", commands(one, folder), folded=bool(loads or run.label)))
    if not rows:
        return [Note("There is no model to load: no stage that makes one is built.")]
    head = ("Model", "Folder", "Parameters", "Bits a weight", "Size", "Base model", "Its licence")
    return [Table("Each model", head, rows, words=(0, 1, 5, 6)), *loads]


def _sizes(one: LoadedStage) -> tuple[str, str, str]:
    """Return parameters, bits a weight and the size of the files."""
    train, quantize = one.figures(TrainReport), one.figures(QuantizeReport)
    if quantize:
        return show_large(quantize.parameters), show(quantize.bits_per_weight), show_bytes(quantize.model_bytes)
    return show_large(train.parameters if train else None), UNKNOWN, show_bytes(one.size_bytes)


def _base(run: Run, one: LoadedStage, folder: ModelFolderFacts) -> tuple[str, str]:
    """Return what a model was made from, and the licence of the model that all of it began with."""
    made_from = next((task for task in one.member.reads if task in run.models), "")
    if not folder.base:
        return made_from or "none: trained from scratch", UNKNOWN
    base = f"{made_from}, from {clean(folder.base)}" if made_from else clean(folder.base)
    return base, clean(folder.licence) or "not named in its folder"


def commands(one: LoadedStage, folder: ModelFolderFacts) -> str:
    """Return what loads a model: with mlxflow, with mlx-lm, and with transformers where its weights are dense."""
    path = one.member.folder.as_posix()
    train = one.figures(TrainReport)
    has_adapters = train is not None and train.fuse == "never"
    adapters = f" --adapter-path {path}" if has_adapters else ""
    trust = " --trust-remote-code" if folder.has_code else ""
    if folder.has_template:
        lines = ["# with mlxflow", f"mlxflow chat {path}{trust}", "", "# with mlx-lm"]
        lines += [f"mlx_lm.chat --model {path}{adapters}{trust}"]
    else:
        lines = ["# with mlxflow", f'mlxflow generate {path} --prompt "Once"{trust}', "", "# with mlx-lm"]
        lines += [f'mlx_lm.generate --model {path}{adapters} --prompt "Once"{trust}']
    if train and not has_adapters:
        lines += ["", "# with transformers, in Python", *_with_transformers(path, has_code=folder.has_code)]
    return "\n".join(lines)


def _with_transformers(path: str, *, has_code: bool) -> list[str]:
    trust = ", trust_remote_code=True" if has_code else ""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'tokenizer = AutoTokenizer.from_pretrained("{path}"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("{path}"{trust})',
        'ids = tokenizer("Once", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))",
    ]
