"""What report.toml holds: a struct of the figures of each stage, in the module of the stage's name."""
