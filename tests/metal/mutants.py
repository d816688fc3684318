"""Kernels of the project with one fault each: the stand-in has to refuse every one."""

from typing import Any, NamedTuple

from mlxflow.kernels import adamw, codegen, cross_entropy, embedding, gated_activation, rms_norm, rotary


class Mutant(NamedTuple):
    """A kernel with a fault.

    Attributes:
        module: of the kernel.
        source: the name of its source in there, or of a text.
        old: what is replaced in the body and the header.
        new: the fault.
        operation: with which it is refused, a name of `operations.every`.
        refusal: a pattern for the message; "deviates" where only the result is wrong.
        dtype: of the operation.
    """

    module: Any
    source: str
    old: str
    new: str
    operation: str
    refusal: str
    dtype: str = "float32"

    def value(self) -> Any:
        """Return the source with its fault."""
        right = getattr(self.module, self.source)
        texts = (right,) if isinstance(right, str) else (right.body, right.header)
        assert sum(text.count(self.old) for text in texts) == 1, f"{self.source} has no such line, or more than one"
        changed = [text.replace(self.old, self.new) for text in texts]
        if isinstance(right, str):
            return changed[0]
        return right._replace(name=f"{right.name}_mutant", body=changed[0], header=changed[1])


_DIFFERS = r"\w+ differs in (reverse|shuffled) order of threads from element \d+ on"

