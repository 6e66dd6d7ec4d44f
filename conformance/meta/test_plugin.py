"""pytest's side: options, header, one clear line for bad ones, and a case that replays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import conformance
from conformance import cli, profiles
from conformance.meta.test_run import CASE, Broken
from conformance.records import load
from conformance.run import versions
from conformance.spec import DTYPES
from conformance.suite.properties import judged

pytest_plugins = ["pytester"]

BROKEN = f"{Broken.__module__}:{Broken.__name__}"
VARIABLES = (
    profiles.ADAPTER_VARIABLE,
    profiles.PROFILE_VARIABLE,
    profiles.DTYPES_VARIABLE,
    profiles.LEDGER_VARIABLE,
)

# A property as the suite has it, of one case only: two layers, three tokens.
PROPERTY = """
from conformance.meta.test_run import only
from conformance.suite.properties import as_test

test_values = as_test(only("hooks.values"))
test_names = as_test(only("hooks.names"))
test_clipped = as_test(only("interventions.clipped"))
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def runs(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest with the plugin, in this process; what it leaves in the environment goes again."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*arguments: str) -> pytest.RunResult:
        judged.cache_clear()
        try:
            options = ("-p", "conformance.plugin", "-p", "no:cacheprovider", "-p", "no:xdist")
            return pytester.runpytest_inprocess(*options, *arguments)
        finally:
            judged.cache_clear()

    return run


def header(result: pytest.RunResult) -> list[str]:
    starts = ("conformance of:", "with:", "dtypes:")
    return [line for line in result.outlines if line.startswith(starts)]


def test_the_header_names_subject_versions_dtypes_and_profile(
    pytester: pytest.Pytester, runs: Run
) -> None:
    pytester.makepyfile(test_conformance="def test_nothing(): pass")
    named = ", ".join(f"{name} {versions()[name]}" for name in list(versions())[1:])
    assert header(runs("test_conformance.py")) == [
        "conformance of: adapter:OlmoArchitectureAdapter",
        f"with: {named}",
        f"dtypes: {', '.join(DTYPES)}; profile: ci "
        f"({profiles.PROFILES['ci'].examples} examples a check of weight 1, "
        "the same cases every time)",
    ]
    options = ("--adapter", "upstream", "--dtypes", "float16,float32")
    lines = header(runs("test_conformance.py", *options, "--conformance-profile", "dev"))
    assert lines[0] == "conformance of: upstream"
    drawn = profiles.PROFILES["dev"].examples
    assert lines[2].startswith(f"dtypes: float32, float16; profile: dev ({drawn} examples")
    assert lines[2].endswith("random cases)")


def test_a_run_that_is_about_something_else_is_left_alone(
    pytester: pytest.Pytester, runs: Run
) -> None:
    pytester.makepyfile(test_other="def test_nothing(): pass")
    result = runs("test_other.py")
    assert not header(result)
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--adapter", "nowhere:Adapter"), "adapter='nowhere:Adapter': must be MODULE:CLASS"),
        (("--adapter", "adapter:Nothing"), "adapter has no Nothing"),
        (("--adapter", "json:JSONDecoder"), "must be a subclass of transformer_lens'"),
        (("--adapter", "adapter"), "must be MODULE:CLASS"),
        (("--dtypes", "float8"), "dtypes='float8': must be a comma-separated choice of"),
    ],
)
def test_a_bad_option_is_one_clear_line(runs: Run, arguments: tuple[str, ...], told: str) -> None:
    result = runs(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line.startswith("ERROR: ")
    assert told in line


def test_an_unknown_profile_is_a_usage_error(runs: Run) -> None:
    result = runs("--conformance-profile", "quick")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = "\n".join(result.errlines)
    assert "--conformance-profile: invalid choice: 'quick'" in told
    assert "Traceback" not in told


def test_a_failing_property_leaves_a_case_that_replays(
    pytester: pytest.Pytester, runs: Run
) -> None:
    pytester.makepyfile(test_property=PROPERTY)
    result = runs("--adapter", BROKEN, "-k", "values or names")
    result.assert_outcomes(passed=1, failed=1)
    replay = "olmo-conformance replay conformance-failures/hooks.values.json"
    result.stdout.re_match_lines([rf"E .*blocks\.0\.hook_out: value: .*; replay: {replay}$"])

    path = pytester.path / "conformance-failures" / "hooks.values.json"
    assert list(path.parent.iterdir()) == [path]
    record = load(path)
    assert (record.check, record.adapter, record.case) == ("hooks.values", BROKEN, CASE)
    assert record.versions == versions()
    assert record.note.startswith("blocks.0.hook_out: value: ")
    again = CliRunner().invoke(cli.main, ["replay", str(path)])
    assert again.exit_code == 1
    assert f"\n  {record.note.partition(';')[0]}" in again.stdout


def test_a_case_that_says_nothing_skips_no_other(pytester: pytest.Pytester, runs: Run) -> None:
    pytester.makepyfile(
        test_property="""
        from hypothesis import strategies as st

        from conformance.checks.registry import Check, ConformanceError
        from conformance.compare import Gap
        from conformance.spec import Case, RunSpec
        from conformance.suite.properties import as_test
        from conformance.verdict import NotApplicable


        def short(adapter, case):
            if case.run.seq_len == 1:
                raise NotApplicable("one token says nothing")
            yield Gap("logits", "value", "of two tokens")


        cases = st.sampled_from((1, 2)).map(lambda length: Case(run=RunSpec(seq_len=length)))
        test_short = as_test(Check("made.up", "", short, lambda: cases, 1.0, ConformanceError))
        """
    )
    result = runs("-k", "short")
    result.assert_outcomes(failed=1)


def test_a_property_that_says_nothing_of_an_adapter_is_skipped_with_the_reason(
    pytester: pytest.Pytester, runs: Run
) -> None:
    pytester.makepyfile(test_property=PROPERTY)
    options = ("--adapter", "upstream", "--dtypes", "float32", "-k", "clipped or names", "-rs")
    result = runs(*options)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*the adapter declares no post-clip hooks"])
    assert not (pytester.path / "conformance-failures").exists()


KNOWN = """
from conformance.meta.test_run import only
from conformance.suite.properties import as_test

test_pickle = as_test(only("copies.pickle"))
"""


def test_a_property_that_fails_as_is_known_is_an_expected_failure(
    pytester: pytest.Pytester, runs: Run
) -> None:
    pytester.makepyfile(test_property=KNOWN)
    result = runs("--adapter", "upstream", "-rx")
    result.assert_outcomes(xfailed=1)
    result.stdout.fnmatch_lines(["XFAIL*unpicklable in 2*"])
    assert not (pytester.path / "conformance-failures").exists()
    result = runs("--adapter", "upstream", "--no-ledger", "test_property.py")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*pickle: contract: AttributeError*"])


def test_a_known_defect_that_does_not_show_is_a_failure(
    pytester: pytest.Pytester, runs: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(test_property=KNOWN)
    # As if this project's adapter were upstream's, of which more is known than it shows.
    monkeypatch.setattr("conformance.run.UPSTREAM", "adapter.olmo:OlmoArchitectureAdapter")
    result = runs()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*known defect *: missing: *fixed upstream? update the ledger*"])


WORKER = """
import os
import sys


def test_worker():
    assert os.environ["PYTEST_XDIST_WORKER"]
    assert os.environ["OLMO_CONFORMANCE_DTYPES"] == "float16"
    assert os.environ["OLMO_CONFORMANCE_PROFILE"] == "deep"
    assert "torch" not in sys.modules, "the plugin taxes every run"
"""


def test_the_choices_reach_the_workers_of_xdist(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(WORKER)
    root = str(Path(conformance.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root, prepend=os.pathsep)
    choices = ("--dtypes", "float16", "--conformance-profile", "deep")
    result = pytester.runpytest_subprocess("-p", "conformance.plugin", "-n", "1", *choices)
    result.assert_outcomes(passed=1)
