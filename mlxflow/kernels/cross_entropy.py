"""The gradient of a weighted cross-entropy with respect to its logits: one pass.

For a row of logits z with target t, weight w and s = log(sum(e^z)), which the forward pass has:

    loss = s - z_t          d loss / dz_i = w (e^(z_i - s) - [i = t])

MLX's implementation writes the softmax and reads it again. As in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).

| takes | |
| --- | --- |
| logits | fp32 or bf16, (N, V), V a multiple of 8, less than 2^31 numbers |
| targets | any integer type, (N,) |
| s, w | fp32, (N,) |
"""

import mlx.core as mx

from mlxflow.kernels.codegen import KernelSource

_SOURCE = KernelSource(
    name="cross_entropy_backward",
    inputs=("z", "s", "t", "w"),
    outputs=("dz",),
    body="""
  const int wide = z_width;
  const float sum = s[group], weight = w[group];
  const int target = static_cast<int>(t[group]);
  for (int at = worker * 8; at < wide; at += THREADS * 8) {
    float zs[8];
    read_8(z + group * wide + at, zs);
    for (int i = 0; i < 8; ++i) zs[i] = weight * (EXP(zs[i] - sum) - (at + i == target ? 1.0f : 0.0f));
    write_8(dz + group * wide + at, zs);
  }
""",
)


def reference_gradient(logits: mx.array, sums: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return the gradient, (N, V) in the type of the logits, in plain operations.

    Args:
        logits: (N, V)
        sums: (N,) logarithms of the sums of the exponentials, fp32.
        targets: (N,) ids.
        weights: (N,) incoming gradient of each loss, fp32.
    """
    at_target = mx.arange(logits.shape[-1], dtype=targets.dtype) == targets[:, None]
    probabilities = mx.exp(logits.astype(mx.float32) - sums[:, None])
    gradient = mx.where(at_target, probabilities - 1, probabilities) * weights[:, None]
    return gradient.astype(logits.dtype)


def supports(logits: mx.array) -> bool:
    """Return whether the kernel takes logits of this shape and type."""
    is_supported = logits.dtype in (mx.float32, mx.bfloat16) and logits.ndim == 2
    return is_supported and logits.shape[-1] % 8 == 0 and 0 < logits.size < 2**31


def kernel_gradient(logits: mx.array, sums: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return what `reference_gradient` does, by the kernel."""
    inputs = [logits, sums, targets, weights]
    return _SOURCE.launch(inputs, constants=[], groups=len(logits), shapes=[logits.shape], dtypes=[logits.dtype])[0]
