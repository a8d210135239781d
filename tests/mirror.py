"""A web server in this process that serves a directory, and fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Mirror:
    """Serves ``root``. A GET of a ``.gz`` takes the next of ``faults``: a status code, or bytes after which the
    connection is cut; with none left it is served whole, or always cut as ``always`` says.

    ``pause``: seconds after every byte of an answer's body, from byte ``pause_from`` of the file on; ``head_pause``: of
    its head. ``redirect``: where a GET of a ``.gz`` is sent on to. ``headers`` replace those of its answers.
    """

    root: Path
    faults: list[int] = field(default_factory=list)
    always: int | None = None
    ranges: bool = True
    index: bool = True
    pause: float = 0.0
    pause_from: int = 0
    head_pause: float = 0.0
    redirect: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def fault(self) -> int | None:
        return self.faults.pop(0) if self.faults else self.always


class _Handler(BaseHTTPRequestHandler):
    mirror: Mirror

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.mirror.tokens.append(self.headers.get("Authorization"))
        self.mirror.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if path.startswith("/api/datasets/allenai/c4"):
            return self.hub(path.removeprefix("/api/datasets/allenai/c4"))
        path = path.removeprefix(f"/datasets/allenai/c4/resolve/{REVISION}")
        place = self.mirror.root / path.strip("/")
        if place.is_dir() and self.mirror.index:
            return self.answer("".join(f'<a href="{file.name}">{file.name}</a>' for file in place.iterdir()).encode())
        if not place.is_file():
            return self.answer(b"", 404)
        self.file(place.read_bytes())

    def file(self, content: bytes) -> None:
        if self.mirror.redirect is not None and self.command == "GET":
            self.send_response(302)
            self.send_header("Location", self.mirror.redirect)
            return self.end_headers()
        fault = self.mirror.fault() if self.command == "GET" else None
        if fault is not None and 400 <= fault < 600:
            return self.answer(b"", fault)
        span = self.headers.get("Range") if self.mirror.ranges else None
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        self.send_response(206 if span else 200)
        headers = {"Content-Length": str(len(content) - start), "ETag": f'"{sha256(content).hexdigest()[:8]}"'}
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for name, value in (headers | self.mirror.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.send(content[start:] if fault is None else content[start:][:fault], start)

    def end_headers(self) -> None:
        if self.mirror.head_pause:
            head, self._headers_buffer = b"".join(self._headers_buffer), []
            for byte in head:
                self.wfile.write(bytes([byte]))
                time.sleep(self.mirror.head_pause)
        super().end_headers()

    def send(self, content: bytes, start: int = 0) -> None:
        if not self.mirror.pause:
            self.wfile.write(content)
            return
        fast = max(0, self.mirror.pause_from - start)
        self.wfile.write(content[:fast])
        for byte in content[fast:]:
            self.wfile.write(bytes([byte]))
            time.sleep(self.mirror.pause)

    def handle(self) -> None:
        with suppress(ConnectionError):  # of a reader that gave up
            super().handle()

    def hub(self, rest: str) -> None:
        if rest.startswith(f"/tree/{REVISION}"):
            directory = rest.split("?")[0].removeprefix(f"/tree/{REVISION}").strip("/")
            if not (self.mirror.root / directory).is_dir():
                return self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})
            entries: list[dict[str, Any]] = []
            for place in sorted((self.mirror.root / directory).iterdir()):
                entry = {"path": f"{directory}/{place.name}".strip("/"), "oid": f"blob-{place.name}"}
                kind = {"type": "file", "size": place.stat().st_size} if place.is_file() else {"type": "directory"}
                entries.append(entry | kind)
            self.answer(json.dumps(entries).encode(), kind="application/json")
        else:
            self.answer(
                json.dumps({"id": "allenai/c4", "sha": REVISION, "siblings": []}).encode(), kind="application/json"
            )

    def answer(self, content: bytes, status: int = 200, kind: str = "text/html", **more: str) -> None:
        self.send_response(status)
        sent = {"Content-Type": kind, "Content-Length": str(len(content)), **more}
        for name, value in (sent | (self.mirror.headers if status >= 400 else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send(content)


@contextmanager
def serving(root: Path) -> Iterator[Mirror]:
    mirror = Mirror(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"mirror": mirror}))
    mirror.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield mirror
    finally:
        server.shutdown()
        server.server_close()
