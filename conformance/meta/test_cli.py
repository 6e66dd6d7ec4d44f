"""The command line: what it prints, what it leaves behind and the code it ends with."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from conformance import cli, profiles, run
from conformance.checks import REGISTRY, Check
from conformance.checks.registry import Adapter
from conformance.compare import Gap
from conformance.data import FIXTURES
from conformance.history import table
from conformance.history.table import Column, History
from conformance.meta.test_run import CASE, Broken, only
from conformance.records import FORMAT_VERSION, Record, load
from conformance.verdict import Outcome, Verdict

BROKEN = f"{Broken.__module__}:{Broken.__name__}"
OURS = "adapter:OlmoArchitectureAdapter"
FEW = ("--examples", "2", "--dtypes", "float32")

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command in a folder of its own; what it leaves in the environment goes again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    variables = (profiles.ADAPTER_VARIABLE, profiles.PROFILE_VARIABLE, profiles.DTYPES_VARIABLE)
    nothing = dict.fromkeys(variables)

    def invoked(*arguments: object, env: dict[str, str] | None = None) -> Result:
        words = [str(argument) for argument in arguments]
        return CliRunner().invoke(cli.main, words, env={**nothing, **(env or {})})

    return invoked


def recorded(path: Path, *, check: str = "hooks.values", adapter: str = BROKEN) -> Path:
    """A case file."""
    record = Record(case=CASE, check=check, adapter=adapter, versions={"torch": "1.0"})
    path.write_text(record.dumps(), encoding="utf-8")
    return path


def one_clear_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert result.stdout == ""
    return line.removeprefix("Error: ")


# --- check


def test_an_adapter_that_conforms(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("check", "forward.logits", "hooks", *FEW)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"conformance of: {OURS}"
    assert lines[1].startswith("with: olmo-conformance ")
    assert "torch " in lines[1]
    assert lines[2] == "dtypes: float32"
    assert lines[3] == "profile: ci (2 examples a check of weight 1, the same cases every time)"
    (row,) = [line for line in lines if "hooks.values" in line]
    assert row.split()[:3] == ["hooks.values", "passed", "3"]
    assert lines[-1].startswith("conforms: 4 passed; 9 cases in ")
    assert result.stderr.splitlines()[1].startswith("[2/4] hooks.values: passed, 3 cases, ")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_does_not_conform_and_its_replay(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "hooks.values", only("hooks.values"))
    result = invoke("check", "hooks.values", "hooks.names", *FEW, "--adapter", BROKEN)
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    (row,) = [at for at, line in enumerate(lines) if line.startswith(" hooks.values")]
    assert lines[row].split()[1] == "failed"
    assert lines[row + 1].strip() == "blocks.0.hook_out: value"
    (failure,) = [line for line in lines if line.startswith("hooks.values: ")]
    assert failure.startswith("hooks.values: blocks.0.hook_out: value: ")
    file = "conformance-failures/hooks.values.json"
    assert failure.endswith(f"; replay: olmo-conformance replay {file}")
    assert lines[-1].startswith("does not conform: 1 failed, 1 passed; ")

    record = load(tmp_path / file)
    assert (record.check, record.adapter) == ("hooks.values", BROKEN)
    assert record.versions == run.versions()
    again = invoke("replay", file)
    assert again.exit_code == 1
    first = again.stdout.splitlines()[2].strip()
    assert failure.startswith(f"hooks.values: {first}")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Verdicts, or exceptions, that the checks come to one after the other, with no model."""
    script: list[object] = []

    def run_check(check: Check, adapter: Adapter, **settings: Any) -> Verdict:
        (answer, *script[:]) = script
        settings["each"]()
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Verdict)
        return answer

    monkeypatch.setattr(run, "run_check", run_check)
    yield script
    assert not script


