"""Run one stage in this process: device, limits, inputs, a private folder, the report, and publication."""

import platform
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from mlxflow.device import compute_device, cpu_backend, memory_errors, mlx_environment, resident_memory
from mlxflow.device.stop_signals import saving_if_interrupted
from mlxflow.distributed.rank import Rank, of_this_process
from mlxflow.distributed.rank_failures import reported
from mlxflow.messages import terminal
from mlxflow.messages.advice import advise_build
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.messages.errors import ArtifactError, CallError, StageError
from mlxflow.messages.os_errors import advise_on
from mlxflow.storage import (
    atomic_folders,
    layout,
    ownership,
    paths,
    remote_code,
    report_structs,
    temporary_files,
    tensor_writing,
    unfinished_runs,
)
from mlxflow.storage.locks import hold
from mlxflow.storage.observed_inputs import ObservedInputs
from mlxflow.storage.run_context import Context
from mlxflow.storage.user_folders import prepare_compiled_folder
from mlxflow.workflow import artifact_card, rank_timing, ranked_execution, stage_tracking
from mlxflow.workflow.handover import Handover
from mlxflow.workflow.model import Stage, Workflow
from mlxflow.workflow.repeated_artifact import repeated_artifact
from mlxflow.workflow.stage import outputs_of, paths_of, rooted, settings_digest


def execute_stage(workflow: Workflow, stage: Stage, into: Path | None = None, handover: Handover | None = None) -> Path:
    """Run one stage in this process, without locks, and return its artifact folder. See `run_stage`.

    Args:
        workflow: the workflow.
        stage: one of its stages.
        into: the folder to write instead of the stage's own.
        handover: settings and inputs passed by doit; None if doit did not start this process.

    Raises:
        CallError: `into` contains files that are no artifact.
        MlxflowError: the stage failed or inputs are missing; the old artifact is unchanged.
    """
    started = time.perf_counter()
    if into is not None and into.is_dir() and any(into.iterdir()) and not ownership.maker(into):
        raise CallError(f"--into {into}: holds files that no stage wrote. Name a new or an empty folder.")
    rank = of_this_process()
    if into is None:
        stage_tracking.require_trackers(workflow)
    if stage.ranks > 1 and rank.size == 1:
        observe_inputs(workflow, stage)  # reports missing files once, and saves their digests for the ranks
        ranked_execution.run_ranks(workflow, stage, into, handover)
        return into or workflow.root / stage.folder
    if getattr(stage.module, "USES_DEVICE", True):
        prepare_compiled_folder()  # before starting any process that compiles
        mlx_environment.prepare()
    begin = getattr(stage.module, "begin", None)
    with (
        reported(rank, stage.task),
        nullcontext() if begin is None else begin(stage.config, workflow.settings.device) as begun,
    ):
        return _run(workflow, stage, into, begun, started, handover)


def _run(
    workflow: Workflow, stage: Stage, into: Path | None, begun: Any, started: float, handover: Handover | None
) -> Path:
    uses_device = getattr(stage.module, "USES_DEVICE", True)
    if uses_device:
        if workflow.settings.threads:
            cpu_backend.fix_threads(workflow.settings.threads, key="workflow.threads")
        cpu_backend.prepare()
    digests, identities = observe_inputs(workflow, stage)
    settings = stage.settings() | compute_device.environment(stage.bound_device)
    if handover:
        handover.check(stage.task, settings, identities)
    provenance = _provenance(workflow, stage, settings, identities)
    chosen = _select_device(workflow) if uses_device else None
    rank = of_this_process()
    limit = limit_memory(workflow) if uses_device else 0
    ranked_execution.join(rank)
    threads = (workflow.settings.threads or cpu_backend.thread_count()) if chosen == "cpu" else None
    folder = into or workflow.root / stage.folder
    key = unfinished_runs.key_of(provenance["settings_digest"], provenance["inputs_digest"], threads)
    unfinished = unfinished_runs.folder_of(workflow.state, stage.task, key)
    if into:
        unfinished = _prepare_scratch(folder, rank)
    if not rank.is_first:
        folder = ranked_execution.folder_of_rank(workflow, stage, rank)
    publishing = atomic_folders.publishing(folder, keep=lambda: ownership.foreign_names(folder))
    tracking = stage_tracking.tracked(workflow, stage, provenance, key, is_scratch=into is not None)
    with (
        remote_code.trusting_code(workflow.trusts_code(stage)),
        tracking as tracked,
        saving_if_interrupted() as if_interrupted,
        publishing as private,
    ):
        tracked.begin()
        context = Context(
            task=stage.task,
            seed=workflow.settings.seed,
            device=chosen or "cpu",
            memory_limit_bytes=limit,
            provenance=provenance,
            root=workflow.root,
            state=workflow.state,
            tasks=tuple(each.task for each in workflow.stages),
            members=workflow.members(),
            name=workflow.settings.name,
            folder=private,
            unfinished=unfinished,
            digests=digests,
            published=repeated_artifact(workflow.root / stage.folder, provenance) if into else None,
            begun=begun,
            time_ranks=partial(rank_timing.time_ranks, workflow),
            if_interrupted=if_interrupted,
        )
        _make_artifact(stage, context, started, chosen, threads)
        _require_unchanged(workflow, stage, digests, identities, unfinished)
    atomic_folders.remove_folder(unfinished)
    if into is None:
        _tidy(workflow, stage)
    return folder


