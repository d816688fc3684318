"""Write the HTML page about the whole run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.storage import layout
from mlxflow.storage.run_context import Context, derive_seed
from mlxflow.storage.toml_tables import MAX_SIZE, Problem
from mlxflow.workflow import products
from mlxflow.workflow.stage import Artifacts, Beside

if TYPE_CHECKING:
    from mlxflow.report.stage_reports.report import PageReport

VERSION = 2

#: The page is copied to the artifacts folder, where it is found first.
COPIED_TO_ARTIFACTS_ROOT = (layout.PAGE,)

#: The page's title is the workflow's name.
SHOWS_NAME = True

#: The page shows times, rates and memory, which differ between equal runs.
SHOWS_TIMES = True


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[report]` table."""

    models: Annotated[
        tuple[str, ...],
        Meta(description='models that generate samples; "stage:*" is all variants; none: no samples'),
    ] = ("train:*", "quantize:*")
    data: Annotated[
        str,
        Meta(
            description="the pretokenize stage with the held-out documents for samples; the first of several; "
            "without one there are no samples"
        ),
    ] = "pretokenize:*"
    prompts: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="texts to continue instead; questions for models with a chat template"),
    ] = ()
    num_prompts: Annotated[
        int, Meta(ge=1, le=20, description="number of held-out documents to continue, or conversations to answer")
    ] = 2
    prompt_tokens: Annotated[int, Meta(ge=1, le=MAX_SIZE, description="prompt tokens of a document")] = 12
    max_tokens: Annotated[int, Meta(ge=1, le=2048, description="most tokens that a model generates")] = 48
    temperature: Annotated[
        Literal["auto"] | Annotated[float, Meta(ge=0, le=10)],
        Meta(description="sampling temperature; 0: greedy; auto: 0 for answers, 0.8 for texts"),
    ] = "auto"


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """Reports of all stages, and models and documents for samples.

    Attributes:
        reports: by task, as are the others.
        models: by reference, such as "quantize:q4".
    """

    reports: dict[str, Path] = {}
    curves: dict[str, Path] = {}
    timelines: dict[str, Path] = {}
    models: dict[str, Path] = {}
    model_files: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    validation: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take reports, learning curves and timelines of all stages, and the models and documents for samples."""
        makers = artifacts.makers()

        def made(name: str) -> dict[str, Path]:
            return {task: layout.stage_folder(task) / name for task, names in makers.items() if name in names}

        data = () if config.prompts else artifacts.expand((config.data,), "data")[:1]
        names = artifacts.expand(config.models, "models") if config.prompts or data else ()
        models = {one: artifacts.folder(one, "models") for one in names}
        data = data if models else ()
        _note_samples(config, len(models), artifacts)
        files = ("config.json", "tokenizer.json", "tokenizer_config.json")
        return cls(
            reports=made(layout.REPORT),
            curves=made(layout.METRICS),
            timelines=made(layout.TIMELINE),
            models={one: folder / "model.safetensors" for one, folder in models.items()},
            model_files=tuple(folder / name for folder in models.values() for name in files),
            beside=tuple(Beside(folder) for folder in models.values()),
            validation=tuple(
                artifacts.folder(one, "data") / name
                for one in data
                for name in ("validation.safetensors", "tokenizer.json", "tokenizer_config.json")
            ),
        )


def _note_samples(config: Config, num_models: int, artifacts: Artifacts) -> None:
    """Report more tokens of samples than models can generate within days."""
    prompts = len(config.prompts) or config.num_prompts
    tokens = config.max_tokens + (0 if config.prompts else config.prompt_tokens)
    number = num_models * prompts * tokens
    if number > products.MAX_SAMPLE_TOKENS:
        key = "max_tokens" if config.prompts else "prompt_tokens"
        expected = f"expected, with {prompts:,} prompts of {num_models:,} models, "
        expected += f"at most {products.MAX_SAMPLE_TOKENS:,} tokens read and written, not {number:,}"
        advice = "Lower it, or name fewer prompts or models."
        artifacts.note(Problem(key, getattr(config, key), expected, advice))


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The page, and the samples on it."""

    page: Path = Path(layout.PAGE)
    report: Path = Path(layout.REPORT)


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "PageReport":
    """Generate samples with the models, and write the page from all reports.

    Raises:
        ArtifactError: a model cannot be opened.
    """
    from mlxflow.report.load_run import read_run
    from mlxflow.report.render import render
    from mlxflow.report.samples import SampleRequest, write_samples
    from mlxflow.report.stage_reports.report import PageReport
    from mlxflow.storage import atomic_folders

    request = SampleRequest(
        config.prompts,
        config.num_prompts,
        config.prompt_tokens,
        config.max_tokens,
        config.temperature,
        derive_seed(context.seed, "report.samples"),
    )
    samples = write_samples(request, inputs.models, reports=inputs.reports, validation=inputs.validation)
    members = [member for member in context.members if member.task in inputs.reports]
    read = read_run(context.root, members, name=context.name, samples=samples)
    page = render([read])
    atomic_folders.write_whole(outputs.page, page, is_published=True)
    return PageReport(page_bytes=len(page), samples=tuple(samples))
