"""Files on a web server or on the Hugging Face hub, read as if they were here: ranges, retries, never a part as whole.

`huggingface_hub` lists the files of a hub repository (HF_ENDPOINT and HF_TOKEN count), pinned to one revision. They are
read by plain HTTP, as those of any server are: a connection that breaks is taken up at the byte it broke at, if the
server still has the file that it had at the start. The readers of `huggingface_hub` and `fsspec` promise less
(docs/log.md, 2026-11-26), so this one stays.
"""

from __future__ import annotations

import re
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from ..errors import UserError, one_line

T = TypeVar("T")
MIN_BYTES_PER_SECOND = 1000
_TIMEOUT_SECONDS = 30.0  # without a byte
_RATE_SECONDS = 30.0  # of waiting, over which a server's rate is taken
_FIRST_WAIT_SECONDS = 0.5  # doubled after every failure in a row
_LONGEST_WAIT_SECONDS = 60.0
_HUB_SECONDS = 300.0  # for one question to the hub, whose library asks it in several
_CHUNK_BYTES = 1 << 20
_INDEX_BYTES = 16 << 20
_TRANSIENT = (408, 425, 429)  # and every 5xx
_DIGITS = re.compile(r"[0-9]{1,18}")
_SPAN = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")
_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inside>.+))?")
_C4 = "allenai/c4"


def remote_path(path: str) -> str | None:
    """``path`` as a URL if it is one of HTTP or the hub, None for a place in this file system."""
    if path.startswith(("http://", "https://", "hf://")):
        return path.rstrip("/")
    return f"hf://datasets/{_C4}" if path.rstrip("/") == _C4 else None


class Changed(OSError):
    """The server holds another file now than it did at the start."""


class TooSlow(ConnectionError):
    """The server sends less than ``data.min_bytes_per_second``."""


@dataclass(frozen=True)
class RemoteFile:
    """One file on a server. ``tag`` is its ETag or date, or its hash on the hub.

    It is given up after ``attempts`` failures in a row, of which too slow an answer is one; 0 bytes a second are never
    too slow.
    """

    url: str
    size: int
    tag: str
    attempts: int
    min_bytes_per_second: int = MIN_BYTES_PER_SECOND
    pinned: bool = False  # the URL names a revision: what it gives cannot change
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return urlsplit(self.url).path.rsplit("/", 1)[1]

    def identity(self) -> str:
        return f"{self.size}:{self.tag}"

    def open(self, mode: str = "rb") -> RemoteReader:
        assert mode == "rb"
        return RemoteReader(self)


class RemoteReader:
    """Reads a ``RemoteFile`` from its start to its end.

    ``read`` raises OSError once ``attempts`` in a row have failed, or if the file is another one now. A byte ends such
    a row, but not one of answers that are too slow: that takes as much as a server of the least rate would have sent.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._position = 0
        self._response: HTTPResponse | None = None
        self._rate = _Rate(file.min_bytes_per_second)
        self._slow = 0  # answers in a row
        self._slow_at = 0  # the position
        self._broke: float | None = None  # when, on the clock

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def read(self, size: int = _CHUNK_BYTES) -> bytes:
        """The next ``size`` bytes, less only at the end, which is where the server said it was."""
        parts, wanted = [], min(size, self._file.size - self._position)
        while wanted:
            what = f"{self._file.url} at byte {self._position:,}"
            data = retried(self._read_once, what, self._file.attempts, wanted, failed=self._slow)
            parts.append(data)
            self._position += len(data)
            wanted -= len(data)
            if self._position - self._slow_at >= self._file.min_bytes_per_second * _RATE_SECONDS:
                self._slow = 0
        return b"".join(parts)

    def _read_once(self, size: int) -> bytes:
        try:
            if self._response is None:
                self._response = self._open()
            return self._piece(self._response, size)
        except BaseException as error:
            self.close()
            self._broke = time.monotonic()
            if isinstance(error, TooSlow):
                self._slow, self._slow_at = self._slow + 1, self._position
            raise

    def _piece(self, response: HTTPResponse, size: int) -> bytes:
        if not (data := self._rate.read(response, size)):
            raise ConnectionError("the connection ended early")
        return data

    def _open(self) -> HTTPResponse:
        headers = dict(self._file.headers) | {"Range": f"bytes={self._position}-"}
        response = _request(self._file.url, "GET", headers)
        try:
            partial = response.status == 206
            span = _SPAN.fullmatch(response.headers.get("Content-Range", "")) if partial else None
            first, size = (int(span[1]), int(span[2])) if span else (0, _length(response))
            tag = _tag(response)
            if partial and not span:
                raise ConnectionError("the answer does not say which part of the file it is")
            if size != self._file.size or (not self._file.pinned and tag != self._file.tag):
                raise Changed(f"the file changed on the server: {size}:{tag}, not {self._file.identity()}")
            if first > self._position:
                raise ConnectionError(f"the answer begins at byte {first:,}")
            if self._broke is not None:  # answers that break again and again are slow as well
                self._rate.seconds += time.monotonic() - self._broke
            while first < self._position:  # a server that does not know ranges
                first += len(self._piece(response, min(self._position - first, _CHUNK_BYTES)))
        except BaseException:
            response.close()
            raise
        return response


class _Rate:
    """Reads an answer piece by piece, and takes its rate over the time spent waiting for it."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._bytes, self.seconds = 0, 0.0

    def read(self, response: HTTPResponse, size: int) -> bytes:
        """Up to ``size`` bytes, none only at the end. Raises TooSlow."""
        start = time.monotonic()
        data = response.read1(size)  # not `read`, which waits for all of them
        self._bytes, self.seconds = self._bytes + len(data), self.seconds + time.monotonic() - start
        if self.seconds >= _RATE_SECONDS:
            rate, self._bytes, self.seconds = self._bytes / self.seconds, 0, 0.0
            if rate < self._least:
                raise TooSlow(f"sends {rate:,.0f} bytes a second, less than data.min_bytes_per_second={self._least}")
        return data


