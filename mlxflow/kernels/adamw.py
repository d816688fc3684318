"""AdamW over one long array in one launch: scaling, moments, decay, finite check and rounding (arXiv:1711.05101).

    g' = scale g          m' = b1 m + (1 - b1) g'          v' = b2 v + (1 - b2) g'^2
    w' = (1 - rate decay) w - rate m' / (sqrt(v') root + eps)

With bias correction, root is 1 / sqrt(1 - b2^t) and the rate before m' is divided by 1 - b1^t. Computed in fp32, stored
in the types given. Where `keep` is 0, after a loss or gradient that is not finite, nothing changes.

| takes | |
| --- | --- |
| w, m, v | fp32 or bf16, of one type and shape, fewer than 2^31 numbers |
| g | fp32 or bf16 |
| rounded | w' once more in the model's type, where fp32 masters are kept |
"""

from typing import NamedTuple

import mlx.core as mx

from mlxflow.device.gpu_cores import gpu_cores
from mlxflow.kernels.codegen import THREADS, KernelSource, groups_for

_BODY = """
  const int size = w_size;
  const float b1 = settings[0], b2 = settings[1], eps = settings[2];
  const float shrink = 1.0f - rate[0] * settings[3], moving = rate[0] * first[0], times = scale[0], widening = root[0];
  const int at = (group * THREADS + worker) * 8;
  if (at >= size) return;
  const int count = size - at < 8 ? size - at : 8;
  float ws[8], gs[8], ms[8], vs[8];
  if (count == 8) {
    read_8(w + at, ws);
    read_8(g + at, gs);
    read_8(m + at, ms);
    read_8(v + at, vs);
  } else {
    for (int i = 0; i < 8; ++i) {
      const int j = i < count ? at + i : at;
      ws[i] = static_cast<float>(w[j]);
      gs[i] = static_cast<float>(g[j]);
      ms[i] = static_cast<float>(m[j]);
      vs[i] = static_cast<float>(v[j]);
    }
  }
  if (keep[0]) {
    for (int i = 0; i < 8; ++i) {
      const float gradient = gs[i] * times;
      ms[i] = b1 * ms[i] + (1.0f - b1) * gradient;
      vs[i] = b2 * vs[i] + (1.0f - b2) * gradient * gradient;
      ws[i] = shrink * ws[i] - moving * ms[i] / (SQRT(vs[i]) * widening + eps);
    }
  }
  if (count == 8) {
    write_8(new_w + at, ws);
    write_8(new_m + at, ms);
    write_8(new_v + at, vs);
    ROUND_8
  } else {
    for (int i = 0; i < count; ++i) {
      new_w[at + i] = static_cast<W>(ws[i]);
      new_m[at + i] = static_cast<W>(ms[i]);
      new_v[at + i] = static_cast<W>(vs[i]);
      ROUND_1
    }
  }
"""

_INPUTS = ("w", "g", "m", "v", "rate", "scale", "keep", "first", "root", "settings")
_OUTPUTS = ("new_w", "new_m", "new_v")
_PLAIN = KernelSource("adamw", _INPUTS, _OUTPUTS, _BODY.replace("ROUND_8", "").replace("ROUND_1", ""))
_ROUNDING = KernelSource(
    "adamw_rounding",
    _INPUTS,
    (*_OUTPUTS, "rounded"),
    _BODY.replace("ROUND_8", "write_8(rounded + at, ws);").replace(
        "ROUND_1", "rounded[at + i] = static_cast<R>(ws[i]);"
    ),
)


class AdamWSettings(NamedTuple):
    """Hyperparameters that are constant during a run.

    Attributes:
        b1: of the first moment.
        b2: of the second.
        eps: added to the root.
        decay: of the weights.
    """

    b1: float
    b2: float
    eps: float
    decay: float


class Scalars(NamedTuple):
    """The scalars of a step; 0-dimensional, fp32.

    Attributes:
        rate: the learning rate.
        scale: factor of the gradients.
        keep: boolean; False leaves everything unchanged.
        first: factor of the rate before the first moment; 1 without bias correction.
        root: factor of the root of the second moment; 1 without bias correction.
    """

    rate: mx.array
    scale: mx.array
    keep: mx.array
    first: mx.array
    root: mx.array


