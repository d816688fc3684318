"""The first hour of a user with a chat model and conversations."""

import json
import shutil
from pathlib import Path

import pytest

from tests.first_hour.conftest import EXAMPLES, Newcomer

pytestmark = pytest.mark.first_hour


def test_a_chat_model_learns_conversations_and_answers(newcomer: Newcomer, chat_model: Path) -> None:
    newcomer.types("mlxflow init talk --template chat")
    workflow = newcomer.folder / "talk/workflow.toml"
    text = workflow.read_text().replace('"model"', json.dumps(str(chat_model)))
    assert "context_length = 256" in text
    workflow.write_text(text.replace("context_length = 256", "context_length = 64"))  # the model has 64 positions
    shutil.copy(EXAMPLES / "chat-lora/chats.jsonl", newcomer.folder / "talk")
    newcomer.types("cd talk && mlxflow build train report")
    newcomer.assert_improved("talk")
    answer = newcomer.types("cd talk && mlxflow chat artifacts/train --max-tokens 20", stdin="hello\n")
    assert answer.strip()