GAPS = (
    Gap("blocks.10.attn.hook_attn_scores", "value", "[/red] 1 of 2 differ", float("inf"), (0, 1)),
    Gap("logits", "value", "2 of 2 differ", 0.5, (0, 0)),
)
FIVE = (
    *("forward.logits", "forward.loss", "forward.patched", "forward.patched_exact"),
    "forward.patch_warning",
)
PASSED = Verdict("forward.logits", OURS, Outcome.PASSED, CASE, examples=3, seconds=1.25)
FAILED = Verdict("forward.loss", OURS, Outcome.FAILED, CASE, GAPS, examples=12, seconds=3.0)
ERRORED = Verdict(
    "forward.patched",
    OURS,
    Outcome.ERRORED,
    CASE,
    reason="running: [/red] ValueError: " + 50 * "very ",
)
ABSENT = Verdict("forward.patched_exact", OURS, Outcome.NOT_APPLICABLE, CASE, reason="no such mode")
WARNED = Verdict("forward.patch_warning", OURS, Outcome.PASSED, CASE)
ALL = (PASSED, FAILED, ERRORED, ABSENT, WARNED)


def test_the_table_fits_into_80_columns_and_says_everything(
    invoke: Invoke, scripted: list[object]
) -> None:
    scripted += ALL
    result = invoke("check", *FIVE, env={"COLUMNS": "80"})
    assert result.exit_code == 1
    table, _, rest = result.stdout.partition("\nforward.loss: ")
    lines = [line.rstrip() for line in table.splitlines()[4:]]
    assert all(len(line) <= 80 for line in lines)
    for verdict in ALL:
        (row,) = [line for line in lines if line.startswith(f" {verdict.check} ")]
        words = [verdict.outcome.value, str(verdict.examples), f"{verdict.seconds:.1f}"]
        assert row.split() == [verdict.check, *" ".join(words).split()]
    assert "   blocks.10.attn.hook_attn_scores: value" in lines
    assert "   no such mode" in lines
    (at,) = [
        at for at, line in enumerate(lines) if line.startswith("   running: [/red] ValueError: ")
    ]
    assert lines[at + 1].startswith("   very ")
    assert lines[at + 1].endswith(" ...")
    rest = f"forward.loss: {rest}"
    assert f"forward.loss: {GAPS[0]}; 1 later site differs; replay: " in rest
    assert f"forward.patched: {ERRORED.reason}; replay: " in rest
    assert "does not conform: 1 errored, 1 failed, 1 not applicable, 2 passed; 18 cases" in rest


def test_the_case_of_every_bad_verdict_is_left_where_asked(
    invoke: Invoke, scripted: list[object], tmp_path: Path
) -> None:
    scripted += ALL
    result = invoke("check", *FIVE, "--failures", tmp_path / "some" / "where")
    assert {path.name for path in (tmp_path / "some" / "where").iterdir()} == {
        "forward.loss.json",
        "forward.patched.json",
    }
    assert f"replay {tmp_path}/some/where/forward.loss.json" in result.stdout


def test_the_report_as_json(invoke: Invoke, scripted: list[object], tmp_path: Path) -> None:
    scripted += ALL
    invoke("check", *FIVE, "--json", "report.json", "--seed", "7", "--profile", "dev")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["adapter"] == OURS
    assert report["versions"] == run.versions()
    assert (report["profile"]["name"], report["seed"]) == ("dev", 7)
    assert report["dtypes"] == ["float32", "float64", "bfloat16", "float16"]
    assert (report["complete"], report["conforms"]) == (True, False)
    assert [verdict["check"] for verdict in report["verdicts"]] == [each.check for each in ALL]
    failed = report["verdicts"][1]
    assert failed["outcome"] == "failed"
    assert failed["case"]["model"]["num_hidden_layers"] == 2
    assert [(gap["site"], gap["greatest"]) for gap in failed["gaps"]] == [
        ("blocks.10.attn.hook_attn_scores", "inf"),
        ("logits", 0.5),
    ]


