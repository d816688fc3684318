"""Settings of a training that depend on its model and tokens: the document mask, and the fused loss."""

from typing import Literal

import mlx.nn as nn

from mlxflow.data.token_file import TokenFile
from mlxflow.messages.errors import WorkflowError
from mlxflow.ops import document_mask
from mlxflow.storage.toml_tables import toml_value
from mlxflow.training import objective
from mlxflow.training.output_head import find_head
from mlxflow.training.settings import SettingNames, TrainingSettings

Choice = Literal["auto"] | bool


def with_model_choices(
    settings: TrainingSettings,
    model: nn.Module,
    tokens: TokenFile,
    *,
    masks_documents: Choice,
    fused_loss: Choice,
    names: SettingNames,
) -> TrainingSettings:
    """Return the settings with document mask and fused loss resolved.

    Args:
        settings: of the training, with its batch size.
        model: to train, without kernels.
        tokens: to train on.
        masks_documents: as configured; "auto" masks documents if there are conversations.
        fused_loss: as configured; see `objective.uses_fused_loss` for "auto".
        names: of the settings, for messages.

    Raises:
        WorkflowError: document mask or fused loss are configured, but the model's architecture does not support them.
    """
    fused = objective.uses_fused_loss(
        model,
        wanted=None if fused_loss == "auto" else fused_loss,
        vocab_size=tokens.vocab_size,
        tokens=settings.batch_size * tokens.context_length,
        setting=names.of("fused_loss"),
    )
    return settings.replace(masks_documents=_masks(model, tokens, masks_documents, names), fused_loss=fused)


def adjustable_names(
    names: SettingNames, settings: TrainingSettings, model: nn.Module, tokens: TokenFile, *, fused_loss: Choice
) -> SettingNames:
    """Return the names of the settings, without the fused loss where the model has none.

    Args:
        names: of the settings.
        settings: of the training, as `with_model_choices` returns them.
        model: to train, without kernels.
        tokens: to train on.
        fused_loss: as configured.
    """
    was_looked_for = fused_loss == "auto" and not settings.fused_loss
    return names.without("fused_loss") if was_looked_for and find_head(model, tokens.vocab_size) is None else names


def _masks(model: nn.Module, tokens: TokenFile, written: Choice, names: SettingNames) -> bool:
    """Return whether a mask keeps the documents of a row apart.

    Raises:
        WorkflowError: it is configured, but the model's architecture cannot keep documents apart.
    """
    is_requested = tokens.has_conversations if written == "auto" else written
    if not is_requested or document_mask.can_mask_documents(model, tokens.vocab_size):
        return bool(is_requested)
    if tokens.packs_documents:
        key = names.of("document_mask")
        raise WorkflowError(
            f"{key} = {toml_value(written)}: this architecture counts positions through the whole row and cannot keep "
            f'the documents in it apart. Set {key} = false, or {names.packing} = "none".'
        )
    return False  # each row contains one document


def default_objective(model: nn.Module, tokens: TokenFile, *, batch_size: int) -> objective.Objective:
    """Return the loss to minimize with default settings.

    Args:
        model: dense.
        tokens: of the same vocabulary.
        batch_size: rows in one forward pass.
    """
    size = tokens.vocab_size
    fused = objective.uses_fused_loss(model, wanted=None, vocab_size=size, tokens=batch_size * tokens.context_length)
    masks = document_mask.masks_conversations(model, tokens)
    return objective.make_objective(model, fused=fused, vocab_size=size, masks_documents=masks)


def counts_positions_through_rows(model: nn.Module) -> bool:
    """Return whether a model's state runs through a whole row, so that documents in it cannot be kept apart.

    Args:
        model: weights are not needed.
    """
    return document_mask.has_row_state(model)
