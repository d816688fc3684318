"""Replacements of MLX and mlx-lm operations; `patching` installs and undoes all of them."""
