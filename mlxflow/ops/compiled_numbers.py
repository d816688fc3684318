"""Settings as arrays: MLX's compiler writes a scalar that is no input into the code of a compiled function.

With another learning rate MLX would compile the functions that read it again: about a second each with g++ on a CPU,
3 to 5 s with NVRTC on CUDA.
"""

import mlx.core as mx


def as_arrays(*values: float) -> list[mx.array]:
    """Return numbers as scalars in fp32 that MLX's compiler takes for inputs of a function.

    They are parts of one array: only an array of one number counts as a constant. To be called within the function,
    since the parts are arrays of one number once they are evaluated.
    """
    together = mx.array([*values, 0.0], mx.float32)
    return [together[number] for number in range(len(values))]
