"""The shape of a new model: its table in a workflow, its number of weights, its `config.json`; imports no MLX."""

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mlxflow.models import architecture_args
from mlxflow.storage.toml_tables import MAX_LAYERS, MAX_SIZE, MAX_WEIGHTS, Problem


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train.model]` table: the shape of a new model, or a base model."""

    from_: Annotated[
        str,
        Meta(description="a model folder, a GGUF file, a hub id or a stage to start from; empty: a new model"),
    ] = msgspec.field(default="", name="from")
    trust_remote_code: Annotated[bool, Meta(description="whether Python code of the folder may run; read it first")] = (
        False
    )
    architecture: Annotated[
        str, Meta(min_length=1, description='one of mlx-lm\'s architectures, such as "qwen3", "gemma3_text" or "olmo2"')
    ] = "llama"
    hidden_size: Annotated[int, Meta(ge=8, le=MAX_SIZE, description="width of the residual stream")] = 128
    num_layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS, description="transformer blocks")] = 2
    num_heads: Annotated[int, Meta(ge=1, le=MAX_SIZE, description="attention heads")] = 2
    num_kv_heads: Annotated[int, Meta(ge=1, le=MAX_SIZE, description="heads of keys and values")] = 2
    intermediate_size: Annotated[int, Meta(ge=8, le=MAX_SIZE, description="width inside the gated MLP")] = 256
    tie_word_embeddings: Annotated[bool, Meta(description="whether the head shares the embedding's weights")] = True
    rope_theta: Annotated[float, Meta(ge=1, le=1e12, description="base of the rotary embedding")] = 10_000.0
    args: Annotated[
        dict[str, Any], Meta(description="other settings of the architecture, by the names of mlx-lm's ModelArgs")
    ] = {}

    def problems(self) -> Iterator[Problem]:
        """Yield sizes that do not divide, and a shape that is set although a base model is."""
        if self.from_:
            shaped = [key for key in self.__struct_fields__ if key not in ("from_", "trust_remote_code")]
            for key in (key for key in shaped if getattr(self, key) != getattr(ModelConfig(), key)):
                expected = "is for a new model, and model.from names one that exists"
                yield Problem(key, getattr(self, key), expected, "Remove one of the two.")
            return
        if not self.is_plain_llama:
            yield from architecture_args.problems(self.architecture, self.args)
        if self.is_plain_llama and self.hidden_size % (2 * self.num_heads):
            yield Problem(
                "hidden_size",
                self.hidden_size,
                f"expected a multiple of twice num_heads = {self.num_heads}",
                "Change one of the two.",
            )
        if self.is_plain_llama and self.num_heads % self.num_kv_heads:
            yield Problem(
                "num_kv_heads",
                self.num_kv_heads,
                f"expected a divisor of num_heads = {self.num_heads}",
                "Change one of the two.",
            )
        num_weights = self.num_weights(vocab_size=0)
        if num_weights > MAX_WEIGHTS:
            yield Problem(
                "hidden_size",
                self.hidden_size,
                f"expected, with intermediate_size = {self.intermediate_size} and num_layers = {self.num_layers}, "
                f"at most {MAX_WEIGHTS:,} weights, not {num_weights:,}",
                "Lower one of the three.",
            )

    @property
    def is_plain_llama(self) -> bool:
        """Whether the shape describes the whole model."""
        return self.architecture == "llama" and not self.args

    def num_weights(self, vocab_size: int) -> int:
        """Return the number of weights of a new model, without those of its norms.

        Args:
            vocab_size: number of ids of the tokenizer.
        """
        keys_and_values = 2 * self.hidden_size * self.num_kv_heads // self.num_heads
        layer = self.hidden_size * (2 * self.hidden_size + keys_and_values + 3 * self.intermediate_size)
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + tables * vocab_size * self.hidden_size


def new_config(shape: ModelConfig, *, vocab_size: int, context_length: int, end_of_text: int = 0) -> dict[str, Any]:
    """Return the `config.json` of a new model of any architecture; see `llama_config`.

    Args:
        shape: of the model.
        vocab_size: rows of the embedding, V.
        context_length: maximum number of positions, L.
        end_of_text: the token id that ends a document.
    """
    if shape.architecture == "llama":
        config = llama_config(shape, vocab_size=vocab_size, context_length=context_length, end_of_text=end_of_text)
        return {**config, **shape.args}
    sizes = {key: getattr(shape, key) for key in architecture_args.ALIASES if key in shape.__struct_fields__}
    sizes |= {"vocab_size": vocab_size, "context_length": context_length, "eps": 1e-5}
    sizes["head_dim"] = max(1, shape.hidden_size // shape.num_heads)
    return {
        "model_type": shape.architecture,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
        **architecture_args.given(shape.architecture, sizes),
        **shape.args,
    }


def llama_config(shape: ModelConfig, *, vocab_size: int, context_length: int, end_of_text: int = 0) -> dict[str, Any]:
    """Return the `config.json` of a new Llama-shaped model in Hugging Face's keys.

    Args:
        shape: of the model; `hidden_size` is divisible by `num_heads`, and that by `num_kv_heads`.
        vocab_size: rows of the embedding, V.
        context_length: maximum number of positions, L.
        end_of_text: the token id that ends a document.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "head_dim": shape.hidden_size // shape.num_heads,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": context_length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
    }
