"""The lock file holds any name that a file can have."""

import os
import tomllib
from pathlib import Path

from tasks import lockfile
from tasks.node import Node


def test_names_that_are_no_utf_8_or_hold_line_breaks_are_written_escaped(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9.txt"), "two\nlines.txt", "x [v2].txt"]
    node = Node("s", "", tmp_path, "artifacts/s", tuple(names), (), {}, ())
    values = {
        "settings": {"mlx": "0"},
        "seconds": 1.0,
        "inputs": {name: str(number) for number, name in enumerate(names)},
        "outputs": {},
    }
    lockfile.update(tmp_path / lockfile.NAME, node, values, {"s"})
    inputs = tomllib.loads((tmp_path / lockfile.NAME).read_text())["s"]["inputs"]
    assert inputs == {"caf\\xe9.txt": "0", "two\\nlines.txt": "1", "x [v2].txt": "2"}
