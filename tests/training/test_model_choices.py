from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from mlxflow.data.token_file import TokenFile
from mlxflow.messages.errors import WorkflowError
from mlxflow.ops import document_mask
from mlxflow.training.model_choices import Choice, with_model_choices
from mlxflow.training.settings import SettingNames, TrainingSettings
from tests import small_models

NAMES = SettingNames.of_stage("train:long", "pretokenize", "workflow.memory_limit")


def _tokens(built: Path, *, conversations: bool) -> TokenFile:
    tokens = TokenFile.open(built / "artifacts/pretokenize/train.safetensors")
    return tokens._replace(has_conversations=conversations)


def _choices(model: nn.Module, tokens: TokenFile, masks: Choice) -> TrainingSettings:
    return with_model_choices(TrainingSettings(), model, tokens, masks_documents=masks, fused_loss="auto", names=NAMES)


@pytest.mark.parametrize("conversations", [True, False])
@pytest.mark.parametrize("written", ["auto", True, False])
def test_documents_are_masked_if_configured_or_if_there_are_conversations(
    built: Path, written: Any, conversations: bool
) -> None:
    model, _ = small_models.llama(vocab_size=400, context_length=32)
    settings = _choices(model, _tokens(built, conversations=conversations), written)
    assert settings.masks_documents == (conversations if written == "auto" else written)


def test_a_model_that_cannot_keep_documents_apart_is_refused_with_the_keys(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = small_models.llama(vocab_size=400, context_length=32)
    monkeypatch.setattr(document_mask, "can_mask_documents", lambda model, vocab_size: False)
    monkeypatch.setattr(TokenFile, "packs_documents", True)
    with pytest.raises(WorkflowError) as caught:
        _choices(model, _tokens(built, conversations=True), "auto")
    assert str(caught.value) == (
        'train:long.document_mask = "auto": this architecture counts positions through the whole row and cannot keep '
        'the documents in it apart. Set train:long.document_mask = false, or pretokenize.packing = "none".'
    )
    monkeypatch.setattr(TokenFile, "packs_documents", False)
    assert not _choices(model, _tokens(built, conversations=True), True).masks_documents


def test_only_choices_that_depend_on_the_model_change(built: Path) -> None:
    model, _ = small_models.llama(vocab_size=400, context_length=32)
    settings = _choices(model, _tokens(built, conversations=True), "auto")
    assert settings == TrainingSettings(masks_documents=True, fused_loss=settings.fused_loss)
