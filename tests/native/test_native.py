"""How C++ kernels are built: once, beside other work, by one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

import models.kernels.compiled
import native
import precision.backends.cpu
from trainer.kernels import KERNELS

pytestmark = pytest.mark.skipif(native.shutil.which("g++") is None, reason="no C++ compiler")
SOURCE = 'extern "C" int answer() { return ANSWER; }\n// flags: -DANSWER=42 -w\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a place of its own, as the cache is; every run of the compiler leaves its process id in ``runs``."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        textwrap.dedent(f"""\
            #!/bin/sh
            if [ "$1" != --version ]; then echo $$ >> {tmp_path}/runs; sleep ${{PAUSE:-0}}; fi
            exec g++ "$@"
            """)
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "small.cpp"
    file.write_text(SOURCE)
    return file


def runs(place: Path) -> list[str]:
    return (place / "runs").read_text().split() if (place / "runs").exists() else []


def process(code: str, source: Path, **environment: str) -> subprocess.Popen[str]:
    code = f"import native, pathlib, sys; source = pathlib.Path({str(source)!r}); {code}"
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)


def test_the_trainer_begins_every_source() -> None:
    assert set(KERNELS) == {models.kernels.compiled.SOURCE, precision.backends.cpu.SOURCE}


def test_processes_that_build_at_once_build_once(source: Path, tmp_path: Path) -> None:
    """Before torch is imported, which the compilers' time is for; the next process finds what they built."""
    code = "native.begin(source); print(native.library(source).answer(), 'torch' in sys.modules)"
    both = [process(code, source, PAUSE="0.5") for _ in range(2)]
    assert [one.communicate(timeout=100)[0].split() for one in both] == [["42", "False"]] * 2
    assert [path.suffix for path in (tmp_path / "narrowgauge").iterdir()] == [".so"]
    assert len(runs(tmp_path)) == 1
    library = native.library(source)
    assert library is not None
    assert library.answer() == 42
    assert len(runs(tmp_path)) == 1


def test_a_process_that_ends_ends_its_compilers(source: Path, tmp_path: Path) -> None:
    code = f"native.begin(source)\nwhile not pathlib.Path({str(tmp_path / 'runs')!r}).exists(): pass"
    assert process(code, source, PAUSE="1000").wait(timeout=100) == 0
    assert list((tmp_path / "narrowgauge").iterdir()) == []
    (pid,) = runs(tmp_path)
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.05)  # until the system has taken it away; a compiler that lives on ends the test by its time limit


def test_what_was_begun_in_vain_warns_as_any_failed_build(source: Path, tmp_path: Path) -> None:
    source.write_text("this is not C++")
    native.begin(source)
    with pytest.warns(UserWarning, match="small.cpp was not built, plain torch serves: .*small.cpp:1:1: error"):
        assert native.library(source) is None
    assert list((tmp_path / "narrowgauge").iterdir()) == []
    assert len(runs(tmp_path)) == 1


def test_nothing_begins_where_kernels_are_not_wanted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWGAUGE_NATIVE", "0")
    native.begin(source)
    assert native.library(source) is None
    assert not (tmp_path / "narrowgauge").exists()


@pytest.mark.parametrize("home", ["file", "missing"])
def test_a_cache_that_cannot_be_written_is_replaced(
    home: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache" / "deep"
    if home == "file":  # a directory cannot be made here, whoever asks
        place.parent.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library = native.library(source)
    assert library is not None
    assert library.answer() == 42
    wanted = place / "narrowgauge" if home == "missing" else tmp_path / f"narrowgauge-{os.getuid()}"
    assert len(list(wanted.glob("small-*.so"))) == 1