def test_what_is_known_conforms_and_is_named(invoke: Invoke, scripted: list[object]) -> None:
    known = Verdict(
        "forward.loss", OURS, Outcome.KNOWN, CASE, GAPS, known=(("one-defect", 3), ("other", 1))
    )
    scripted += [PASSED, known, PASSED, PASSED, PASSED]
    result = invoke("check", *FIVE, "--json", "report.json", env={"COLUMNS": "80"})
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    (row,) = [at for at, line in enumerate(lines) if line.startswith(" forward.loss ")]
    assert lines[row].split()[1] == "known"
    assert lines[row + 1].strip() == "one-defect in 3, other in 1"
    assert lines[-1].startswith("conforms but for what is known: 1 known, 4 passed; ")
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert (report["ledger"], report["conforms"]) == (True, True)
    assert report["verdicts"][1]["known"] == {"one-defect": 3, "other": 1}
    assert not Path("conformance-failures").exists()


def test_the_ledger_may_be_left_out(invoke: Invoke) -> None:
    arguments = ("check", "copies.pickle", "--adapter", "upstream", *FEW)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "unpicklable in " in result.stdout
    result = invoke(*arguments, "--no-ledger")
    assert result.exit_code == 1
    assert "does not conform: 1 failed" in result.stdout


def test_the_choices_reach_the_engine(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def run_check(check: Check, adapter: Adapter, **settings: Any) -> Verdict:
        on, seed = settings["on"], settings["seed"]
        seen.append((on.name, on.examples, seed, os.environ[profiles.DTYPES_VARIABLE]))
        return PASSED

    monkeypatch.setattr(run, "run_check", run_check)
    arguments = ("check", "hooks.names", "--examples", "4", "--seed", "5")
    result = invoke(*arguments, "--profile", "deep", "--dtypes", "float16, float32")
    assert "(4 examples a check of weight 1, the cases of seed 5)" in result.stdout
    by_environment = {profiles.PROFILE_VARIABLE: "dev", profiles.DTYPES_VARIABLE: "bfloat16"}
    result = invoke("check", "hooks.names", env=by_environment)
    drawn = profiles.PROFILES["dev"].examples
    assert f"profile: dev ({drawn} examples a check of weight 1, random cases)" in result.stdout
    assert seen == [("deep", 4, 5, "float32,float16"), ("dev", drawn, None, "bfloat16")]


def test_an_interrupt_loses_nothing(invoke: Invoke, scripted: list[object], tmp_path: Path) -> None:
    scripted += [PASSED, FAILED, KeyboardInterrupt()]
    result = invoke("check", *FIVE, "--json", "report.json")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert " forward.loss " in result.stdout
    assert (tmp_path / "conformance-failures" / "forward.loss.json").exists()
    assert "incomplete, 2 of 5 checks: 1 failed, 1 passed; 15 cases in 4 s" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["complete"], report["conforms"]) == (False, False)
    assert len(report["verdicts"]) == 2


def test_an_interrupt_before_the_first_verdict(invoke: Invoke, scripted: list[object]) -> None:
    scripted += [KeyboardInterrupt()]
    result = invoke("check", *FIVE)
    assert result.exit_code == 130
    assert "incomplete, 0 of 5 checks: nothing judged" in result.stdout


def test_a_fault_of_the_kit_is_not_the_adapter_s(
    invoke: Invoke, scripted: list[object], tmp_path: Path
) -> None:
    scripted += [PASSED, ZeroDivisionError("ours")]
    result = invoke("check", *FIVE, "--json", "report.json")
    assert result.exit_code == 3
    assert "ZeroDivisionError: ours" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == "this is a fault of olmo-conformance, not of the adapter"
    assert len(result.stderr.splitlines()) < 20
    assert " forward.logits " in result.stdout
    assert "incomplete, 1 of 5 checks: 1 passed" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["conforms"] is False


def test_an_adapter_in_the_working_folder_is_found(
    invoke: Invoke, scripted: list[object], tmp_path: Path
) -> None:
    text = "from adapter import OlmoArchitectureAdapter as Mine\n"
    (tmp_path / "lying_here.py").write_text(text, encoding="utf-8")
    scripted += [PASSED]
    assert invoke("check", "forward.loss", "--adapter", "lying_here:Mine").exit_code == 0


