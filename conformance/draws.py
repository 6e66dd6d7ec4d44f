"""Draws that their seed decides, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import hypothesis
from hypothesis import given, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from hypothesis.strategies import SearchStrategy

from conformance.spec import Case


@contextmanager
def by_seed_alone() -> Iterator[None]:
    """Hypothesis without the constants of whatever is imported.

    One number in twenty is drawn from a pool of constants. To its own, Hypothesis adds those in the
    source of all modules that are imported and are not in ``site-packages``: from one seed come
    other cases in a checkout than from a wheel, and others once another test has been imported.
    """
    with patch.object(providers, "_get_local_constants", Constants):
        providers.CONSTANTS_CACHE.cache.clear()
        try:
            yield
        finally:
            providers.CONSTANTS_CACHE.cache.clear()


def drawing(
    test: Callable[[Case], Any],
    cases: SearchStrategy[Case],
    bound: settings,
    *,
    seed: int | None = None,
) -> Callable[[], None]:
    """A Hypothesis test of drawn cases.

    Args:
        test: What to do with each.
        cases: Where they are drawn from.
        bound: Hypothesis' settings.
        seed: Seed of the draws. If None, the settings say whether they are the same every time;
            those that are change with the source of ``test``.
    """
    if seed is not None:
        bound = settings(bound, derandomize=False)
    drawn: Callable[[], None] = bound(given(case=cases)(test))
    if seed is not None:
        drawn = hypothesis.seed(seed)(drawn)

    @wraps(drawn)
    def alone() -> None:
        with by_seed_alone():
            drawn()

    return alone
