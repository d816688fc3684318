"""The device that MLX computes on: selection, limits, the CPU backend and MLX's counter of peak memory."""
