"""What a verdict says, what it puts on file, and that it survives the way between processes."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from conformance.checks import REGISTRY
from conformance.compare import Gap
from conformance.records import loads
from conformance.spec import Case, ModelSpec
from conformance.verdict import ConformanceError, Outcome, Verdict

CASE = Case(model=ModelSpec(clip_qkv=0.5, biases=("q",)))
FIRST = Gap("blocks.0.attn.hook_rot_k", "value", "1 of 2 differ", 0.16, (0, 0))
SAME_SITE = Gap("blocks.0.attn.hook_rot_k", "count", "fired 2 times instead of once")
LATER = Gap("logits", "value", "3 of 4 differ")
LATEST = Gap("loss", "value", "1 of 1 differ")


def verdict(*gaps: Gap, outcome: Outcome = Outcome.FAILED, reason: str = "") -> Verdict:
    return Verdict("hooks.values", "adapter:Some", outcome, CASE, gaps, reason)


@pytest.mark.parametrize(
    ("outcome", "word", "bad"),
    [
        (Outcome.PASSED, "passed", False),
        (Outcome.KNOWN, "known", False),
        (Outcome.FAILED, "failed", True),
        (Outcome.ERRORED, "errored", True),
        (Outcome.NOT_APPLICABLE, "not applicable", False),
    ],
)
def test_outcomes(outcome: Outcome, word: str, bad: bool) -> None:
    assert outcome.value == word
    assert verdict(outcome=outcome).bad is bad
    words = {"passed", "known", "failed", "errored", "not applicable"}
    assert {each.value for each in Outcome} == words


@pytest.mark.parametrize(
    ("gaps", "end"),
    [
        ((FIRST,), ""),
        ((FIRST, LATER), "; 1 later site differs"),
        ((FIRST, LATER, LATEST), "; 2 later sites differ"),
        ((FIRST, LATER, LATER), "; 1 later site differs"),
    ],
)
def test_the_summary_is_the_first_gap_and_how_many_more(gaps: tuple[Gap, ...], end: str) -> None:
    assert verdict(*gaps).summary == f"blocks.0.attn.hook_rot_k: value: 1 of 2 differ{end}"


def test_a_second_gap_at_the_first_site_is_no_later_site() -> None:
    assert verdict(FIRST, SAME_SITE).summary == str(FIRST)
    assert verdict(FIRST, SAME_SITE, LATER).summary == f"{FIRST}; 1 later site differs"


def test_without_a_gap_the_summary_is_the_reason() -> None:
    assert verdict(outcome=Outcome.ERRORED, reason="running: boom").summary == "running: boom"


def test_the_message_ends_with_the_replay_line() -> None:
    replay = "olmo-conformance replay conformance-failures/hooks.values.json"
    assert str(ConformanceError(verdict(FIRST))) == f"{FIRST}; replay: {replay}"
    assert str(ConformanceError(verdict(FIRST), "some/where")).endswith(
        "; replay: olmo-conformance replay some/where/hooks.values.json"
    )


def test_the_record_is_read_again_as_it_was() -> None:
    record = verdict(FIRST, LATER).record({"torch": "2.13.0"})
    again = loads(record.dumps())
    assert again == record
    assert again.case == CASE
    assert (again.check, again.adapter) == ("hooks.values", "adapter:Some")
    assert again.note == f"{FIRST}; 1 later site differs"
    assert again.versions == {"torch": "2.13.0"}
    assert verdict(FIRST).record().versions == {}


def test_known_defects_are_told_with_their_counts() -> None:
    assert replace(verdict(FIRST), known=(("one", 3), ("two", 1))).known_as == "one in 3, two in 1"
    assert verdict(FIRST).known_as == ""


def test_a_verdict_on_no_case_cannot_be_recorded() -> None:
    with pytest.raises(AssertionError, match="on a case"):
        Verdict("hooks.values", "adapter:Some", Outcome.ERRORED).record()


@pytest.mark.parametrize("check", REGISTRY.values(), ids=str)
def test_every_check_s_error_survives_pickling(check: object) -> None:
    error = REGISTRY[str(check)].error(verdict(FIRST), "elsewhere")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ConformanceError)
    assert isinstance(again, AssertionError)  # a failure to pytest, not an error
    assert (again.verdict, again.folder, str(again)) == (error.verdict, "elsewhere", str(error))


def test_no_two_checks_raise_the_same_error() -> None:
    assert len({check.error for check in REGISTRY.values()}) == len(REGISTRY)
