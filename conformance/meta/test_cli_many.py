"""The commands that run for long: mutants, soak and bench, cut short."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from conformance import cli

# Each command hides the module that it is defined in.
mutants_module: Any = import_module("conformance.cli.mutants")
soak_module: Any = import_module("conformance.cli.soak")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.main, words)


def test_mutants_are_killed_and_told(folder: Path) -> None:
    named = ("clamp.in_place", "hooks.extra", "--jobs", "1", "--json", "all.json")
    done = invoke("mutants", *named, "--journal", "kept.jsonl")
    assert done.exit_code == 0, done.output
    assert "2 of 2 mutants killed" in done.output
    report = json.loads((folder / "all.json").read_text())
    assert set(report["mutants"]) == {"clamp.in_place", "hooks.extra"}
    assert all(result["killed"] for (result,) in report["mutants"].values())
    assert "hook_middle" in report["mutants"]["hooks.extra"][0]["gap"]


def test_what_a_journal_has_is_not_got_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def judge(task: tuple[str, int, float]) -> dict[str, object]:
        asked.append(task[1])
        return {"killed": task[1] not in (1, 2), "cases": 60, "seconds": 1.0, "gap": ""}

    monkeypatch.setattr(mutants_module, "judge_mutant", judge)
    words = ("mutants", "hooks.extra", "--jobs", "1", "--journal", "kept.jsonl")
    first = invoke(*words, "--seeds", "3")
    assert (first.exit_code, asked) == (1, [0, 1, 2])
    assert "0 of 1 mutants killed, at least in all seeds but 1 of 3" in first.output
    second = invoke(*words, "--seeds", "20")
    assert (second.exit_code, asked) == (0, list(range(20)))
    assert "1 of 1 mutants" in second.output
    assert "18 of 20 runs killed theirs" in second.output


def test_a_mutant_that_hangs_is_a_survivor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conformance.checks import REGISTRY
    from conformance.mutants import CATALOGUE, kill

    def forever(*_: object) -> None:
        while True:
            pass

    mutant = CATALOGUE["hooks.extra"]
    endless = REGISTRY[mutant.killer].__class__
    fields = {**vars(REGISTRY[mutant.killer]), "run": forever}
    monkeypatch.setitem(REGISTRY, mutant.killer, endless(**fields))
    found = kill(mutant, cap=1.0)
    assert not found.killed
    assert 0.9 < found.seconds < 30


def test_rotating_takes_others_every_day(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[set[str]] = []

    def judge(task: tuple[str, int, float]) -> dict[str, object]:
        taken[-1].add(task[0])
        return {"killed": True, "cases": 1, "seconds": 0.1, "gap": ""}

    monkeypatch.setattr(mutants_module, "judge_mutant", judge)
    for day in (1, 2):

        class Calendar:
            @staticmethod
            def today(day: int = day) -> object:
                return type("Day", (), {"toordinal": lambda self: day})()

        taken.append(set())
        monkeypatch.setattr(mutants_module.datetime, "date", Calendar)
        assert invoke("mutants", "--rotating", "10", "--jobs", "1").exit_code == 0
    assert [len(names) for names in taken] == [10, 10]
    assert not taken[0] & taken[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("mutants", "nobody"), "mutant='nobody'"),
        (("mutants", "hooks.extra", "--rotating", "3"), "rotating=3"),
        (("soak", "nothing"), "check='nothing'"),
        (("soak", "--adapter", "nowhere:X"), "adapter='nowhere:X'"),
        (("mutants", "--journal", "no/folder/x"), "no folder"),
    ],
)
def test_bad_input_is_told_before_any_work(folder: Path, words: tuple[str, ...], told: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 2
    assert told in done.output


def test_soak_counts_and_records(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_module, "CHUNK", 3)
    words = ("soak", "hooks.names", "--cases", "5", "--jobs", "1", "--journal", "kept.jsonl")
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    assert "0 disagreements in 6 cases of 1 checks" in done.output
    from conformance.mutants import CATALOGUE

    (folder / "kept.jsonl").unlink()
    with CATALOGUE["alias.hook_v"].apply():
        red = invoke(*words)
    assert red.exit_code == 1
    assert ", 2 disagreements\n2 disagreements in " in red.output
    assert sorted(path.name for path in (folder / "conformance-failures").iterdir()) == [
        "seed-0",
        "seed-1",
    ]


def test_bench_prints_and_writes(folder: Path) -> None:
    done = invoke("bench", "--examples", "1", "--repeats", "1", "--json", "bench.json")
    assert done.exit_code == 0, done.output
    found = json.loads((folder / "bench.json").read_text())
    assert found["ratio"]["median"] > 1
    assert found["cases"] >= 1
    assert found["facts"] > 50 * found["cases"]
    assert set(found["split"]) == {"draw", "build", "observe", "compare"}
