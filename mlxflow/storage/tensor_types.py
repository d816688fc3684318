"""Names of dtypes in the safetensors format, numpy and MLX."""

#: The format's names of the written dtypes, by the common names of numpy and MLX.
FORMAT_NAMES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
}

#: numpy's dtypes of mapped tensors by the format's names: columns of token files, shards and timelines, probabilities.
NUMPY_TYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4"}

#: Dtypes of weights, by the format's names: the integer dtype in which numpy reads their bits, and MLX's name.
WEIGHT_TYPES = {"F32": ("<u4", "float32"), "F16": ("<u2", "float16"), "BF16": ("<u2", "bfloat16")}

#: Dtypes of the format that MLX does not support.
UNREAD_TYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F64"})
