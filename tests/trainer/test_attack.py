"""A short form of ``scripts/attack.py``: a few attacks of each part, and that what goes wrong is told."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import attack
import pytest
from attack_suite import damage, disks, kills, servers
from attack_suite.attacks import NOT_REACHED, Attack, Child, Ended, carry_out, spread, table
from attack_suite.scene import Scene
from narrowgauge.trainer.errors import ExitCode, UserError


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    scene = Scene(tmp_path_factory.mktemp("attack"))
    scene.prepare()
    damage.prepare(scene, 1)
    return scene


SLOW_SERVERS = ("silent", "a byte now", "a line of 1 GB", "a page without", "training")
DAMAGE = spread(list(damage.kinds(1)), 10)
SERVERS = spread([kind.name for kind in servers.kinds() if not kind.name.startswith(SLOW_SERVERS)], 8)


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_worker_is_brought_back_to_the_same_digits(scene: Scene) -> None:
    configuration = kills.Configuration("short", ("precision=fp8_delayed", "checkpoint.every=1"), 2)
    kill = kills.Kill(signal.SIGKILL, "a worker", "step", restart=True)
    results = carry_out(kills.attacks_on(scene, configuration, [kill], 12), float("inf"), lambda done: None)
    assert [result.problems for result in results] == [[]] * 3
    assert not results[1].missed


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), [(kind.group, kind.name) for kind in DAMAGE])
def test_damage_ends_in_the_same_digits_or_in_one_line(scene: Scene, group: str, name: str) -> None:
    assert damage.attempt(scene, 1, group, name).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [".metadata os.mkdir", "a tensor's archive eval", "an entry of bytes posix.system"])
def test_no_code_of_a_checkpoint_is_run(scene: Scene, name: str) -> None:
    assert damage.attempt(scene, 1, "checkpoint: a pickle that calls", name).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_an_error_that_passes_is_no_damage(scene: Scene, name: str) -> None:
    assert damage.passing(scene, 5, name).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_a_server_gives_the_text_of_the_disk_or_one_line(scene: Scene, name: str) -> None:
    assert servers.attempt(scene, name).problems == []


def test_every_kind_has_a_name_of_its_own() -> None:
    for names in (
        [(kind.group, kind.name) for kind in damage.kinds(2)],
        [kind.name for kind in servers.kinds()],
        [(fault.call, fault.name) for fault in disks.faults()],
        [configuration.name for configuration in kills.CONFIGURATIONS],
    ):
        assert len(set(names)) == len(names)
    assert len(list(damage.kinds(2))) > 75


def test_the_seed_draws_the_kills_and_covers_every_kind() -> None:
    assert kills.deal(3, 5) == kills.deal(3, 5)
    assert kills.deal(3, 5) != kills.deal(4, 5)
    dealt = [kill for cards in kills.deal(0, 5).values() for kill in cards]
    assert len({kill.kind for kill in dealt}) == 17
    assert {kill.moment for kill in dealt} == {"start", "step", "write"}


def test_what_goes_wrong_or_is_not_reached_is_told() -> None:
    def breaks() -> Ended:
        raise ValueError("out of\nluck")

    def planned(name: str, ended: Ended) -> Attack:
        return Attack("part", "group", name, lambda: ended, kind="a kind")

    well = planned("well", Ended(note="went on"))
    wrong = planned("wrong", Ended(["other digits"]))
    late = planned("late", Ended(missed=True, note="it had ended"))
    results = carry_out([well, wrong, late, Attack("part", "group", "breaks", breaks)], float("inf"), lambda done: None)
    assert [result.right for result in results] == [True, False, False, False]
    assert results[3].problems[0].startswith("ValueError at test_attack.py:")
    assert results[3].problems[0].endswith("out of luck")
    lines = table(results).splitlines()
    assert [line.split()[:4] for line in lines if "group" in line] == [["part", "group", "3", "1"]]
    assert [line.split()[:5] for line in lines if "a kind" in line] == [["part", "a", "kind", "2", "1"]]

    (result,) = carry_out([well], 0.0, lambda done: None)
    assert result.problems == [NOT_REACHED]


@pytest.mark.slow
def test_a_call_that_hangs_or_dies_costs_that_call_alone(tmp_path: Path) -> None:
    child = Child(tmp_path / "log")
    assert child.call(sys.exit, 3, limit=30).problems == ["SystemExit: 3"]
    assert child.call(signal.raise_signal, signal.SIGKILL, limit=30).problems == ["the process died with exit code -9"]
    assert child.call(signal.pause, limit=0.2).problems == ["hung for 0 s"]
    child.close()


def test_a_sample_is_spread_over_the_whole_list() -> None:
    attacks = [Attack("part", "group", str(number), Ended) for number in range(10)]
    assert [attack.name for attack in spread(attacks, 4)] == ["0", "2", "5", "7"]
    assert spread(attacks, 0) == attacks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"parts": "damage,ghosts"}, "parts=ghosts: of damage"),
        ({"parts": "kills", "configs": "sql"}, "configs=sql: a number up to 20, or parts of the names"),
        ({"parts": "kills", "configs": "21"}, "configs=21: a number up to 20"),
        ({"kills": 0}, "kills=0"),
    ],
    ids=["part", "configuration", "count", "kills"],
)
def test_arguments_that_there_are_not(tmp_path: Path, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        attack.main([], out=str(tmp_path / "out"), **arguments)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_script_writes_every_end_and_its_exit_code_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = [Attack("part", "group", "wrong", lambda: Ended(["other digits"], place="there"))]
    monkeypatch.setattr(attack, "plan", lambda *arguments: planned)
    assert attack.main([], out=str(tmp_path / "out")) == ExitCode.FAILED
    assert "part: group: wrong: other digits [there]" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "attack.json").read_text())["attacks"]
    assert (row["name"], row["right"]) == ("wrong", False)
