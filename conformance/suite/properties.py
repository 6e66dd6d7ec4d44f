"""Turn a check into a property that pytest (and HypoFuzz) collects."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import example, given

from conformance.checks import Check, require
from conformance.checks.registry import Adapter
from conformance.data import regressions
from conformance.run import property_settings, selected_adapter
from conformance.spec import Case
from conformance.verdict import Outcome


@cache
def judged() -> Adapter:
    """The adapter under test, loaded once a process."""
    return selected_adapter()


def as_test(check: Check) -> Callable[[], None]:
    """A Hypothesis test of one check: recorded cases first, then drawn ones."""

    def test(case: Case) -> None:
        verdict = require(check, judged(), case)
        if verdict.outcome is Outcome.NOT_APPLICABLE:
            pytest.skip(verdict.reason)

    test.__name__ = test.__qualname__ = f"test_{check.name.replace('.', '_')}"
    test.__doc__ = check.promise
    wrapped: Callable[[], None] = given(case=check.cases())(test)
    for record in regressions(check.name):
        wrapped = example(case=record.case)(wrapped)
    return property_settings(check)(wrapped)