def _prepare_scratch(folder: Path, rank: Rank) -> Path:
    """Return the folder for checkpoints of a run that starts from the beginning and leaves no files."""
    unfinished = folder.with_name(f".{folder.name}.unfinished.partial")
    if rank.is_first:
        atomic_folders.remove_folder(unfinished)
    return unfinished


def observe_inputs(workflow: Workflow, stage: Stage) -> tuple[ObservedInputs, dict[str, str]]:
    """Return the current digests of the inputs, and the identity of each by name; what was read is saved.

    Raises:
        ArtifactError: inputs are missing or damaged.
    """
    digests = ObservedInputs(workflow.state / layout.DIGESTS)
    try:
        return digests, _identify_inputs(workflow, stage, digests)
    finally:
        digests.save()


def _provenance(
    workflow: Workflow, stage: Stage, settings: dict[str, Any], identities: dict[str, str]
) -> dict[str, str]:
    """Return the provenance metadata for the header of every file of the artifact."""
    return {
        "stage": stage.task,
        "settings_digest": settings_digest(settings),
        "inputs_digest": settings_digest(dict(identities)),
        "seed": str(workflow.settings.seed),
        "mlxflow": version("mlxflow"),
        "mlx": version("mlx"),
    }


def _select_device(workflow: Workflow) -> str:
    chosen = compute_device.select(workflow.settings.device, key="workflow.device")
    if chosen == "cpu":
        cpu_backend.prepare_compiler()
    if notice := cpu_backend.notice(chosen):
        terminal.say(notice)
    return chosen


def _make_artifact(stage: Stage, context: Context, started: float, chosen: str | None, threads: int | None) -> None:
    """Run a stage in the private folder, write its report, and check all outputs.

    Raises:
        StageError: an output was not written, or the device ran out of memory.
        ArtifactError: a safetensors file is incomplete.
    """
    outputs = rooted(outputs_of(stage.module, stage.config), context.folder)
    inputs = rooted(stage.inputs, context.root)
    with memory_errors.naming(stage.task) if chosen else nullcontext():
        figures = stage.module.run(config=stage.config, inputs=inputs, outputs=outputs, context=context)
    artifact_card.write(stage, inputs, context, figures)
    files = sorted({*ownership.written_names(context.folder), layout.REPORT})
    run = _describe_run(round(time.perf_counter() - started, 3), chosen, threads, files)
    stage_table = report_structs.Provenance(**context.provenance)
    report_structs.write(context.folder / layout.REPORT, report_structs.Report(stage_table, figures, run))
    if unwritten := [path.name for path in paths_of(outputs) if not path.exists()]:
        raise StageError(f"{stage.task}: ended without writing {', '.join(unwritten)}.")
    for path in paths_of(outputs):
        if path.suffix == ".safetensors":
            tensor_writing.check_whole(path)


def _tidy(workflow: Workflow, stage: Stage) -> None:
    """Remove unfinished runs with other settings, and update the copies in the artifacts folder."""
    for run in unfinished_runs.prune(workflow.state, stage.task):
        size = show_bytes(run.num_bytes)
        terminal.say(f"{run.folder}: removed, {size} left by a run of {stage.task} with other settings.")
    for copy, original in stage.copies.items():
        with atomic_folders.writable(workflow.root / copy):
            atomic_folders.write_whole(workflow.root / copy, (workflow.root / original).read_bytes())


def _require_unchanged(
    workflow: Workflow, stage: Stage, digests: ObservedInputs, identities: dict[str, str], unfinished: Path
) -> None:
    """Refuse the result of a run whose inputs changed, and remove its checkpoints.

    Raises:
        StageError: inputs changed; one line for each.
    """
    try:
        digests.require_unchanged(stage.task, workflow.root)
        now = dict.fromkeys(stage.files_read(workflow.root)) | stage.corpus_identities(digests)
        changed = [name for name in identities if name not in now or now[name] not in (None, identities[name])]
        if names := sorted({*changed, *now.keys() - identities.keys()}):
            advice = f"changed while {stage.task} ran, so its result is not kept. Run it again."
            raise StageError("\n".join(f"{name}: {advice}" for name in names))
    except StageError:
        atomic_folders.remove_folder(unfinished)
        raise


