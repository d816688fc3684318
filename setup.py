"""The packages of the wheel. `tasks/` lies at the top of the repository and is installed as `mlxflow.tasks`.

In a checkout the symbolic link `mlxflow/tasks` leads there. The mapping below does without the link, which some ways of
unpacking an archive turn into a text file.
"""

from setuptools import find_packages, setup

setup(
    packages=sorted({*find_packages(include=["mlxflow", "mlxflow.*"]), "mlxflow.tasks"}),
    package_dir={"mlxflow.tasks": "tasks"},
)
