"""How C++ kernels are built: once, beside other work, by one process at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import models.kernels.compiled
import native
import precision.backends.cpu
from trainer.kernels import KERNELS

pytestmark = pytest.mark.skipif(native.shutil.which("g++") is None, reason="no C++ compiler")
SOURCE = 'extern "C" int answer() { return ANSWER; }\n// flags: -DANSWER=42 -w\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
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
    yield file
    for pid in living(tmp_path):  # of a test that failed
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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


def wait_for_a_run(place: Path) -> None:
    while not runs(place):
        time.sleep(0.01)


def wait_for_compilers_to_end(place: Path, but: int = 0) -> None:
    """Theirs and all that they have started; one that lives on ends the test by its time limit."""
    while living(place) - {but}:
        time.sleep(0.01)


def living(place: Path) -> set[int]:
    found = set()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # ended meanwhile, or somebody else's; that of a zombie is empty
            if f"XDG_CACHE_HOME={place}" in environment.read_bytes().decode(errors="replace").split("\0"):
                found.add(int(environment.parent.name))
    return found


def test_a_process_that_ends_ends_its_compilers(source: Path, tmp_path: Path) -> None:
    code = f"native.begin(source)\nwhile not pathlib.Path({str(tmp_path / 'runs')!r}).exists(): pass"
    assert process(code, source, PAUSE="1000").wait(timeout=100) == 0
    assert list((tmp_path / "narrowgauge").iterdir()) == []
    wait_for_compilers_to_end(tmp_path)
    assert len(runs(tmp_path)) == 1


@pytest.mark.parametrize("begun", [True, False])
def test_ctrl_c_ends_the_compiler_and_leaves_nothing(begun: bool, source: Path, tmp_path: Path) -> None:
    """Whether the main thread compiles or waits for a thread that does."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"{begun} and native.begin(source); native.library(source)"
    one = process(code, source, PAUSE="1000")
    wait_for_a_run(tmp_path)
    one.send_signal(signal.SIGINT)
    assert one.wait(timeout=100) == -signal.SIGINT
    assert list((tmp_path / "narrowgauge").iterdir()) == []
    wait_for_compilers_to_end(tmp_path)


def test_a_process_that_lives_on_after_ctrl_c_has_no_compiler(source: Path, tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            native.library(source)
        except KeyboardInterrupt:
            time.sleep(1000)
        """)
    one = process(code, source, PAUSE="1000")
    wait_for_a_run(tmp_path)
    one.send_signal(signal.SIGINT)
    wait_for_compilers_to_end(tmp_path, but=one.pid)
    while any((tmp_path / "narrowgauge").iterdir()):
        time.sleep(0.01)
    one.kill()
    assert one.wait(timeout=100) == -signal.SIGKILL


@pytest.mark.parametrize("forked", [True, False])
def test_a_killed_process_takes_its_compiler_along(forked: bool, source: Path, tmp_path: Path) -> None:
    """And what it leaves, which nobody tidies up then, goes with the next build."""
    place = tmp_path / "narrowgauge"
    wait = f"while not pathlib.Path({str(tmp_path / 'runs')!r}).exists(): time.sleep(0.01)"
    fork = f"child = os.fork() if {forked} else -1\nif child: print(child, flush=True)\ntime.sleep(1000)"
    one = process(f"import os, time; native.begin(source)\n{wait}\n{fork}", source, PAUSE="1000")
    assert one.stdout is not None
    child = int(one.stdout.readline())
    one.kill()
    assert one.wait(timeout=100) == -signal.SIGKILL
    wait_for_compilers_to_end(tmp_path, but=child)
    if forked:  # a data loader's worker, say
        os.kill(child, signal.SIGKILL)
    assert sorted(path.suffix for path in place.iterdir()) == [".incomplete", ".lock"]
    others = [place / name for name in ("old.incomplete", "old.lock", "new.incomplete", "new.lock")]
    for path in others:
        path.touch()
    for path in others[:2]:
        os.utime(path, (0, 0))
    assert native.library(source) is not None
    (built,) = place.glob("*.so")
    assert set(place.iterdir()) == {built, *others[2:]}


def test_a_process_that_ends_does_not_wait_for_one_that_builds(source: Path, tmp_path: Path) -> None:
    one = process("native.library(source)", source, PAUSE="1000")
    wait_for_a_run(tmp_path)
    code = "native.begin(source); thread, _ = native._begun[source]; native._end_compilers(); print(thread.is_alive())"
    assert process(code, source).communicate(timeout=100)[0] == "False\n"
    assert len(runs(tmp_path)) == 1
    one.kill()
    assert one.wait(timeout=100) == -signal.SIGKILL
    wait_for_compilers_to_end(tmp_path)


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