# --- bad input to check


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--adapter", "nowhere:Adapter"), "cannot import: No module named 'nowhere'"),
        (("--adapter", "adapter:Nothing"), "adapter has no Nothing"),
        (("--adapter", "json:JSONDecoder"), "must be a subclass of transformer_lens'"),
        (("--adapter", "adapter:bridge"), "must be a subclass of transformer_lens'"),
        (("--adapter", "adapter"), "must be MODULE:CLASS"),
        (("--dtypes", "float32,float8"), "dtypes='float32,float8': must be"),
        (("--dtypes", ""), "dtypes='': must be"),
        (("forward", "backward"), "check='backward': must be one of"),
    ],
)
def test_bad_input_is_one_clear_line(invoke: Invoke, arguments: tuple[str, ...], told: str) -> None:
    assert told in one_clear_line(invoke("check", *arguments))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--profile", "quick"), "'quick' is not one of 'ci', 'dev', 'deep'"),
        (("--examples", "0"), "0 is not in the range x>=1"),
        (("--examples", "few"), "'few' is not a valid integer"),
        (("--seed", "-1"), "-1 is not in the range x>=0"),
        (("--json", "no/such/folder.json"), "there is no folder 'no/such'"),
        (("--json", "."), "is a directory"),
        (("--failures", __file__), "is a file"),
        (("--nothing",), "No such option"),
    ],
)
def test_bad_usage(invoke: Invoke, arguments: tuple[str, ...], told: str) -> None:
    result = invoke("check", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bad_environment_is_bad_usage_too(invoke: Invoke) -> None:
    result = invoke("check", env={profiles.PROFILE_VARIABLE: "quick"})
    assert result.exit_code == 2
    assert "'quick' is not one of" in result.stderr
    assert "float8" in one_clear_line(invoke("check", env={profiles.DTYPES_VARIABLE: "float8"}))


# --- replay


def test_a_replay_prints_every_gap_in_the_order_of_execution(
    invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("replay", recorded(tmp_path / "case.json"))
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == f"{tmp_path}/case.json: hooks.values of {BROKEN}"
    assert lines[1] == f"recorded with torch 1.0, now {run.versions()['torch']}"
    assert lines[2] == "hooks.values: failed"
    sites = [line.split(":")[0].strip() for line in lines[3:-1]]
    assert sites[:3] == ["blocks.0.hook_out", "blocks.1.hook_in", "blocks.1.ln1.hook_in"]
    assert sites[-1] == "logits"
    assert lines[-1].startswith("does not conform: 1 failed; 1 cases")


def test_another_adapter_may_be_judged_on_the_case(invoke: Invoke, tmp_path: Path) -> None:
    path = recorded(tmp_path / "case.json", adapter="gone:Adapter")
    result = invoke("replay", path, "--adapter", OURS)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].endswith(f"hooks.values of {OURS}")
    assert "hooks.values: passed" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("conforms: 1 passed")


def test_a_recorded_adapter_that_is_gone_is_named(invoke: Invoke, tmp_path: Path) -> None:
    path = recorded(tmp_path / "case.json", adapter="gone:Adapter")
    line = one_clear_line(invoke("replay", path))
    assert line.startswith("adapter='gone:Adapter': must be ")
    assert "No module named 'gone'" in line
    assert line.endswith("it was recorded so: name another with --adapter")
    assert "recorded" not in one_clear_line(invoke("replay", path, "--adapter", "gone:Other"))


def test_all_checks_may_judge_the_case(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [run.select_checks([name])[0] for name in ("hooks.values", "hooks.names", "clamp.kink")]
    monkeypatch.setattr(run, "select_checks", lambda names: every[:1] if list(names) else every)
    result = invoke("replay", recorded(tmp_path / "case.json"), "--all", "--adapter", OURS)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()[2:]
    assert lines[:2] == ["hooks.values: passed", "hooks.names: passed"]
    # This case has no clip, which that check's own cases always have.
    assert lines[2].startswith("clamp.kink: not for this case (")
    assert lines[3].startswith("conforms: 2 passed")


def test_a_fault_of_the_kit_on_the_check_s_own_case_is_not_hidden(
    invoke: Invoke, tmp_path: Path
) -> None:
    path = recorded(tmp_path / "case.json", check="clamp.kink", adapter=OURS)
    for arguments in ((path,), (path, "--all")):
        assert invoke("replay", *arguments).exit_code == 3


def changed(path: Path, **fields: object) -> Path:
    """A case file with other fields of the model."""
    body = json.loads(recorded(path).read_text(encoding="utf-8"))
    body["case"]["model"].update(fields)
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_size": 15}, "hidden_size=15: must be divisible by num_attention_heads=2"),
        ({"head_dim": 3}, "head_dim=3: must be even"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=3: must be"),
        ({"clip_qkv": -1.0}, "clip_qkv=-1.0: must be"),
        ({"clip_qkv": float("nan")}, "clip_qkv=nan: must be"),
        ({"dtype": "float8"}, "dtype='float8': must be one of"),
        ({"hidden_act": "nothing"}, "hidden_act='nothing': must be"),
        ({"colour": "red"}, "record.case.model.colour='red': must be absent"),
    ],
)
def test_a_bad_model_is_one_clear_line(
    invoke: Invoke, tmp_path: Path, fields: dict[str, object], told: str
) -> None:
    result = invoke("replay", changed(tmp_path / "case.json", **fields))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {told}")


def test_a_bad_file_is_one_clear_line(invoke: Invoke, tmp_path: Path) -> None:
    path = recorded(tmp_path / "case.json")
    text = path.read_text(encoding="utf-8")

    def replayed(text: str) -> str:
        path.write_text(text, encoding="utf-8")
        return one_clear_line(invoke("replay", path))

    assert "must be complete JSON" in replayed(text[: len(text) // 2])
    newer = f'"format_version": {FORMAT_VERSION + 1}'
    told = replayed(text.replace(f'"format_version": {FORMAT_VERSION}', newer))
    assert told.startswith(f"format_version={FORMAT_VERSION + 1}: must be {FORMAT_VERSION}")
    tokens = '"tokens": [[1, 2, 17]]'
    told = replayed(text.replace('"tokens": []', tokens))
    assert told.startswith("tokens=17: must be a token id in 0..16")
    assert "check='no.such': must be one of" in replayed(text.replace("hooks.values", "no.such"))
    told = one_clear_line(invoke("replay", tmp_path / "missing.json"))
    assert "must be a readable case file" in told
    assert "must be a readable case file" in one_clear_line(invoke("replay", tmp_path))


def test_a_case_may_stand_in_the_ledger_or_in_a_history(invoke: Invoke) -> None:
    result = invoke("replay", f"{FIXTURES}/known_defects.toml#unpicklable")
    assert result.exit_code == 1
    assert "\n  pickle: contract: AttributeError" in result.stdout
    told = one_clear_line(invoke("replay", f"{FIXTURES}/known_defects.toml#nothing"))
    assert told.startswith("defect='nothing': must be one of ['float32-after-rope'")
    told = one_clear_line(
        invoke("replay", f"{FIXTURES}/known_defects.toml#unpicklable/hooks.values")
    )
    assert told == "check='hooks.values': must be one of ['copies.pickle', 'machine.steps']"
    told = one_clear_line(invoke("replay", "missing.toml#unpicklable"))
    assert told.startswith("file='missing.toml': must be a ledger or a history")
    cell = Column({}, checks={"copies.pickle": {"case": {}, "told": "it", "known": {}}})
    text = table.dumps(History(1, {"1.0": cell}, {}))
    Path("history.json").write_text(text, encoding="utf-8")
    assert invoke("replay", "history.json#1.0/copies.pickle").exit_code == 1
    told = one_clear_line(invoke("replay", "history.json#1.0/hooks.values"))
    assert told.startswith("cell='1.0/hooks.values': must be one of ['1.0']")
    Path("history.json").write_text("{}", encoding="utf-8")
    told = one_clear_line(invoke("replay", "history.json#1.0/hooks.values"))
    assert told.startswith("history.json='{}': must be a history as JSON")


# --- around


def test_help_says_what_there_is(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert "Exit codes: 0 conforms, 1 does not" in result.stdout
    result = invoke("check", "--help")
    for option in ("--adapter", "--profile", "--examples", "--dtypes", "--seed", "--no-ledger"):
        assert option in result.stdout
    assert "--all" in invoke("replay", "--help").stdout
