"""`mlxflow schema`: print the JSON schema of workflow.toml, for editors."""

import argparse

from mlxflow.messages import terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow schema`: none."""


def run(parsed: argparse.Namespace) -> None:
    """Print the schema."""
    from mlxflow.workflow.json_schema import schema_text

    terminal.write(schema_text())
