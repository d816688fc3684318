"""Architectures that both llama.cpp and mlx-lm know: names of tensors and header fields in a GGUF file.

The names are those of llama.cpp's `convert_hf_to_gguf.py`; the loader of each architecture is `src/models/*.cpp` there.
A model whose settings llama.cpp does not read is refused, because it would compute something else without an error.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxflow.messages.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORM = {"ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# Field of the header without the architecture's prefix, and the key of config.json
_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


class GgufArchitecture(NamedTuple):
    """An architecture of a GGUF file.

    Attributes:
        name: llama.cpp's, `general.architecture`.
        model_types: mlx-lm's; the first is written when a file is read.
        transformers_class: the value of `architectures` in `config.json`.
        blocks: tensors of a block by llama.cpp's name; the path within mlx-lm's block.
        fields: further fields of the header, with the key of `config.json`.
        permutes: whether the rows of q and k are in the order of llama.cpp's rotary embedding.
        adds_one: whether the weights of norms are stored with one added.
        exceeds_fp16: whether activations exceed the range of fp16, so that a folder in fp16 would give no numbers.
        settings: values of `config.json` that llama.cpp does not read from the file but assumes.
    """

    name: str
    model_types: tuple[str, ...]
    transformers_class: str
    blocks: Mapping[str, str]
    fields: Mapping[str, str] = {}
    permutes: bool = False
    adds_one: bool = False
    exceeds_fp16: bool = False
    settings: Mapping[str, Any] = {}

    @property
    def all_fields(self) -> dict[str, str]:
        """The fields of the header by name, without the prefix, with the key of `config.json`."""
        return {**_COMMON, **self.fields}

    def tensor_name(self, path: str) -> str:
        """Return llama.cpp's name of a parameter; empty if it has none.

        Args:
            path: mlx-lm's name, such as "model.layers.0.self_attn.q_proj.weight".
        """
        module, _, kind = path.rpartition(".")
        prefix = "model.layers."
        if not module.startswith(prefix):
            found = next((name for name, own in _GLOBAL.items() if own == module), "")
            return f"{found}.{kind}" if found else ""
        number, _, inner = module.removeprefix(prefix).partition(".")
        found = next((name for name, own in self.blocks.items() if own == inner), "")
        return f"blk.{number}.{found}.{kind}" if found else ""

    def path(self, name: str) -> str:
        """Return mlx-lm's name of a tensor; empty if it has none.

        Args:
            name: of a tensor in a GGUF file, such as "blk.0.attn_q.weight".
        """
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("blk."):
            return f"{_GLOBAL[stem]}.{kind}" if stem in _GLOBAL else ""
        _, number, inner = stem.split(".", 2)
        return f"model.layers.{number}.{self.blocks[inner]}.{kind}" if inner in self.blocks else ""


_GEMMA_BLOCKS = {**_ATTENTION, **_MLP, **_AFTER, "ffn_norm": "pre_feedforward_layernorm"}

ARCHITECTURES = (
    GgufArchitecture("llama", ("llama", "mistral"), "LlamaForCausalLM", {**_ATTENTION, **_MLP, **_NORM}, permutes=True),
    GgufArchitecture("qwen2", ("qwen2",), "Qwen2ForCausalLM", {**_ATTENTION, **_MLP, **_NORM}),
    GgufArchitecture("qwen3", ("qwen3",), "Qwen3ForCausalLM", {**_ATTENTION, **_MLP, **_NORM, **_HEAD_NORMS}),
    GgufArchitecture(
        "qwen3moe",
        ("qwen3_moe",),
        "Qwen3MoeForCausalLM",
        {**_ATTENTION, **_NORM, **_HEAD_NORMS, **_EXPERTS},
        {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        settings={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    GgufArchitecture(
        "gemma2",
        ("gemma2",),
        "Gemma2ForCausalLM",
        _GEMMA_BLOCKS,
        {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        adds_one=True,
        exceeds_fp16=True,
    ),
    GgufArchitecture(
        "gemma3",
        ("gemma3_text",),
        "Gemma3ForCausalLM",
        {**_GEMMA_BLOCKS, **_HEAD_NORMS},
        {"attention.sliding_window": "sliding_window"},
        adds_one=True,
        exceeds_fp16=True,
        settings={"sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0},
    ),
    GgufArchitecture(
        "phi3",
        ("phi3",),
        "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            **_NORM,
        },
        settings={"partial_rotary_factor": 1.0},
    ),
    GgufArchitecture(
        "olmo2",
        ("olmo2",),
        "Olmo2ForCausalLM",
        {**{k: v for k, v in _ATTENTION.items() if k != "attn_norm"}, **_MLP, **_AFTER, **_HEAD_NORMS},
    ),
)

#: mlx-lm's model types that can be written.
MODEL_TYPES = tuple(name for one in ARCHITECTURES for name in one.model_types)


def of_config(config: Mapping[str, Any], key: str) -> GgufArchitecture:
    """Return the architecture of a model.

    Args:
        config: its `config.json`, completed with mlx-lm's defaults.
        key: names the model in messages.

    Raises:
        ArtifactError: llama.cpp has no name for it, or does not read one of its settings; a line for each.
    """
    model_type = config.get("model_type")
    found = next((one for one in ARCHITECTURES if model_type in one.model_types), None)
    if found is None:
        raise ArtifactError(f"{key}: {unknown_architecture(str(model_type))}")
    lines = [
        f"{key}: its config.json has {name} = {config[name]!r}, and llama.cpp assumes {value!r} for {found.name}. "
        'Export it with format = "mlx".'
        for name, value in _assumed(found, config)
        if config.get(name, value) not in (value, None)
    ]
    if lines:
        raise ArtifactError(*lines)
    return found


def unknown_architecture(model_type: str) -> str:
    """Return the message for a model type that llama.cpp has no name for."""
    return f'is of the architecture "{model_type}", which cannot be written as GGUF. Known: {", ".join(MODEL_TYPES)}.'


def _assumed(architecture: GgufArchitecture, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from architecture.settings.items()
    yield "rope_traditional", False
    if architecture.name.startswith("gemma"):
        heads = config["num_attention_heads"]
        is_largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[architecture.name]
        yield "query_pre_attn_scalar", config["hidden_size"] // heads if is_largest else config["head_dim"]
    if layers := config.get("layer_types"):
        kinds = set(layers)
        if architecture.name == "llama" and kinds != {"full_attention"}:
            yield "layer_types", ["full_attention"] * len(layers)


def of_name(name: str, key: str) -> GgufArchitecture:
    """Return the architecture of a GGUF file.

    Args:
        name: `general.architecture`.
        key: names the file in messages.

    Raises:
        ArtifactError: it is not known.
    """
    found = next((one for one in ARCHITECTURES if one.name == name), None)
    if found is None:
        names = ", ".join(one.name for one in ARCHITECTURES)
        raise ArtifactError(f'{key}: is of the architecture "{name}", which cannot be read. Known: {names}.')
    return found


def header(architecture: GgufArchitecture, config: Mapping[str, Any], key: str) -> dict[str, int | float | str]:
    """Return the fields of a GGUF file's header that describe a model, by their full names.

    Args:
        architecture: of the model.
        config: its `config.json`, completed with mlx-lm's defaults.
        key: names the model in messages.

    Raises:
        ArtifactError: the scaling of its rotary embedding has no fields.
    """
    name = architecture.name
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    complete = {**config, "head_dim": head_dim}
    fields: dict[str, int | float | str] = {
        f"{name}.{field}": complete[own]
        for field, own in architecture.all_fields.items()
        if complete.get(own) is not None
    }
    fields[f"{name}.attention.value_length"] = head_dim
    fields[f"{name}.rope.dimension_count"] = head_dim
    if name == "phi3":
        fields[f"{name}.rope.scaling.original_context_length"] = config["max_position_embeddings"]
    scaling = _scaling(config)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "linear":
        fields |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(scaling["factor"])}
    elif kind not in ("default", "llama3"):
        raise ArtifactError(
            f'{key}: its config.json has rope_scaling of the type "{kind}", which cannot be written as GGUF. '
            'Export it with format = "mlx".'
        )
    return fields


def _scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_scaling") or {}


def rope_factors(config: Mapping[str, Any]) -> list[float]:
    """Return the factors by which Llama 3 divides its rotary frequencies, (D / 2,); empty for other models.

    Source: `_compute_llama3_parameters` of transformers, and `Llama3` in `convert_hf_to_gguf.py`.
    """
    import math

    scaling = _scaling(config)
    if (scaling.get("rope_type") or scaling.get("type")) != "llama3":
        return []
    dims = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factor, low, high = (float(scaling[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    positions = float(scaling.get("original_max_position_embeddings", 8192))

    def factor_of(place: int) -> float:
        wavelength = 2 * math.pi * float(config["rope_theta"]) ** (place / dims)
        if wavelength < positions / high:
            return 1.0
        if wavelength > positions / low:
            return factor
        smooth = (positions / wavelength - low) / (high - low)
        return float(1 / ((1 - smooth) / factor + smooth))

    return [factor_of(place) for place in range(0, dims, 2)]


def rotary_order(num_rows: int, num_heads: int) -> "NDArray[np.intp]":
    """Return the order in which llama.cpp has the rows of q or k: the two halves of each head take turns.

    Args:
        num_rows: of the matrix, H * D.
        num_heads: H.
    """
    import numpy as np

    return np.arange(num_rows).reshape(num_heads, 2, -1).swapaxes(1, 2).reshape(-1)


def config_json(architecture: GgufArchitecture, field: Callable[[str], Any]) -> dict[str, Any]:
    """Return the `config.json` of the model in a GGUF file, without dtype and token ids.

    Args:
        architecture: of the file.
        field: returns a field by its full name; None if the file has none of that name.
    """
    read = {own: field(f"{architecture.name}.{name}") for name, own in architecture.all_fields.items()}
    config = {
        "architectures": [architecture.transformers_class],
        "model_type": architecture.model_types[0],
        **dict(architecture.settings),
        **{own: value for own, value in read.items() if value is not None},
    }
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("rope_theta", 10_000.0)
    if architecture.name.startswith("gemma"):
        config["query_pre_attn_scalar"] = config["head_dim"]
        config["hidden_activation"] = "gelu_pytorch_tanh"
    elif architecture.name != "phi3":
        config["hidden_act"] = "silu"
    if (factor := field(f"{architecture.name}.rope.scaling.factor")) is not None:
        config["rope_scaling"] = {"type": "linear", "factor": factor}
    return config
