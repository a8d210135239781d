"""Files on a web server or on the Hugging Face hub, read as if they were here: ranges, retries, never a part as whole.

`datasets` finds the files of a hub repository (HF_ENDPOINT and HF_TOKEN count), pinned to one revision. They are read
by plain HTTP, as those of any server are: a connection that breaks is taken up at the byte it broke at.
"""

from __future__ import annotations

import re
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from types import TracebackType
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from trainer.errors import UserError, one_line

T = TypeVar("T")
_TIMEOUT_SECONDS = 30.0  # without a byte
_FIRST_WAIT_SECONDS = 0.5  # doubled after every failure in a row
_LONGEST_WAIT_SECONDS = 60.0
_CHUNK_BYTES = 1 << 20
_PATHS_AT_ONCE = 500  # of one question to the hub
_TRANSIENT = (408, 425, 429)  # and every 5xx
_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inside>.+))?")
_C4 = "allenai/c4"


def remote_path(path: str) -> str | None:
    """``path`` as a URL if it is one of HTTP or the hub, None for a place in this file system."""
    if path.startswith(("http://", "https://", "hf://")):
        return path.rstrip("/")
    return f"hf://datasets/{_C4}" if path.rstrip("/") == _C4 else None


class Changed(OSError):
    """The server holds another file now than it did at the start."""


@dataclass(frozen=True)
class RemoteFile:
    """One file on a server. ``tag`` is its ETag or date, or its hash on the hub."""

    url: str
    size: int
    tag: str
    attempts: int
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

    ``read`` raises OSError once ``attempts`` in a row have failed, or if the file is another one now.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._position = 0
        self._response: HTTPResponse | None = None

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def read(self, size: int = _CHUNK_BYTES) -> bytes:
        """At least one byte, or none at the end, which is where the server said it was."""
        if self._position == self._file.size:
            return b""
        data = retried(self._read_once, f"{self._file.url} at byte {self._position:,}", self._file.attempts, size)
        self._position += len(data)
        return data

    def _read_once(self, size: int) -> bytes:
        try:
            if self._response is None:
                self._response = self._open()
            data = self._response.read(min(size, self._file.size - self._position))
            if not data:
                raise ConnectionError("the connection ended early")
            return data
        except BaseException:
            self.close()
            raise

    def _open(self) -> HTTPResponse:
        headers = dict(self._file.headers) | {"Range": f"bytes={self._position}-"}
        response = _request(self._file.url, "GET", headers)
        partial = response.status == 206
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "")) if partial else None
        first, size = (int(span[1]), int(span[2])) if span else (0, _length(response))
        tag = _tag(response)
        if size != self._file.size or (not self._file.pinned and tag != self._file.tag):
            response.close()
            raise Changed(f"the file changed on the server: {size}:{tag}, not {self._file.identity()}")
        left = self._position - first
        while left:  # a server that does not know ranges
            skipped = len(response.read(min(left, _CHUNK_BYTES))) if left > 0 else 0
            if not skipped:
                response.close()
                raise ConnectionError("the connection ended early")
            left -= skipped
        return response


def retried(function: Callable[..., T], what: str, attempts: int, *arguments: Any) -> T:
    """``function(*arguments)``, again after dropped connections and HTTP 408, 425, 429 and 5xx, one line each time.

    Raises OSError after the last attempt, or at once for what another attempt would not mend.
    """
    for attempt in range(1, attempts + 1):
        try:
            return function(*arguments)
        except (OSError, HTTPException) as error:
            cause = getattr(error, "reason", None)  # of a URLError, which wraps it in its own words
            reason = one_line(cause if isinstance(cause, OSError) else error)
            if not _is_transient(error):
                raise error if isinstance(error, OSError) else OSError(reason) from error
            if attempt == attempts:
                plural = "s" if attempts > 1 else ""
                raise OSError(f"{reason}; gave up after {attempts} attempt{plural}") from error
            wait = min(_LONGEST_WAIT_SECONDS, max(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1), _retry_after(error)))
            # Not by `say`: every rank reads files of its own, and standard output is for results.
            line = f"{what}: {reason}; attempt {attempt + 1} of {attempts} in {wait:.1f} s"
            print(line, file=sys.stderr, flush=True)
            time.sleep(wait)
    raise AssertionError("attempts is at least 1")