MUTANTS = {
    "norm backward: no barrier before the next row's sums": Mutant(
        rms_norm, "BACKWARD", "      BARRIER;\n      partial[0]", "      partial[0]", "norm, 11 rows of 2056", _DIFFERS
    ),
    "sum and norm backward: no barrier before the next row's sums": Mutant(
        rms_norm,
        "SUM_BACKWARD",
        "      BARRIER;\n      partial[0]",
        "      partial[0]",
        "sum and norm, 11 rows of 2056",
        _DIFFERS,
        "bfloat16",
    ),
    "norm backward: no barrier before the sums are read": Mutant(
        rms_norm,
        "BACKWARD",
        "      BARRIER;\n      squares = products",
        "      squares = products",
        "norm, 11 rows of 2056",
        _DIFFERS,
    ),
    "norm backward with a frozen weight: no barrier before the next row's sums": Mutant(
        rms_norm,
        "FROZEN_BACKWARD",
        "      BARRIER;\n      partial[0]",
        "      partial[0]",
        "norm, 11 rows of 2056",
        _DIFFERS,
    ),
    "norm backward: no barrier between two parts of the columns": Mutant(
        rms_norm, "BACKWARD", "    BARRIER;\n    if (lane", "    if (lane", "norm, 27 rows of 776", _DIFFERS
    ),
    "norm backward: threads without a row miss the barrier": Mutant(
        rms_norm,
        "BACKWARD",
        "    if (WARPS > 1) {",
        "    if (WARPS > 1 && row < rows) {",
        "norm, 27 rows of 776",
        r"barrier in line \d+: thread \d+ of group \d waits in line \d+",
    ),
    "norm forward: no barrier": Mutant(
        rms_norm,
        "FORWARD",
        "    BARRIER;\n",
        "",
        "norm, 11 rows of 2056",
        _DIFFERS,
    ),
    "norm forward: rows past the last are read": Mutant(
        rms_norm,
        "FORWARD",
        "    if (row < rows && vector < VECTORS) {\n      read_8(x",
        "    if (vector < VECTORS) {\n      read_8(x",
        "norm, 101 rows of 72",
        r"reads at byte \d+ of x, which has 29088",
    ),
    "norm backward: more threadgroup memory than there is": Mutant(
        rms_norm,
        "BACKWARD",
        "SLOTS > 1 ? THREADS * 8 : 1",
        "SLOTS > 1 ? THREADS * 64 : 1",
        "norm, 101 rows of 72",
        r"\d+ bytes of threadgroup memory: more than 32 KB",
    ),
    "shares of the weight's gradient: no barrier": Mutant(
        rms_norm, "ADD_SHARES", "  BARRIER;\n", "", "norm, 11 rows of 2056", _DIFFERS
    ),
    "sum over a simdgroup: a lane is left out": Mutant(
        codegen, "METAL", "step = 16", "step = 8", "squares of 100003", "deviates"
    ),
    "eight numbers: read as two float4, which a view does not allow": Mutant(
        codegen,
        "METAL",
        "typedef packed_float4 type",
        "typedef float4 type",
        "silu, 8 numbers",
        "reads or writes at an address that is not aligned for the type",
    ),
    "eight numbers: none in constant memory": Mutant(
        codegen,
        "METAL",
        "const constant T* from",
        "const threadgroup T* from",
        "squares of 7",
        "(?s:.*Unable to build metal library.*no matching function for call to 'read_8'.*)",
    ),
    "embedding: a variable of the program that is not in constant memory": Mutant(
        embedding,
        "_SOURCE",
        "enum { FEW = 16, AT_ONCE = 8 };",
        "constexpr int FEW = 16, AT_ONCE = 8;",
        "embedding, frequent tokens",
        "(?s:.*Unable to build metal library.*program scope variable must reside in constant address space.*)",
    ),
    "embedding: the places of rows must be in device memory": Mutant(
        embedding,
        "_SOURCE",
        "template <typename G, typename N> INLINE void add_rows(G g, N n,",
        "template <typename T> INLINE void add_rows(const GLOBAL T* g, const GLOBAL int* n,",
        "embedding, 3 lookups",
        "(?s:.*Unable to build metal library.*no matching function for call to 'add_rows'.*)",
    ),
    "embedding: no barrier before the shares are added": Mutant(
        embedding,
        "_SOURCE",
        "      BARRIER;\n      if (takes_part && slot",
        "      if (takes_part && slot",
        "embedding, frequent tokens",
        _DIFFERS,
    ),
    "embedding: no barrier before the next shares": Mutant(
        embedding,
        "_SOURCE",
        "      BARRIER;\n      for (int j = 0; j < 8; ++j) shares",
        "      for (int j = 0; j < 8; ++j) shares",
        "embedding, two frequent tokens",
        _DIFFERS,
    ),
    "embedding: the range of a token ends one too early": Mutant(
        embedding, "_BOUNDS", "t[middle] <= number", "t[middle] + 1 <= number", "embedding, frequent tokens", "deviates"
    ),
    "loss: the target's number is one too high": Mutant(
        cross_entropy, "_SOURCE", "at + i == target", "at + i == target + 1", "loss, 7 rows", "deviates", "bfloat16"
    ),
    "rotation back: turns the same way": Mutant(
        rotary, "_SOURCE", "ss[i] = -ss[i];", "ss[i] = ss[i];", "rotation, a part", "deviates", "bfloat16"
    ),
    "rotation: an index of 32 bits overflows": Mutant(
        rotary,
        "_SOURCE",
        "(row * heads + head) * WIDTH;",
        "(row * heads + head) * (WIDTH << 20) / (1 << 20);",
        "rotation, a part",
        "an integer overflows",
    ),
    "gated activation: the last numbers are read past the end": Mutant(
        gated_activation,
        "_SOURCE",
        "  if (at < size) {",
        "  if (at < size + 8) {",
        "silu, rows of 12",
        r"reads at byte \d+ of \w, which has \d+",
    ),
    "update: the last number is not written": Mutant(
        adamw,
        "_ROUNDING",
        "for (int i = 0; i < count; ++i) {\n      new_w",
        "for (int i = 0; i < count - 1; ++i) {\n      new_w",
        "update of 15 mlx.core.float32",
        _DIFFERS,
        "bfloat16",
    ),
    "update: a scalar is read past its end": Mutant(
        adamw,
        "_ROUNDING",
        "rate[0] * first[0]",
        "rate[1] * first[0]",
        "update of 15 mlx.core.float32",
        "reads at byte 4 of rate, which has 4",
        "bfloat16",
    ),
    "squares: the last vector is read whole": Mutant(
        adamw, "_SQUARES", "at + 8 <= size; at += step", "at < size; at += step", "squares of 100003", "reads at .*"
    ),
}
