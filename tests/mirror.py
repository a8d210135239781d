"""A web server in this process that serves a directory, and fails as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Mirror:
    """Serves ``root``. A GET of a ``.gz`` takes the next of ``faults``: a status code, or bytes after which the
    connection is cut; with none left it is served whole, or always cut as ``always`` says."""

    root: Path
    faults: list[int] = field(default_factory=list)
    always: int | None = None
    ranges: bool = True
    index: bool = True
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
        fault = self.mirror.fault() if self.command == "GET" else None
        if fault is not None and 400 <= fault < 600:
            return self.answer(b"", fault)
        span = self.headers.get("Range") if self.mirror.ranges else None
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{sha256(content).hexdigest()[:8]}"')
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:] if fault is None else content[start:][:fault])

    def hub(self, rest: str) -> None:
        files = sorted((self.mirror.root / "en").iterdir())
        entries = [
            {"type": "file", "path": f"en/{file.name}", "size": file.stat().st_size, "oid": f"blob-{file.name}"}
            for file in files
        ]
        if rest.startswith(f"/tree/{REVISION}/en"):
            self.answer(json.dumps(entries).encode(), kind="application/json")
        elif rest.startswith(f"/tree/{REVISION}"):
            self.answer(json.dumps([{"type": "directory", "path": "en", "oid": "t"}]).encode(), kind="application/json")
        else:
            self.answer(
                json.dumps({"id": "allenai/c4", "sha": REVISION, "siblings": []}).encode(), kind="application/json"
            )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.mirror.requests.append(f"POST {self.path}")
        files = [f for f in sorted((self.mirror.root / "en").iterdir()) if f.name in body]
        entries = [
            {"type": "file", "path": f"en/{file.name}", "size": file.stat().st_size, "oid": f"blob-{file.name}"}
            for file in files
        ]
        self.answer(json.dumps(entries).encode(), kind="application/json")

    def answer(self, content: bytes, status: int = 200, kind: str = "text/html") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


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
