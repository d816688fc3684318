"""The page of a run of 100,000 points: its size, the seconds to draw it, and to open it in Chromium.

    python benchmarks/page.py [--points 100000] [--rounds 5]

Opening is from the request for the file to the end of its script, every plot drawn and listening; the median of rounds,
each in a fresh context of one browser. Needs the `interop` extra and Chromium.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlxflow.report.render import render
from tests.report.runs import read, write_run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000, help="steps of the learning curve and of the timeline")
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), points=parsed.points)
        begin = time.perf_counter()
        page = render([read(Path(folder))])
        drawing = time.perf_counter() - begin
        path = Path(folder, "index.html")
        path.write_bytes(page)
        opening = open_page(path, parsed.rounds)
    print(f"points a series   {parsed.points:,}")
    print(f"size              {len(page):,} bytes")
    print(f"read and drawn    {drawing:.2f} s")
    print(f"opened            {statistics.median(opening):.2f} s ({min(opening):.2f} to {max(opening):.2f})")


def open_page(path: Path, rounds: int) -> list[float]:
    """Return the seconds that each opening took."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    took = []
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(rounds):
            context = browser.new_context(viewport={"width": 1200, "height": 900})
            page = context.new_page()
            begin = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            took.append(time.perf_counter() - begin)
            context.close()
        browser.close()
    return took


if __name__ == "__main__":
    main()
