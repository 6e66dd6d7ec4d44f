"""Known disagreements: they end no search, hide no other one, and must still be there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapter import OlmoArchitectureAdapter
from conformance import profiles, run
from conformance.compare import Gap
from conformance.data import FIXTURES, regressions
from conformance.defects import Known, Showing
from conformance.ledger import ledger
from conformance.meta.test_run import CI, Question
from conformance.records import load
from conformance.run import check_adapter, known_of, load_adapter, run_check, select_checks
from conformance.spec import Case, ModelSpec
from conformance.subjects import SubjectError
from conformance.trial import Trial
from conformance.verdict import ConformanceError, Outcome, Verdict

ANY_RELEASE = ledger()[0].releases.__class__()


def showing(*, kind: str = "dtype", later: bool = False, error: str = "") -> Showing:
    """A defect of bfloat16 models."""
    return Showing(
        promises=("some.question",),
        witness=Case(model=ModelSpec(dtype="bfloat16")),
        case={"dtype": ["bfloat16", "float16"]},
        edit={},
        gap={} if error else {"kind": (kind,)},
        later=later,
        error=(error,) if error else (),
        releases=ANY_RELEASE,
    )


KNOWN = Known((("short", showing()),))


class Short(Question):
    """Of the wrong dtype wherever that is short."""

    def answer(self, case: Case) -> Iterator[Gap]:
        if case.model.dtype in ("bfloat16", "float16"):
            yield Gap("site", "dtype", "another")


def ask(question: Question, known: Known | None = KNOWN) -> Verdict:
    return run_check(question.check, OlmoArchitectureAdapter, on=CI, known=known)


def test_a_search_goes_on_past_what_is_known_and_counts_it() -> None:
    question = Short()
    verdict = ask(question)
    assert (verdict.outcome, verdict.bad) == (Outcome.KNOWN, False)
    short = [case for case in question.asked if case.model.dtype in ("bfloat16", "float16")]
    assert verdict.examples == len(question.asked) == CI.examples + 1
    assert 1 < len(short) < verdict.examples
    assert verdict.known == (("short", len(short)),)
    assert verdict.known_as == f"short in {len(short)}"
    # It keeps the first of them: the witness, which is judged before any case is drawn.
    assert verdict.case == question.asked[0] == KNOWN.showings[0][1].witness
    assert [gap.kind for gap in verdict.gaps] == ["dtype"]


def test_without_the_ledger_it_fails() -> None:
    assert ask(Short(), None).outcome is Outcome.FAILED
    assert ask(Short(), Known()).outcome is Outcome.FAILED


def test_news_in_a_case_that_shows_what_is_known_is_red_and_comes_first() -> None:
    class News(Short):
        def answer(self, case: Case) -> Iterator[Gap]:
            yield from super().answer(case)
            if case.model.dtype == "float16":
                yield Gap("elsewhere", "value", "off")

    verdict = ask(News())
    assert verdict.outcome is Outcome.FAILED
    assert verdict.summary == "elsewhere: value: off"
    assert verdict.case is not None
    assert verdict.case.model.dtype == "float16"
    assert dict(verdict.known)["short"] >= 1


def test_a_trigger_is_needed_and_not_the_gap_alone() -> None:
    class Everywhere(Question):
        def answer(self, case: Case) -> Iterator[Gap]:
            yield Gap("site", "dtype", "another")

    verdict = ask(Everywhere())
    assert verdict.outcome is Outcome.FAILED
    assert verdict.case is not None
    assert verdict.case.model.dtype == "float32"


def test_a_known_defect_that_does_not_show_is_an_error() -> None:
    verdict = ask(Question())
    assert verdict.outcome is Outcome.FAILED
    told = "known, but it does not show any more: fixed upstream? update the ledger"
    assert verdict.summary == f"known defect short: missing: {told}"
    assert verdict.case == KNOWN.showings[0][1].witness


def test_each_way_of_showing_must_be_met() -> None:
    two = Known(
        (*KNOWN.showings, ("short", showing(kind="value")), ("long", showing(kind="count")))
    )
    verdict = ask(Short(), two)
    assert verdict.outcome is Outcome.FAILED
    assert [gap.site for gap in verdict.gaps] == ["known defect short", "known defect long"]


def test_a_known_error_of_a_subject_is_known() -> None:
    class Crash(Question):
        def answer(self, case: Case) -> Iterator[Gap]:
            if case.model.dtype == "bfloat16":
                raise SubjectError("running: RuntimeError: boom 7")
            yield from ()

    crash = Known((("crash", showing(error="boom")),))
    assert ask(Crash(), crash).outcome is Outcome.KNOWN
    verdict = ask(Crash(), Known((("crash", showing(error="bang")),)))
    assert (verdict.outcome, verdict.reason) == (Outcome.ERRORED, "running: RuntimeError: boom 7")


def test_a_witness_of_another_dtype_than_those_drawn_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(profiles.DTYPES_VARIABLE, "float32")
    question = Short()
    assert ask(question).outcome is Outcome.PASSED
    assert {case.model.dtype for case in question.asked} == {"float32"}


def test_only_upstream_s_adapter_has_its_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = select_checks(["hooks.values"])
    upstream = load_adapter("upstream")
    assert known_of(check, upstream).showings
    ours = known_of(check, OlmoArchitectureAdapter)
    assert {name for name, _ in ours.showings} <= {
        defect.id for defect in ledger() if defect.subject == "any"
    }
    monkeypatch.setattr(run, "versions", lambda: {"transformer-lens": "2.0"})
    assert not known_of(check, upstream).showings


def test_check_adapter_knows_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(profiles.PROFILES["ci"], examples=1)
    monkeypatch.setitem(profiles.PROFILES, "ci", few)
    for ledger_too, outcome in ((True, Outcome.KNOWN), (False, Outcome.FAILED)):
        (verdict,) = check_adapter("upstream", checks=["copies.pickle"], ledger=ledger_too)
        assert verdict.outcome is outcome


# --- what once failed


RECORDED = sorted((FIXTURES / "regressions").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_case_is_plain_and_of_a_check_that_there_is(path: Path) -> None:
    record = load(path)
    assert path.name.startswith(record.check)
    (check,) = select_checks([record.check])
    assert record in regressions(record.check)
    assert Trial(check, OlmoArchitectureAdapter).firsts[0] in [
        each.case for each in regressions(record.check)
    ]
    assert json.loads(path.read_text(encoding="utf-8"))["case"]


def test_what_once_failed_is_judged_before_any_case_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (path, *_) = RECORDED
    recorded = load(path)
    monkeypatch.setattr("conformance.trial.regressions", lambda name: [recorded])

    class Once(Question):
        def answer(self, case: Case) -> Iterator[Gap]:
            if case == recorded.case:
                yield Gap("site", "value", "again")

    question = Once()
    with pytest.raises(ConformanceError, match="again"):
        Trial(question.check, OlmoArchitectureAdapter).judge(recorded.case)
    verdict = ask(question, None)
    assert (verdict.outcome, verdict.case, verdict.examples) == (Outcome.FAILED, recorded.case, 1)
