"""An HTTP server for one page on 127.0.0.1 that follows a run: after a change of the run the page is drawn again.

It answers for nothing but the page. A request whose `Host` is not the server's own is refused, so that a site which
gives its own name this address (DNS rebinding) cannot read the page.
"""

import hashlib
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError, MlxflowError

HOST = "127.0.0.1"

_TIMEOUT_SECONDS = 10

_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class LivePage:
    """The page as of the latest change of a run.

    Args:
        draw: returns the page.
        stamp: returns a value that is another one after a change of the run.
    """

    def __init__(self, draw: Callable[[], bytes], stamp: Callable[[], object]) -> None:
        self._draw = draw
        self._stamp = stamp
        self._lock = threading.Lock()
        self._drawn_at: object = None
        self._page = b""
        self._tag = ""

    def current(self) -> tuple[bytes, str]:
        """Return the page and its entity tag; drawn again if the run changed since the last call."""
        with self._lock:
            stamp = self._stamp()
            if not self._page or stamp != self._drawn_at:
                self._page = self._draw()
                self._drawn_at = stamp
                self._tag = f'"{hashlib.sha256(self._page).hexdigest()[:32]}"'
            return self._page, self._tag


class PageServer(ThreadingHTTPServer):
    """Answers requests for a page on 127.0.0.1.

    Args:
        page: the page.
        port: to listen on; 0 for a free one.

    Raises:
        CallError: the port cannot be used.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, page: LivePage, port: int) -> None:
        self.page = page
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise CallError(
                f"report: --port = {port}: cannot be used ({error.strerror}). Use another, or leave it out."
            ) from error

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    """Answers one request: the page for `/`, else an error."""

    server: PageServer
    server_version = "mlxflow"
    sys_version = ""
    timeout = _TIMEOUT_SECONDS

    def do_GET(self) -> None:
        """Send the page, or 304 if the client has it."""
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        """Send the headers of the page."""
        self._answer(has_body=False)

    def log_message(self, *_: object) -> None:
        """Print nothing: a page asks every second."""

    def _answer(self, *, has_body: bool) -> None:
        port = self.server.server_port
        if self.headers.get_all("Host") not in ([f"{HOST}:{port}"], [f"localhost:{port}"]):
            self._send(HTTPStatus.MISDIRECTED_REQUEST, b"", "")
        elif self.path != "/":
            self._send(HTTPStatus.NOT_FOUND, b"", "")
        elif (current := self._current()) is not None:
            page, tag = current
            is_known = self.headers.get("If-None-Match") == tag
            self._send(
                HTTPStatus.NOT_MODIFIED if is_known else HTTPStatus.OK,
                b"" if is_known else page,
                tag,
                has_body=has_body,
            )

    def _current(self) -> tuple[bytes, str] | None:
        """Return the page and its tag; None after an answer that it cannot be drawn."""
        try:
            return self.server.page.current()
        except (MlxflowError, OSError) as error:
            terminal.say(f"report: the page cannot be drawn: {error}")
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, b"", "")
            return None

    def _send(self, status: HTTPStatus, body: bytes, tag: str, *, has_body: bool = True) -> None:
        try:
            self.send_response(status)
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            if tag:
                self.send_header("ETag", tag)
            if status is not HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if has_body:
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the browser left
            self.close_connection = True