def retried(function: Callable[..., T], what: str, attempts: int, *arguments: Any, failed: int = 0) -> T:
    """``function(*arguments)``, again after dropped connections and HTTP 408, 425, 429 and 5xx, one line each time.

    ``failed`` of the attempts have been made before. Raises OSError after the last one, or at once for what another
    attempt would not mend.
    """
    for attempt in range(min(failed + 1, attempts), attempts + 1):
        try:
            return function(*arguments)
        except (OSError, HTTPException) as error:
            cause = getattr(error, "reason", None)  # of a URLError, which wraps it in its own words
            reason = one_line(cause if isinstance(cause, OSError) else error)
            if not _is_transient(error):
                raise error if isinstance(error, OSError) else OSError(reason) from error
            if attempt >= attempts:
                plural = "s" if attempts > 1 else ""
                raise OSError(f"{reason}; gave up after {attempts} attempt{plural}") from error
            pause = min(_LONGEST_WAIT_SECONDS, max(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1), _retry_after(error)))
            say_aside(f"{what}: {reason}; attempt {attempt + 1} of {attempts} in {pause:.1f} s")
            time.sleep(pause)
    raise AssertionError("attempts is at least 1")


def say_aside(line: str) -> None:
    """Not by `say`: every process reads files of its own, and standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def _is_transient(error: BaseException) -> bool:
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in _TRANSIENT or status >= 500
    if isinstance(error, URLError):
        return not isinstance(error.reason, ssl.SSLCertVerificationError | ValueError)
    return not isinstance(error, Changed | FileNotFoundError | InvalidURL)


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks for, as a number or as a date; 0 if it does not say, or nonsense."""
    value = error.headers.get("Retry-After", "").strip() if isinstance(error, HTTPError) else ""
    if _DIGITS.fullmatch(value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to HTTP only, and never from an encrypted connection to a plain one."""

    def redirect_request(
        self, request: urllib.request.Request, response: Any, code: int, words: str, headers: Any, url: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(request.full_url).scheme, urlsplit(url).scheme
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            words = f"{request.full_url} redirects from {old} to {new}, which is not followed"
            raise HTTPError(request.full_url, code, words, headers, response)
        following = super().redirect_request(request, response, code, words, headers, url)
        if following is not None:
            following.method = request.get_method()  # a HEAD stays one
        return following


def _request(url: str, method: str, headers: dict[str, str]) -> HTTPResponse:
    """The answer's head. Raises OSError or HTTPException if there is none within twice the timeout."""
    request = urllib.request.Request(url, method=method, headers={"Accept-Encoding": "identity"})
    for name, value in headers.items():
        if name.lower() == "authorization":
            request.add_unredirected_header(name, value)  # the hub sends on to stores that must not see the token
        else:
            request.add_header(name, value)
    opener = urllib.request.build_opener(_Redirects)
    return _within(2 * _TIMEOUT_SECONDS, lambda: opener.open(request, timeout=_TIMEOUT_SECONDS))


def _within(seconds: float, function: Callable[[], T]) -> T:
    """``function()`` in a thread that is left behind if it takes longer: a socket's timeout ends at every byte."""
    outcome: Future[T] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    def close(late: Future[T]) -> None:
        if late.exception() is None and isinstance(answer := late.result(), HTTPResponse):
            answer.close()

    threading.Thread(target=call, daemon=True).start()
    if not wait([outcome], seconds).done:
        outcome.add_done_callback(close)
        raise TimeoutError(f"no answer in {seconds:.3g} s")
    return outcome.result()


def _length(response: HTTPResponse) -> int:
    length = response.headers.get("Content-Length", "")
    return int(length) if _DIGITS.fullmatch(length) else -1


def _tag(response: HTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


@dataclass(frozen=True)
class Listing:
    """The files of one directory, here or on a server."""

    directory: str
    names: list[str]
    #: Sizes and tags are asked for the chosen ones only.
    describe: Callable[[Sequence[str]], Sequence[Path | RemoteFile]]


def list_remote(url: str, name: re.Pattern[str], known: Sequence[str], attempts: int, least_rate: int) -> Listing:
    """The files in ``url/en``, or in ``url``, whose names match ``name``.

    A web server is asked for its index page; where it has none, for the first of each of the ``known`` sets of names.
    Raises UserError for a server or a repository that cannot be reached or holds no such file.
    """
    try:
        if url.startswith("hf://"):
            return _list_hub(url, name, attempts, least_rate)
        return _list_http(url, name, known, attempts, least_rate)
    except (OSError, ValueError, OverflowError) as error:  # the last two: what is no address
        raise UserError(f"data.path={url}: cannot be reached: {one_line(error)}") from error


def _list_http(url: str, name: re.Pattern[str], known: Sequence[str], attempts: int, least_rate: int) -> Listing:
    def index_of(directory: str) -> str:
        with _request(f"{directory}/", "GET", {}) as response:
            page, rate = b"", _Rate(least_rate)
            while len(page) < _INDEX_BYTES and (data := rate.read(response, _CHUNK_BYTES)):
                page += data
            if response.length and not data:
                raise ConnectionError("the connection ended early")
        return page.decode(errors="replace")

    def describe_one(address: str) -> RemoteFile:
        with retried(_request, address, attempts, address, "HEAD", {}) as response:
            size = _length(response)
            if size < 0:
                raise OSError(f"the server does not say how long {address} is")
            return RemoteFile(address, size, _tag(response), attempts, least_rate)

    def found(address: str) -> bool:
        try:
            describe_one(address)
        except HTTPError as error:
            if error.code in (403, 404):
                return False
            raise
        return True

    def describe(directory: str, names: Sequence[str]) -> list[RemoteFile]:
        try:
            with ThreadPoolExecutor(16) as pool:
                return list(pool.map(describe_one, [f"{directory}/{file}" for file in names]))
        except OSError as error:
            raise UserError(f"data.path={url}: sizes and dates of its files: {one_line(error)}") from error

    for directory in (f"{url}/en", url):
        page = ""
        try:
            page = retried(index_of, directory, attempts, directory)
        except HTTPError as error:
            if error.code not in (401, 403, 404, 405):
                raise
        names = sorted({match[0] for match in name.finditer(page)})
        names = names or [file for first in known if found(f"{directory}/{first}") for file in _whole_set(first, name)]
        if names:
            return Listing(directory, names, lambda chosen, at=directory: describe(at, chosen))
    return Listing(url, [], lambda chosen: [])


def _whole_set(first: str, name: re.Pattern[str]) -> list[str]:
    match = name.fullmatch(first)
    assert match is not None
    return [first.replace(".00000-", f".{index:05}-") for index in range(int(match["count"]))]


def _list_hub(url: str, name: re.Pattern[str], attempts: int, least_rate: int) -> Listing:
    # Imported here: it costs every process a second, and only the hub needs it.
    from huggingface_hub import HfApi, RepoFile, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers

    match = _HUB.fullmatch(url)
    if match is None:
        raise UserError(f"data.path={url}: write hf://datasets/OWNER/NAME, or OWNER/NAME@REVISION")
    repo, inside, api = match["repo"], match["inside"] or "", HfApi()

    def asked(function: Callable[[], T]) -> T:
        return retried(lambda: _within(_HUB_SECONDS, lambda: _as_os_error(function)), url, attempts)

    def entries_of(directory: str) -> list[Any]:
        return list(api.list_repo_tree(repo, directory, revision=revision, repo_type="dataset"))

    revision = asked(lambda: api.dataset_info(repo, revision=match["revision"])).sha
    headers = tuple((key, value) for key, value in build_hf_headers().items() if isinstance(value, str))
    for directory in (f"{inside}/en".lstrip("/"), inside):
        files = {}
        with suppress(EntryNotFoundError):
            for entry in asked(lambda at=directory: entries_of(at)):
                file = entry.path.rsplit("/", 1)[-1]
                if isinstance(entry, RepoFile) and name.fullmatch(file):
                    address = hf_hub_url(
                        repo, entry.path, repo_type="dataset", revision=revision, endpoint=api.endpoint
                    )
                    tag = entry.lfs.sha256 if entry.lfs else entry.blob_id
                    files[file] = RemoteFile(
                        address, entry.size, tag, attempts, least_rate, pinned=True, headers=headers
                    )
        if files:
            place = f"hf://datasets/{repo}@{revision}/{directory}".rstrip("/")
            return Listing(place, sorted(files), lambda chosen, files=files: [files[file] for file in chosen])
    return Listing(url, [], lambda chosen: [])


def _as_os_error(function: Callable[[], T]) -> T:
    """The hub's HTTP library has errors of its own, which one depends on its version."""
    try:
        return function()
    except (OSError, UserError):
        raise
    except ValueError as error:  # not the name of a repository
        raise UserError(one_line(error)) from error
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {one_line(error)}") from error
