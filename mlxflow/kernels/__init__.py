"""Own GPU kernels, each beside its reference in plain MLX operations, used only where it proved right and faster."""
