"""Every promise on the trained model too: weights that mean something, on real text."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

from conformance.checks import REGISTRY, Check, require
from conformance.draws import drawing
from conformance.profiles import chosen
from conformance.run import property_settings
from conformance.spec import Case
from conformance.strategies import on_trained
from conformance.suite.properties import judged
from conformance.verdict import Outcome

ELSEWHERE = {
    "compatibility.value_biases": "the trained model has no biases",
    "patch.no_clip": "the trained model has a clip",
    "compiled.patched": "seconds of compiling, to which weights are nothing",
}


def drawn(check: Check, count: int) -> list[Case]:
    """Cases of a check, without the first draw: that is always the simplest there is."""
    cases: list[Case] = []
    kept = settings(property_settings(check), max_examples=count + 1, phases=[Phase.generate])
    drawing(lambda case: cases.append(case), check.cases(), kept)()
    return cases[1:]


@pytest.mark.parametrize("check", REGISTRY.values(), ids=str)
def test_on_the_trained_model(check: Check) -> None:
    if check.name in ELSEWHERE:
        pytest.skip(ELSEWHERE[check.name])
    count = max(1, chosen().examples // 60)
    verdicts = [require(check, judged(), on_trained(case)) for case in drawn(check, count)]
    reasons = {v.reason for v in verdicts if v.outcome is Outcome.NOT_APPLICABLE}
    if len(reasons) == len(verdicts):
        pytest.skip(", ".join(reasons))