def reference(
    w: mx.array, g: mx.array, m: mx.array, v: mx.array, scalars: Scalars, settings: AdamWSettings, rounded: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return the new weights, both moments, and the weights in the type `rounded`, in plain operations in fp32."""
    wide_w, wide_m, wide_v = (array.astype(mx.float32) for array in (w, m, v))
    gradient = g.astype(mx.float32) * scalars.scale
    new_m = settings.b1 * wide_m + (1 - settings.b1) * gradient
    new_v = settings.b2 * wide_v + (1 - settings.b2) * gradient * gradient
    moved = scalars.rate * scalars.first * new_m / (mx.sqrt(new_v) * scalars.root + settings.eps)
    new_w = (1 - scalars.rate * settings.decay) * wide_w - moved
    new_w, new_m, new_v = (
        mx.where(scalars.keep, new, old).astype(w.dtype)
        for new, old in ((new_w, wide_w), (new_m, wide_m), (new_v, wide_v))
    )
    return new_w, new_m, new_v, new_w.astype(rounded)


def supports(w: mx.array, g: mx.array) -> bool:
    """Return whether the kernel takes arrays of these shapes and types."""
    known = (mx.float32, mx.bfloat16)
    return w.dtype in known and g.dtype in known and w.shape == g.shape and w.ndim > 0 and 8 <= w.size < 2**31


def kernel(
    w: mx.array, g: mx.array, m: mx.array, v: mx.array, scalars: Scalars, settings: AdamWSettings, rounded: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return what `reference` does, by the kernel.

    Args:
        w: weights; so are the moments m and v.
        g: gradients.
        m: first moments.
        v: second moments.
        scalars: of the step.
        settings: of the run.
        rounded: the model's type.
    """
    source, types = (_PLAIN, []) if rounded == w.dtype else (_ROUNDING, [rounded])
    outputs = source.launch(
        [w, g, m, v, *(scalar.reshape(1) for scalar in scalars), mx.array([*settings] * 2)],
        constants=[("W", w.dtype), *(("R", one) for one in types)],
        groups=groups_for(w.size),
        shapes=[w.shape] * (3 + len(types)),
        dtypes=[w.dtype] * 3 + types,
    )
    return outputs[0], outputs[1], outputs[2], outputs[-1] if types else outputs[0]


# Groups of the sum of squares: as many as a core of a large GPU runs at once
_SUM_GROUPS_A_CORE = 8


def squares_at_once() -> int:
    """Return the numbers that all groups of the sum of squares read in a round."""
    return _max_sum_groups() * THREADS * 8


def _max_sum_groups() -> int:
    return _SUM_GROUPS_A_CORE * gpu_cores()


_SQUARES = KernelSource(
    "sum_of_squares",
    ("x",),
    ("sums",),
    """
  const int size = x_size;
  const int step = groups * THREADS * 8;
  float sum = 0;
  int at = (group * THREADS + worker) * 8;
  for (; at + 8 <= size; at += step) {
    float xs[8];
    read_8(x + at, xs);
    float some = 0;
    for (int i = 0; i < 8; ++i) some += xs[i] * xs[i];
    sum += some;
    if (at > 2147483647 - step) break;
  }
  if (at < size && at + 8 > size) for (; at < size; ++at) sum += static_cast<float>(x[at]) * static_cast<float>(x[at]);
  sum = sum_32(sum);
  SHARED float parts[THREADS / 32];
  if (worker % 32 == 0) parts[worker / 32] = sum;
  BARRIER;
  if (worker == 0) {
    sum = 0;
    for (int i = 0; i < THREADS / 32; ++i) sum += parts[i];
    sums[group] = sum;
  }
""",
)


def reference_sum_of_squares(x: mx.array) -> mx.array:
    """Return the sum of the squares in fp32, a scalar."""
    return x.astype(mx.float32).square().sum()


def kernel_sum_of_squares(x: mx.array) -> mx.array:
    """Return what `reference_sum_of_squares` does, by the kernel: each thread's share, then the shares."""
    groups = min(_max_sum_groups(), groups_for(x.size))
    return _SQUARES.launch([x], constants=[], groups=groups, shapes=[(groups,)], dtypes=[mx.float32])[0].sum()
