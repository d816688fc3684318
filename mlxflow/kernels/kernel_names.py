"""Kernel names: the operation, its dtypes, and its width if each width is compiled separately."""

import mlx.core as mx

#: The dtypes that kernels take, by name.
TYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def name_of(dtype: mx.Dtype) -> str:
    """Return a type's name, such as "bfloat16"."""
    return str(dtype).rpartition(".")[2]


def rms_norm_name(dtype: mx.Dtype, width: int, *, is_frozen: bool) -> str:
    """Return the name of the norm of rows of a width; that with a frozen weight has another backward pass."""
    return f"rms_norm{'_frozen' * is_frozen}/{name_of(dtype)}/{width}"


def block_name(dtype: mx.Dtype, width: int, *, is_frozen: bool) -> str:
    """Return the name of the residual sum and norm of rows of a width; see `rms_norm_name`."""
    return f"sum_rms_norm{'_frozen' * is_frozen}/{name_of(dtype)}/{width}"


def gated_name(activation: str, dtype: mx.Dtype) -> str:
    """Return the name of a gated activation."""
    return f"gated_{activation}/{name_of(dtype)}"


def mlp_name(activation: str, dtype: mx.Dtype) -> str:
    """Return the name of a gated activation of two projections of the same input."""
    return f"mlp_{activation}/{name_of(dtype)}"


def rotary_name(dtype: mx.Dtype, width: int, *, interleaved: bool) -> str:
    """Return the name of the rotary embedding that rotates `width` dimensions of a head."""
    return f"rotary{'_interleaved' * interleaved}/{name_of(dtype)}/{width}"


def attention_name(dtype: mx.Dtype, width: int, *, is_bounded: bool) -> str:
    """Return the name of the causal attention of heads of a width; widths up to 64 share a kernel.

    Args:
        dtype: of queries, keys and values.
        width: of a head.
        is_bounded: whether queries see only the keys from a first key on.
    """
    cut = 64 if width <= 64 else 128 if width <= 128 else width
    return f"attention{'_bounded' * is_bounded}/{name_of(dtype)}/{cut}"


def embedding_name(dtype: mx.Dtype) -> str:
    """Return the name of the gradient of an embedding lookup."""
    return f"embedding/{name_of(dtype)}"


def cross_entropy_name(dtype: mx.Dtype) -> str:
    """Return the name of the gradient of the loss."""
    return f"cross_entropy/{name_of(dtype)}"


def adamw_name(weights: mx.Dtype, gradients: mx.Dtype) -> str:
    """Return the name of the optimizer's update."""
    return f"adamw/{name_of(weights)}/{name_of(gradients)}"


def sum_of_squares_name(dtype: mx.Dtype) -> str:
    """Return the name of the sum of squares for the gradient norm."""
    return f"sum_of_squares/{name_of(dtype)}"


def is_known(name: str) -> bool:
    """Return whether a kernel supports the dtype and width in its name."""
    kind, dtype, *width = name.split("/")
    if kind.startswith("attention"):
        return dtype == "bfloat16" and int(width[0]) <= 128
    if kind.endswith(("rms_norm", "rms_norm_frozen")):
        return dtype in TYPES and int(width[0]) % 8 == 0 and int(width[0]) <= 8192
    return dtype in TYPES and (not kind.startswith("rotary") or int(width[0]) % 16 == 0)
