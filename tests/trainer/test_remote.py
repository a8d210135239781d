"""Text on a web server and on the hub: read whole through every fault that passes, refused in one line otherwise."""

from __future__ import annotations

import io
import json
import pickle
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from email.message import Message
from pathlib import Path
from unittest.mock import Mock
from urllib.error import HTTPError
from urllib.request import Request

import pytest
from conftest import make_texts, write_corpus
from mirror import REVISION, Mirror, serving
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data import remote
from narrowgauge.trainer.data.config import DataConfig, home_of
from narrowgauge.trainer.data.corpus import CorpusFile, corpus_files
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.data.remote import RemoteFile
from narrowgauge.trainer.errors import UserError

TRAIN = [make_texts(60, 1), make_texts(60, 2)]


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.001)
    root = write_corpus(tmp_path / "mirror", {"train": TRAIN, "validation": [make_texts(9, 3)]})
    with serving(root) as server:
        yield server


@pytest.fixture
def hub(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", mirror.address)
    template = mirror.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", mirror.address)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    return mirror


def texts(path: str, attempts: int = 4, **options: int) -> list[list[str]]:
    return [list(file.texts()) for file in corpus_files(path, ["train"], attempts=attempts, **options)["train"]]


def refusal(path: str, attempts: int = 3) -> str:
    with pytest.raises(UserError) as caught:
        texts(path, attempts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def config(mirror: Mirror, tmp_path: Path, *overrides: str) -> DataConfig:
    own = (f"data.path={mirror.address}", "data.tokenizer=bytes", f"data.shards={tmp_path / 'shards'}")
    return load_config(["data=c4", *own, "data.attempts=3", *overrides]).data


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[], [100, 200, 0], [503, 429, 408], [500, 700]])
def test_a_server_that_fails_for_a_while_gives_the_same_text(
    mirror: Mirror, capfd: pytest.CaptureFixture[str], ranges: bool, faults: list[int]
) -> None:
    mirror.ranges, mirror.faults = ranges, list(faults)
    assert texts(mirror.address) == TRAIN
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(faults)
    assert all("/en/c4-train.00000-of-00002.json.gz at byte " in line and "attempt " in line for line in lines)


def test_an_interrupted_file_goes_on_at_the_byte_it_broke_at(mirror: Mirror) -> None:
    mirror.faults = [300, 300]
    texts(mirror.address)
    gets = [line for line in mirror.requests if line.startswith("GET /en/c4-train.00000")]
    assert [line.split()[-1] for line in gets] == ["bytes=0-", "bytes=300-", "bytes=600-"]


def test_a_server_that_never_recovers_is_named_with_file_row_and_attempts(mirror: Mirror) -> None:
    mirror.always, mirror.ranges = 900, False
    message = refusal(mirror.address)
    assert message.startswith(f"{mirror.address}/en/c4-train.00000-of-00002.json.gz: cannot be read after line ")
    assert "the connection ended early" in message
    assert "gave up after 3 attempts" in message
    mirror.always = 503
    assert "after line 0: HTTP Error 503" in refusal(mirror.address)


def test_a_file_that_is_gone_is_not_asked_for_again(mirror: Mirror) -> None:
    files = corpus_files(mirror.address, ["train"], attempts=3)["train"]
    (mirror.root / "en" / files[0].path.name).unlink()
    with pytest.raises(UserError, match="after line 0: HTTP Error 404"):
        list(files[0].texts())
    assert sum(line.startswith("GET /en/c4-train.00000") for line in mirror.requests) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(mirror: Mirror) -> None:
    file = corpus_files(mirror.address, ["train"], attempts=3)["train"][0]
    path = mirror.root / "en" / file.path.name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="the file changed on the server"):
        list(file.texts())


