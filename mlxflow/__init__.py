"""Make for models: one `workflow.toml`, an incremental and reproducible MLX training workflow."""