def _is_transient(error: BaseException) -> bool:
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in _TRANSIENT or status >= 500
    if isinstance(error, URLError):
        return not isinstance(error.reason, ssl.SSLCertVerificationError | ValueError)
    return not isinstance(error, Changed | FileNotFoundError)


def _retry_after(error: BaseException) -> float:
    value = error.headers.get("Retry-After", "") if isinstance(error, HTTPError) else ""
    return float(value) if value.isdigit() else 0.0


def _request(url: str, method: str, headers: dict[str, str]) -> HTTPResponse:
    request = urllib.request.Request(url, method=method, headers={"Accept-Encoding": "identity"})
    for name, value in headers.items():
        if name.lower() == "authorization":
            request.add_unredirected_header(name, value)  # the hub sends on to stores that must not see the token
        else:
            request.add_header(name, value)
    return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)  # type: ignore[no-any-return]


def _length(response: HTTPResponse) -> int:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else -1


def _tag(response: HTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


@dataclass(frozen=True)
class Listing:
    """The files of one remote directory."""

    directory: str
    names: list[str]
    describe: Callable[[Sequence[str]], list[RemoteFile]]  # sizes and tags are asked for the chosen ones only


def list_remote(url: str, name: re.Pattern[str], known: Sequence[str], attempts: int) -> Listing:
    """The files in ``url/en``, or in ``url``, whose names match ``name``.

    A web server is asked for its index page; where it has none, for the first of each of the ``known`` sets of names.
    Raises UserError for a server or a repository that cannot be reached or holds no such file.
    """
    try:
        if url.startswith("hf://"):
            return _list_hub(url, name, attempts)
        return _list_http(url, name, known, attempts)
    except OSError as error:
        raise UserError(f"data.path={url}: cannot be reached: {one_line(error)}") from error


def _list_http(url: str, name: re.Pattern[str], known: Sequence[str], attempts: int) -> Listing:
    def describe_one(address: str) -> RemoteFile:
        with retried(_request, address, attempts, address, "HEAD", {}) as response:
            size = _length(response)
            if size < 0:
                raise OSError(f"the server does not say how long {address} is")
            return RemoteFile(address, size, _tag(response), attempts)

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
            with retried(_request, directory, attempts, f"{directory}/", "GET", {}) as response:
                page = response.read(16 << 20).decode(errors="replace")
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


def _list_hub(url: str, name: re.Pattern[str], attempts: int) -> Listing:
    # Imported here: it costs every process two seconds, and only the hub needs it.
    from datasets.data_files import resolve_pattern
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    match = _HUB.fullmatch(url)
    if match is None:
        raise UserError(f"data.path={url}: write hf://datasets/OWNER/NAME, or OWNER/NAME@REVISION")
    repo, api = match["repo"], HfApi()

    def once(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        return retried(lambda: _as_os_error(lambda: function(*arguments, **options)), url, attempts)

    revision = once(api.dataset_info, repo, revision=match["revision"]).sha
    headers = tuple((key, value) for key, value in build_hf_headers().items() if isinstance(value, str))

    def describe(directory: str, chosen: Sequence[str]) -> list[RemoteFile]:
        paths = [f"{directory}/{file}".lstrip("/") for file in chosen]
        infos = {}
        for start in range(0, len(paths), _PATHS_AT_ONCE):
            part = paths[start : start + _PATHS_AT_ONCE]
            found = once(api.get_paths_info, repo, part, revision=revision, repo_type="dataset")
            infos |= {info.path: info for info in found}
        files = []
        for path in paths:
            url = hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=api.endpoint)
            info = infos[path]
            content = info.lfs.sha256 if info.lfs else info.blob_id
            files.append(RemoteFile(url, info.size, content, attempts, pinned=True, headers=headers))
        return files

    inside = match["inside"] or ""
    for directory in (f"{inside}/en".lstrip("/"), inside):
        place = f"hf://datasets/{repo}@{revision}/{directory}".rstrip("/")
        try:
            paths = once(resolve_pattern, f"{place}/c4-*.json.gz", base_path="")
        except FileNotFoundError:
            continue
        names = sorted(file for path in paths if name.fullmatch(file := path.rsplit("/", 1)[1]))
        return Listing(place, names, lambda chosen, at=directory: describe(at, chosen))
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
