"""The dense model in transformers with PyTorch; needs the `interop` extra."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.models import model_folder

torch = pytest.importorskip("torch", reason="needs the interop extra: pip install -e '.[test,interop]'")


def test_transformers_gives_the_same_logits(built: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = built / "artifacts/train"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("note 3 line 4: the 5th thing")["input_ids"]
    assert tokenizer.decode(ids) == "note 3 line 4: the 5th thing"
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits.numpy()
    model, _ = model_folder.load(folder)
    ours = np.array(model(mx.array([ids])))
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-3
