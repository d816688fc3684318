"""The verbs of the `mlxflow` command, one module each."""
