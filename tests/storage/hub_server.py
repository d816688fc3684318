"""The part of the Hugging Face hub's protocol that stores in a data set use, on this machine: no hub can run here."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY, TOKEN = "owner/store", "hf_the_token_of_a_test"


class Hub(ThreadingHTTPServer):
    """A hub with one data set.

    Attributes:
        files: of the data set, by name.
        commits: titles of the commits.
        refuses: answer every request to commit with 403.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.refuses = False
        self.turn = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def head(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode(), usedforsecurity=False).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """Start a hub; it ends with the block."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.server
        if not re.match(rf"/(api/)?datasets/{REPOSITORY}(/|$)", path):
            self._refuse(404, "RepoNotFound")
        elif found := re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/[^/]+/?(.*)", path):
            entries = self._entries(found[1].strip("/"))
            self._answer(entries) if entries else self._refuse(404, "EntryNotFound")
        elif found := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/[^/]+/(.+)", path):
            if found[1] not in hub.files:
                self._refuse(404, "EntryNotFound")
                return
            data = hub.files[found[1]]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            part = data[int(span[1]) : int(span[2]) + 1 if span[2] else None] if span else data
            head = {"ETag": etag, "X-Repo-Commit": hub.head, "Accept-Ranges": "bytes"}
            head |= {"Content-Range": f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(data)}"} if span else {}
            self._answer(part, 206 if span else 200, head)
        elif path.endswith("/auth-check") or "/auth-check/" in path:
            self._refuse(403, "Forbidden") if hub.refuses else self._answer({})
        else:
            facts = {"private": False, "siblings": [], "tags": [], "disabled": False, "downloads": 0, "likes": 0}
            self._answer({"id": REPOSITORY, "sha": hub.head, "gated": False} | facts)

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        begin = f"{folder}/" if folder else ""
        inner = {name[len(begin) :].partition("/")[0] for name in self.server.files if name.startswith(begin)}
        return [self._entry(begin + name) for name in sorted(inner)]

    def _entry(self, name: str) -> dict[str, Any]:
        data = self.server.files.get(name)
        digest = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        if data is None:
            return {"type": "directory", "path": name, "oid": digest, "size": 0}
        return {"type": "file", "path": name, "oid": digest, "size": len(data)}

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({}, headers={"ETag": '"x"'})

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        path = unquote(urlsplit(self.path).path)
        if hub.refuses and "/commit/" in path:
            self._refuse(403, "Forbidden")
        elif "/paths-info/" in path:
            is_json = body[:1] == b"{"
            names = json.loads(body)["paths"] if is_json else re.findall(r"paths=([^&]+)", unquote(body.decode()))
            known = [name for name in names if name in hub.files or self._entries(name)]
            self._answer([self._entry(name) for name in known])
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if "blobs" in one["path"] else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in files
            ]
            self._answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            upload = [{**one, "actions": {"upload": {"href": f"{hub.url}/put/{one['oid']}"}}} for one in asked]
            self._answer({"transfer": "basic", "objects": upload})
        elif "/commit/" in path:
            with hub.turn:
                self._commit([json.loads(line) for line in body.splitlines() if line])
        else:
            self._refuse(404, "Unknown")

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub, header = self.server, lines[0]["value"]
        if header.get("parentCommit") not in (None, hub.head):
            self._refuse(412, "PreconditionFailed")
            return
        for line in lines[1:]:
            value = line["value"]
            hub.files[value["path"]] = (
                hub.objects[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            )
        hub.commits.append(header["summary"])
        url = f"{hub.url}/datasets/{REPOSITORY}/commit/{hub.head}"
        self._answer(
            {"success": True, "commitOid": hub.head, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}
        )
