"""Turn a check into a property that pytest (and HypoFuzz) collects."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import pytest

from conformance.checks import Check
from conformance.checks.registry import Adapter
from conformance.draws import drawing
from conformance.profiles import uses_ledger
from conformance.run import known_of, property_settings, selected_adapter
from conformance.spec import Case
from conformance.trial import Trial
from conformance.verdict import Outcome


@cache
def judged() -> Adapter:
    """The adapter under test, loaded once a process."""
    return selected_adapter()


def trial_of(check: Check) -> Trial:
    """A trial of the adapter under test, with what the ledger knows of it, unless turned off."""
    known = known_of(check, judged()) if uses_ledger() else None
    return Trial(check, judged(), known)


def as_test(check: Check) -> Callable[[], None]:
    """A Hypothesis test of one check: recorded cases first, then drawn ones.

    It fails on what is news, is an expected failure where all that failed is known, and fails if
    something known has not shown.
    """
    trial = cache(lambda: trial_of(check))

    def test(case: Case) -> None:
        trial().judge(case)

    test.__name__ = test.__qualname__ = f"test_{check.name.replace('.', '_')}"
    test.__doc__ = check.promise
    drawn = drawing(test, check.cases(), property_settings(check))

    @wraps(drawn)
    def whole() -> None:
        trial.cache_clear()
        for case in trial().firsts:
            test(case)
        drawn()
        verdict = trial().verdict()
        if verdict.outcome is Outcome.KNOWN:
            pytest.xfail(verdict.known_as)
        if verdict.outcome is Outcome.NOT_APPLICABLE:
            pytest.skip(verdict.reason)

    return whole
