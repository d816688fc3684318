"""Names of llama.cpp's tensors and header fields."""

import mlx.core as mx
import pytest
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from mlx.utils import tree_flatten

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import gguf_architectures, model_folder
from tests.models.gguf_models import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_the_name_of_the_gguf_package(name: str) -> None:
    config = {"model_type": name} | CONFIGS[name]
    architecture = gguf_architectures.of_config(config, "model")
    number = next(one for one, text in MODEL_ARCH_NAMES.items() if text == architecture.name)
    expected = get_tensor_name_map(MODEL_ARCH(number), config["num_hidden_layers"])
    names: dict[str, mx.array] = dict(tree_flatten(model_folder.skeleton(config).parameters()))
    for path in names:
        hugging_face = path.replace("switch_mlp.", "experts.")
        found = architecture.tensor_name(path)
        assert found == expected.get_name(hugging_face, try_suffixes=(".weight", ".bias")), path
        assert architecture.path(found) == path


def test_every_architecture_is_tried() -> None:
    tried = {CONFIGS[name].get("model_type", name) for name in CONFIGS}
    assert tried == set(gguf_architectures.MODEL_TYPES)


def test_an_architecture_without_a_name_is_refused() -> None:
    with pytest.raises(ArtifactError) as caught:
        gguf_architectures.of_config({"model_type": "mamba9"}, 'export.model = "base"')
    known = "llama, mistral, qwen2, qwen3, qwen3_moe, gemma2, gemma3_text, phi3, olmo2"
    assert str(caught.value) == (
        f'export.model = "base": is of the architecture "mamba9", which cannot be written as GGUF. Known: {known}.'
    )
    with pytest.raises(
        ArtifactError, match=r'^x.gguf: is of the architecture "bert", which cannot be read. Known: llama,'
    ):
        gguf_architectures.of_name("bert", "x.gguf")


def test_a_parameter_or_tensor_without_a_name_gives_none() -> None:
    architecture = gguf_architectures.of_name("llama", "x")
    assert architecture.tensor_name("model.layers.0.self_attn.sinks") == ""
    assert architecture.tensor_name("model.vision.weight") == ""
    assert architecture.path("blk.0.attn_sinks.weight") == ""
    assert architecture.path("v.patch_embd.weight") == ""
