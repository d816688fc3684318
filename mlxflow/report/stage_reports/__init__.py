"""The contents of report.toml: one module for each stage with the struct of its figures."""
