"""The job of a `[train]` table: settings, origin of the model, kernels and seeds of a training."""

from typing import Any, NamedTuple, cast

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.storage.run_context import Context, derive_seed
from mlxflow.training import (
    job,
    kernel_selection,
    length,
    optimizers,
    setting_checks,
    starting_model,
    table_settings,
)
from mlxflow.training.run_warnings import RunOutline, outline_of
from mlxflow.training.settings import SettingNames


class TableJob(NamedTuple):
    """A job and the tokens that it trains on.

    Attributes:
        job: the request.
        tokens: of the training.
        rows: as rows; at least one batch of them.
        config: the table, with what depends on the tokens resolved.
    """

    job: job.Job
    tokens: TokenFile
    rows: Rows
    config: Any


def job_of(config: Any, inputs: Any, context: Context, names: SettingNames) -> TableJob:
    """Return the job of a table.

    Args:
        config: a `[train]` table.
        inputs: of the stage; the token files are built.
        context: of the stage.
        names: of the settings, for messages.

    Raises:
        SourceError: there are fewer rows than in one batch.
        UserError: settings contradict each other or the tokens.
    """
    tokens = TokenFile.open(inputs.train)
    config = length.fitted(config, tokens.rows.num_rows, key=names.of("batch_size"))
    rows = tokens.full_rows(cast("int", config.batch_size), names.of("batch_size"), sources=names.sources)
    settings = table_settings.training_settings(config, length.planned_steps(config, rows.num_rows))
    setting_checks.require_fitting_steps(config, settings.num_steps, rows.num_rows, table=context.task)
    optimizers.require_known(
        config.optimizer,
        config.optimizer_options,
        reserved=("weight_decay", "betas"),
        key=names.of("optimizer_options"),
    )
    base = starting_model.find_folder(config.model.from_, inputs.base, names)
    request = job.Job(
        settings,
        names,
        starting_model.ModelSource(config.model, base, config.fuse, inputs.tokenizer[0]),
        kernel_selection.KernelRequest.of(config.kernels, context),
        masks_documents=config.document_mask,
        fused_loss=config.fused_loss,
        picks_checkpointing=config.checkpointing == "auto",
        outline=cast("RunOutline", outline_of(config, inputs.train, inputs.validation)),
        model_seed=derive_seed(context.seed, "train.model"),
        data_seed=derive_seed(context.seed, "train.batches"),
    )
    return TableJob(request, tokens, rows, config)
