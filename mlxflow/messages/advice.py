"""The commands that messages advise."""


def advise_build(task: str) -> str:
    """Return the advice to build a stage, by the command that needs no `dodo.py` in the user's folder.

    Args:
        task: the stage, or a variant of it.
    """
    return f"Run: mlxflow build {task}"