def _identify_inputs(workflow: Workflow, stage: Stage, cache: ObservedInputs) -> dict[str, str]:
    """Return the identity of every input by name.

    Raises:
        ArtifactError: inputs are missing or damaged; each line names the command that makes it.
    """
    identities: dict[str, str] = {}
    lines: list[str] = []
    for record_name, name in stage.files_read(workflow.root).items():
        path = workflow.root / name
        try:
            identities[record_name] = cache.digests(path).identity
        except FileNotFoundError:
            gone = path if path.parent.is_dir() else path.parent
            lines.append(f"{paths.shown(gone)}: missing{_maker_advice(workflow, name)}")
        except OSError as error:
            lines.append(f"{paths.shown(path)}: cannot be read ({error.strerror}). {_advise(error, workflow, name)}")
        except ValueError as error:
            lines.append(f"{paths.shown(path)}: damaged ({error}){_maker_advice(workflow, name)}")
    if lines:
        raise ArtifactError(*dict.fromkeys(lines))
    return identities | stage.corpus_identities(cache)


def _advise(error: OSError, workflow: Workflow, name: Path) -> str:
    return advise_on(error, _maker_advice(workflow, name).removeprefix(". ").removesuffix(".")) + "."


def _maker_advice(workflow: Workflow, name: Path) -> str:
    maker = next((maker.task for maker in workflow.stages if name in maker.outputs), None)
    return f". {advise_build(maker)}" if maker else ". Fix it or change the workflow."


def limit_memory(workflow: Workflow) -> int:
    """Set MLX's limits and return its memory limit in bytes; ranks that share a device share its memory."""
    import mlx.core as mx

    settings = workflow.settings
    limit = compute_device.parse_size(settings.memory_limit, compute_device.working_set_bytes())
    limit //= of_this_process().sharing
    mx.set_memory_limit(limit)
    if settings.cache_limit:
        mx.set_cache_limit(compute_device.parse_size(settings.cache_limit, limit))
    if mx.default_device() == mx.gpu and mx.metal.is_available():  # no effect on other systems
        most = int(mx.device_info().get("max_recommended_working_set_size", 0))
        mx.set_wired_limit(min(compute_device.parse_size(settings.wired_limit, limit), most))
    return limit


def _describe_run(seconds: float, chosen: str | None, threads: int | None, files: list[str]) -> report_structs.RunFacts:
    """Return the facts that may differ between two equal runs.

    Args:
        seconds: wall clock of the run.
        chosen: the device; None for a stage that uses none, which does not import MLX.
        threads: number of threads of matrix products on the CPU; None on other devices.
        files: names of the files that the run wrote.
    """
    facts = report_structs.RunFacts(
        seconds=seconds,
        device_name=compute_device.processor() if chosen is None else compute_device.name(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        peak_rss_bytes=resident_memory.peak_bytes(),
        ended=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        files=tuple(files),
    )
    if chosen is None:
        return facts
    from mlxflow.device.phase_peaks import process_peak

    rank = of_this_process()
    return msgspec.structs.replace(
        facts,
        device=chosen,
        blas=cpu_backend.prepare() or "built in",
        threads=threads or None,
        ranks=rank.size if rank.size > 1 else None,
        backend=rank.backend or None,
        peak_memory_bytes=process_peak(),
    )


def run_stage(workflow: Workflow, stage: Stage, into: Path | None = None) -> Path:
    """Run one stage in this process under the same locks as doit, and return its artifact folder.

    Waits until no doit uses the artifacts and, for a stage that computes, until the device is free. Missing or stale
    inputs are not built; use `doit` for that.

    Args:
        workflow: the workflow; see `load_workflow`.
        stage: one of its stages: `workflow.find("train")`.
        into: the folder to write instead of the stage's own.

    Raises:
        CallError: `into` contains files that are no artifact.
        MlxflowError: the stage failed or inputs are missing; the old artifact is unchanged.
    """
    waiting = f"{stage.task}: waits for the artifacts, used by process {{holder}}"
    atomic_folders.make_link_target(workflow.artifacts)
    with ExitStack() as held:
        if not held.enter_context(hold(workflow.state / layout.LOCK, waiting, wait=True, needed=into is None)):
            temporary_files.remove_orphans(workflow.artifacts, ".")
            temporary_files.remove_orphans_below(workflow.state)
        if getattr(stage.module, "USES_DEVICE", True):
            chosen, measures = workflow.settings.device, stage.bound_device is not None
            held.enter_context(compute_device.turn(stage.task, workflow.root, chosen, measures=measures))
        return execute_stage(workflow, stage, into)
