"""Write the generated pages of `docs/reference`.

python -m tools.docs            # write every page that differs
python -m tools.docs --check    # name the pages that differ and exit with 1 if there are any
"""

import argparse
import sys
from collections.abc import Sequence

from tools.docs.pages import differing, generated_pages, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description="Write the generated pages of docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    parsed = parser.parse_args(arguments)
    pages = generated_pages()
    stale = differing(pages)
    for path in stale:
        print(f"{path}: {'out of date. Run: python -m tools.docs' if parsed.check else 'written'}")
    if not parsed.check:
        write(pages)
    return int(bool(stale) and parsed.check)


if __name__ == "__main__":
    sys.exit(main())
