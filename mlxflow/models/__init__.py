"""Model folders and mlx-lm's models: loading, saving, adapters and layers that hold quantized weights."""