def test_a_file_that_is_cut_on_the_server_is_not_taken_as_whole(mirror: Mirror) -> None:
    path = mirror.root / "en" / "c4-train.00001-of-00002.json.gz"
    path.write_bytes(path.read_bytes()[:-30])
    assert "damaged or truncated gzip after line" in refusal(mirror.address)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are taken over a twentieth of a second."""
    monkeypatch.setattr(remote, "_RATE_SECONDS", 0.05)


SLOW = re.compile(r"sends [0-9,]+ bytes a second, less than data.min_bytes_per_second=10000; gave up after 3 attempts")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("slow_from", [0, 500], ids=["from the start", "from the middle"])
def test_a_server_that_sends_a_byte_at_a_time_is_given_up(
    mirror: Mirror, capfd: pytest.CaptureFixture[str], ranges: bool, slow_from: int
) -> None:
    file = corpus_files(mirror.address, ["train"], attempts=3, min_bytes_per_second=10_000)["train"][0]
    mirror.pause, mirror.pause_from, mirror.ranges = 0.002, slow_from, ranges
    with pytest.raises(UserError) as caught:
        list(file.texts())
    assert str(caught.value).startswith(f"{mirror.address}/en/c4-train.00000-of-00002.json.gz: cannot be read after")
    assert SLOW.search(str(caught.value))
    lines = capfd.readouterr().err.splitlines()
    assert [re.findall("; attempt . of 3", line) for line in lines] == [["; attempt 2 of 3"], ["; attempt 3 of 3"]]


@pytest.mark.usefixtures("hasty")
def test_any_rate_will_do_if_asked_and_a_slow_reader_is_no_slow_server(mirror: Mirror) -> None:
    mirror.pause, mirror.pause_from = 0.0005, 900
    (file, _) = corpus_files(mirror.address, ["train"], attempts=1, min_bytes_per_second=0)["train"]
    assert list(file.texts()) == TRAIN[0]
    mirror.pause = 0.0
    (file, _) = corpus_files(mirror.address, ["train"], attempts=1, min_bytes_per_second=10_000)["train"]
    assert isinstance(file.path, RemoteFile)
    with file.path.open() as reader:
        while reader.read(100):
            time.sleep(0.01)


@pytest.mark.usefixtures("hasty")
def test_a_server_that_cuts_after_every_few_bytes_is_given_up(mirror: Mirror) -> None:
    file = corpus_files(mirror.address, ["train"], attempts=3, min_bytes_per_second=10_000)["train"][0]
    mirror.always = 10
    # Once it was slow twice, its next cut is the last attempt: whichever is seen first is the reason.
    reason = r"(less than data.min_bytes_per_second=10000|the connection ended early); gave up after 3 attempts"
    with pytest.raises(UserError, match=reason):
        list(file.texts())


@pytest.mark.usefixtures("hasty")
def test_an_index_that_never_ends_is_given_up(mirror: Mirror) -> None:
    mirror.pause = 0.002
    with pytest.raises(UserError) as caught:
        corpus_files(mirror.address, ["train"], attempts=3, min_bytes_per_second=10_000)
    assert str(caught.value).startswith(f"data.path={mirror.address}: cannot be reached: ")
    assert SLOW.search(str(caught.value))


def test_an_answer_whose_head_never_ends_is_given_up(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TIMEOUT_SECONDS", 0.04)
    mirror.head_pause = 0.005
    assert "no answer in 0.08 s; gave up after 3 attempts" in refusal(mirror.address)


@pytest.mark.parametrize(
    "value",
    ["²", "-5", "1e9", "9" * 5000, "soon", "", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Oct 99999 07:28:00 GMT", "٣"],
    ids=["superscript", "negative", "float", "endless", "word", "empty", "past", "no date", "other digits"],
)
def test_a_server_may_ask_for_nonsense_before_the_next_attempt(mirror: Mirror, value: str) -> None:
    mirror.headers, mirror.faults = {"Retry-After": value.encode().decode("latin-1")}, [503, 429]
    file = corpus_files(mirror.address, ["train"], attempts=3)["train"][0]
    assert list(file.texts()) == TRAIN[0]


def test_a_server_is_left_alone_for_as_long_as_it_asks(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote, "time", Mock(wraps=time, sleep=waits.append, time=lambda: 1_445_412_480.0 - 20))
    file = corpus_files(mirror.address, ["train"], attempts=4)["train"][0]
    for value in ("7", "Wed, 21 Oct 2015 07:28:00 GMT", "99999"):
        mirror.headers, mirror.faults = {"Retry-After": value}, [503]
        list(file.texts())
        mirror.headers = {}
    assert waits == [7.0, 20.0, 60.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Content-Range", "bytes 0-1"),
        ("Content-Range", "bytes ²-3/4"),
        ("Content-Range", "bytes " + "9" * 5000 + "-1/1"),
        ("Content-Range", "bytes 5-9/10"),
        ("Content-Length", "²"),
        ("Content-Length", "-1"),
        ("Content-Length", "9" * 5000),
        ("Content-Length", "many"),
    ],
    ids=[
        *("no size", "superscript", "endless", "another part"),
        *("superscript length", "negative length", "endless length", "word"),
    ],
)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_headers_that_are_nonsense_are_one_line(mirror: Mirror, name: str, value: str, ranges: bool) -> None:
    files = corpus_files(mirror.address, ["train"], attempts=2)["train"]
    mirror.headers, mirror.ranges = {name: value.encode().decode("latin-1")}, ranges
    if name == "Content-Length":
        assert "the server does not say how long" in refusal(mirror.address)
    if ranges == (name == "Content-Range"):  # the header that the answer is read by
        with pytest.raises(UserError, match="cannot be read after line 0: ") as caught:
            list(files[0].texts())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("file:///etc/passwd", "is not allowed"),
        ("ftp://127.0.0.1/x", "redirects from http to ftp, which is not followed"),
        ("/en/c4-train.00000-of-00002.json.gz", "infinite loop"),
    ],
    ids=["file", "ftp", "loop"],
)
def test_redirects_that_lead_nowhere(mirror: Mirror, target: str, words: str) -> None:
    file = corpus_files(mirror.address, ["train"], attempts=3)["train"][0]
    mirror.redirect = target
    mirror.requests.clear()
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        list(file.texts())
    assert "\n" not in str(caught.value)
    assert len(mirror.requests) <= 11  # not asked again


def test_an_encrypted_server_that_sends_on_to_a_plain_one_is_not_followed() -> None:
    request = Request("https://host/a", headers={"Authorization": "Bearer secret"})
    with pytest.raises(HTTPError, match="https://host/a redirects from https to http, which is not followed"):
        remote._Redirects().redirect_request(request, io.BytesIO(), 302, "Found", Message(), "http://host/a")
    following = remote._Redirects().redirect_request(
        Request("https://host/a", method="HEAD"), io.BytesIO(), 302, "Found", Message(), "https://store/a"
    )
    assert following is not None
    assert following.get_method() == "HEAD"


def test_a_token_is_not_sent_on_to_another_server(mirror: Mirror, tmp_path: Path) -> None:
    file = corpus_files(mirror.address, ["train"])["train"][0].path
    assert isinstance(file, RemoteFile)
    with serving(mirror.root) as store:
        mirror.redirect = f"{store.address}/en/{file.name}"
        secret = replace(file, headers=(("authorization", "Bearer secret"), ("x-other", "1")))
        mirror.tokens.clear()
        assert list(CorpusFile(secret, "train", 0, 1).texts()) == TRAIN[0]
        assert (mirror.tokens, store.tokens) == (["Bearer secret"], [None])


@pytest.mark.parametrize(
    "path",
    ["http://[x", "http://h:99999", "http://h:x/", "http://", "http://a b/c"],
    ids=["bracket", "port too large", "port in letters", "no host", "space"],
)
def test_addresses_that_are_none(path: str) -> None:
    assert refusal(path).startswith(f"data.path={path}".rstrip("/") + ": ")


def test_the_first_files_are_enough(mirror: Mirror) -> None:
    assert texts(mirror.address, max_files=1) == TRAIN[:1]
    (mirror.root / "en" / "c4-train.00001-of-00002.json.gz").unlink()
    assert "missing c4-train.00001-of-00002.json.gz (data.max_files=1 takes those before it)" in refusal(mirror.address)
    assert texts(mirror.address, max_files=1) == TRAIN[:1]
    assert texts(str(mirror.root), max_files=1) == TRAIN[:1]


def test_servers_that_are_none_or_hold_nothing(mirror: Mirror, tmp_path: Path) -> None:
    assert "no train file named like" in refusal(f"{mirror.address}/nowhere")
    with serving(tmp_path) as gone:
        pass
    assert "cannot be reached: " in refusal(gone.address)
    assert "write hf://datasets/OWNER/NAME" in refusal("hf://models/x")


def test_a_server_without_an_index_is_asked_for_the_official_names(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.index = False
    monkeypatch.setattr(
        "narrowgauge.trainer.data.corpus._OFFICIAL",
        ["c4-train.00000-of-00009.json.gz", "c4-train.00000-of-00002.json.gz"],
    )
    assert texts(mirror.address) == TRAIN


def test_preparing_goes_on_where_the_server_gave_up(mirror: Mirror, tmp_path: Path) -> None:
    data = config(mirror, tmp_path)
    broken = mirror.root / "en" / "c4-train.00001-of-00002.json.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="damaged or truncated"):
        prepare(data, 1)
    shards = Path(data.shards_dir)
    assert sorted(file.name for file in shards.glob("*.bin")) == ["train.00000-of-00002.bin"]
    assert not list(shards.glob("*.incomplete"))
    broken.write_bytes(whole)
    mirror.requests.clear()
    manifest = prepare(data, 1)
    assert not any(
        line.startswith("GET /en/c4-train.00000") for line in mirror.requests
    )  # what stands is not read again
    local = prepare(load_config([f"data.path={mirror.root}", "data.tokenizer=bytes"]).data, 1)
    for split in ("train", "validation"):
        assert [s["sha256"] for s in manifest["splits"][split]] == [s["sha256"] for s in local["splits"][split]]
    changed = mirror.root / "en" / "c4-train.00000-of-00002.json.gz"
    changed.write_bytes(broken.read_bytes())
    assert prepare(data, 1)["splits"]["train"][0]["sha256"] == manifest["splits"]["train"][1]["sha256"]


def test_a_remote_file_can_be_sent_to_another_process(mirror: Mirror) -> None:
    for file in corpus_files(mirror.address, ["train"])["train"]:
        assert pickle.loads(pickle.dumps(file)) == file
        assert file.size == (mirror.root / "en" / file.path.name).stat().st_size


def test_the_hub_is_read_at_one_revision(hub: Mirror, tmp_path: Path) -> None:
    files = corpus_files("allenai/c4", attempts=3)
    assert {split: len(group) for split, group in files.items()} == {"train": 2, "validation": 1}
    first = files["train"][0]
    size = (hub.root / "en" / first.path.name).stat().st_size
    assert first.identity() == f"{size}:blob-c4-train.00000-of-00002.json.gz"
    assert REVISION in str(first.path)
    hub.faults = [250, 503]
    assert texts("hf://datasets/allenai/c4") == TRAIN
    data = load_config(["data=c4", "data.tokenizer=bytes", f"data.shards={tmp_path / 's'}", "data.max_files=1"]).data
    assert json.loads(json.dumps(prepare(data, 1)))["splits"]["train"][0]["documents"] == 60


def test_the_hubs_files_need_no_directory_en(hub: Mirror) -> None:
    for file in (hub.root / "en").iterdir():
        file.rename(hub.root / file.name)
    (hub.root / "en").rmdir()
    assert texts("allenai/c4") == TRAIN


def test_a_hub_that_is_away_or_lacks_the_repository(hub: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be reached" in refusal("hf://datasets/nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "data.path=hf://datasets/allenai/c4: cannot be reached" in refusal("allenai/c4")


def test_what_is_read_from_a_server_is_kept_at_home() -> None:
    assert home_of("/some/where") == "/some/where"
    assert home_of("allenai/c4") == home_of("hf://datasets/allenai/c4/") == "data/allenai-c4"
    assert home_of("http://host:8000/mirror/") == "data/host-8000-mirror"
    assert load_config(["data=c4", "data.path=http://h:1/m"]).data.tokenizer == "data/h-1-m/tokenizer"
