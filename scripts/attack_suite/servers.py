"""Web servers that misbehave: the text is what it is on disk, or one line says why not, and nothing waits for ever."""

from __future__ import annotations

import gzip
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data import remote
from narrowgauge.trainer.data.corpus import corpus_files
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.run import run

from attack_suite.attacks import Attack, Child, Ended
from attack_suite.scene import Scene

#: Seconds after which waiting is a fault. What waits in earnest for half a minute waits for a second here.
_LIMIT_SECONDS = 60.0
_SLOW_LIMIT_SECONDS = 150.0
_WAITS = {"_FIRST_WAIT_SECONDS": 0.01, "_LONGEST_WAIT_SECONDS": 0.1, "_TIMEOUT_SECONDS": 1.0}
_MEMORY_BYTES = 1 << 29  # that reading may take beyond what the process has

SAME, LINE = "the same text", "one line"


class Handler(BaseHTTPRequestHandler):
    """Serves a directory; ``kind`` answers for its ``.gz`` files."""

    kind: Kind
    root: Path
    asked: dict[str, int]  # how often each file was asked for

    protocol_version = "HTTP/1.0"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the reader may have had enough
            self._answer()

    def _answer(self) -> None:
        place = self.root / self.path.split("?")[0].strip("/")
        if place.is_dir() and self.kind.page is None:
            return self.whole("".join(f'<a href="{file.name}">x</a>\n' for file in sorted(place.iterdir())).encode())
        if place.is_dir():
            return self.kind.page(self, b"", 0)
        if not place.is_file():
            return self.status(404)
        content = place.read_bytes()
        if self.command == "HEAD":
            return self.kind.head(self, content, 0)
        number = self.asked[place.name] = self.asked.get(place.name, 0) + 1
        self.kind.get(self, content, number)

    @property
    def first(self) -> int:
        """The byte that is asked for."""
        span = self.headers.get("Range", "")
        return int(span.removeprefix("bytes=").split("-")[0]) if span.startswith("bytes=") else 0

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def status(self, code: int, **headers: str) -> None:
        self.head(code, Content_Length="0", **headers)

    def whole(
        self,
        content: bytes,
        *,
        cut: int | None = None,
        ranges: bool = True,
        tag: str | None = None,
        length: int | None = None,
        **headers: str,
    ) -> None:
        """``content`` from the byte that is asked for on; after ``cut`` bytes the connection ends."""
        first = self.first if ranges else 0
        sizes = {"Content_Length": str(len(content) - first if length is None else length)}
        if first:
            sizes["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.head(206 if first else 200, **(sizes | {"ETag": tag or tag_of(content)} | headers))
        if self.command == "GET":
            self.wfile.write(content[first:] if cut is None else content[first : first + cut])

    def drip(self, content: bytes, seconds: float) -> None:
        """A byte at a time."""
        self.head(200, Content_Length=str(len(content)), ETag=tag_of(content))
        for at in range(len(content)):
            self.wfile.write(content[at : at + 1])
            self.wfile.flush()
            time.sleep(seconds)

    def reset(self) -> None:
        """End the connection as a crash would."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()


def tag_of(content: bytes) -> str:
    return f'"{sha256(content).hexdigest()[:8]}"'


Answer = Callable[[Handler, bytes, int], None]


def _well(handler: Handler, content: bytes, number: int) -> None:
    handler.whole(content)


@dataclass(frozen=True)
class Kind:
    """How a server answers: for a file whose number of requests is given, for HEAD, for the page of a directory."""

    name: str
    get: Answer = _well
    head: Answer = _well
    page: Answer | None = None
    right: tuple[str, ...] = (SAME, LINE)
    limit: float = _LIMIT_SECONDS
    change: Callable[[bytes], bytes] | None = None  # of the text of the first file, before it is compressed
    train: bool = False  # a run is trained from it, instead of text read


def _times(count: int, bad: Answer, good: Answer = _well) -> Answer:
    return lambda handler, content, number: (bad if number <= count else good)(handler, content, number)


def _status(code: int, **headers: str) -> Answer:
    return lambda handler, content, number: handler.status(code, **headers)


def _cut(bytes_at_once: int) -> Answer:
    return lambda handler, content, number: handler.whole(content, cut=bytes_at_once)


def _instead(data: bytes | Callable[[bytes], bytes]) -> Answer:
    def answer(handler: Handler, content: bytes, number: int) -> None:
        handler.whole(data(content) if callable(data) else data)

    return answer


def _silent(handler: Handler, content: bytes, number: int) -> None:
    time.sleep(8)  # longer than anybody waits for a byte here


def _half_then_silent(handler: Handler, content: bytes, number: int) -> None:
    handler.whole(content, cut=len(content) // 2)
    handler.wfile.flush()
    time.sleep(8)


def _chunked(handler: Handler, content: bytes, number: int) -> None:
    handler.head(200, Transfer_Encoding="chunked", ETag=tag_of(content))
    if handler.command == "GET":
        handler.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n\r\n")


def _raw(data: bytes) -> Answer:
    return lambda handler, content, number: [None, handler.wfile.write(data)][0]


def _headless(handler: Handler, content: bytes, number: int) -> None:
    handler.head(200)
    if handler.command == "GET":
        handler.wfile.write(content)


def _other_range(handler: Handler, content: bytes, number: int) -> None:
    first = max(0, handler.first - 7)  # not what was asked for
    span = f"bytes {first}-{len(content) - 1}/{len(content)}"
    cut = 50 if number < 3 else None
    handler.head(206, Content_Length=str(len(content) - first), Content_Range=span, ETag=tag_of(content))
    handler.wfile.write(content[first:] if cut is None else content[first : first + cut])


def _range(text: str) -> Answer:
    def answer(handler: Handler, content: bytes, number: int) -> None:
        handler.head(206, Content_Length=str(len(content)), Content_Range=text, ETag=tag_of(content))
        handler.wfile.write(content)

    return answer


def _changed(handler: Handler, content: bytes, number: int) -> None:
    if number == 1:
        return handler.whole(content, cut=len(content) // 2)
    handler.whole(content[::-1], tag='"other"')


def _blank(text: bytes) -> bytes:
    return b"\n  \n".join(text.splitlines()) + b"\n\n"


def kinds() -> Iterator[Kind]:
    """Every way to misbehave."""
    yield Kind("well", right=(SAME,))
    for code in (400, 401, 403, 404, 410, 416, 418, 451):
        yield Kind(f"{code} for every file", _status(code), right=(LINE,))
    for code in (404, 403, 500, 302, 204):
        yield Kind(f"{code} for everything", _status(code), _status(code), _status(code), right=(LINE,))
    for code in (408, 425, 429, 500, 502, 503, 504):
        yield Kind(f"{code} twice, then well", _times(2, _status(code)), right=(SAME,))
    yield Kind("500 for ever", _status(500), right=(LINE,))
    yield Kind("204 for every file", _status(204))
    nonsense = {
        "a power": "²",
        "below zero": "-1",
        "a huge number": "9" * 40,
        "a float": "1e9",
        "a date": "Wed, 21 Oct 2099 07:28:00 GMT",
        "text": "soon",
        "nothing": "",
        "infinity": "inf",
        "Arabic digits": "٣",
    }
    for name, value in nonsense.items():
        raw = value.encode().decode("latin-1")  # as it comes off the wire
        yield Kind(f"503 once, Retry-After is {name}", _times(1, _status(503, Retry_After=raw)), right=(SAME,))
    yield Kind("503 once, Retry-After is ² in Latin-1", _times(1, _status(503, Retry_After="²")), right=(SAME,))
    yield Kind("cut in the middle", _times(1, lambda h, c, n: h.whole(c, cut=len(c) // 2)), right=(SAME,))
    for size in (1000, 100):
        yield Kind(f"cut every {size} bytes", _cut(size), right=(SAME,))
    yield Kind("cut every byte", _times(9, _cut(1)), right=(SAME,))
    yield Kind("cut before the first byte, for ever", _cut(0), right=(LINE,))
    yield Kind("no ranges", lambda h, c, n: h.whole(c, ranges=False), right=(SAME,))
    no_ranges = _times(
        3, lambda h, c, n: h.whole(c, ranges=False, cut=n * 300), lambda h, c, n: h.whole(c, ranges=False)
    )
    yield Kind("no ranges, cut", no_ranges, right=(SAME,))
    yield Kind("another range than asked for", _other_range)
    for text in ("bytes 0-1/*", "bytes x", "", "bytes 99999999-99999999/1", "bytes 5-2/7"):
        yield Kind(f"the range is {text or 'empty'}", _range(text))
    yield Kind("Content-Length too large", lambda h, c, n: h.whole(c, length=len(c) + 99))
    yield Kind("Content-Length too small", lambda h, c, n: h.whole(c, length=len(c) - 99))
    yield Kind("Content-Length below zero", lambda h, c, n: h.whole(c, length=-5))
    yield Kind("Content-Length too large at HEAD", head=lambda h, c, n: h.whole(c, length=len(c) + 99))
    yield Kind("Content-Length too small at HEAD", head=lambda h, c, n: h.whole(c, length=len(c) - 99))
    yield Kind("Content-Length zero at HEAD", head=lambda h, c, n: h.whole(c, length=0))
    yield Kind("no Content-Length", _headless)
    yield Kind("no Content-Length anywhere", _headless, _headless)
    yield Kind("chunked", _chunked)
    yield Kind("chunked everywhere", _chunked, _chunked)
    yield Kind("another file in the middle", _changed, right=(LINE,))
    yield Kind("another ETag each time", lambda h, c, n: h.whole(c, cut=900, tag=f'"{n}"'))
    yield Kind("HEAD not allowed", head=_status(405))
    for code in (301, 302, 303, 307, 308):
        moved: Answer = lambda h, c, n, code=code: (  # noqa: E731
            h.whole(c) if "?" in h.path else h.status(code, Location=f"{h.path}?there")
        )
        yield Kind(f"{code} to a good place", moved, moved, right=(SAME,))
    loop: Answer = lambda h, c, n: h.status(302, Location=h.path)  # noqa: E731
    yield Kind("a redirect to itself", loop, right=(LINE,))
    endless: Answer = lambda h, c, n: h.status(302, Location=f"{h.path}0?{time.monotonic_ns()}")  # noqa: E731
    yield Kind("redirects without end", endless, endless, endless, right=(LINE,))
    for name, place in {
        "a file": "file:///etc/passwd",
        "nowhere": "http://",
        "nonsense": "::::",
        "text": "gopher://x/",
    }.items():
        yield Kind(f"a redirect to {name}", _status(302, Location=place), right=(LINE,))
    yield Kind("a redirect without a place", _status(302), right=(LINE,))
    yield Kind("a byte now and then", lambda h, c, n: h.drip(c, 0.3), limit=_SLOW_LIMIT_SECONDS)
    yield Kind("silent", _times(2, _silent), right=(SAME,))
    yield Kind("silent for ever", _silent, right=(LINE,))
    yield Kind("silent everywhere", _silent, _silent, _silent, right=(LINE,))
    yield Kind("silent in the middle", _times(2, _half_then_silent), right=(SAME,))
    reset: Answer = lambda h, c, n: h.reset()  # noqa: E731
    yield Kind("closes at once, twice", _times(2, reset), right=(SAME,))
    yield Kind("closes at once, for ever", reset, right=(LINE,))
    yield Kind("closes at once, everywhere", reset, reset, reset, right=(LINE,))
    yield Kind("no HTTP", _raw(b"SSH-2.0-OpenSSH_9.6\r\n"), right=(LINE,))
    yield Kind("no HTTP anywhere", *[_raw(b"\0\1\2\r\n\r\n")] * 3, right=(LINE,))
    yield Kind("a status that is text", _raw(b"HTTP/1.1 fine ok\r\n\r\n"), right=(LINE,))
    yield Kind("a header without end", _raw(b"HTTP/1.0 200 OK\r\nX: " + b"a" * 200_000), right=(LINE,))
    yield Kind("a thousand headers", _raw(b"HTTP/1.0 200 OK\r\n" + b"X: a\r\n" * 1000), right=(LINE,))
    html = b"<html><body>Sign in to the hotel's network</body></html>"
    same_size: Callable[[bytes], bytes] = lambda c: (html * (len(c) // len(html) + 1))[: len(c)]  # noqa: E731
    yield Kind("HTML instead of gzip", _instead(html), _instead(html), right=(LINE,))
    yield Kind("HTML of the same size", _own_tag(same_size), right=(LINE,))
    yield Kind("garbage in gzip", _own_tag(lambda c: c[:40] + bytes(len(c) - 80) + c[-40:]), right=(LINE,))
    yield Kind("a flipped bit in gzip", _own_tag(lambda c: c[:300] + bytes([c[300] ^ 1]) + c[301:]), right=(LINE,))
    yield Kind("the end missing, sizes to match", *[_instead(lambda c: c[:-9])] * 2, right=(LINE,))
    yield Kind("empty, sizes to match", *[_instead(b"")] * 2, right=(LINE,))
    yield Kind("zeros after the end", *[_instead(lambda c: c + bytes(512))] * 2)
    yield Kind("blank lines", change=_blank)
    yield Kind("lines without text", change=lambda text: b"{}\n" + text, right=(LINE,))
    yield Kind("a list in a line", change=lambda text: text + b"[1]\n", right=(LINE,))
    yield Kind("null in a line", change=lambda text: text + b"null\n", right=(LINE,))
    yield Kind("a lone surrogate", change=lambda text: text + b'{"text": "\\ud800"}\n', right=(LINE,))
    yield Kind("not UTF-8", change=lambda text: text + b'{"text": "\xff"}\n', right=(LINE,))
    yield Kind("nested 100,000 deep", change=lambda text: text + b"[" * 100_000 + b"\n", right=(LINE,))
    yield Kind("a line of 1 GB", change=lambda text: text + b"a" * (1 << 30), right=(LINE,), limit=_SLOW_LIMIT_SECONDS)
    yield Kind("a page without end", page=_page_without_end)
    yield Kind("training, 500 twice", _times(2, _status(500)), right=(SAME,), train=True)
    yield Kind("training, cut every 400 bytes", _cut(400), right=(SAME,), train=True)
    yield Kind("training, cut for ever", _cut(0), right=(LINE,), train=True)
    yield Kind("training, another file in the middle", _changed, train=True)  # which it may not reach
    yield Kind("training, silent twice", _times(2, _silent), right=(SAME,), train=True)


def _own_tag(change: Callable[[bytes], bytes]) -> Answer:
    return lambda handler, content, number: handler.whole(change(content), tag=tag_of(content))


def _page_without_end(handler: Handler, content: bytes, number: int) -> None:
    handler.head(200)
    for _ in range(40):
        handler.wfile.write(b"<a href='nothing'>" * 60_000)  # 40 MB; then it is silent
    time.sleep(8)


@contextmanager
def serving(kind: Kind, root: Path) -> Iterator[str]:
    """The address of a server of that kind."""
    handler = type("Of", (Handler,), {"kind": kind, "root": root, "asked": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda request, address: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _texts(path: str) -> list[list[str]]:
    files = corpus_files(path, ["train"], max_files=2, attempts=4)["train"]
    return [list(file.texts()) for file in files]


def attempt(scene: Scene, name: str) -> Ended:
    """Read the text, or train, from a server of the kind ``name``, in this process."""
    kind = next(one for one in kinds() if one.name == name)
    root = scene.corpora[0]
    before = {word: getattr(remote, word) for word in _WAITS if hasattr(remote, word)}
    for word in before:
        setattr(remote, word, _WAITS[word])
    try:
        if kind.change is not None:
            root = _changed_text(scene, kind)
        with serving(kind, root) as address:
            return (_train if kind.train else _read)(scene, kind, address)
    finally:
        for word, value in before.items():
            setattr(remote, word, value)


def _changed_text(scene: Scene, kind: Kind) -> Path:
    root = scene.folder / "servers" / kind.name.replace(" ", "_").replace(",", "")
    (root / "en").mkdir(parents=True, exist_ok=True)
    for file in sorted((scene.corpora[0] / "en").iterdir()):
        data = file.read_bytes()
        if "train.00000" in file.name:
            assert kind.change is not None
            data = gzip.compress(kind.change(gzip.decompress(data)), 1, mtime=0)
        (root / "en" / file.name).write_bytes(data)
    return root


def _read(scene: Scene, kind: Kind, address: str) -> Ended:
    expected = _texts(str(scene.corpora[0]))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + _MEMORY_BYTES, limits[1]))
    try:
        got = _texts(address)
    except UserError as error:
        return _refused(kind, error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    if got != expected:
        return Ended(["other text than on disk, without a word"])
    return Ended([] if SAME in kind.right else ["taken for well"], SAME)


def _refused(kind: Kind, error: UserError) -> Ended:
    problems = ["more than one line"] if "\n" in str(error) else []
    if not str(error).strip():
        problems.append("an empty line")
    if LINE not in kind.right:
        problems.append(f"refused: {str(error)[:200]}")
    return Ended(problems, LINE)


def _train(scene: Scene, kind: Kind, address: str) -> Ended:
    """Steps of a stream from the server against those from the disk."""
    losses = []
    folder = scene.folder / "servers" / kind.name.replace(" ", "_").replace(",", "")
    stream = ("data=c4_stream", "data.shuffle_rows=8", "data.attempts=4", "train.steps=3", "data.max_files=2")
    settings = (*stream, "checkpoint.every=0", "eval.every=0", "model.num_layers=1")
    for number, path in enumerate((str(scene.corpora[0]), address)):
        overrides = scene.overrides(folder / str(number), *settings, f"data.path={path}")
        try:
            run(load_config(overrides))
        except UserError as error:
            return _refused(kind, error)
        rows = read_metrics(folder / str(number) / "metrics.jsonl", "train")
        losses.append({step: (row["loss"], row["grad_norm"]) for step, row in rows.items()})
    if losses[0] != losses[1]:
        return Ended([f"other losses than from the disk: {json.dumps(losses)[:300]}"])
    return Ended([] if SAME in kind.right else ["taken for well"], SAME)


def plan(scene: Scene) -> list[Attack]:
    """A reader for every kind of server, in one process of its own."""
    child = Child(scene.folder / "servers.log")

    def attack(kind: Kind) -> Attack:
        group = "training from a server" if kind.train else f"reading, right is {' or '.join(kind.right)}"
        return Attack("servers", group, kind.name, lambda: child.call(attempt, scene, kind.name, limit=kind.limit))

    return [attack(kind) for kind in kinds()]
