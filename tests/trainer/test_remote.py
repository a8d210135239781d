"""Text on a web server and on the hub: read whole through every fault that passes, refused in one line otherwise."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_texts, write_corpus
from mirror import REVISION, Mirror, serving

from trainer import remote
from trainer.config import load_config
from trainer.corpus import corpus_files, read_texts
from trainer.data import DataConfig, home_of
from trainer.errors import UserError
from trainer.prepare import prepare

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
    return [
        list(read_texts(file.path)) for file in corpus_files(path, ["train"], attempts=attempts, **options)["train"]
    ]


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
        list(read_texts(files[0].path))
    assert sum(line.startswith("GET /en/c4-train.00000") for line in mirror.requests) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(mirror: Mirror) -> None:
    file = corpus_files(mirror.address, ["train"], attempts=3)["train"][0]
    path = mirror.root / "en" / file.path.name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="the file changed on the server"):
        list(read_texts(file.path))


def test_a_file_that_is_cut_on_the_server_is_not_taken_as_whole(mirror: Mirror) -> None:
    path = mirror.root / "en" / "c4-train.00001-of-00002.json.gz"
    path.write_bytes(path.read_bytes()[:-30])
    assert "damaged or truncated gzip after line" in refusal(mirror.address)


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
        "trainer.corpus._OFFICIAL", ["c4-train.00000-of-00009.json.gz", "c4-train.00000-of-00002.json.gz"]
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


def test_a_hub_that_is_away_or_lacks_the_repository(hub: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be reached" in refusal("hf://datasets/nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "data.path=hf://datasets/allenai/c4: cannot be reached" in refusal("allenai/c4")


def test_what_is_read_from_a_server_is_kept_at_home() -> None:
    assert home_of("/some/where") == "/some/where"
    assert home_of("allenai/c4") == home_of("hf://datasets/allenai/c4/") == "data/allenai-c4"
    assert home_of("http://host:8000/mirror/") == "data/host-8000-mirror"
    assert load_config(["data=c4", "data.path=http://h:1/m"]).data.tokenizer == "data/h-1-m/tokenizer"
