"""obstore beside fsspec (s3fs, its own local files) and the project's folder store: for `[store]`, on this machine.

    python -m benchmarks.stores --fsspec PYTHON

PYTHON is an interpreter with s3fs, which cannot be installed beside a current boto3: it pins botocore.
The S3 server is moto's, in a process of its own. Each library runs in a process of its own, three rounds in turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BIG_BYTES, SMALL_BYTES, NUM_SMALL = 64 << 20, 4_000, 20


def _median_seconds(act: Callable[[int], object], count: int) -> float:
    seconds = []
    for number in range(count):
        begin = time.perf_counter()
        act(number)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _opened(library: str, url: str) -> tuple[Callable[[str, Path], object], Callable[[str, Path], object]]:
    """Return the functions of a library that put a file as an object, and get an object into a file."""
    if library == "fsspec":
        import fsspec

        files, root = fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if url.startswith("file") else {}))
        return (
            lambda name, path: files.put_file(str(path), f"{root}/{name}"),
            lambda name, path: files.get_file(f"{root}/{name}", str(path)),
        )
    if library == "mlxflow":
        from mlxflow.storage.object_store import Blob, PlainStore, open_store

        store = open_store(url)
        assert isinstance(store, PlainStore)
        sizes: dict[str, int] = {}

        def put(name: str, path: Path) -> None:
            sizes[name] = path.stat().st_size
            store.upload(path, Blob(name, sizes[name]))

        return put, lambda name, path: store.download(Blob(name, sizes[name]), path)
    import obstore
    from obstore.store import from_url

    bucket = from_url(url, **({"mkdir": True} if url.startswith("file") else {"client_options": {"allow_http": True}}))

    def get(name: str, path: Path) -> None:
        with path.open("wb") as file:
            for piece in obstore.get(bucket, name).stream(min_chunk_size=4 << 20):
                file.write(piece)

    return lambda name, path: obstore.put(bucket, name, path), get


def measure(library: str, url: str) -> dict[str, float]:
    """Return seconds until a store is open, MB/s of a large object, and milliseconds of a small one."""
    begin = time.perf_counter()
    put, get = _opened(library, url)
    opened = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as name:
        big, small, back = (Path(name) / one for one in ("big", "small", "back"))
        big.write_bytes(os.urandom(1 << 20) * (BIG_BYTES >> 20))
        small.write_bytes(os.urandom(SMALL_BYTES))
        figures = {
            "open_seconds": opened,
            "put_mb_per_second": BIG_BYTES / 1e6 / _median_seconds(lambda number: put(f"big{number}", big), 2),
            "get_mb_per_second": BIG_BYTES / 1e6 / _median_seconds(lambda number: get(f"big{number}", back), 2),
        }
        assert back.read_bytes() == big.read_bytes()
        figures["small_put_ms"] = 1e3 * _median_seconds(lambda number: put(f"small{number}", small), NUM_SMALL)
        figures["small_get_ms"] = 1e3 * _median_seconds(lambda number: get(f"small{number}", back), NUM_SMALL)
    return figures


def main() -> None:
    """Print the medians of three rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsspec", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--one", nargs=2)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    from tests.storage.s3_server import BUCKET, s3_server

    with s3_server() as server, tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, **server.environment, "AWS_DEFAULT_REGION": "us-east-1"}
        rounds: dict[tuple[str, str], list[dict[str, float]]] = {}
        for number in range(3):
            for kind, address in (("file", f"file://{folder}"), ("s3", f"s3://{BUCKET}")):
                for library in ("obstore", "fsspec", "mlxflow"):
                    place = Path(folder) / f"{library}{number}"
                    place.mkdir(exist_ok=True)
                    python = options.fsspec if library == "fsspec" else sys.executable
                    command = [python, __file__, "--one", library, f"{address}/{library}{number}"]
                    done = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
                    rounds.setdefault((kind, library), []).append(json.loads(done.stdout))
        for key, figures in rounds.items():
            medians = {name: statistics.median(one[name] for one in figures) for name in figures[0]}
            print(*key, *(f"{name} {value:,.3g}" for name, value in medians.items()))


if __name__ == "__main__":
    main()
