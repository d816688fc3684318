"""The page on 127.0.0.1 that follows a run: what it answers, and what a browser shows of it."""

import fcntl
import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxflow.messages.errors import CallError, UserError
from mlxflow.report.live_server import LivePage, PageServer
from mlxflow.report.render import render
from mlxflow.report.run_changes import stamps
from tests.report.runs import read


@contextmanager
def _answering(page: LivePage) -> Iterator[PageServer]:
    with PageServer(page, 0) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _ask(server: PageServer, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with _answering(LivePage(lambda: b"<p>the page</p>", lambda: 0)) as server:
        yield server


def test_an_unchanged_page_is_sent_only_once(server: PageServer) -> None:
    status, body, headers = _ask(server)
    assert (status, body) == (200, b"<p>the page</p>")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert _ask(server, If_None_Match=headers["ETag"])[:2] == (304, b"")
    assert _ask(server, method="HEAD")[:2] == (200, b"")
    assert _ask(server, Host=f"localhost:{server.server_port}")[0] == 200
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host", ["example.org", "example.org:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.example.org:{port}"]
)
def test_a_request_for_another_host_name_is_refused(server: PageServer, host: str) -> None:
    assert _ask(server, Host=host.format(port=server.server_port))[:2] == (421, b"")


@pytest.mark.parametrize(
    "path",
    ["/index.html", "/workflow.toml", "/../workflow.toml", "/?x", "/artifacts/", "/%2e%2e/etc/passwd"],
)
def test_only_the_page_is_served(server: PageServer, path: str) -> None:
    assert _ask(server, path)[:2] == (404, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_get_requests_are_accepted(server: PageServer, method: str) -> None:
    assert _ask(server, method=method)[0] == 501


def test_a_page_is_drawn_again_after_a_change_only() -> None:
    drawn: list[int] = []
    now = [1]

    def draw() -> bytes:
        drawn.append(now[0])
        return f"page {now[0]}".encode()

    page = LivePage(draw, lambda: now[0])
    first, again = page.current(), page.current()
    now[0] = 2
    assert first == again
    assert page.current()[0] == b"page 2"
    assert first[1] != page.current()[1]
    assert drawn == [1, 2]


def test_a_page_that_cannot_be_rendered_is_reported_and_requested_again(capsys: pytest.CaptureFixture[str]) -> None:
    pages: list[bytes] = [b"a page"]

    def draw() -> bytes:
        if not pages:
            raise UserError("workflow.toml: no TOML")
        return pages.pop()

    with _answering(LivePage(draw, object)) as server:
        assert _ask(server)[0] == 200
        assert _ask(server)[:2] == (503, b"")
        pages.append(b"another")
        assert _ask(server)[:2] == (200, b"another")
    assert capsys.readouterr().err == "report: the page cannot be drawn: workflow.toml: no TOML\n"


def test_a_port_in_use_is_refused_in_one_line(server: PageServer) -> None:
    port = server.server_port
    with pytest.raises(CallError) as caught:
        PageServer(server.page, port)
    assert str(caught.value).startswith(f"report: --port = {port}: cannot be used (")
    assert str(caught.value).endswith("). Use another, or leave it out.")


# --- in a browser


@contextmanager
def _training(root: Path) -> Iterator[Path]:
    """Give the metrics of a training that goes on: its lock is held, its folder is private."""
    metrics = root / "artifacts/.train.partial/metrics.jsonl"
    metrics.parent.mkdir()
    metrics.touch()
    (root / "artifacts/.mlxflow").mkdir(exist_ok=True)
    with (root / "artifacts/.mlxflow/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield metrics
    shutil.rmtree(metrics.parent)


def _write(metrics: Path, *records: dict[str, Any]) -> None:
    with metrics.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _train(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "tokens_per_second": 100.0}


@pytest.fixture
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the interop extra")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def test_a_browser_shows_the_progress_of_the_training(root: Path, chromium: Any) -> None:
    shutil.rmtree(root / "artifacts/train")
    live = LivePage(lambda: render([read(root)], is_live=True), lambda: stamps(root))
    problems: list[str] = []
    with _training(root) as metrics, _answering(live) as server:
        _write(metrics, {"kind": "validation", "step": 0, "loss": 6.5}, _train(1, 6.0), _train(2, 5.5))
        page = chromium.new_page(viewport={"width": 1200, "height": 800})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(server.url)
        answers = page.locator("#answers")
        answers.get_by_text("nats a token while training, at step 2; on held-out text 6.500 before.").wait_for()
        assert page.locator(".live").inner_text() == "Live: this page follows the run."
        figure = page.locator("figure[data-switches]")
        figure.get_by_label("Logarithmic scale").check()
        page.locator("#learning summary").first.click()
        before = figure.locator(".line").first.get_attribute("d")
        _write(metrics, _train(3, 5.0), _train(4, 4.5), {"kind": "validation", "step": 4, "loss": 4.75})
        answers.get_by_text("at step 4; on held-out text 4.750, from 6.500 before.").wait_for()
        assert figure.locator(".line").first.get_attribute("d") != before
        assert figure.get_by_label("Logarithmic scale").is_checked()  # what the reader chose is kept
        assert page.locator("#learning details").first.get_attribute("open") is not None
        assert page.locator(".box.running:visible .box-name").text_content() == "train"
        assert problems == []
    page.get_by_text("mlxflow report has ended: this page no longer follows the run.").wait_for()
