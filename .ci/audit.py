"""Look up every package of `requirements.lock` in the database of known vulnerabilities, with pip-audit.

Exit code 1 where one is known to be vulnerable. Where the database cannot be reached nothing is known, which is one
line and exit code 0: a check that a machine without a network fails would be switched off.

    python3 .ci/audit.py [LOCK]
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_LONGEST_SECONDS = 120


def main(lock: Path) -> int:
    """Audit a lock file, print what was found, and return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = _audit(lock, Path(folder))
        except (subprocess.SubprocessError, ValueError) as error:
            print(f"{lock.name}: not audited, nothing is known of it ({_reason(error)}).")
            return 0
    lines, code = describe(report, lock.name)
    print(*lines, sep="\n")
    return code


def describe(report: dict[str, Any], name: str) -> tuple[list[str], int]:
    """Return the lines about a report of pip-audit's, and the exit code.

    Args:
        report: its JSON.
        name: of the lock file.
    """
    packages = report["dependencies"]
    looked_up = [one for one in packages if "skip_reason" not in one]
    num_known = sum(len(one["vulns"]) for one in looked_up)
    lines = [
        f"{name}: {one['name']} {one['version']}: {found['id']}. "
        f"Fixed in: {', '.join(found.get('fix_versions', ())) or 'no version yet'}."
        for one in looked_up
        for found in one["vulns"]
    ]
    if len(looked_up) < len(packages):
        lines.append(f"{name}: {len(packages) - len(looked_up)} of {len(packages)} packages could not be looked up.")
    if looked_up:
        lines.append(f"{name}: {len(looked_up)} packages looked up, {num_known} known vulnerabilities.")
    return lines, int(num_known > 0)


def _audit(lock: Path, folder: Path) -> dict[str, Any]:
    """Run pip-audit in an environment of its own, which is pinned by hash too, and return its report."""
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv/bin"
    install = [programs / "pip", "install", "-q", "--retries", "1", "--require-hashes", "-r", _HERE / "audit.lock"]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=_LONGEST_SECONDS)
    command = [programs / "pip-audit", "--require-hashes", "--disable-pip", "-f", "json", "-r", lock]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_LONGEST_SECONDS)
    if not result.stdout.strip():
        raise ValueError(result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "pip-audit said nothing")
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return str(error.stderr).strip().splitlines()[-1]
    return str(error)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else _HERE.parent / "requirements.lock"))
