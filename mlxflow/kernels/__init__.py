"""Fused GPU kernels, each beside its reference in plain MLX operations, used only where verified correct and faster."""
