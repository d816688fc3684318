"""Replacements of MLX and mlx-lm operations, and the doors that install and remove them."""
