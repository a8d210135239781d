"""How C++ kernels are built: once, beside other work, by one process at a time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from narrowgauge.models.kernels import compiled
from narrowgauge.precision.backends.cpu import accumulate
from narrowgauge.precision.backends.cpu import library as quantization
from narrowgauge.precision.states import adamw_cpu
from narrowgauge.trainer.kernels import KERNELS

from narrowgauge import native

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
    native.library.cache_clear()
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
    assert set(KERNELS) == {compiled.SOURCE, quantization.SOURCE, adamw_cpu.SOURCE, accumulate.SOURCE}


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


def built(place: Path) -> Path:
    """The one library below ``place``."""
    (found,) = place.glob("**/small-*.so")
    return found


def answer(source: Path) -> int:
    """As a new process has it."""
    native.library.cache_clear()
    library = native.library(source)
    assert library is not None
    return int(library.answer())


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def empty(content: bytes) -> bytes:
    return b""


def unsealed(content: bytes) -> bytes:
    return content[:-32]


@pytest.mark.parametrize("change", [half, flipped, empty, unsealed])
def test_a_library_that_is_not_whole_is_built_anew(change: Callable[[bytes], bytes], source: Path) -> None:
    """Loaded, it would end the process with SIGBUS, or compute something else."""
    assert answer(source) == 42
    file = built(source.parent)
    whole = file.read_bytes()
    file.unlink()  # this process has it mapped
    file.write_bytes(change(whole))
    file.chmod(0o700)
    code = "print(native.library(source).answer())"
    one = process(code, source)
    assert (one.communicate(timeout=100)[0], one.returncode) == ("42\n", 0)
    assert file.read_bytes() == whole
    assert len(runs(source.parent)) == 2
    assert answer(source) == 42
    assert len(runs(source.parent)) == 2


def other_code(source: Path, place: Path) -> bytes:
    """A whole library of the same name that answers 13."""
    text = source.read_text()
    source.write_text(text.replace("ANSWER=42", "ANSWER=13"))
    native.library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place))
        patch.setattr(native, "_fingerprint", lambda *_: "same")
        assert answer(source) == 13
    source.write_text(text)
    return built(place).read_bytes()


@pytest.fixture
def planted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, with a library in it that somebody may have put there."""
    content = other_code(source, tmp_path / "elsewhere")
    monkeypatch.setattr(native, "_fingerprint", lambda *_: "same")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    cache = tmp_path / "narrowgauge"
    cache.mkdir(mode=0o700)
    (cache / "small-same.so").write_bytes(content)
    (cache / "small-same.so").chmod(0o700)
    assert answer(source) == 13  # what is ours alone and whole is loaded
    return cache


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_nothing_is_loaded_from_a_directory_that_others_can_write(mode: int, source: Path, planted: Path) -> None:
    planted.chmod(mode)
    with pytest.warns(UserWarning, match="narrowgauge can be written by other users .*: kernels are loaded from"):
        assert answer(source) == 42
    place = Path(tempfile.gettempdir()) / f"narrowgauge-{os.getuid()}"
    assert built(place).parent == place
    assert place.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in planted.iterdir()] == ["small-same.so"]


@pytest.mark.skipif(os.getuid() != 0, reason="root alone can give files away")
@pytest.mark.parametrize("what", ["directory", "file", "link"])
def test_nothing_of_another_user_is_loaded(what: str, source: Path, planted: Path) -> None:
    """By root least of all."""
    words = "narrowgauge belongs to another user"
    if what == "directory":
        os.chown(planted, 1234, 1234)
    elif what == "link":
        planted.rename(planted.with_name("there"))
        planted.symlink_to("there")
        os.chown(planted, 1234, 1234, follow_symlinks=False)
    else:
        os.chown(planted / "small-same.so", 1234, 1234)
        words = "small-same.so may be somebody else's work"
    with pytest.warns(UserWarning, match=words):
        assert answer(source) == 42


@pytest.mark.parametrize("what", ["writable", "link"])
def test_a_library_that_others_can_write_is_built_anew(what: str, source: Path, planted: Path) -> None:
    file = planted / "small-same.so"
    if what == "link":
        file.rename(planted / "there")
        file.symlink_to("there")
        assert answer(source) == 42
    else:
        file.chmod(0o720)
        with pytest.warns(UserWarning, match=r"small-same.so may be somebody else's work"):
            assert answer(source) == 42
    assert file.stat().st_mode & 0o777 == 0o700
    assert not file.is_symlink()


@pytest.mark.parametrize("what", ["open", "link", "file"])
def test_a_place_for_one_process_where_no_other_is_private(what: str, source: Path, planted: Path) -> None:
    planted.chmod(0o777)
    place = Path(tempfile.gettempdir()) / f"narrowgauge-{os.getuid()}"
    if what == "open":
        place.mkdir()
        place.chmod(0o755)
    elif what == "link":
        (place.parent / "there").mkdir(mode=0o700)
        place.symlink_to("there")
    else:
        place.write_text("")
    code = f"import tempfile; tempfile.tempdir = {str(place.parent)!r}; native._fingerprint = lambda *_: 'same'; "
    code += "print(native.library(source).answer())"
    assert process(code, source).communicate(timeout=100)[0] == "42\n"
    assert not list(place.parent.glob("**/*.so"))  # removed at the end


@pytest.mark.parametrize("mask", [0o000, 0o002])
def test_what_is_built_can_be_trusted_whatever_the_umask(mask: int, source: Path) -> None:
    before = os.umask(mask)
    try:
        assert [answer(source), answer(source)] == [42, 42]
    finally:
        os.umask(before)
    assert len(runs(source.parent)) == 1
    assert [path.stat().st_mode & 0o777 for path in (built(source.parent), built(source.parent).parent)] == [0o700] * 2


def test_libraries_of_one_process_are_told_apart(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.cpp"
    other.write_text(SOURCE.replace("42", "43"))
    assert [answer(source), answer(other), answer(source)] == [42, 43, 42]


def test_an_edited_part_is_built_anew(source: Path, tmp_path: Path) -> None:
    """However deep it is included."""
    (tmp_path / "parts").mkdir()
    deep, part = tmp_path / "parts" / "deep.h", tmp_path / "parts" / "part.h"
    source.write_text('#include "parts/part.h"\n' + SOURCE.replace("ANSWER;", "NUMBER;"))
    part.write_text('#pragma once\n#include <cstdint>\n#include "deep.h"\n#include "part.h"\n')
    deep.write_text("#define NUMBER ANSWER\n")
    assert [answer(source), answer(source)] == [42, 42]
    assert len(runs(tmp_path)) == 1
    deep.write_text("#define NUMBER ANSWER + 1\n")
    assert answer(source) == 43
    part.write_text(part.read_text() + "// another comment\n")
    assert answer(source) == 43
    assert len(runs(tmp_path)) == 3


class CPair(ctypes.Structure):
    _fields_ = [("first", ctypes.c_int32), ("second", ctypes.c_int64)]


def test_structures_of_another_size_are_refused(source: Path) -> None:
    source.write_text(
        SOURCE + 'struct Pair { int first, second; };\nextern "C" int size_of_Pair() { return sizeof(Pair); }'
    )
    with pytest.raises(RuntimeError, match=r"^Pair of small.cpp has 8 bytes in C\+\+ and 16 in Python: fields differ$"):
        native.library(source, CPair)
